"""The stages: what each trains, on which batches, and how it is judged."""

import dataclasses
import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from embedded.clip import TEXT_STAGE, VISION_STAGE, Clip, LossOptions, inverse, unit
from embedded.data import Examples, caption_tokens, clip_batch, end_places, examples
from embedded.training import Budget, Tree, log, save_tree, steps_at_once, train
from embedded.unet import Denoiser
from embedded.vae import Autoencoder
from sdipc_jax.batches import in_batches
from sdipc_jax.checkpoints.keys import flatten
from sdipc_jax.errors import InputError
from sdipc_jax.evaluate.corpus import Corpus
from sdipc_jax.evaluate.metrics import cosines, recall
from sdipc_jax.evaluate.sampling import resized
from sdipc_jax.models import CLIPTextConfig, CLIPVisionConfig, UNetConfig, VAEConfig
from sdipc_jax.prompts.projection import truncated_pinv

Settings = dict[str, Any]

# Of the least squares, beside the features' mean square.
_RIDGE = 1e-2


def clip_of(settings: Settings) -> Clip:
    sizes = settings["clip"]
    text = CLIPTextConfig(vocab_size=settings["vocab_size"], **sizes["text"])
    teachers = sizes.get("teachers", {"count": 0, "channels": []})
    names = tuple(f"teacher_{number}" for number in range(teachers["count"]))
    return Clip(text, CLIPVisionConfig(**sizes["vision"]), tuple(teachers["channels"]), names)


def vae_of(settings: Settings) -> Autoencoder:
    channels = tuple(settings["vae"]["block_out_channels"])
    config = VAEConfig(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        # Few groups: one channel a group would take the colours out of the picture.
        norm_num_groups=2,
        sample_size=64,
    )
    return Autoencoder(config, settings["vae"]["kl_weight"])


def unet_of(settings: Settings) -> Denoiser:
    options: Settings = {
        name: tuple(value) if isinstance(value, list) else value for name, value in settings["unet"]["model"].items()
    }
    config = UNetConfig(cross_attention_dim=settings["clip"]["text"]["hidden_size"], **options)
    return Denoiser(config, clip_of(settings).text.max_position_embeddings, settings["unet"]["blur"])


def train_text(settings: Settings, corpus: Corpus, folder: Path, start: Tree) -> None:
    """The text tower, beside the first of the teachers."""
    clip, options = clip_of(settings), settings["text"]
    data = examples(corpus.where(corpus.split == "train"), folder / "tokenizer")
    captions = caption_tokens(data)

    def batches(step: int) -> Tree:
        rng = np.random.default_rng((settings["seed"], 1, step))
        return clip_batch(data, rng, steps_at_once(8), options["batch"])

    def refresh(params: Tree) -> Tree:
        return {"all_captions": _joint_rows(params, end_states(clip, params, captions))}

    train(
        "text",
        {name: start[name] for name in TEXT_STAGE},
        partial(clip.contrastive_loss, _loss_options(options)),
        {name: getattr(data, name) for name in ("pixels", "may_flip", "label", "style", "plain", "styled")},
        batches,
        Budget(**options["budget"]),
        folder,
        seed=settings["seed"],
        evaluate=lambda params: judge_clip(clip, params, corpus, folder / "tokenizer", count=512, teacher=True),
        refresh=refresh,
    )


def train_teachers(settings: Settings, corpus: Corpus, folder: Path, start: Tree) -> None:
    """The teachers, on the captions as the text tower has them."""
    clip, options = clip_of(settings), settings["teacher"]
    data = examples(corpus.where(corpus.split == "train"), folder / "tokenizer")
    standing = {name: start[name] for name in ("text_model", "text_projection")}

    def captions(tokens: Int[np.ndarray, "N L"]) -> Tree:
        each, of = np.unique(tokens, axis=0, return_inverse=True)
        return {"of": of.ravel()} | _in_both_spaces(clip, standing, each)

    train(
        "teacher",
        {name: start[name] for name in clip.teachers},
        partial(clip.captions_loss, _loss_options(options)),
        {
            "pixels": data.pixels,
            "may_flip": data.may_flip,
            "to_states": inverse(standing),
            "plain": captions(data.plain),
            "styled": captions(data.styled),
        },
        partial(_batch_of_rows, settings, data, options, 5),
        Budget(**options["budget"]),
        folder,
        seed=settings["seed"],
        evaluate=lambda params: judge_clip(
            clip, standing | params, corpus, folder / "tokenizer", count=512, teacher=True
        ),
    )


def train_vision(settings: Settings, corpus: Corpus, folder: Path, start: Tree) -> None:
    """The vision tower, on what the teachers say."""
    if not (folder / "teacher.safetensors").is_file():
        raise InputError(f"{folder / 'teacher.safetensors'}: no teachers there: run --stage teacher first")
    clip, options = clip_of(settings), settings["vision"]
    data = examples(corpus.where(corpus.split == "train"), folder / "tokenizer")
    standing = {name: start[name] for name in ("text_model", "text_projection")}
    train(
        "vision",
        {name: start[name] for name in VISION_STAGE},
        partial(clip.distillation_loss, _loss_options(options)),
        {
            "pixels": data.pixels,
            "may_flip": data.may_flip,
            "to_states": inverse(standing),
            "teachers": {name: start[name] for name in clip.teachers},
        }
        | _in_both_spaces(clip, standing, caption_tokens(data)),
        partial(_batch_of_rows, settings, data, options, 4),
        Budget(**options["budget"]),
        folder,
        seed=settings["seed"],
        evaluate=lambda params: judge_clip(clip, standing | params, corpus, folder / "tokenizer", count=512),
    )


def _batch_of_rows(settings: Settings, data: Examples, options: Settings, stage: int, step: int) -> Tree:
    """Rows of pictures for the next few steps of a stage."""
    rng = np.random.default_rng((settings["seed"], stage, step))
    return {"rows": data.rows(rng, steps_at_once(8), options["batch"])}


def _in_both_spaces(clip: Clip, params: Tree, tokens: Int[np.ndarray, "N L"]) -> Tree:
    """Captions as `states` of their end tokens and as `joint` embeddings, rows of length 1."""
    states = end_states(clip, params, tokens)
    return {"states": unit(states), "joint": _joint_rows(params, states)}


def _loss_options(options: Settings) -> LossOptions:
    return LossOptions(**{field.name: options[field.name] for field in dataclasses.fields(LossOptions)})


def _joint_rows(params: Tree, states: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "N J"]:
    """Text states in the joint space, rows of length 1."""
    return unit(states @ np.asarray(params["text_projection"]["kernel"]))


def fit_projection(settings: Settings, corpus: Corpus, folder: Path, params: Tree) -> None:
    """The visual projection by least squares, so that pictures come out at their captions' text states.

    The contrastive losses look at C-space alone, where directions in which W_t is small count for little; the closed
    form divides by W_t, and there they count as much as any. So the class tokens of the training pictures are
    regressed on the states, and the regression is taken through W_t. Half of what is wanted is the caption that names
    the style: a picture says how it is drawn.
    """
    clip, train = clip_of(settings), corpus.where(corpus.split == "train")
    data = examples(train, folder / "tokenizer")
    plain, styled = (unit(end_states(clip, params, tokens).astype(np.float64)) for tokens in (data.plain, data.styled))
    states = unit(plain + styled)
    features = in_batches(partial(_class_tokens, clip, params), train.pictures).astype(np.float64)
    moments = features.T @ features
    ridge = _RIDGE * np.trace(moments) / len(moments) * np.eye(len(moments))
    to_states = np.linalg.solve(moments + ridge, features.T @ states)
    kernel = to_states @ np.asarray(params["text_projection"]["kernel"], np.float64)
    # As long as it was, for float16's sake; cosines do not see it.
    kernel *= np.linalg.norm(params["visual_projection"]["kernel"]) / np.linalg.norm(kernel)
    fitted = {"visual_projection": {"kernel": kernel.astype(np.float32)}}
    save_tree(folder / "projection.safetensors", {"ema": fitted})
    log(folder, {"stage": "projection"} | judge_clip(clip, params | fitted, corpus, folder / "tokenizer", count=512))


def end_states(clip: Clip, params: Tree, tokens: Int[np.ndarray, "N L"]) -> Float[np.ndarray, "N D"]:
    """The end token's state of each caption."""
    return in_batches(partial(_states_at, clip, {"text_model": params["text_model"]}), tokens, end_places(tokens))


@partial(jax.jit, static_argnums=0)
def _states_at(clip: Clip, params: Tree, tokens: Any, at: Any) -> Any:
    return clip.text_states(params, tokens)[jnp.arange(len(at)), at]


@partial(jax.jit, static_argnums=0)
def _class_tokens(clip: Clip, params: Tree, pixels: Any) -> Any:
    return clip.class_tokens(params, pixels / 255.0)


@partial(jax.jit, static_argnums=(0, 1))
def _joint_features(clip: Clip, teacher: bool, params: Tree, pixels: Any) -> Any:
    return (clip.teacher_embeds if teacher else clip.image_embeds)(params, pixels / 255.0)


def judge_clip(clip: Clip, params: Tree, corpus: Corpus, tokenizer: Path, count: int, *, teacher: bool = False) -> Tree:
    """Caption retrieval in both spaces, on held-out cells, at the cut-off that serves training pictures best."""
    _, first, label = np.unique(corpus.caption, return_index=True, return_inverse=True)
    base = corpus.base[first]
    states = end_states(clip, params, examples(corpus.where(first), tokenizer).plain)
    joint = states @ np.asarray(params["text_projection"]["kernel"])
    rng = np.random.default_rng(0)
    seen = {}
    for split in ("train", "cells"):
        rows = np.flatnonzero(corpus.split == split)
        rows = rng.permutation(rows)[:count]
        pictures = resized(corpus.pictures[rows], clip.vision.image_size, clip.vision.image_size)
        seen[split] = (in_batches(partial(_joint_features, clip, teacher, params), pictures), label[rows])
    values = np.linalg.svd(np.asarray(params["text_projection"]["kernel"]), compute_uv=False)

    def score(share: float) -> float:
        # Cosines alone are best where nothing is kept but what all captions have in common; retrieval alone says
        # little where all cut-offs find about as much.
        inverse = np.asarray(truncated_pinv(params["text_projection"]["kernel"], share * values[0]))
        hidden, truth = seen["train"][0] @ inverse, seen["train"][1]
        return recall(hidden, states, truth, 1) + float(np.mean(cosines(hidden, states[truth])))

    shares = (0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
    cutoff = max(shares, key=score) * float(values[0])
    found, truth = seen["cells"]
    result: Tree = {
        "cutoff": round(cutoff, 4),
        "rank": int((values >= cutoff).sum()),
        "largest": round(float(values[0]), 4),
    }
    nearest = np.argmax(unit(found) @ unit(joint).T, axis=1)
    result["base_recall_1"] = round(float(np.mean(base[nearest] == base[truth])), 4)
    for name, at in (("recall_1", 1), ("recall_5", 5)):
        result[name] = round(recall(found, joint, truth, at), 4)
        for space, limit in (("tspace", cutoff), ("raw", 0.0)):
            hidden = found @ np.asarray(truncated_pinv(params["text_projection"]["kernel"], limit))
            result[f"{space}_{name}"] = round(recall(hidden, states, truth, at), 4)
            result[f"{space}_cosine"] = round(float(np.mean(cosines(hidden, states[truth]))), 4)
    result["scale"] = round(float(np.mean(np.linalg.norm(states, axis=1))), 4)
    return result


def train_vae(settings: Settings, corpus: Corpus, folder: Path, start: Tree, *, decoder_only: bool) -> None:
    """Encoder and decoder, or the decoder alone, for latents that the UNet has been trained on."""
    vae, options = vae_of(settings), settings["vae"]
    data = examples(corpus.where(corpus.split == "train"), None)
    held = corpus.pictures[corpus.split == "cells"][:128]
    trained = ("decoder", "post_quant_conv") if decoder_only else tuple(start)
    fixed = {name: value for name, value in start.items() if name not in trained}

    def loss(params: Tree, data: Tree, batch: Tree, key: Any) -> tuple[Any, Tree]:
        return vae.loss({**fixed, **params}, data, batch, key, augmentation=options["augmentation"])

    @jax.jit
    def error(params: Tree, pixels: Any) -> Any:
        pictures, params = pixels / 255.0, {**fixed, **params}
        again = vae.decode(params, vae.encode(params, pictures)[0])
        return jnp.mean(jnp.square(jnp.clip(again, 0, 1) - pictures), axis=(1, 2, 3))

    def evaluate(params: Tree) -> Tree:
        errors = in_batches(partial(error, params), held, size=32)
        return {"cells_psnr": round(float(np.mean(-10 * np.log10(errors))), 3), "cells_mse": float(np.mean(errors))}

    name = "decoder" if decoder_only else "vae"
    params = {name: start[name] for name in trained}
    train(
        name,
        params,
        loss,
        {"pixels": data.pixels, "may_flip": data.may_flip},
        partial(_batch_of_rows, settings, data, options, 2),
        Budget(**options["budget"]),
        folder,
        seed=settings["seed"],
        evaluate=evaluate,
    )


def train_unet(settings: Settings, corpus: Corpus, folder: Path, start: Tree, vae: Tree, clip: Tree) -> None:
    """The UNet, on stored latents and text states."""
    denoiser, options = unet_of(settings), settings["unet"]
    data = examples(corpus.where(corpus.split == "train"), folder / "tokenizer")
    latents = stored(folder / f"latents-{digest(vae['encoder'])}.npz", partial(encode_all, vae_of(settings), vae, data))
    texts = stored_texts(folder, clip_of(settings), clip, data)
    if "text_layers" in options:
        whole, (tower, clip) = texts, read_by_unet(settings, clip)
        texts = stored_texts(folder, tower, clip, data)
        start = folded(start, texts["states"], whole["states"])
    scale = np.float16(scaling_factor(settings, corpus, vae))
    arrays = {name: latents[name] * scale for name in ("mean", "deviation")} | {
        "states": texts["states"],
        "end": texts["end"],
    }

    def batches(step: int) -> Tree:
        rng = np.random.default_rng((settings["seed"], 3, step))
        rows = data.rows(rng, steps_at_once(8), options["batch"])
        text = np.where(rng.random(rows.shape) < 0.5, texts["styled"][rows], texts["plain"][rows])
        return {
            "rows": rows,
            "mirrored": (data.may_flip[rows] & (rng.random(rows.shape) < 0.5)).astype(int),
            # The first stored text is the empty one.
            "text": np.where(rng.random(rows.shape) < options["drop"], 0, text),
            "end_alone": rng.random(rows.shape) < options["end_alone"],
        }

    train("unet", start, denoiser.loss, arrays, batches, Budget(**options["budget"]), folder, seed=settings["seed"])


def scaling_factor(settings: Settings, corpus: Corpus, vae: Tree) -> float:
    """1 / standard deviation of the latents, over evenly drawn training pictures."""
    pictures = corpus.pictures[corpus.split == "train"]
    model = vae_of(settings)
    mean = jax.jit(lambda pixels: model.encode(vae, pixels / 255.0)[0])
    return 1 / float(np.std(in_batches(mean, pictures[:: max(1, len(pictures) // 1024)], size=64)))


def encode_all(vae: Autoencoder, params: Tree, data: Examples) -> Tree:
    """Mean and deviation of every picture's latents, plain and mirrored: (2, N, h, w, C) in float16."""

    @jax.jit
    def encode(pixels: Any) -> Any:
        mean, log_variance = vae.encode(params, pixels / 255.0)
        return jnp.concatenate([mean, jnp.exp(log_variance / 2)], axis=-1).astype(jnp.float16)

    found = np.stack([in_batches(encode, data.pixels, size=64), in_batches(encode, data.pixels[:, :, ::-1], size=64)])
    mean, deviation = np.split(found, 2, axis=-1)
    return {"mean": mean, "deviation": deviation}


def state_all(clip: Clip, params: Tree, data: Examples) -> Tree:
    """The text states of "" and of every caption, (M, L, D) in float16, where they end, and which each picture has."""
    empty = np.full((1, data.plain.shape[1]), data.plain[0, -1])
    empty[0, 0] = data.plain[0, 0]
    tokens, index = np.unique(np.concatenate([data.plain, data.styled]), axis=0, return_inverse=True)
    states = jax.jit(lambda tokens: clip.text_states(params, tokens).astype(jnp.float16))
    plain, styled = np.split(index.ravel() + 1, 2)
    tokens = np.concatenate([empty, tokens])
    return {"states": in_batches(states, tokens), "end": end_places(tokens), "plain": plain, "styled": styled}


def stored_texts(folder: Path, clip: Clip, params: Tree, data: Examples) -> Tree:
    """What `state_all` gives, kept in a file."""
    return stored(folder / f"texts-{digest(params['text_model'])}.npz", partial(state_all, clip, params, data))


def read_by_unet(settings: Settings, params: Tree) -> tuple[Clip, Tree]:
    """CLIP with the text tower as far as the UNet reads it: `text_layers` layers and the last norm, as in SD 2.x."""
    clip, count = clip_of(settings), settings["unet"]["text_layers"]
    text = params["text_model"]
    layers = {name: layer for name, layer in text["encoder"]["layers"].items() if int(name) < count}
    shorter = dataclasses.replace(clip, text=dataclasses.replace(clip.text, num_hidden_layers=count))
    return shorter, params | {"text_model": text | {"encoder": text["encoder"] | {"layers": layers}}}


def folded(unet: Tree, read: Float[np.ndarray, "M L D"], known: Float[np.ndarray, "M L D"]) -> Tree:
    """A UNet that reads other states than those that it knows: keys and values of what least squares make of them."""
    every = max(1, len(read) // 1000)
    read, known = (states[::every].reshape(-1, states.shape[-1]).astype(np.float64) for states in (read, known))
    moments = read.T @ read
    ridge = 1e-4 * np.trace(moments) / len(moments) * np.eye(len(moments))
    there = np.linalg.solve(moments + ridge, read.T @ known).astype(np.float32)

    def fold(path: tuple[Any, ...], leaf: Any) -> Any:
        names = [part.key for part in path]
        return there @ leaf if "attn2" in names and names[-2] in ("to_k", "to_v") else leaf

    return jax.tree.map_with_path(fold, unet)


def stored(path: Path, compute: Callable[[], Tree]) -> Tree:
    """What `compute` gives, kept in a file."""
    if not path.is_file():
        np.savez(path, **compute())
    with np.load(path) as file:
        return dict(file)


def digest(tree: Tree) -> str:
    """Twelve hexadecimal digits that stand for the values of a tree."""
    joined = hashlib.sha256()
    for _, leaf in sorted(flatten(tree).items()):
        joined.update(np.ascontiguousarray(leaf).tobytes())
    return joined.hexdigest()[:12]

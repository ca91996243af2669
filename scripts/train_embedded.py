"""Trains the checkpoint that ships with the package: CLIP, VAE and UNet, stage by stage.

    python scripts/train_embedded.py configs/embedded.yaml --stage clip --minutes 25
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import yaml

from embedded.clip import Clip, recall, unit
from embedded.data import Examples, clip_batch, end_places, examples, train_tokenizer
from embedded.training import Budget, Tree, log, train
from embedded.vae import Autoencoder
from sdipc_jax.evaluate.corpus import Corpus, load_corpus
from sdipc_jax.models import CLIPTextConfig, CLIPVisionConfig, VAEConfig

Settings = dict[str, Any]


def clip_of(settings: Settings) -> Clip:
    text = CLIPTextConfig(vocab_size=settings["vocab_size"], **settings["clip"]["text"])
    return Clip(text, CLIPVisionConfig(**settings["clip"]["vision"]))


def vae_of(settings: Settings) -> Autoencoder:
    channels = tuple(settings["vae"]["block_out_channels"])
    config = VAEConfig(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        norm_num_groups=8,
        sample_size=64,
    )
    return Autoencoder(config, settings["vae"]["kl_weight"])


def train_clip(settings: Settings, corpus: Corpus, folder: Path) -> None:
    clip = clip_of(settings)
    data = examples(corpus.where(corpus.split == "train"), folder / "tokenizer")
    whole = examples(corpus, folder / "tokenizer")
    captions, first = np.unique(corpus.caption, return_index=True)
    cells = np.flatnonzero(corpus.split == "cells")
    options = settings["clip"]

    def batches(step: int) -> Tree:
        rng = np.random.default_rng((settings["seed"], 1, step))
        if step % 4 == 3:
            return clip_batch(data, rng, options["batch"] // 2, clip.text.max_position_embeddings)
        return clip_batch(data, rng, options["batch"], options["prefix"])

    images = jax.jit(lambda params, x: clip.image_features(params, x / 255.0) @ params["visual_projection"]["kernel"])
    ends = jax.jit(
        lambda params, x, at: clip.text_states(params, x)[jnp.arange(len(at)), at] @ params["text_projection"]["kernel"]
    )

    def evaluate(params: Tree) -> Tree:
        rows = cells[:: max(1, len(cells) // 512)][:512]
        seen = np.concatenate([images(params, corpus.pictures[part]) for part in np.split(rows, len(rows) // 64)])
        tokens = whole.plain[first]
        padded = np.concatenate([tokens, tokens[: -len(tokens) % 128]])
        texts = np.concatenate(
            [ends(params, part, end_places(part)) for part in np.split(padded, len(padded) // 128)]
        )[: len(tokens)]
        return {f"cells_recall_{at}": round(recall(seen, texts, whole.label[rows], at), 4) for at in (1, 5)}

    loss = partial(clip.loss, augmentation=options["augmentation"])
    params = clip.init(jax.random.key(settings["seed"]))
    train("clip", params, loss, batches, Budget(**options["budget"]), folder, seed=settings["seed"], evaluate=evaluate)


def train_vae(settings: Settings, corpus: Corpus, folder: Path) -> None:
    vae, options = vae_of(settings), settings["vae"]
    data = examples(corpus.where(corpus.split == "train"), None)
    held = corpus.pictures[corpus.split == "cells"][:128]

    def batches(step: int) -> Tree:
        rng = np.random.default_rng((settings["seed"], 2, step))
        rows = data.rows(rng, options["batch"])
        return {"pixels": data.pixels[rows], "may_flip": data.may_flip[rows]}

    @jax.jit
    def error(params: Tree, pixels: Any) -> Any:
        pictures = pixels / 255.0
        again = vae.decode(params, vae.encode(params, pictures)[0])
        return jnp.mean(jnp.square(jnp.clip(again, 0, 1) - pictures), axis=(1, 2, 3))

    def evaluate(params: Tree) -> Tree:
        errors = np.concatenate([error(params, part) for part in np.split(held, 4)])
        return {"cells_psnr": round(float(np.mean(-10 * np.log10(errors))), 3), "cells_mse": float(np.mean(errors))}

    loss = partial(vae.loss, augmentation=options["augmentation"])
    params = vae.init(jax.random.key(settings["seed"]))
    train("vae", params, loss, batches, Budget(**options["budget"]), folder, seed=settings["seed"], evaluate=evaluate)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("--stage", choices=("tokenizer", "clip", "vae", "unet", "export"))
    parser.add_argument("--minutes", type=float)
    arguments = parser.parse_args()
    settings = yaml.safe_load(arguments.config.read_text())
    folder = Path(settings["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    corpus = load_corpus(settings["corpus"])
    corpus = corpus.where(corpus.split != "style")
    if not (folder / "tokenizer").is_dir():
        texts = [*np.unique(corpus.caption), *(f"{style} style" for style in np.unique(corpus.style))]
        train_tokenizer(texts, folder / "tokenizer", settings["vocabulary"])
    settings["vocab_size"] = len(yaml.safe_load((folder / "tokenizer/vocab.json").read_text()))
    if arguments.minutes is not None:
        settings[arguments.stage]["budget"]["minutes"] = arguments.minutes
    if arguments.stage == "clip":
        train_clip(settings, corpus, folder)
    if arguments.stage == "vae":
        train_vae(settings, corpus, folder)


if __name__ == "__main__":
    main()

"""Training against PyTorch: diffusers' UNet, transformers' CLIP with prompts put in by hand, torch.optim."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch.nn import functional
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

import sdipc_jax as sdipc
from sdipc_jax import tuning
from sdipc_jax.checkpoints.keys import flatten, to_torch, torch_name
from sdipc_jax.samplers import SchedulerConfig
from tests.compare import relative_error
from tests.parity.oracle import nchw, nhwc
from tests.tiny import SCHEDULER, write_checkpoint

CAPTIONS = ["a cat", "two red dogs", "", "b"]
LENGTH = 3


@pytest.fixture(autouse=True)
def _gradients() -> Iterator[None]:
    with torch.enable_grad():
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        kind: write_checkpoint(
            tmp_path_factory.mktemp(kind) / "tiny",
            scheduler=SchedulerConfig.from_json(SCHEDULER | {"prediction_type": kind}),
        )
        for kind in ("epsilon", "v_prediction")
    }


@pytest.fixture(scope="module")
def batch(folders: dict[str, Path]) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(4)
    bundle = sdipc.load(folders["epsilon"])
    shape = (len(CAPTIONS), 8, 8, 4)
    return {
        "latents": generator.standard_normal(shape, np.float32),
        "deviation": generator.uniform(0.05, 0.2, shape).astype(np.float32),
        "pixels": generator.standard_normal((len(CAPTIONS), 28, 28, 3), np.float32),
        "text": np.asarray(sdipc.text_prompt(bundle, sdipc.tokenize(bundle, CAPTIONS))),
    }


def by_name(params: dict[str, Any]) -> dict[str, np.ndarray]:
    """Trained leaves as PyTorch has them."""
    return {
        f"{path[0]}.{torch_name(path[1:])}": np.array(to_torch(path, np.asarray(leaf)), order="C")
        for path, leaf in flatten(params).items()
    }


class Twin:
    """The method in PyTorch, from a checkpoint's files and the first values of the deep prompts."""

    def __init__(self, folder: Path, state: tuning.State) -> None:
        self.unet = UNet2DConditionModel.from_pretrained(folder / "unet").requires_grad_(False)
        self.clip = CLIPModel.from_pretrained(folder / "clip").requires_grad_(False)
        self.text_encoder = CLIPTextModel.from_pretrained(folder / "text_encoder").requires_grad_(False)
        self.tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
        self.schedule = DDIMScheduler.from_pretrained(folder / "scheduler")
        self.scale = float(state.frozen.projection.scale)
        self.inverse = torch.linalg.pinv(self.clip.text_projection.weight.double(), atol=0.3, rtol=0).float()
        self.trained = {
            f"unet.{name}": parameter.requires_grad_(True)
            for name, parameter in self.unet.named_parameters()
            if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))
        }
        for name, value in by_name(state.params).items():
            if name.startswith("clip.deep_prompts."):
                self.trained[name] = torch.nn.Parameter(torch.tensor(value))

    def features(self, pixels: torch.Tensor, keep: torch.Tensor | None) -> torch.Tensor:
        tower = self.clip.vision_model
        part = {name.removeprefix("clip.deep_prompts."): value for name, value in self.trained.items()}
        prompts = functional.linear(part["embeddings"], part["projection.weight"], part["projection.bias"])
        prompts = prompts.expand(len(pixels), -1, -1, -1)
        prompts = prompts if keep is None else prompts * keep
        x = tower.pre_layrnorm(tower.embeddings(pixels))
        for index, layer in enumerate(tower.encoder.layers):
            patches = x[:, 1:] if index == 0 else x[:, 1 + LENGTH :]
            x = torch.cat([x[:, :1], prompts[:, index], patches], dim=1)
            x = layer(x, None, None)[0]
        epsilon = tower.post_layernorm.eps
        x = functional.layer_norm(x, x.shape[-1:], part["layer_norm.weight"], part["layer_norm.bias"], epsilon)
        return tower.post_layernorm(x[:, 0])

    def states(self, texts: list[str]) -> torch.Tensor:
        tokens = self.tokenizer(texts, padding="max_length", return_tensors="pt").input_ids
        return self.text_encoder(tokens).last_hidden_state

    def loss(self, batch: dict[str, np.ndarray], draws: tuning.Draws, text_weight: float) -> torch.Tensor:
        keep = None if draws.keep is None else torch.tensor(np.asarray(draws.keep))
        joint = self.clip.visual_projection(self.features(nchw(batch["pixels"]), keep))
        state = joint @ self.inverse.T
        vector = self.scale * state / state.norm(dim=-1, keepdim=True)
        start = self.states([""])[:, :1].expand(len(vector), -1, -1)
        length = self.tokenizer.model_max_length
        contexts = [torch.cat([start, vector[:, None].expand(-1, length - 1, -1)], dim=1)]
        weights = [1.0]
        if text_weight:
            contexts.append(self.states(CAPTIONS))
            weights.append(text_weight)
        latents = nchw(batch["latents"]) + nchw(batch["deviation"]) * nchw(np.asarray(draws.latent_noise))
        noise, timesteps = nchw(np.asarray(draws.noise)), torch.tensor(np.asarray(draws.timesteps)).long()
        noisy = self.schedule.add_noise(latents, noise, timesteps)
        target = noise
        if self.schedule.config.prediction_type == "v_prediction":
            target = self.schedule.get_velocity(latents, noise, timesteps)
        losses = [functional.mse_loss(self.unet(noisy, timesteps, context).sample, target) for context in contexts]
        return sum(weight * loss for weight, loss in zip(weights, losses, strict=True))


@pytest.mark.parametrize("prediction_type, optimizer", [("epsilon", "adamw"), ("v_prediction", "sgd")])
def test_one_step(
    folders: dict[str, Path],
    batch: dict[str, np.ndarray],
    prediction_type: str,
    optimizer: str,
    measured: Callable[[str, float], float],
) -> None:
    values: dict[str, Any] = {"adamw": {"learning_rate": 1e-5}, "sgd": {"learning_rate": 1.0, "clip_norm": 0.1}}
    chosen = tuning.TuningSettings(
        optimizer=optimizer, prompt_length=LENGTH, steps=10, text_weight=0.7, **values[optimizer]
    )
    bundle, key = sdipc.load(folders[prediction_type]), jax.random.key(7)
    state = tuning.init(bundle, chosen)
    draws = tuning.draw(key, jnp.arange(len(CAPTIONS)), state.frozen, chosen, batch)
    differentiated = jax.jit(jax.value_and_grad(tuning.loss, has_aux=True), static_argnums=2)
    (found, _), gradients = differentiated(state.params, state.frozen, chosen, batch, draws)

    twin = Twin(folders[prediction_type], state)
    before = by_name(state.params)
    assert before.keys() == twin.trained.keys()
    loss = twin.loss(batch, draws, 0.7)
    loss.backward()
    worst = {"loss": abs(float(found) / float(loss) - 1)}
    worst["gradient"] = max(
        relative_error(leaf, twin.trained[name].grad.numpy()) for name, leaf in by_name(gradients).items()
    )

    torch.nn.utils.clip_grad_norm_(twin.trained.values(), chosen.clip_norm)
    if optimizer == "adamw":
        made: Any = torch.optim.AdamW(twin.trained.values(), lr=1e-5, weight_decay=1e-2)
    else:
        made = torch.optim.SGD(twin.trained.values(), lr=1.0, weight_decay=1e-2)
    made.step()
    after, metrics = tuning.step(state, batch, key)
    worst["step loss"] = abs(float(metrics["loss"]) / float(loss) - 1)
    changes = {}
    for name, leaf in by_name(after.params).items():
        expected = twin.trained[name].detach().numpy() - before[name]
        changes[name] = relative_error(leaf - before[name], expected)
        # No change at all is as wrong as can be.
        assert relative_error(np.zeros_like(expected), expected) == 1
    worst["update"] = max(changes.values())
    for what, error in worst.items():
        measured(f"tuning step, {prediction_type}, {optimizer}: {what}", error)
    assert worst["loss"] <= 1e-5
    assert worst["step loss"] <= 1e-5
    assert worst["gradient"] <= 1e-4
    assert worst["update"] <= (1e-2 if optimizer == "adamw" else 1e-4)


def test_thirty_steps_of_customising(
    folders: dict[str, Path], batch: dict[str, np.ndarray], measured: Callable[[str, float], float]
) -> None:
    """At two hundred times the paper's rate, so that thirty steps change the loss visibly."""
    chosen = tuning.TuningSettings(mode="ct", prompt_length=LENGTH, learning_rate=1e-3)
    bundle = sdipc.load(folders["epsilon"])
    state = tuning.init(bundle, chosen)
    twin, untrained = Twin(folders["epsilon"], state), Twin(folders["epsilon"], state)
    made = torch.optim.AdamW(twin.trained.values(), lr=1e-3, weight_decay=1e-2)
    found, expected, key = [], [], jax.random.key(3)
    for turn in range(30):
        each = jax.random.fold_in(key, turn)
        draws = tuning.draw(each, jnp.arange(len(CAPTIONS)), state.frozen, chosen, batch)
        state, metrics = tuning.step(state, batch, each)
        found.append(float(metrics["loss"]))
        made.zero_grad()
        loss = twin.loss(batch, draws, 0.0)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(twin.trained.values(), 1.0)
        made.step()
        expected.append(float(loss.detach()))
    errors = np.abs(np.array(found) / expected - 1)
    assert measured("thirty steps of ct, loss", errors.max()) <= 1e-4
    assert abs(float(untrained.loss(batch, draws, 0.0)) / expected[-1] - 1) > 1e-2


def test_latents_are_those_of_pytorch(folders: dict[str, Path]) -> None:
    bundle = sdipc.load(folders["epsilon"])
    pictures = [np.random.default_rng(index).integers(0, 256, (32, 32, 3), np.uint8) for index in range(3)]
    cache = tuning.make_cache(bundle, tuning.TuningSettings(mode="ct"), pictures, batch_size=2)
    vae = AutoencoderKL.from_pretrained(folders["epsilon"] / "vae")
    with torch.no_grad():
        encoded = vae.encode(nchw(np.stack(pictures).astype(np.float32) / 127.5 - 1)).latent_dist
    assert relative_error(cache.latents, nhwc(encoded.mean) * vae.config.scaling_factor) <= 1e-5
    assert relative_error(cache.deviation, nhwc(encoded.std) * vae.config.scaling_factor) <= 1e-5


def test_a_tuned_folder_opens_in_pytorch(folders: dict[str, Path], tmp_path: Path) -> None:
    bundle = sdipc.load(folders["epsilon"])
    state = tuning.init(bundle, tuning.TuningSettings(mode="ct", prompt_length=LENGTH))
    state = dataclasses.replace(state, params=jax.tree.map(lambda leaf: leaf + 1, state.params))
    sdipc.save(tuning.apply(bundle, tuning.delta(state)), tmp_path / "tuned")
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "tuned/unet").state_dict()
    for name, value in by_name({"unet": state.params["unet"]}).items():
        np.testing.assert_array_equal(unet[name.removeprefix("unet.")].numpy(), value)
    _, report = CLIPModel.from_pretrained(tmp_path / "tuned/clip", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]

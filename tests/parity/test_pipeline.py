"""Whole pictures against a PyTorch pipeline, and checkpoints that both sides open."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
)
from PIL import Image
from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

import sdipc_jax as sdipc
from tests.tiny import write_checkpoint

SCHEDULERS = {
    "ddim": DDIMScheduler,
    "pndm": PNDMScheduler,
    "euler": EulerDiscreteScheduler,
    "euler-a": EulerAncestralDiscreteScheduler,
    "dpm++2m": DPMSolverMultistepScheduler,
}
PROMPT, NEGATIVE, STEPS, GUIDANCE = "a red cat", "blue", 20, 7.5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture(scope="module")
def bundle(folder: Path) -> sdipc.Bundle:
    return sdipc.load(folder)


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> StableDiffusionPipeline:
    made = StableDiffusionPipeline.from_pretrained(folder)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("picture") / "noise.png"
    pixels = np.random.default_rng(3).integers(0, 256, (9, 7, 3), np.uint8)
    Image.fromarray(pixels).resize((70, 90)).save(path)
    return path


def independent_prompt(folder: Path, pipeline: StableDiffusionPipeline, picture: Path, scale: float) -> torch.Tensor:
    """Eqs. 6 and 7 in PyTorch, from the folder's files alone."""
    clip = CLIPModel.from_pretrained(folder / "clip")
    pixels = CLIPImageProcessor.from_pretrained(folder / "clip")(Image.open(picture), return_tensors="pt").pixel_values
    joint = clip.visual_projection(clip.vision_model(pixels).pooler_output)
    inverse = torch.linalg.pinv(clip.text_projection.weight.double(), atol=0.3, rtol=0).float()
    state = inverse @ joint[0]
    tokens = pipeline.tokenizer("", padding="max_length", return_tensors="pt").input_ids
    start = pipeline.text_encoder(tokens).last_hidden_state[0, :1]
    vector = scale * state / state.norm()
    return torch.cat([start, vector.expand(tokens.shape[1] - 1, -1)])[None]


@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_variations_equal_pytorch(
    folder: Path, bundle: sdipc.Bundle, pipeline: StableDiffusionPipeline, picture: Path, sampler: str,
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    height, width = size
    f = bundle.config.vae.downscale
    latents = np.random.default_rng(1).standard_normal((1, 4, height // f, width // f), np.float32)
    projection = sdipc.closed_form(bundle)
    vectors = sdipc.convert(projection, sdipc.encode_images(bundle, sdipc.read_pictures(bundle, [picture])))
    negative = sdipc.text_prompt(bundle, sdipc.tokenize(bundle, [NEGATIVE]))
    found = sdipc.generate(
        bundle, sdipc.image_prompt(bundle, vectors), negative=negative, seeds=5, latents=latents, steps=STEPS,
        guidance_scale=GUIDANCE, sampler=sampler, height=height, width=width,
    )  # fmt: skip
    pipeline.scheduler = SCHEDULERS[sampler].from_config(pipeline.scheduler.config)
    # PyTorch's stochastic samplers draw the noise that ours draw.
    steps = iter(range(1, 1000))
    key = jax.random.fold_in(jax.random.key(5, impl="threefry2x32"), 0)

    def noise(shape: tuple[int, ...], **_: object) -> torch.Tensor:
        drawn = jax.random.normal(jax.random.fold_in(key, next(steps)), tuple(shape[1:]))
        return torch.tensor(np.asarray(drawn))[None]

    monkeypatch.setattr("diffusers.schedulers.scheduling_euler_ancestral_discrete.randn_tensor", noise)
    expected = pipeline(
        prompt_embeds=independent_prompt(folder, pipeline, picture, float(projection.scale)),
        negative_prompt_embeds=pipeline.text_encoder(
            pipeline.tokenizer(NEGATIVE, padding="max_length", return_tensors="pt").input_ids
        ).last_hidden_state,
        latents=torch.tensor(latents), num_inference_steps=STEPS, guidance_scale=GUIDANCE, height=height, width=width,
        output_type="np",
    ).images  # fmt: skip
    assert expected.std() > 0.1
    difference = np.abs(np.round(np.asarray(found) * 255) - np.round(expected * 255))
    assert difference.mean() <= 0.01
    assert difference.max() <= 1


def test_text_equals_pytorch(bundle: sdipc.Bundle, pipeline: StableDiffusionPipeline) -> None:
    latents = np.random.default_rng(2).standard_normal((2, 4, 8, 8), np.float32)
    context = sdipc.text_prompt(bundle, sdipc.tokenize(bundle, [PROMPT, "b"]))
    found = sdipc.generate(bundle, context, seeds=0, latents=latents, steps=STEPS, guidance_scale=GUIDANCE)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    expected = pipeline(
        [PROMPT, "b"],
        latents=torch.tensor(latents),
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        output_type="np",
    ).images
    difference = np.abs(np.round(np.asarray(found) * 255) - np.round(expected * 255))
    assert difference.mean() <= 0.01
    assert difference.max() <= 1


def test_tokens_equal_transformers(folder: Path, bundle: sdipc.Bundle) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    texts = ["", "A cat, two  dogs!", "x" * 40]
    expected = tokenizer(texts, padding="max_length", truncation=True, return_tensors="np").input_ids
    np.testing.assert_array_equal(sdipc.tokenize(bundle, texts, truncate=True), expected)


def test_pytorch_opens_a_saved_folder_with_a_safety_checker(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "safe", safety=True)
    made = StableDiffusionPipeline.from_pretrained(folder)
    assert made.safety_checker is not None
    assert json.loads((folder / "model_index.json").read_text())["requires_safety_checker"] is True


def test_folders_written_by_pytorch_load(
    folder: Path, bundle: sdipc.Bundle, pipeline: StableDiffusionPipeline, tmp_path: Path
) -> None:
    pipeline.save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    assert list((tmp_path / "sharded/unet").glob("*.index.json"))
    CLIPModel.from_pretrained(folder / "clip").save_pretrained(tmp_path / "sharded/clip")
    CLIPImageProcessor.from_pretrained(folder / "clip").save_pretrained(tmp_path / "sharded/clip")
    again = sdipc.load(tmp_path / "sharded")
    jax.tree.map(np.testing.assert_array_equal, again.params, bundle.params)
    half = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float16)
    half.save_pretrained(tmp_path / "half", variant="fp16")
    assert (tmp_path / "half/unet/diffusion_pytorch_model.fp16.safetensors").is_file()
    rounded = sdipc.load(tmp_path / "half", folder / "clip")
    for found, exact in zip(
        jax.tree.leaves(rounded.params["unet"]), jax.tree.leaves(bundle.params["unet"]), strict=True
    ):
        np.testing.assert_array_equal(found, np.float32(np.float16(exact)))

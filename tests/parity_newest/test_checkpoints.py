"""Checkpoints as the newest diffusers and transformers write them, and the pictures that these make of them."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
import transformers
from diffusers import DDIMScheduler, StableDiffusionPipeline
from transformers import CLIPImageProcessor, CLIPModel, CLIPTextModel

import sdipc_jax as sdipc
from sdipc_jax.checkpoints.bundle import Bundle
from tests import picture_cases
from tests.parity import picture_oracle
from tests.picture_cases import GUIDANCE, STEPS, differences, same
from tests.tiny import write_checkpoint

torch.set_num_threads(1)
TEXTS = ["a red cat", "b"]


def fresh(module: Any) -> Any:
    """The module as one that was never loaded: a loaded one is saved under the names that its file had."""
    made = type(module)(module.config)
    made.load_state_dict(module.state_dict())
    return made


def equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.fixture(scope="module")
def safe_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("safe") / "checkpoint", safety=True)


def test_this_is_the_newest() -> None:
    assert int(transformers.__version__.split(".")[0]) >= 5


@pytest.mark.parametrize("safety", [False, True])
def test_a_pipeline_saved_today_loads(
    safety: bool, tiny_folder: Path, safe_folder: Path, tiny: Bundle, tmp_path: Path
) -> None:
    folder = safe_folder if safety else tiny_folder
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.text_encoder = fresh(pipeline.text_encoder)
    if safety:
        pipeline.safety_checker = fresh(pipeline.safety_checker)
    pipeline.save_pretrained(tmp_path / "saved")
    CLIPModel.from_pretrained(folder / "clip").save_pretrained(tmp_path / "saved/clip")
    CLIPImageProcessor.from_pretrained(folder / "clip").save_pretrained(tmp_path / "saved/clip")
    # What is new about them.
    assert sorted(path.name for path in (tmp_path / "saved/tokenizer").iterdir()) == [
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    expected, found = sdipc.load(folder), sdipc.load(tmp_path / "saved")
    equal(found.params, expected.params)
    np.testing.assert_array_equal(sdipc.tokenize(found, TEXTS), sdipc.tokenize(tiny, TEXTS))


@pytest.mark.parametrize("variant, dtype", [("bf16", "bfloat16"), ("fp16", "float16"), ("non_ema", "float32")])
def test_variants_saved_today_load(variant: str, dtype: str, tiny_folder: Path, tiny: Bundle, tmp_path: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_folder).to(getattr(torch, dtype))
    pipeline.save_pretrained(tmp_path / "saved", variant=variant)
    found = sdipc.load(tmp_path / "saved", tiny_folder / "clip")
    expected = jax.tree.map(lambda leaf: np.float32(leaf.astype(dtype)), tiny.params["unet"])
    equal(found.params["unet"], expected)


@pytest.mark.parametrize("sampler, size", picture_cases.GOLDEN.items())
def test_variations_equal_pytorch(
    sampler: str, size: tuple[int, int], tiny_folder: Path, tiny: Bundle, tmp_path: Path
) -> None:
    picture = picture_cases.write_picture(tmp_path / "clouds.png")
    expected = picture_oracle.variation(
        tiny_folder, picture_oracle.open_pipeline(tiny_folder), picture, sampler, size
    )  # fmt: skip
    found = picture_cases.variation(tiny, picture, sampler, size)
    assert expected.std() > 0.1
    assert same(found, expected), differences(found, expected)


def test_text_equals_pytorch(tiny_folder: Path, tiny: Bundle) -> None:
    pipeline = picture_oracle.open_pipeline(tiny_folder)
    latents = np.random.default_rng(2).standard_normal((2, 4, 8, 8), np.float32)
    context = sdipc.text_prompt(tiny, sdipc.tokenize(tiny, TEXTS))
    found = sdipc.generate(tiny, context, seeds=0, latents=latents, steps=STEPS, guidance_scale=GUIDANCE)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    expected = pipeline(
        TEXTS, latents=torch.tensor(latents), num_inference_steps=STEPS, guidance_scale=GUIDANCE, output_type="np"
    ).images
    assert same(np.asarray(found), expected), differences(np.asarray(found), expected)


@torch.no_grad()
def test_text_states_equal_pytorch(tiny_folder: Path, tiny: Bundle) -> None:
    tokens = sdipc.tokenize(tiny, [*TEXTS, ""])
    model = CLIPTextModel.from_pretrained(tiny_folder / "text_encoder")
    expected = model(torch.tensor(tokens, dtype=torch.long)).last_hidden_state.numpy()
    np.testing.assert_allclose(sdipc.text_prompt(tiny, tokens), expected, rtol=1e-4, atol=1e-4)

"""Whole pictures against a PyTorch pipeline, and checkpoints that both sides open."""

import json
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

import sdipc_jax as sdipc
from tests import picture_cases
from tests.parity import picture_oracle
from tests.picture_cases import GUIDANCE, STEPS, differences, same
from tests.tiny import tiny_bundle, write_checkpoint

TEXTS = ["a red cat", "b"]


@pytest.fixture(scope="module")
def pipeline(tiny_folder: Path) -> StableDiffusionPipeline:
    return picture_oracle.open_pipeline(tiny_folder)


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return picture_cases.write_picture(tmp_path_factory.mktemp("picture") / "clouds.png")


@pytest.mark.parametrize("size", picture_cases.SIZES)
@pytest.mark.parametrize("sampler", picture_cases.SAMPLERS)
def test_variations_equal_pytorch(
    tiny_folder: Path, tiny: sdipc.Bundle, pipeline: StableDiffusionPipeline, picture: Path, sampler: str,
    size: tuple[int, int], measured: Callable[[str, float], float],
) -> None:  # fmt: skip
    expected = picture_oracle.variation(tiny_folder, pipeline, picture, sampler, size)
    assert expected.std() > 0.1
    found = picture_cases.variation(tiny, picture, sampler, size)
    mean, largest = differences(found, expected)
    measured("pictures, mean difference in 1/255", mean)
    measured("pictures, largest difference in 1/255", largest)
    measured("pictures before rounding, largest in 1/255", 255 * float(np.abs(found - expected).max()))
    assert same(found, expected), (mean, largest)


def test_golden_file_is_current(tiny_folder: Path, picture: Path) -> None:
    with np.load(Path(__file__).parents[1] / "golden/pictures.npz") as saved:
        made = picture_oracle.golden_pictures(tiny_folder, picture)
        assert set(saved) == set(made)
        for sampler, expected in made.items():
            assert same(saved[sampler] / 255.0, expected / 255.0), sampler


def test_text_equals_pytorch(tiny: sdipc.Bundle, pipeline: StableDiffusionPipeline) -> None:
    latents = np.random.default_rng(2).standard_normal((2, 4, 8, 8), np.float32)
    context = sdipc.text_prompt(tiny, sdipc.tokenize(tiny, TEXTS))
    found = sdipc.generate(tiny, context, seeds=0, latents=latents, steps=STEPS, guidance_scale=GUIDANCE)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    expected = pipeline(
        TEXTS, latents=torch.tensor(latents), num_inference_steps=STEPS, guidance_scale=GUIDANCE, output_type="np"
    ).images
    assert same(np.asarray(found), expected), differences(np.asarray(found), expected)


def test_safety_checker_blackens_what_pytorch_blackens(tmp_path: Path) -> None:
    texts = list("abcdefgh")
    latents = np.random.default_rng(4).standard_normal((len(texts), 4, 8, 8), np.float32)
    settings = {"num_inference_steps": 4, "guidance_scale": GUIDANCE, "output_type": "np"}
    bundle = tiny_bundle(tmp_path / "parts", safety=True)
    # Only the first concept can be met, and its threshold lies between the pictures' cosines.
    checker = bundle.params["safety_checker"]
    checker["special_care_embeds_weights"] = np.full(3, 2, np.float32)
    checker["concept_embeds_weights"] = np.full(17, 2, np.float32)
    sdipc.save(bundle, tmp_path / "lenient")
    pipeline = picture_oracle.open_pipeline(tmp_path / "lenient")
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    unchecked = pipeline(texts, latents=torch.tensor(latents), **settings)
    assert unchecked.nsfw_content_detected == [False] * len(texts)
    pixels = pipeline.feature_extractor(
        pipeline.image_processor.numpy_to_pil(unchecked.images), return_tensors="pt"
    ).pixel_values
    model = pipeline.safety_checker
    embeddings = model.visual_projection(model.vision_model(pixels)[1])
    cosines = np.sort(torch.nn.functional.cosine_similarity(embeddings, model.concept_embeds[:1]).numpy())
    middle = int(np.argmax(np.diff(cosines)[1:-1])) + 1
    checker["concept_embeds_weights"][0] = cosines[middle : middle + 2].mean()

    sdipc.save(bundle, tmp_path / "strict")
    pipeline = picture_oracle.open_pipeline(tmp_path / "strict")
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    expected = pipeline(texts, latents=torch.tensor(latents), **settings)
    assert 0 < sum(expected.nsfw_content_detected) < len(texts)
    loaded = sdipc.load(tmp_path / "strict")
    context = sdipc.text_prompt(loaded, sdipc.tokenize(loaded, texts))
    found, flagged = sdipc.generate_with_progress(
        loaded, context, lambda done, total: None, seeds=0, latents=latents, steps=4, guidance_scale=GUIDANCE,
        sampler="ddim",
    )  # fmt: skip
    assert flagged.tolist() == expected.nsfw_content_detected
    assert same(np.asarray(found), expected.images)
    assert not np.asarray(found)[np.asarray(flagged)].any()


def test_tokens_equal_transformers(tiny_folder: Path, tiny: sdipc.Bundle) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(tiny_folder / "tokenizer")
    texts = ["", "A cat, two  dogs!", "x" * 40]
    expected = tokenizer(texts, padding="max_length", truncation=True, return_tensors="np").input_ids
    np.testing.assert_array_equal(sdipc.tokenize(tiny, texts, truncate=True), expected)


def test_pytorch_opens_a_saved_folder_with_a_safety_checker(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "safe", safety=True)
    made = StableDiffusionPipeline.from_pretrained(folder)
    assert made.safety_checker is not None
    assert json.loads((folder / "model_index.json").read_text())["requires_safety_checker"] is True


def test_folders_written_by_pytorch_load(
    tiny_folder: Path, tiny: sdipc.Bundle, pipeline: StableDiffusionPipeline, tmp_path: Path
) -> None:
    pipeline.save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    assert list((tmp_path / "sharded/unet").glob("*.index.json"))
    CLIPModel.from_pretrained(tiny_folder / "clip").save_pretrained(tmp_path / "sharded/clip")
    CLIPImageProcessor.from_pretrained(tiny_folder / "clip").save_pretrained(tmp_path / "sharded/clip")
    again = sdipc.load(tmp_path / "sharded")
    jax.tree.map(np.testing.assert_array_equal, again.params, tiny.params)
    half = StableDiffusionPipeline.from_pretrained(tiny_folder, torch_dtype=torch.float16)
    half.save_pretrained(tmp_path / "half", variant="fp16")
    assert (tmp_path / "half/unet/diffusion_pytorch_model.fp16.safetensors").is_file()
    rounded = sdipc.load(tmp_path / "half", tiny_folder / "clip")
    for found, exact in zip(jax.tree.leaves(rounded.params["unet"]), jax.tree.leaves(tiny.params["unet"]), strict=True):
        np.testing.assert_array_equal(found, np.float32(np.float16(exact)))

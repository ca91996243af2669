"""Checkpoints that say how they are sampled, by their scheduler's class or by their name; and the safety checker."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import sdipc_jax as sdipc
from sdipc_jax import cli, parallel
from sdipc_jax.checkpoints.bundle import Config
from sdipc_jax.checkpoints.load import read_config
from sdipc_jax.checkpoints.lora_changes import Lora
from sdipc_jax.errors import InputError
from sdipc_jax.models.unet import TimestepEmbedding
from sdipc_jax.samplers import SAMPLERS, SchedulerConfig, chosen_sampler, default_sampler
from sdipc_jax.sampling.advice import advice
from sdipc_jax.sampling.loop import advance
from sdipc_jax.sampling.request import begin, decide
from sdipc_jax.settings import Defaults, SamplerSettings
from tests.tiny import SCHEDULER, SMALL_UNET, tiny_bundle, write_checkpoint

TRAILING = {"timestep_spacing": "trailing"}
TURBO = {"_class_name": "EulerAncestralDiscreteScheduler", **TRAILING}


def scheduler(fields: dict[str, Any]) -> SchedulerConfig:
    return SchedulerConfig.from_json(SCHEDULER | fields)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return tiny_bundle(tmp_path_factory.mktemp("few") / "tiny").config


@pytest.mark.parametrize(
    "name, default, asked",
    [
        ("DDIMScheduler", "ddim", "ddim"),
        ("PNDMScheduler", "ddim", "pndm"),
        ("FlaxPNDMScheduler", "ddim", "pndm"),
        ("EulerDiscreteScheduler", "euler", "euler"),
        ("EulerAncestralDiscreteScheduler", "euler-a", "euler-a"),
        ("DPMSolverMultistepScheduler", "dpm++2m", "dpm++2m"),
        ("LCMScheduler", "lcm", "lcm"),
        ("TCDScheduler", "tcd", "tcd"),
    ],
)
def test_the_class_of_the_scheduler(name: str, default: str, asked: str) -> None:
    found = scheduler({"_class_name": name})
    assert default_sampler(found) == default
    assert chosen_sampler(found, "checkpoint") == asked
    assert chosen_sampler(found, "euler") == "euler"


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"_class_name": "UniPCMultistepScheduler"}, "_class_name is 'UniPCMultistepScheduler', expected one of DDIM"),
        ({"_class_name": None}, "_class_name is None, expected"),
        ({"_class_name": "DPMSolverMultistepScheduler", "solver_order": 3}, "solver_order is 3, sdipc supports 1 or 2"),
    ],
)
def test_a_class_that_is_not_built_is_replaced_or_refused(fields: dict[str, Any], message: str, config: Config) -> None:
    found = scheduler(fields)
    assert default_sampler(found) == "ddim"
    with pytest.raises(InputError, match=message):
        chosen_sampler(found, "checkpoint")
    with pytest.raises(InputError, match=message):
        decide(dataclasses.replace(config, scheduler=found), SamplerSettings(sampler="checkpoint"))


def test_unknown_samplers_are_refused() -> None:
    with pytest.raises(InputError, match=r"sampler is 'heun', expected one of ddim, .*, tcd, checkpoint"):
        chosen_sampler(scheduler({}), "heun")


def test_what_is_decided_has_a_sampler_of_the_table(config: Config) -> None:
    settings = SamplerSettings(sampler="checkpoint", steps=3, guidance_scale=0.0)
    assert decide(config, settings).sampler == "pndm"
    asks = config.defaults.model_copy(update={"sampler": "checkpoint"})
    assert decide(dataclasses.replace(config, defaults=asks), SamplerSettings()).sampler == "pndm"


@pytest.mark.parametrize(
    "fields, model, values, told",
    [
        ({}, "sd15", {}, None),
        (TURBO, "folder", {}, "guidance_scale is 7.5, but to judge by its scheduler_config.json this model was made"),
        (TURBO, "folder", {"guidance_scale": 1.0}, None),
        (
            TURBO | {"_class_name": "EulerDiscreteScheduler", "prediction_type": "sample"},
            "folder",
            {},
            "guidance_scale",
        ),
        # Trained to zero terminal SNR, which takes trailing timesteps, and as many steps as any other.
        (TURBO | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}, "folder", {}, None),
        ({"_class_name": "DDIMScheduler", **TRAILING}, "folder", {}, None),
        ({}, "stabilityai/sd-turbo@main", {}, "to judge by the name sd-turbo@main this"),
        ({}, "models/SDXL-Lightning_4step.safetensors", {}, "to judge by the name"),
        ({}, "turbocharged", {}, None),
        ({}, "turbo/sd15", {}, None),
        ({"_class_name": "LCMScheduler"}, "folder", {"guidance_scale": 1.5}, None),
        ({"_class_name": "LCMScheduler"}, "folder", {"guidance_scale": 2.5}, "guidance_scale is 2.5"),
        ({"_class_name": "HeunDiscreteScheduler"}, "sd15", {}, "scheduler is not built .*HeunDiscreteScheduler.*ddim"),
        ({"_class_name": "HeunDiscreteScheduler"}, "sd15", {"sampler": "euler"}, None),
    ],
)
def test_advice(fields: dict[str, Any], model: str, values: dict[str, Any], told: str | None, config: Config) -> None:
    found = scheduler(fields)
    defaults = config.defaults.model_copy(update={"sampler": default_sampler(found)})
    changed = dataclasses.replace(config, scheduler=found, defaults=defaults)
    settings = SamplerSettings(model=model, **values)
    lines = list(advice(changed, settings, decide(changed, settings)))
    if told is None:
        assert not lines
    else:
        (line,) = lines
        assert "\n" not in line
        assert re.search(told, line), line


def test_advice_by_metadata(config: Config, tmp_path: Path) -> None:
    """Where neither a scheduler nor a name says it: as a single file, or the LoRA that is fused."""
    plain = {"modelspec.title": "Everyday", "modelspec.description": "turbo"}
    for name, metadata, told in (
        (
            "a",
            {"modelspec.architecture": "stable-diffusion-xl-turbo-v1"},
            r"modelspec.architecture\) stable-diffusion-x",
        ),
        ("b", plain | {"ss_output_name": "my-lcm-lora"}, r"its metadata \(ss_output_name\) my-lcm-lora this model was"),
        ("c", plain, None),
    ):
        file = tmp_path / f"{name}.safetensors"
        save_file({"x": np.zeros(1, np.float32)}, file, metadata)
        model = dataclasses.replace(config, folder=str(file))
        lora = dataclasses.replace(config, loras=(Lora(file, 1.0, {}),))
        for changed in (model, lora):
            settings = SamplerSettings(model="folder")
            lines = list(advice(changed, settings, decide(changed, settings)))
            assert [bool(re.search(told, line)) for line in lines] == [True] if told else not lines


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with LCM's scheduler, a safety checker, and no defaults of its own but its size."""
    folder = tmp_path_factory.mktemp("checkpoints") / "few"
    write_checkpoint(folder, safety=True, scheduler=scheduler({"_class_name": "LCMScheduler"}))
    (folder / "sdipc.json").write_text(json.dumps({"height": 32, "width": 32}))
    return folder


def test_a_checkpoint_brings_its_sampler(few: Path) -> None:
    assert read_config(few).defaults.sampler == "lcm"
    (few / "sdipc.json").write_text(json.dumps({"height": 32, "width": 32, "sampler": "tcd", "steps": 2}))
    assert read_config(few).defaults.sampler == "tcd"
    (few / "sdipc.json").write_text(json.dumps({"height": 32, "width": 32}))


def test_safety(few: Path, tmp_path: Path) -> None:
    assert read_config(few).safety is not None
    assert read_config(few, safety="on").safety is not None
    without = read_config(few, safety="off")
    assert without.safety is None
    assert "safety_checker" not in without.abstract_params()
    with pytest.raises(InputError, match="safety is 'of', expected one of auto, on, off"):
        read_config(few, safety="of")  # type: ignore[arg-type]
    unsafe = write_checkpoint(tmp_path / "unsafe")
    assert read_config(unsafe).safety is None
    with pytest.raises(InputError, match="no safety_checker/ folder, expected one with --safety on"):
        read_config(unsafe, safety="on")
    index = json.loads((few / "model_index.json").read_text())
    (unsafe / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"names a safety_checker, but there is no such folder: .*--safety off"):
        read_config(unsafe)
    assert read_config(unsafe, safety="off").safety is None


def test_the_command(few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    calls = []

    def generate(mesh: Any, bundle: sdipc.Bundle, context: Any, report: Any, **settings: Any) -> tuple[Any, Any]:
        calls.append((bundle, settings))
        return np.zeros((len(context), 32, 32, 3), np.float32), np.zeros(len(context), bool)

    monkeypatch.setattr(parallel, "generate", generate)
    common = ["text", "a", "--model", str(few), "--num-images", "1", "--mesh", "data=1"]
    options = ["--steps", "4", "--guidance-scale", "0", "--safety", "off", "--output-dir", str(tmp_path / "off")]
    assert cli.main([*common, *options]) == 0
    (record,) = (json.loads(line) for line in (tmp_path / "off/manifest.jsonl").read_text().splitlines())
    asked = {name: record["settings"][name] for name in ("steps", "guidance_scale", "sampler", "safety")}
    assert asked == {"steps": 4, "guidance_scale": 0.0, "sampler": "lcm", "safety": "off"}
    assert not any(name.startswith("safety_checker") for name in record["checkpoint"])
    bundle, settings = calls.pop()
    assert "safety_checker" not in bundle.params
    assert settings["sampler"] == "lcm"
    capsys.readouterr()
    assert cli.main([*common, "--sampler", "checkpoint", "--output-dir", str(tmp_path / "on")]) == 0
    (record,) = (json.loads(line) for line in (tmp_path / "on/manifest.jsonl").read_text().splitlines())
    assert (record["settings"]["safety"], record["settings"]["sampler"]) == ("on", "lcm")
    assert "without guidance: try --steps 4 --guidance-scale 0" in capsys.readouterr().out


def test_a_full_lcm_is_told_the_guidance_scale(tmp_path: Path) -> None:
    """It runs on the prompts alone, and a scale of 1 or less is another one too."""
    unet = dataclasses.replace(SMALL_UNET, time_cond_proj_dim=6)
    defaults = Defaults(steps=1, height=8, width=8, sampler="lcm")
    bundle = tiny_bundle(tmp_path / "tiny", unet=unet, defaults=defaults)
    assert bundle.params["unet"]["time_embedding"]["cond_proj"]["kernel"].shape == (6, 16)
    context = jnp.asarray(np.random.default_rng(0).standard_normal((3, 20, 24), np.float32))
    scales = np.float32([8.5, 1.0, 0.5])
    request, state = begin(bundle, context, seeds=0, guidance_scale=scales)
    assert request.context.shape == context.shape
    noise = state[0]
    found = np.asarray(advance(bundle, request, state, 0, 1)[0])
    params = {"params": bundle.params["unet"]}
    output = bundle.config.unet_model.apply(params, noise, jnp.full(3, 999.0), context, guidance_scale=scales)
    expected, _ = SAMPLERS["lcm"].step(request.schedule, 0, noise, output, (), jnp.zeros_like(noise), 0.0)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    settings = SamplerSettings(model="lcm-dreamshaper")
    assert not list(advice(bundle.config, settings, decide(bundle.config, settings)))


def test_the_guidance_embedding_by_hand() -> None:
    x, condition = np.ones((1, 2), np.float32), np.float32([[0.5, -1.0, 2.0]])
    network = TimestepEmbedding(2)
    kernel = np.float32([[1, 0], [0, 1], [1, 1]])
    dense = {"kernel": np.eye(2, dtype=np.float32), "bias": np.zeros(2, np.float32)}
    params = {"linear_1": dense, "linear_2": dense, "cond_proj": {"kernel": kernel}}
    summed = x + condition @ kernel
    np.testing.assert_allclose(
        network.apply({"params": params}, x, condition), summed / (1 + np.exp(-summed)), rtol=1e-6
    )

"""Checkpoint folders: what is loaded, what is refused before it can do harm, what is saved."""

import contextlib
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from transformers import CLIPTokenizer

import sdipc_jax as sdipc
from sdipc_jax.checkpoints.headers import all_finite
from sdipc_jax.checkpoints.load import load_weights, read_config
from sdipc_jax.checkpoints.tensors import load_tree, read_header, weight_files
from sdipc_jax.checkpoints.tokenizer import load_tokenizer
from sdipc_jax.errors import InputError
from tests.tiny import write_checkpoint

UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint to spoil."""
    return shutil.copytree(tiny_folder, tmp_path / "checkpoint")


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def refuse(action: Callable[..., object], *arguments: Any, words: str) -> None:
    with pytest.raises(InputError) as caught:
        action(*arguments)
    assert words in str(caught.value)
    assert str(caught.value).isprintable()


def equal(found: Any, expected: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


# One component: a tree of two leaves.

TREE = {
    "conv": {"kernel": jax.ShapeDtypeStruct((3, 3, 2, 4), jnp.float32)},
    "norm": {"scale": jax.ShapeDtypeStruct((5,), jnp.float32)},
}


def tensors() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    shapes = {"conv.weight": (4, 2, 3, 3), "norm.weight": (5,)}
    return {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def load(folder: Path) -> dict[str, Any]:
    return load_tree(folder, "unet", TREE)


def test_one_file(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "model.safetensors")
    found = load(tmp_path)
    np.testing.assert_array_equal(found["conv"]["kernel"], tensors()["conv.weight"].transpose(2, 3, 1, 0))
    np.testing.assert_array_equal(found["norm"]["scale"], tensors()["norm.weight"])
    assert isinstance(found["norm"]["scale"], jax.Array)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"conv.weight": None}, "conv.weight is missing"),
        ({"more.weight": np.zeros(3, np.float32)}, "more.weight is extra"),
        ({"norm.weight": np.zeros(6, np.float32)}, "norm.weight has shape [6], expected [5]"),
        ({"conv.weight": np.zeros((3, 3, 2, 4), np.float32)}, "conv.weight has shape [3, 3, 2, 4], expected [4, 2, 3"),
        ({"norm.weight": np.array([1, 2, np.nan, 4, 5], np.float32)}, "norm.weight holds NaN or infinity"),
        ({"norm.weight": np.array([1, 2, -np.inf, 4, 5], np.float16)}, "norm.weight holds NaN or infinity"),
        ({"norm.weight": np.zeros(5, np.int32)}, "norm.weight has dtype I32, expected one of F64, F32, F16, BF16"),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    changed = {name: array for name, array in (tensors() | changes).items() if array is not None}
    save_file(changed, tmp_path / "model.safetensors")
    refuse(load, tmp_path, words=words)


def test_all_problems_are_counted(tmp_path: Path) -> None:
    save_file({f"x{n}": np.zeros(1, np.float32) for n in range(9)}, tmp_path / "model.safetensors")
    refuse(load, tmp_path, words="conv.weight is missing; norm.weight is missing; x0 is extra")
    refuse(load, tmp_path, words="and 6 more")


def test_shapes_are_checked_before_anything_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file(tensors() | {"norm.weight": np.zeros(6, np.float32)}, tmp_path / "model.safetensors")

    def read(*_: Any, **__: Any) -> None:
        raise AssertionError("values were read")

    monkeypatch.setattr(np, "fromfile", read)
    refuse(load, tmp_path, words="norm.weight has shape")


def test_variants(tmp_path: Path) -> None:
    half = {name: array.astype(np.float16) for name, array in tensors().items()}
    save_file(half, tmp_path / "diffusion_pytorch_model.fp16.safetensors")
    found = load(tmp_path)
    assert found["norm"]["scale"].dtype == jnp.float32
    np.testing.assert_array_equal(found["norm"]["scale"], half["norm.weight"].astype(np.float32))
    # Full precision goes first.
    save_file(tensors(), tmp_path / "diffusion_pytorch_model.safetensors")
    np.testing.assert_array_equal(load(tmp_path)["norm"]["scale"], tensors()["norm.weight"])


@pytest.mark.parametrize("variant", ["fp32", "fp16", "bf16", "non_ema"])
def test_any_variant_that_is_alone(tmp_path: Path, variant: str) -> None:
    save_file(tensors(), tmp_path / f"diffusion_pytorch_model.{variant}.safetensors")
    np.testing.assert_array_equal(load(tmp_path)["norm"]["scale"], tensors()["norm.weight"])


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 3438167540\n"


@pytest.mark.parametrize("file", [UNET, "tokenizer/vocab.json", "unet/config.json", "vae/diffusion_pytorch_model."])
def test_pointers_of_git_lfs_are_named(folder: Path, file: str) -> None:
    path = folder / (f"{file}safetensors" if file.endswith(".") else file)
    path.write_text(POINTER)
    refuse(lambda: sdipc.load(folder), words=f"{path}: found a git-lfs pointer, expected the file that it points to")
    refuse(lambda: sdipc.load(folder), words=f"run `git -C {path.parent} lfs pull`")


def test_names_of_transformers_5(folder: Path, tmp_path: Path) -> None:
    """It leaves the outer module's name away, and writes tokenizer.json alone."""
    write_checkpoint(tmp_path / "safe", safety=True)
    expected = sdipc.load(tmp_path / "safe")
    for part, old, new in (
        ("text_encoder", "text_model.", ""),
        ("safety_checker", "vision_model.vision_model.", "vision_model."),
    ):
        file = tmp_path / "safe" / part / "model.safetensors"
        stored = load_file(file)
        assert any(name.startswith(old) for name in stored)
        save_file({name.replace(old, new): array for name, array in stored.items()}, file)
    tokenizer = tmp_path / "safe/tokenizer"
    saved = CLIPTokenizer.from_pretrained(tokenizer)
    shutil.rmtree(tokenizer)
    saved.save_pretrained(tokenizer)
    assert {path.name for path in tokenizer.iterdir()} == {"tokenizer.json", "tokenizer_config.json"}
    change(tmp_path / "safe/model_index.json", feature_extractor=["transformers", "CLIPImageProcessorPil"])
    load_tokenizer.cache_clear()
    found = sdipc.load(tmp_path / "safe")
    equal(found.params, expected.params)
    assert found.config.tokens == expected.config.tokens


def shards(folder: Path, index: str = "model.safetensors.index.json", **entries: Any) -> Path:
    for number, (name, array) in enumerate(tensors().items(), start=1):
        save_file({name: array}, folder / f"model-{number}.safetensors")
    weight_map = {"conv.weight": "model-1.safetensors", "norm.weight": "model-2.safetensors"} | entries
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.mark.parametrize(
    "index",
    [
        *("model.safetensors.index.json", "diffusion_pytorch_model.safetensors.index.json"),
        *("model.safetensors.index.fp16.json", "model.fp16.safetensors.index.json"),
    ],
)
def test_sharded(tmp_path: Path, index: str) -> None:
    found = load(shards(tmp_path, index))
    np.testing.assert_array_equal(found["conv"]["kernel"], tensors()["conv.weight"].transpose(2, 3, 1, 0))
    np.testing.assert_array_equal(found["norm"]["scale"], tensors()["norm.weight"])


@pytest.mark.parametrize(
    "entries, words",
    [
        ({"norm.weight": "model-3.safetensors"}, "names model-3.safetensors, which is not there"),
        (
            {"norm.weight": "../model-2.safetensors"},
            "names '../model-2.safetensors', expected files of the same folder",
        ),
        ({"norm.weight": "/etc/passwd"}, "names '/etc/passwd', expected files of the same folder"),
        ({"norm.weight": ".."}, "names .., which is not there"),
        ({"norm.weight": 3}, "not a safetensors index"),
        ({"norm.weight": "model-1.safetensors"}, "norm.weight is missing"),
    ],
)
def test_bad_indexes(tmp_path: Path, entries: dict[str, Any], words: str) -> None:
    folder = tmp_path / "unet"
    folder.mkdir()
    save_file(tensors(), tmp_path / "model-2.safetensors")
    refuse(load, shards(folder, **entries), words=words)


@pytest.mark.parametrize("text", ["[]", "{}", '{"weight_map": []}', "not json", '{"weight_map": {"a": ["b"]}}'])
def test_no_index(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    refuse(load, tmp_path, words="not a safetensors index, expected an object with 'weight_map'")


def test_tensor_in_two_shards(tmp_path: Path) -> None:
    shards(tmp_path)
    save_file(tensors(), tmp_path / "model-2.safetensors")
    refuse(load, tmp_path, words="conv.weight is there twice")


def header(entries: str, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(entries)) + entries.encode() + data


ENTRY = '"{}":{{"dtype":"F32","shape":[1],"data_offsets":[{},{}]}}'
ONE, TWO = ENTRY.format("a", 0, 4), ENTRY.format("b", 2, 6)


@pytest.mark.parametrize(
    "data, words",
    [
        (b"", ""),
        (b"\x08\0\0", ""),
        (struct.pack("<Q", 2**40) + b"{}", "its header would be 1099511627776 bytes long"),
        (header("{" + ONE + "}", bytes(3)), ""),
        (header("{" + ONE + "}", bytes(5)), ""),
        (header("{" + ONE + "," + TWO + "}", bytes(6)), ""),
        (header("{" + ONE + "," + ENTRY.format("a", 4, 8) + "}", bytes(8)), "a is in its header twice"),
        (header('{"a":{"dtype":"F32","shape":[1],"shape":[1],"data_offsets":[0,4]}}', bytes(4)), "shape is in its"),
        (header(ONE.replace("F32", "F31").join("{}"), bytes(4)), ""),
        (header(ONE.replace("[1]", "[4611686018427387905]").join("{}"), bytes(4)), ""),
        (header(ONE.replace("[1]", "[-1]").join("{}"), bytes(4)), ""),
        (header("[1]"), ""),
        (header("[" * 100_000), ""),
        (header('{"a":'), ""),
    ],
    ids=range(14),
)
def test_damaged_files(tmp_path: Path, data: bytes, words: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(data)
    refuse(load, tmp_path, words="found no whole safetensors file")
    refuse(load, tmp_path, words=words)


def test_every_cut_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(tensors(), path)
    data = path.read_bytes()
    for length in range(0, len(data), 7):
        path.write_bytes(data[:length])
        refuse(load, tmp_path, words="found no whole safetensors file")


def test_hundreds_of_thousands_of_tensors_are_not_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = '"layer.{}.weight":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'
    (tmp_path / "model.safetensors").write_bytes(
        header("{" + ",".join(entry.format(number) for number in range(300_000)) + "}")
    )

    def parse(*_: Any, **__: Any) -> None:
        raise AssertionError("the header was parsed")

    monkeypatch.setattr(json, "loads", parse)
    refuse(load, tmp_path, words="bytes long")


class Canary:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.ckpt", "weights.pt", "model.safetensors"])
def test_pickles_are_not_opened(tmp_path: Path, name: str) -> None:
    canary, folder = tmp_path / "canary", tmp_path / "unet"
    folder.mkdir()
    (folder / name).write_bytes(pickle.dumps(Canary(canary)))
    found = f"found {name}, expected safetensors" if not name.endswith("safetensors") else "no whole safetensors file"
    refuse(load, folder, words=found)
    found = "no whole safetensors file" if name.endswith("safetensors") else f"found a {Path(name).suffix} file"
    refuse(read_config, folder / name, words=found)
    assert not canary.exists()
    pickle.loads((folder / name).read_bytes())
    assert canary.exists()


def test_no_weights(tmp_path: Path) -> None:
    refuse(weight_files, tmp_path, words="found no weights")
    refuse(weight_files, tmp_path / "missing", words="found no weights")


# Whole folders.


def test_loaded_weights_are_the_files(tiny_folder: Path, tiny: sdipc.Bundle) -> None:
    stored = load_file(tiny_folder / UNET)
    name = "down_blocks.0.resnets.0.conv1.weight"
    found = tiny.params["unet"]["down_blocks_0"]["resnets_0"]["conv1"]["kernel"]
    np.testing.assert_array_equal(found, stored[name].transpose(2, 3, 1, 0))
    assert len(jax.tree.leaves(tiny.params["unet"])) == len(stored)


def test_saved_and_loaded_again_to_the_bit(tiny: sdipc.Bundle, tmp_path: Path) -> None:
    sdipc.save(tiny, tmp_path / "again")
    again = sdipc.load(tmp_path / "again")
    equal(again.params, tiny.params)
    assert again.config.unet == tiny.config.unet
    assert again.config.scheduler == tiny.config.scheduler
    assert again.config.defaults == tiny.config.defaults
    assert again.config.tokens == tiny.config.tokens
    assert again.config.vision_side.preprocessing == tiny.config.vision_side.preprocessing
    assert os.listdir(tmp_path) == ["again"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_saved_smaller(tiny: sdipc.Bundle, tmp_path: Path, dtype: str) -> None:
    sdipc.save(tiny, tmp_path / "half", dtype=dtype)
    with safe_open(tmp_path / "half" / UNET, framework="numpy") as opened:
        names = {"float16": "F16", "bfloat16": "BF16"}
        assert {opened.get_slice(name).get_dtype() for name in opened.keys()} == {names[dtype]}  # noqa: SIM118
    for component in ("unet", "vae"):
        exact = tiny.params[component]
        expected = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), exact)
        found = load_tree(tmp_path / "half" / component, component, expected)
        equal(found, jax.tree.map(lambda leaf: leaf.astype(dtype).astype(jnp.float32), exact))


def test_bfloat16(tiny_folder: Path, tiny: sdipc.Bundle) -> None:
    found = sdipc.load(tiny_folder, dtype="bfloat16")
    assert found.config.compute_dtype == jnp.bfloat16
    for component in ("unet", "vae", "text_encoder"):
        expected = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tiny.params[component])
        equal(found.params[component], expected)
    clip, exact = found.params["clip"], tiny.params["clip"]
    assert {leaf.dtype for leaf in jax.tree.leaves(clip["vision_model"])} == {jnp.dtype(jnp.bfloat16)}
    for name in ("visual_projection", "text_projection", "logit_scale"):
        equal(clip[name], exact[name])


def test_nothing_is_saved_over_something(tiny: sdipc.Bundle, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "x").write_text("x")
    for name in ("file", "folder"):
        refuse(sdipc.save, tiny, tmp_path / name, words="found something there, expected a new folder")
    (tmp_path / "empty").mkdir()
    sdipc.save(tiny, tmp_path / "empty")
    assert (tmp_path / "empty" / UNET).is_file()


def test_nothing_half_saved_is_left(tiny: sdipc.Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []

    def fail(tensors: Any, path: Path, metadata: Any) -> None:
        written.append(path)
        if len(written) == 3:
            raise OSError("No space left on device")
        save_file(tensors, path, metadata)

    monkeypatch.setattr(sys.modules[sdipc.save.__module__], "save_file", fail)
    with pytest.raises(OSError, match="No space"):
        sdipc.save(tiny, tmp_path / "new")
    assert os.listdir(tmp_path) == []


def test_what_cannot_be_saved(tiny: sdipc.Bundle, tiny_folder: Path, folder: Path, tmp_path: Path) -> None:
    new = tmp_path / "new"
    with pytest.raises(InputError, match="dtype is 'int8', expected float32, float16 or bfloat16"):
        sdipc.save(tiny, new, dtype="int8")
    large = load_file(folder / UNET)
    large["conv_in.bias"][3] = 1e6
    save_file(large, folder / UNET)
    with pytest.raises(InputError, match=r"conv_in\.bias holds NaN or infinity as float16, expected finite"):
        sdipc.save(sdipc.load(folder), new, dtype="float16")
    # The upper layers of such a CLIP are not in memory, and a text tower without them would be another one.
    config = json.loads((tiny_folder / "clip/config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 3
    change(folder / "clip/config.json", **config)
    with pytest.raises(InputError, match="the CLIP's text tower has 3 layers and the text encoder 2"):
        sdipc.save(sdipc.load(folder), new)
    assert not new.exists()


# Configurations.


@pytest.mark.parametrize(
    "file, values, words",
    [
        ("unet/config.json", {"_class_name": "UNet3DConditionModel"}, "'UNet3DConditionModel', expected 'UNet2DCond"),
        ("vae/config.json", {"_class_name": "VQModel"}, "_class_name is 'VQModel', expected 'AutoencoderKL'"),
        ("text_encoder/config.json", {"architectures": ["BertModel"]}, "architectures is 'BertModel', expected"),
        ("text_encoder/config.json", {"model_type": "bert"}, "model_type is 'bert', expected 'clip_text_model'"),
        ("clip/config.json", {"model_type": "chinese_clip"}, "model_type is 'chinese_clip', expected 'clip'"),
        ("clip/config.json", {"architectures": ["AltCLIPModel"]}, "architectures is 'AltCLIPModel'"),
        ("unet/config.json", {"trust_remote_code": True}, "trust_remote_code is not an option of UNet2DConditionModel"),
        ("vae/config.json", {"auto_map": {"AutoModel": "evil.Model"}}, "auto_map is not an option of AutoencoderKL"),
        ("text_encoder/config.json", {"trust_remote_code": True}, "trust_remote_code is not an option of CLIPTextM"),
        ("text_encoder/config.json", {"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, expected"),
        ("text_encoder/config.json", {"num_hidden_layers": 999_999}, "num_hidden_layers is 999999, expected 1 to 200"),
        ("unet/config.json", {"layers_per_block": 999_999}, "layers_per_block is 999999, expected 1 to 200"),
        ("vae/config.json", {"layers_per_block": 10**9}, "layers_per_block is 1000000000, expected"),
        (
            "unet/config.json",
            {"class_embed_type": "timestep"},
            "class_embed_type is 'timestep', only None is supported",
        ),
        ("unet/config.json", {"in_channels": 8, "out_channels": 4}, "the UNet takes 8 and gives 4 channels, expected"),
        ("unet/config.json", {"cross_attention_dim": 32}, "states are 24 wide but the UNet reads 32-wide prompts"),
        ("text_encoder/config.json", {"intermediate_size": 0}, "intermediate_size is 0, expected 1 to"),
        ("clip/config.json", {"vision_config": {"patch_size": 0}}, "vision_config: patch_size is 0, expected 1 to"),
        ("clip/config.json", {"projection_dim": "wide"}, "projection_dim is 'wide', expected 1 to 100,000"),
        ("clip/config.json", {"vision_config": [3]}, "vision_config is [3], expected a JSON object"),
        ("clip/preprocessor_config.json", {"crop_size": 32}, "gives 32x32 pictures but the vision tower takes 28x28"),
        ("sdipc.json", {"steps": 0}, "sdipc.json: steps is 0, expected greater than or equal to 1"),
        (
            "sdipc.json",
            {"guidance_interval": [0.7, 0.3]},
            "sdipc.json: guidance_interval is [0.7, 0.3], expected the lower share first",
        ),
        (
            "sdipc.json",
            {"guidance_interval": [0.3, 0.7], "cache_interval": 2},
            "sdipc.json: found both guidance_interval and cache_interval, expected one of them",
        ),
        ("sdipc.json", {"stepz": 3}, "sdipc.json: stepz is not a setting"),
        (
            "model_index.json",
            {"_class_name": "StableDiffusionXLInpaintPipeline"},
            "found a StableDiffusionXLInpaintPipeline, expected",
        ),
        ("model_index.json", {"requires_aesthetics_score": True}, "found SDXL's refiner"),
        (
            "model_index.json",
            {"scheduler": ["diffusers", "EDMDPMSolverMultistepScheduler"]},
            "EDMDPMSolverMultistepScheduler, with EDM's noise levels",
        ),
        (
            "scheduler/scheduler_config.json",
            {"_class_name": "EDMEulerScheduler"},
            "scheduler_config.json: the scheduler is a EDMEulerScheduler, with EDM's noise levels",
        ),
        (
            "unet/config.json",
            {
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 8,
                "projection_class_embeddings_input_dim": 80,
            },
            "reads a pooled text, but there is no text_encoder_2",
        ),
        ("unet/config.json", {"addition_embed_type": "text_time"}, "expected all of them or none"),
        ("unet/config.json", {"transformer_layers_per_block": [1, [2]]}, "expected reverse_transformer_layers_per"),
        (
            "unet/config.json",
            {"transformer_layers_per_block": [1, 201]},
            "transformer_layers_per_block is 201, expected",
        ),
        ("model_index.json", {"unet": ["evil", "EvilUNet"]}, "unet is a EvilUNet, expected UNet2DConditionModel"),
        (
            "model_index.json",
            {"text_encoder_2": ["transformers", "CLIPTextModel"]},
            "text_encoder_2 is a CLIPTextModel",
        ),
        ("model_index.json", {"image_encoder": ["transformers", "X"]}, "image_encoder is a X, expected no such part"),
        (
            "model_index.json",
            {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]},
            "names a safety_checker, but there is no such folder",
        ),
    ],
)
def test_configurations_that_are_refused(folder: Path, file: str, values: dict[str, Any], words: str) -> None:
    change(folder / file, **values)
    with pytest.raises(InputError) as caught:
        read_config(folder)
    assert words in str(caught.value)
    assert str(caught.value).isprintable()


def test_a_clip_that_does_not_fit(folder: Path) -> None:
    config = json.loads((folder / "clip/config.json").read_text())
    config["text_config"] |= {"hidden_size": 48}
    change(folder / "clip/config.json", **config)
    refuse(
        read_config(folder).check_inverse,
        words="text_projection is (24, 48) but the UNet reads 24-wide prompts: pass --clip with the CLIP this",
    )


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000])
@pytest.mark.parametrize("file", ["unet/config.json", "clip/config.json", "scheduler/scheduler_config.json"])
def test_configurations_that_cannot_be_read(folder: Path, file: str, data: bytes) -> None:
    (folder / file).write_bytes(data)
    with pytest.raises(InputError) as caught:
        read_config(folder)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("part", ["vae", "text_encoder", "tokenizer", "scheduler"])
def test_missing_parts(folder: Path, part: str) -> None:
    shutil.rmtree(folder / part)
    with pytest.raises(InputError, match=f"{part}.*expected"):
        read_config(folder)


@pytest.mark.parametrize("data", ["", "{", "[]", '"text"'])
def test_tokenizers_that_cannot_be_read(folder: Path, data: str) -> None:
    (folder / "tokenizer/vocab.json").write_text(data)
    refuse(read_config, folder, words="tokenizer")


@pytest.mark.parametrize("value", [0, -1, 1.5, "x", [], {}, [[]], None, True, 10**9])
def test_any_value_of_any_option_is_taken_or_refused(folder: Path, value: Any) -> None:
    """Never another error, whatever a file says."""
    for file in ("unet/config.json", "vae/config.json", "text_encoder/config.json", "clip/config.json",
                 "clip/preprocessor_config.json", "scheduler/scheduler_config.json", "model_index.json"):  # fmt: skip
        path = folder / file
        text = path.read_text()
        for name in json.loads(text):
            change(path, **{name: value})
            with contextlib.suppress(InputError):
                read_config(folder)
        path.write_text(text)


def test_names_that_are_no_folders(tmp_path: Path) -> None:
    for name in ("sd15", "runwayml/stable-diffusion-v1-5"):
        refuse(read_config, name, words="not in the cache, and the network must not be used: run `sdipc models fetch")
    refuse(read_config, tmp_path / "missing\n", words="no such folder or file, expected 'embedded', sd14")
    refuse(read_config, tmp_path, words="not a checkpoint, expected a diffusers pipeline folder with unet/")


def test_clip_folders(folder: Path, tmp_path: Path) -> None:
    (folder / "clip").rename(tmp_path / "clip")
    config = read_config(folder)
    assert config.clip is None
    with pytest.raises(InputError, match=r"has no clip/ folder, expected the CLIP .*: pass --clip FOLDER"):
        _ = config.vision_side
    assert read_config(folder, tmp_path / "clip").vision_side.folder == str(tmp_path / "clip")
    refuse(read_config, folder, "openai/clip-vit-large-patch14", words="not in the cache, and the network must not")
    refuse(read_config, folder, folder / UNET, words="found no CLIP with a vision tower, only the UNet")


def test_nothing_but_the_text_encoder_gives_text_states(folder: Path, tiny: sdipc.Bundle) -> None:
    """The CLIP's own text tower may be missing or wrong: it is not read."""
    stored = load_file(folder / "clip/model.safetensors")
    kept = {name: array for name, array in stored.items() if not name.startswith("text_model.")}
    assert len(kept) < len(stored)
    save_file(kept | {"text_model.other": np.full(3, np.nan, np.float32)}, folder / "clip/model.safetensors")
    equal(load_weights(read_config(folder)).params, tiny.params)


MEASURE = """
import contextlib, sys
from pathlib import Path
import jax, jax.numpy as jnp
from sdipc_jax.checkpoints.tensors import load_tree

def memory(name):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024

shape = jax.ShapeDtypeStruct((500, 500), jnp.dtype(sys.argv[2]))
tree = {f"layer_{n}": {"kernel": shape} for n in range(200)}
jnp.copy(jnp.zeros((500, 500), shape.dtype)).block_until_ready()
# The peak from here on, not that of starting up.
Path("/proc/self/clear_refs").write_text("5")
before = memory("VmRSS")
loaded = jax.block_until_ready(load_tree(Path(sys.argv[1]), "unet", tree))
copies = [jax.block_until_ready(jax.tree.map(jnp.copy, loaded)) for _ in range(int(sys.argv[3]))]
print(memory("VmHWM") - before)
"""


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_what_is_finite_by_its_bits(dtype: str) -> None:
    finite = np.array([0.0, -0.0, 1.5, -65504.0 if dtype == "float16" else -1e38, 1e-7], jnp.dtype(dtype))
    assert all_finite(finite)
    assert all_finite(finite[1:2])
    assert all_finite(finite[:0])
    assert all_finite(np.array(-2, jnp.dtype(dtype)))
    for wrong in (np.inf, -np.inf, np.nan, np.copysign(np.nan, -1.0)):
        for place in range(len(finite)):
            array = finite.copy()
            array[place] = wrong
            assert not all_finite(array)
            assert not all_finite(array[place : place + 1])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells how much memory a process has taken")
def test_loading_makes_no_second_copy(tmp_path: Path) -> None:
    """200 MB of weights, in a process of its own; one that does make a copy shows that the measure would tell."""
    matrix = np.random.default_rng(0).standard_normal((500, 500), np.float32)
    save_file({f"layer_{n}.weight": matrix + n for n in range(200)}, tmp_path / "model.safetensors")

    def growth(dtype: str, copies: int) -> int:
        arguments = [sys.executable, "-c", MEASURE, str(tmp_path), dtype, str(copies)]
        return int(subprocess.run(arguments, capture_output=True, text=True, check=True).stdout)

    assert 0.8 * 200e6 < growth("float32", 0) <= 1.3 * 200e6
    assert growth("bfloat16", 0) <= 1.3 * 100e6
    assert growth("float32", 1) > 1.3 * 200e6


def test_headers_tell_where_tensors_lie(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "x.safetensors", {"note": "not a tensor"})
    found = {tensor.name: tensor.read() for tensor in read_header(tmp_path / "x.safetensors")}
    assert found.keys() == tensors().keys()
    for name, array in tensors().items():
        np.testing.assert_array_equal(found[name], array)

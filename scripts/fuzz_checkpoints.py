"""Damaged and hostile single files, LoRAs, embeddings and ControlNets: each is opened or refused in one line, quickly,
in little memory.

python scripts/fuzz_checkpoints.py --count 10000
"""

import argparse
import dataclasses
import json
import struct
import sys
import tempfile
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from sdipc_jax.checkpoints.bundle import Bundle
from sdipc_jax.checkpoints.checks import check_counts
from sdipc_jax.checkpoints.controlnets import add_controlnet
from sdipc_jax.checkpoints.keys import flatten, torch_name, torch_shape
from sdipc_jax.checkpoints.save_single import save_single
from sdipc_jax.checkpoints.shapes import configuration, family_of, prediction_of
from sdipc_jax.checkpoints.single import SingleFile
from sdipc_jax.errors import InputError
from sdipc_jax.models import CLIPTextConfig, UNetConfig, VAEConfig

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests import lora_files
from tests.control_cases import random_network
from tests.single_files import family_bundle
from tests.tiny import tiny_bundle

SECONDS, TIMES = 2.0, 2.0
# What Python itself needs for a small file's header.
SPARE_BYTES = 8_000_000
PARTS: dict[str, Any] = {"unet": UNetConfig, "vae": VAEConfig, "text_encoder": CLIPTextConfig}
_NAMES = [
    *("v_pred", "ztsnr", "scaled_fp8", "lora_unet_x.alpha", "control_model.x", "betas"),
    *("model_ema.decay", "", "\n", "\u2028"),
    *("model.diffusion_model.input_blocks.99.0.op.weight", "first_stage_model.decoder.up.7.block.0.conv1.weight"),
    *("cond_stage_model.model.positional_embedding", "conditioner.embedders.1.model.positional_embedding", "x" * 5000),
    *("lora_unet_conv_in.alpha", "lora_unet_conv_in.lora_down.weight", "lora_te_text_model_final_layer_norm.w_norm"),
    *("lora_unet_conv_in.hada_w1_b", "lora_unet_conv_in.lokr_w1", "lora_unet_conv_in.lora_mid.weight", "clip_l"),
    *("control_model.input_hint_block.0.weight", "controlnet_cond_embedding.blocks.99.weight", "lora_controlnet"),
]
_NUMBERS = [0, 1, -1, 2, 3, 9, 63, 1280, 2**31, 2**63, -(2**63), 10**30]
_DTYPES = ["F64", "F32", "F16", "BF16", "F8_E4M3", "I64", "U8", "BOOL", "F4", "", None, 3]


def mutated(data: bytes, random: np.random.Generator) -> bytes:
    """The file with one to four things changed."""
    length = struct.unpack("<Q", data[:8])[0]
    header, values = data[8 : 8 + length], data[8 + length :]
    if random.random() < 0.35:
        return _bytes_changed(data, length, random)
    entries = json.loads(header)
    for _ in range(int(random.integers(1, 5))):
        _entry_changed(entries, random)
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + values


def _bytes_changed(data: bytes, length: int, random: np.random.Generator) -> bytes:
    array = bytearray(data)
    place = int(random.integers(0, 8 + length))
    kind = int(random.integers(0, 5))
    if kind == 0:
        array[place] ^= 1 << int(random.integers(0, 8))
    elif kind == 1:
        return bytes(array[: int(random.integers(0, len(array)))])
    elif kind == 2:
        end = place + int(random.integers(1, 200))
        array[place:end] = bytes(len(array[place:end]))
    elif kind == 3:
        array[place:place] = array[place : place + int(random.integers(1, 200))]
    else:
        array[:8] = struct.pack("<Q", int(random.choice([0, 1, length - 1, length + 1, 2**40, 2**62])))
    return bytes(array)


def _entry_changed(entries: dict[str, Any], random: np.random.Generator) -> None:
    names = [name for name in entries if name != "__metadata__"]
    if not names:
        return
    name = names[int(random.integers(len(names)))]
    entry = entries[name]
    kind = int(random.integers(0, 9))
    if kind == 0:
        del entries[name]
    elif kind == 1:
        place = int(random.integers(len(name) + 1))
        entries[name[:place] + str(random.choice(list("0.9x_"))) + name[place:]] = entries.pop(name)
    elif kind == 2:
        entries[_NAMES[int(random.integers(len(_NAMES)))]] = dict(entry) if isinstance(entry, dict) else entry
    elif kind == 3:
        entries["__metadata__"] = [
            {"modelspec.architecture": "flux-1-dev"}, {"modelspec.prediction_type": "x" * 1000}, {}, [], {"a": 1}, None,
            {"lora_adapter_metadata": "[" * 10_000}, {"lora_adapter_metadata": '{"unet.alpha_pattern": 3}'},
        ][int(random.integers(8))]  # fmt: skip
    elif not isinstance(entry, dict):
        entries[name] = {}
    elif kind == 4:
        entry["shape"] = [int(n) if abs(n) < 2**62 else n for n in (_NUMBERS[i] for i in random.integers(0, 12, 2))]
    elif kind == 5:
        entry["shape"] = list(reversed(entry.get("shape") or []))
    elif kind == 6:
        entry["dtype"] = _DTYPES[int(random.integers(len(_DTYPES)))]
    elif kind == 7:
        entry["data_offsets"] = [_NUMBERS[int(i)] for i in random.integers(0, 12, 2)]
    else:
        other = names[int(random.integers(len(names)))]
        entries[name], entries[other] = entries[other], entry


def open_file(path: Path, shapes: dict[str, dict[str, tuple[int, ...]]]) -> None:
    """What loading a single file does before a network is made, and the values of all tensors that fit."""
    single = SingleFile(path)
    family = family_of(single)
    prediction = prediction_of(single, family)
    for part, kind in PARTS.items():
        found = kind.from_json(configuration(single, part, prediction.value), part)
        check_counts(part, found)
        for name, tensor in single.read(part, shapes[part]).items():
            if tensor.shape == shapes[part].get(name):
                tensor.read()


def judge(path: Path, action: Callable[[Path], object]) -> str:
    """What comes of a file: `opened`, `refused`, or what went wrong."""
    tracemalloc.reset_peak()
    # Of the processor, so that nothing else that runs beside counts.
    before, start = tracemalloc.get_traced_memory()[0], time.process_time()
    try:
        action(path)
        outcome = "opened"
    except InputError as error:
        good = str(error).isprintable() and len(str(error)) < 2000
        outcome = "refused" if good else f"refused with {error!r:.300}"
    except Exception as error:
        outcome = f"{type(error).__name__}: {error}"[:300]
    seconds, used = time.process_time() - start, tracemalloc.get_traced_memory()[1] - before
    if seconds > SECONDS:
        return f"{seconds:.1f} s"
    limit = TIMES * path.stat().st_size + SPARE_BYTES
    return outcome if used <= limit else f"{used} bytes for a file of {path.stat().st_size}"


@dataclass(frozen=True)
class Target:
    """A file that is changed, and what opens it."""

    name: str
    file: Path
    action: Callable[[Path], object]


def run(target: Target, count: int, seed: int) -> Counter[str]:
    """Outcomes of `count` mutations of a file."""
    data, outcomes = target.file.read_bytes(), Counter[str]()
    target.action(target.file)
    tracemalloc.start()
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "x.safetensors")
            for number in range(count):
                # Every other file is whole by its header, and wrong in what it says.
                random = np.random.default_rng([seed, number])
                changed = mutated(data, random) if number % 2 else lora_files.damaged(data, int(random.integers(2**32)))
                path.write_bytes(changed)
                outcome = judge(path, target.action)
                if outcome not in ("opened", "refused"):
                    outcome = f"mutation {number}: {outcome}"
                outcomes[outcome] += 1
    finally:
        tracemalloc.stop()
    return outcomes


def expected_shapes(bundle: Bundle) -> dict[str, dict[str, tuple[int, ...]]]:
    """Of a bundle's parts, by PyTorch's names."""
    params = bundle.params
    return {
        part: {torch_name(path): torch_shape(path, leaf.shape) for path, leaf in flatten(params[part]).items()}
        for part in PARTS
    }


def small_vocabulary(bundle: Bundle, words: int = 200) -> Bundle:
    """The bundle with fewer words, so that its file is small."""
    table = bundle.params["text_encoder"]["text_model"]["embeddings"]["token_embedding"]
    params = jax.tree.map(lambda leaf: leaf[:words] if leaf is table["embedding"] else leaf, bundle.params)
    text = dataclasses.replace(bundle.config.text, vocab_size=words)
    return Bundle(params, dataclasses.replace(bundle.config, text=text))


def single_file(folder: Path) -> Target:
    """A whole checkpoint of Stable Diffusion 1.x in one file."""
    bundle = small_vocabulary(family_bundle(folder / "checkpoint"))
    save_single(bundle, folder / "whole.safetensors", dtype="float16")
    shapes = expected_shapes(bundle)
    return Target("single files", folder / "whole.safetensors", lambda path: open_file(path, shapes))


def additions(folder: Path) -> list[Target]:
    """What is added to a checkpoint."""
    bundle = tiny_bundle(folder / "tiny")
    save_file(random_network(bundle.config, 0)[1], folder / "control.safetensors")
    names = ("LoRAs", "LoRAs, --lora-partial", "embeddings")
    found = zip(names, lora_files.targets(folder, bundle), strict=True)
    return [
        *(Target(name, file, action) for name, (file, action) in found),
        Target("ControlNets", folder / "control.safetensors", lambda path: add_controlnet(bundle, path)),
    ]


def main() -> int:
    """Tries them, and tells what became of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000, help="of all of them together")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        targets = [single_file(Path(folder)), *additions(Path(folder))]
        for place, target in enumerate(targets):
            count = (arguments.count + place) // len(targets)
            outcomes = run(target, count, arguments.seed)
            wrong += count - outcomes["opened"] - outcomes["refused"]
            for outcome, number in outcomes.most_common(30):
                print(f"{target.name:24} {number:6} {outcome}", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())

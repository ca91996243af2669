"""LoRA and embedding files that damage is tried on."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from sdipc_jax import Bundle
from sdipc_jax.checkpoints.embeddings import read_embedding
from sdipc_jax.checkpoints.lora import merge_lora

_BLOCK = "down_blocks_0_attentions_0_transformer_blocks_0_attn1"


def write_lora(folder: Path) -> Path:
    """A small file with a module of every kind."""
    rng = np.random.default_rng(0)

    def random(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float16)

    modules = {
        f"lora_unet_{_BLOCK}_to_q": {"lora_up.weight": random(16, 2), "lora_down.weight": random(2, 16)},
        f"lora_unet_{_BLOCK}_to_k": {"lokr_w1": random(4, 4), "lokr_w2_a": random(4, 2), "lokr_w2_b": random(2, 4)},
        f"lora_unet_{_BLOCK}_to_v": {
            f"hada_w{n}_{side}": random(*shape) for n in (1, 2) for side, shape in (("a", (16, 2)), ("b", (2, 16)))
        },
        f"lora_unet_{_BLOCK}_to_out_0": {"diff": random(16, 16), "diff_b": random(16)},
        "lora_unet_down_blocks_0_resnets_0_conv1": {
            **{"lora_up.weight": random(16, 2, 1, 1), "lora_down.weight": random(2, 16, 1, 1)},
            **{"lora_mid.weight": random(2, 2, 3, 3), "dora_scale": random(16, 1, 1, 1)},
        },
        "lora_te_text_model_encoder_layers_0_mlp_fc1": {
            "lora_up.weight": random(48, 2),
            "lora_down.weight": random(2, 24),
        },
    }
    tensors = {f"{module}.{name}": value for module, values in modules.items() for name, value in values.items()}
    tensors |= {f"{module}.alpha": np.array(1.5, np.float32) for module in list(modules)[:3]}
    save_file(tensors, folder / "lora.safetensors", {"lora_adapter_metadata": "{}"})
    return folder / "lora.safetensors"


def write_embedding(folder: Path) -> Path:
    """A small file with a word of three vectors."""
    save_file({"emb_params": np.ones((3, 24), np.float16)}, folder / "word.safetensors")
    return folder / "word.safetensors"


def targets(folder: Path, bundle: Bundle) -> list[tuple[Path, Callable[[Path], object]]]:
    """Each file with what reads it."""
    return [
        (write_lora(folder), lambda path: merge_lora(bundle, path)),
        (write_lora(folder), lambda path: merge_lora(bundle, path, partial=True)),
        (write_embedding(folder), lambda path: read_embedding(path, bundle.config)),
    ]


def damaged(data: bytes, seed: int) -> bytes:
    """A safetensors file with one to three things changed in its header, or cut off."""
    rng = np.random.default_rng([7, seed])
    length = int.from_bytes(data[:8], "little")
    if seed % 5 == 0:
        array = bytearray(data)
        array[int(rng.integers(8 + length))] ^= 1 << int(rng.integers(8))
        return bytes(array[: len(array) if rng.random() < 0.5 else int(rng.integers(len(array)))])
    header, values = json.loads(data[8 : 8 + length]), data[8 + length :]
    for _ in range(int(rng.integers(1, 4))):
        names = [name for name in header if name != "__metadata__"]
        one, other = (names[int(place)] for place in rng.integers(len(names), size=2))
        entry, kind = header[one], int(rng.integers(7))
        if kind == 0:
            header[one], header[other] = header[other], entry
        elif kind == 1:
            place = int(rng.integers(len(one) + 1))
            header[one[:place] + "0_.x"[int(rng.integers(4))] + one[place:]] = header.pop(one)
        elif kind == 2:
            entry["shape"] = entry["shape"][::-1]
        elif kind == 3:
            entry["shape"] = [1, *entry["shape"]] if rng.random() < 0.5 else [int(np.prod(entry["shape"]))]
        elif kind == 4:
            entry["dtype"] = ("BF16", "I16", "F32", "")[int(rng.integers(4))]
        elif kind == 5:
            ending = ("alpha", "lora_mid.weight", "oft_blocks", "dora_scale", "diff_b", "lokr_t2")[int(rng.integers(6))]
            header[f"{one.partition('.')[0]}.{ending}"] = header.pop(one)
        else:
            patterns = {"unet.lora_alpha": "x", "unet.alpha_pattern": [1]}
            header["__metadata__"] = {"lora_adapter_metadata": json.dumps(patterns)[: int(rng.integers(60))]}
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + values

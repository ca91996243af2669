"""Reading safetensors files tensor by tensor, so that no second copy of the weights is ever in memory."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import ml_dtypes
import numpy as np
import safetensors.numpy

from sdipc_jax.checkpoints.keys import canonical_name, flatten, from_torch, torch_name, torch_shape, unflatten
from sdipc_jax.errors import InputError

_DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
_SHOWN = 5
# Bytes, of XLA's arrays on CPUs.
_ALIGNMENT = 64
# Hundreds of times what a Stable Diffusion checkpoint needs: parsing a hostile header must not take long.
_LONGEST_HEADER = 8_000_000
RUNS_CODE = (".bin", ".ckpt", ".pkl", ".pt", ".pth")


@dataclass(frozen=True)
class Tensor:
    """Where a tensor lies in a file."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    def read(self) -> np.ndarray:
        """The tensor's values.

        Raises:
            InputError: not a floating-point tensor, or not all of its values are finite.
        """
        if self.dtype not in _DTYPES:
            raise InputError(
                f"{self.file}: {self.name} has dtype {self.dtype}, expected one of {', '.join(_DTYPES)}: fetch it again"
            )
        count = int(np.prod(self.shape, dtype=np.int64))
        array = np.fromfile(self.file, _DTYPES[self.dtype], count, offset=self.offset).reshape(self.shape)
        if not np.isfinite(array).all():
            raise InputError(f"{self.file}: {self.name} holds NaN or infinity: the file is damaged, fetch it again")
        return array


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a component: one, or the shards an index names, full precision before fp16.

    Raises:
        InputError: there is none, or only files that could run code when opened.
    """
    for stem in ("diffusion_pytorch_model", "model"):
        for variant in ("", ".fp16"):
            single = folder / f"{stem}{variant}.safetensors"
            if single.is_file():
                return [single]
            for index in (
                folder / f"{stem}.safetensors.index{variant}.json",
                folder / f"{stem}{variant}.safetensors.index.json",
            ):
                if index.is_file():
                    return _shards(index)
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in RUNS_CODE) if folder.is_dir() else []
    if pickles:
        raise InputError(
            f"{folder}: found {pickles[0]}, expected safetensors: such a file can run code when it is opened, "
            "convert it with save_pretrained(safe_serialization=True)"
        )
    raise InputError(
        f"{folder}: found no weights, expected diffusion_pytorch_model.safetensors or model.safetensors: "
        "fetch the whole checkpoint"
    )


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8-sig"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError):
        raise InputError(
            f"{index}: not a safetensors index, expected an object with 'weight_map': fetch it again"
        ) from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise InputError(f"{index}: names {name!r}, expected files of the same folder: fetch it again")
        if not (index.parent / name).is_file():
            raise InputError(f"{index}: names {name}, which is not there: fetch it again")
    return [index.parent / name for name in names]


def read_header(file: Path) -> Iterator[Tensor]:
    """The tensors of a safetensors file, without their values.

    Raises:
        InputError: the file is not whole or not safetensors.
    """
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > _LONGEST_HEADER:
                raise ValueError(f"its header would be {length} bytes long")
            header = json.loads(stream.read(length), object_pairs_hook=_unique)
        # The library checks what a hostile header could do: overlaps, holes, sizes.
        with safetensors.safe_open(file, framework="numpy"):
            pass
    except (safetensors.SafetensorError, OSError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{file}: found no whole safetensors file ({reason}), expected one: fetch it again") from None
    for name, entry in header.items():
        if name != "__metadata__":
            offset = 8 + length + entry["data_offsets"][0]
            yield Tensor(file, name, entry["dtype"], tuple(entry["shape"]), offset)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:
            raise ValueError(f"{name} is in its header twice")
        values[name] = value
    return values


def read_metadata(file: Path) -> dict[str, str]:
    """The texts that a whole safetensors file carries beside its tensors."""
    with safetensors.safe_open(file, framework="numpy") as opened:
        return opened.metadata() or {}


def load_tree(
    folder: Path,
    component: str,
    expected: Mapping[str, Any],
    *,
    unused_prefixes: tuple[str, ...] = (),
    files: Sequence[Path] | None = None,
    changes: Mapping[str, Callable[[np.ndarray], np.ndarray]] = MappingProxyType({}),
) -> dict[str, Any]:
    """Loads a component's parameter tree.

    Everything is checked against the expected tree before the first value is read.

    Args:
        folder: holds the component's safetensors files.
        component: its name in the pipeline, such as `unet`.
        expected: nested dict of `jax.ShapeDtypeStruct`; the dtypes are those that the leaves get.
        unused_prefixes: tensors that may be there and are not wanted.
        files: to read instead of those that `weight_files` finds.
        changes: what happens to tensors between the file and the leaf's dtype, by their names in PyTorch.

    Raises:
        InputError: with the missing, extra and misshapen tensors by name.
    """
    found: dict[str, Tensor] = {}
    problems = []
    for file in weight_files(folder) if files is None else files:
        for tensor in read_header(file):
            name = canonical_name(component, tensor.name)
            if name is not None and not name.startswith(unused_prefixes):
                if name in found:
                    problems.append(f"{name} is there twice")
                found[name] = tensor
    wanted = {torch_name(path): (path, leaf) for path, leaf in flatten(expected).items()}
    problems += [f"{name} is missing" for name in wanted if name not in found]
    problems += [f"{tensor.name} is extra" for name, tensor in found.items() if name not in wanted]
    problems += [
        f"{name} has shape {list(found[name].shape)}, expected {list(torch_shape(path, leaf.shape))}"
        for name, (path, leaf) in wanted.items()
        if name in found and found[name].shape != torch_shape(path, leaf.shape)
    ]
    if problems:
        more = f" and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise InputError(
            f"{folder}: the weights do not fit config.json: {'; '.join(problems[:_SHOWN])}{more}: "
            "use the files of one checkpoint together"
        )
    return unflatten(
        {path: _place(path, found[name], leaf, changes.get(name, _same)) for name, (path, leaf) in wanted.items()}
    )


def _same(values: np.ndarray) -> np.ndarray:
    return values


def _place(
    path: tuple[str, ...],
    tensor: Tensor,
    leaf: jax.ShapeDtypeStruct,
    change: Callable[[np.ndarray], np.ndarray],
) -> jax.Array:
    array = _aligned(leaf)
    with np.errstate(over="ignore"):  # Told below, by name.
        array[...] = from_torch(path, change(tensor.read()))
    if leaf.dtype == np.float16 and not np.isfinite(array).all():
        raise InputError(
            f"{tensor.file}: {tensor.name} holds numbers above {np.finfo(np.float16).max:g}, which float16 does not: "
            "use --dtype bfloat16 or float32"
        )
    # Not by jnp.asarray, which compiles a program for every shape. Copies to accelerators happen in the background:
    # without waiting, those that are not done yet would pile up.
    return jax.block_until_ready(jax.device_put(array))


def _aligned(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
    """Memory that a CPU's device takes as it is, without a copy."""
    size = leaf.size * leaf.dtype.itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(leaf.dtype).reshape(leaf.shape)


def to_safetensors(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file: the same bytes for the same arrays and metadata, which safetensors writes in any order."""
    file = safetensors.numpy.save(dict(arrays), dict(metadata))
    length = int.from_bytes(file[:8], "little")
    header = json.loads(file[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return file[:8] + text.ljust(length) + file[8 + length :]

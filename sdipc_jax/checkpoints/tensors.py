"""Reading safetensors files tensor by tensor, so that no second copy of the weights is ever in memory."""

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
import safetensors.numpy

from sdipc_jax.checkpoints.headers import Tensor, all_finite, read_header
from sdipc_jax.checkpoints.keys import canonical_name, flatten, from_torch, torch_name, torch_shape, unflatten
from sdipc_jax.checkpoints.single import open_single
from sdipc_jax.errors import InputError, printable

_SHOWN = 5
# More would wait for the disk, and hold more of its tensors twice.
_AT_A_TIME = 2
# Bytes, of XLA's arrays on CPUs.
_ALIGNMENT = 64
_STEMS = ("diffusion_pytorch_model", "model")
# Of one checkpoint: full precision before half, the average that pipelines sample with before the weights behind it.
_VARIANTS = ("", ".fp32", ".fp16", ".bf16", ".non_ema")
RUNS_CODE = (".bin", ".ckpt", ".pkl", ".pt", ".pth")


def refuse_pickle(file: Path) -> None:
    """Refuses a file that is no safetensors by its name.

    Raises:
        InputError: opening it could run code.
    """
    if file.suffix in RUNS_CODE:
        raise InputError(
            f"{printable(file)}: found a pickle, expected safetensors: such a file can run code when it is opened"
        )


def weight_names() -> Iterator[tuple[str, str | None]]:
    """What a component's weights may be called, best first: a file, or an index with a pattern of its shards' names."""
    for stem in _STEMS:
        for variant in _VARIANTS:
            yield f"{stem}{variant}.safetensors", None
            yield f"{stem}.safetensors.index{variant}.json", rf"{stem}{variant}-\d+-of-\d+\.safetensors"
            yield f"{stem}{variant}.safetensors.index.json", rf"{stem}-\d+-of-\d+{variant}\.safetensors"


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a component: one, or the shards an index names, of the first variant that is there.

    Raises:
        InputError: there is none, or only files that could run code when opened.
    """
    for name, shards in weight_names():
        if (folder / name).is_file():
            return [folder / name] if shards is None else _shards(folder / name)
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


def load_tree(
    folder: Path,
    component: str,
    expected: Mapping[str, Any],
    *,
    unused_prefixes: tuple[str, ...] = (),
    files: Sequence[Path] | None = None,
    changes: Mapping[str, Callable[[np.ndarray], np.ndarray]] = MappingProxyType({}),
    average: bool = False,
) -> dict[str, Any]:
    """Loads a component's parameter tree.

    Everything is checked against the expected tree before the first value is read.

    Args:
        folder: holds the component's safetensors files, or is a single file that holds it.
        component: its name in the pipeline, such as `unet`.
        expected: nested dict of `jax.ShapeDtypeStruct`; the dtypes are those that the leaves get.
        unused_prefixes: tensors that may be there and are not wanted.
        files: to read instead of those that `weight_files` finds.
        changes: what happens to tensors between the file and the leaf's dtype, by their names in PyTorch.
        average: read the moving average that a single file has beside the weights.

    Raises:
        InputError: with the missing, extra and misshapen tensors by name.
    """
    problems: list[str] = []
    if files is None and folder.is_file():
        shapes = shapes_of(expected)
        stored = open_single(folder).read(component, shapes, average=average)
        found = {name: tensor for name, tensor in stored.items() if not name.startswith(unused_prefixes)}
    else:
        found = _stored(component, weight_files(folder) if files is None else files, unused_prefixes, problems)
    return take(folder, expected, found, changes, problems)


def take(
    source: Path,
    expected: Mapping[str, Any],
    found: Mapping[str, Tensor],
    changes: Mapping[str, Callable[[np.ndarray], np.ndarray]] = MappingProxyType({}),
    problems: Sequence[str] = (),
) -> dict[str, Any]:
    """A parameter tree from the tensors that were found under PyTorch's names, which must be those. See `load_tree`."""
    wanted = {torch_name(path): (path, leaf) for path, leaf in flatten(expected).items()}
    problems = [*problems]
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
            f"{source}: the weights do not fit config.json: {'; '.join(problems[:_SHOWN])}{more}: "
            "use the files of one checkpoint together"
        )

    def read(name: str) -> np.ndarray:
        (path, leaf), tensor = wanted[name], found[name]
        values = changes.get(name, _same)(tensor.read())
        return _as_leaf(from_torch(path, values), leaf, f"{tensor.file}: {tensor.name}")

    arrays = _read_ahead(read, wanted)
    return unflatten({path: _on_device(array) for (path, _), array in zip(wanted.values(), arrays, strict=True)})


def _read_ahead(read: Callable[[str], np.ndarray], names: Iterable[str]) -> Iterator[np.ndarray]:
    """What is read for each name, in order, a few at a time: NumPy reads and copies without Python's lock."""
    with ThreadPoolExecutor(_AT_A_TIME) as pool:
        ahead: deque[Future[np.ndarray]] = deque()
        for name in names:
            ahead.append(pool.submit(read, name))
            if len(ahead) > _AT_A_TIME:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def shapes_of(expected: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The names and shapes that a tree's leaves have in PyTorch."""
    return {torch_name(path): torch_shape(path, leaf.shape) for path, leaf in flatten(expected).items()}


def _same(values: np.ndarray) -> np.ndarray:
    return values


def _stored(
    component: str, files: Sequence[Path], unused_prefixes: tuple[str, ...], problems: list[str]
) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in files:
        for tensor in read_header(file):
            name = canonical_name(component, tensor.name)
            if name is not None and not name.startswith(unused_prefixes):
                if name in found:
                    problems.append(f"{name} is there twice")
                found[name] = tensor
    return found


def cast(path: tuple[str, ...], array: jax.Array, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    """A leaf in another dtype.

    Raises:
        InputError: float16 does not hold it.
    """
    return array if array.dtype == leaf.dtype else _on_device(_as_leaf(np.asarray(array), leaf, torch_name(path)))


def _as_leaf(values: np.ndarray, leaf: jax.ShapeDtypeStruct, name: str) -> np.ndarray:
    array = _aligned(leaf)
    with np.errstate(over="ignore"):  # Told below, by name.
        array[...] = values
    if leaf.dtype == np.float16 and not all_finite(array):
        raise InputError(
            f"{name} holds numbers above {np.finfo(np.float16).max:g}, which float16 does not: "
            "use --dtype bfloat16 or float32"
        )
    return array


def _on_device(array: np.ndarray) -> jax.Array:
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

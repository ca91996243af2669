"""LoRA files: read, checked against a checkpoint without a value being read, and fused into its weights.

A file is fused in float32 and into the weights as their own file has them, before they are cast. Several are fused in
the order in which they are given.
"""

import dataclasses
import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sdipc_jax.checkpoints.bundle import Bundle, Config
from sdipc_jax.checkpoints.headers import Tensor, read_header, read_metadata
from sdipc_jax.checkpoints.keys import flatten, from_torch, to_torch, torch_name, unflatten
from sdipc_jax.checkpoints.lora_changes import Change, Lora, changes_of, named, shown_name
from sdipc_jax.checkpoints.lora_formulas import KINDS, Kind, changed, kind_of
from sdipc_jax.checkpoints.lora_names import UNSUPPORTED, spellings, split
from sdipc_jax.checkpoints.sources import find_lora
from sdipc_jax.checkpoints.tensors import refuse_pickle, shapes_of
from sdipc_jax.errors import InputError, one_line, printable
from sdipc_jax.settings import LoraSettings

_COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
# What the keys and values of cross-attention read tells which checkpoints a file was made for.
_BASES = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "SDXL", 1280: "the SDXL refiner"}
_CROSS_KEYS = re.compile(r"attn2[._](processor\.)?to_k(_lora)?$")
_DIFFERENCE = next(kind for kind in KINDS if "diff" in kind.required)
_HIGHEST_RANK = 4096


def with_loras(config: Config, settings: LoraSettings) -> Config:
    """The configuration of a checkpoint into which files will be fused when its weights are loaded.

    Raises:
        InputError: a file cannot be read, is for another base, is of a kind that is not built, or does not fit.
    """
    if not settings.lora:
        return config
    shapes = _shapes(config.abstract_params())
    loras = [
        read_lora(find_lora(file), config, scale, partial=settings.lora_partial, shapes=shapes)
        for file, scale in zip(settings.lora, settings.scales, strict=True)
    ]
    return _with(config, loras)


def merge_lora(bundle: Bundle, file: str | Path, scale: float = 1.0, *, partial: bool = False) -> Bundle:
    """The bundle with a LoRA fused into its weights. The old bundle stays what it was: keep it to undo this.

    Args:
        file: a safetensors file, or an id on the hub (`ORG/NAME[@REVISION][/FILE.safetensors]`); LoRA, LoCon, LoHa,
            LoKr, DoRA or plain differences, for UNet and text encoders.
        scale: how much of the change is made; 1 is all of it, 0 none, and less than 0 leads away from it.
        partial: leave out what fits nothing in this checkpoint instead of refusing the file.

    Raises:
        InputError: the file cannot be read, is for another base, is of a kind that is not built, or does not fit.
    """
    config = bundle.config
    lora = read_lora(find_lora(file), config, scale, partial=partial, shapes=_shapes(bundle.params))
    fuse = {component: changes_of([lora], component) for component in _COMPONENTS}
    leaves = flatten(bundle.params)
    for path, leaf in leaves.items():
        name = torch_name(path[1:])
        if name in fuse.get(path[0], {}):
            new = fuse[path[0]][name](to_torch(path, np.asarray(leaf)))
            leaves[path] = jnp.asarray(from_torch(path, new), leaf.dtype)
    return dataclasses.replace(bundle, params=unflatten(leaves), config=_with(config, [lora]))


def _with(config: Config, loras: Sequence[Lora]) -> Config:
    notes = (note for lora in loras for note in lora.notes)
    return dataclasses.replace(config, loras=(*config.loras, *loras), notes=(*config.notes, *notes))


def read_lora(
    file: Path,
    config: Config,
    scale: float = 1.0,
    *,
    partial: bool = False,
    shapes: Mapping[tuple[str, str], tuple[int, ...]],
) -> Lora:
    """Reads a file's header and looks up what it is for.

    Args:
        shapes: of the checkpoint's tensors in PyTorch's layout, by component and name.
    """
    shown = printable(file)
    refuse_pickle(file)
    if not file.is_file():
        raise InputError(f"{shown}: no such file, expected a LoRA in a safetensors file: check the path")
    if not math.isfinite(scale):
        raise InputError(f"the scale of {shown} is {scale}, expected a finite number: 1 is the whole change")
    tensors = list(read_header(file))
    _check_kinds(shown, tensors)
    _check_base(shown, tensors, config)
    metadata = _read_metadata(file)
    modules: dict[str, set[str]] = {}
    for component, name in shapes:
        modules.setdefault(component, set()).add(name.rpartition(".")[0])
    table = spellings(modules, config.unet.layers_per_block)
    found, left_out = _look_up(shown, tensors, table)
    changes: dict[tuple[str, str], Change] = {}
    for (component, module), roles in found.items():
        for leaf, change in _changes(shown, module, roles, *metadata(component, module)):
            name = f"{module}.{leaf}"
            if (component, name) not in shapes:
                left_out += [tensor.name for tensor in change.tensors.values()]
                continue
            _check_shapes(shown, change, name, shapes[component, name])
            changes[component, name] = change
    if left_out and (not partial or not changes):
        raise InputError(
            f"{shown}: {len(left_out)} of {len(tensors)} tensors fit nothing in this checkpoint, {named(left_out)}: "
            + ("leave them out with --lora-partial, or use another file" if changes else "use another file")
        )
    return Lora(file, scale, changes, tuple(left_out))


def _shapes(params: Mapping[str, Any]) -> dict[tuple[str, str], tuple[int, ...]]:
    return {
        (component, name): shape
        for component in _COMPONENTS
        for name, shape in shapes_of(params.get(component, {})).items()
    }


def _check_kinds(shown: str, tensors: Sequence[Tensor]) -> None:
    for tensor in tensors:
        kind = next((kind for suffix, kind in UNSUPPORTED.items() if tensor.name.endswith(suffix)), None)
        if kind is not None:
            raise InputError(
                f"{shown}: {shown_name(tensor.name)} is of the kind {kind}, expected LoRA, LoCon, LoHa, LoKr, DoRA or "
                "differences: use another file"
            )
        if 0 in tensor.shape:
            raise InputError(f"{shown}: {shown_name(tensor.name)} is empty, expected numbers: use another file")


def _check_base(shown: str, tensors: Sequence[Tensor], config: Config) -> None:
    """Refuses a file for another family by what its cross-attention reads, before all its tensors fail to fit."""
    expected = config.unet.cross_attention_dim
    for tensor in tensors:
        match = split(tensor.name)
        if match is None or match[1] not in ("down", "hada_w1_b") or len(tensor.shape) < 2:
            continue
        width = tensor.shape[1]
        if _CROSS_KEYS.search(match[0]) and width != expected:
            made = _BASES.get(width, f"a UNet that reads {width}-wide prompts")
            raise InputError(
                f"{shown}: made for {made} (attn2.to_k reads {width}), expected one for "
                f"{_BASES.get(expected, 'this checkpoint')} ({expected}): use another file or another checkpoint"
            )


def _look_up(
    shown: str, tensors: Sequence[Tensor], table: Mapping[str, tuple[str, str]]
) -> tuple[dict[tuple[str, str], dict[str, Tensor]], list[str]]:
    """The tensors of each module by their roles, and the names of those that belong to none."""
    found: dict[tuple[str, str], dict[str, Tensor]] = defaultdict(dict)
    left_out = []
    for tensor in tensors:
        spelled, role = split(tensor.name) or ("", "")
        place = table.get(spelled)
        if place is None:
            left_out.append(tensor.name)
            continue
        other = found[place].setdefault(role, tensor)
        # Some files have every tensor twice, under the names of two programs.
        if other is not tensor and (other.shape != tensor.shape or (other.read() != tensor.read()).any()):
            raise InputError(
                f"{shown}: {shown_name(other.name)} and {shown_name(tensor.name)} are for the same module and differ, "
                "expected one of them: use another file"
            )
    return found, left_out


def _changes(
    shown: str, module: str, roles: dict[str, Tensor], alpha: float | None, rank_stabilised: bool
) -> list[tuple[str, Change]]:
    """What a module's tensors do, to which of its leaves."""
    result = []
    bias, weight = roles.get("diff_b"), {role: tensor for role, tensor in roles.items() if role != "diff_b"}
    if bias is not None:
        result.append(("bias", Change(_DIFFERENCE, {"diff": bias}, None, False)))
    if weight:
        kind = kind_of(frozenset(weight))
        if kind is None:
            raise InputError(
                f"{shown}: {shown_name(module)} has {', '.join(sorted(weight))}, expected all tensors of one kind, "
                "such as up and down: the file is damaged"
            )
        rank = kind.rank(weight) or 1
        if rank > _HIGHEST_RANK:
            raise InputError(f"{shown}: {shown_name(module)} is of rank {rank}, expected at most {_HIGHEST_RANK}")
        result.append(("weight", Change(kind, weight, alpha, rank_stabilised)))
    return result


def _check_shapes(shown: str, change: Change, name: str, shape: tuple[int, ...]) -> None:
    shapes = tuple((role, tensor.shape) for role, tensor in change.tensors.items())
    if problem := _problem(change.kind, shapes, shape):
        first = next(iter(change.tensors.values()))
        raise InputError(
            f"{shown}: {shown_name(first.name)} and what belongs to it do not fit {name} of {list(shape)} ({problem}): "
            "use another file or another checkpoint"
        )


@lru_cache(maxsize=4096)
def _problem(kind: Kind, shapes: tuple[tuple[str, tuple[int, ...]], ...], shape: tuple[int, ...]) -> str | None:
    """Why tensors of these shapes do not change a weight of that one, found out without any numbers."""
    tensors = {role: jax.ShapeDtypeStruct(each, jnp.float32) for role, each in shapes}
    alpha = tensors.pop("alpha", None)
    if alpha is not None and math.prod(alpha.shape) != 1:
        return f"alpha is {list(alpha.shape)}"
    weight = jax.ShapeDtypeStruct(shape, jnp.float32)
    try:
        jax.eval_shape(lambda weight, tensors: changed(weight, kind, tensors, 1.0, 1.0), weight, tensors)
    except Exception as error:  # Whatever shapes that no one has foreseen lead to.
        return one_line(error)[:200]
    return None


def _read_metadata(file: Path) -> Callable[[str, str], tuple[float | None, bool]]:
    """What PEFT writes beside the tensors, as a function of component and module: alpha, and whether it is alpha over
    the root of the rank that counts."""
    text = read_metadata(file).get("lora_adapter_metadata", "{}")
    shown = f"{printable(file)}: lora_adapter_metadata"
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise InputError(f"{shown} is not readable, expected a JSON object: use another file")

    def of(component: str, module: str) -> tuple[float | None, bool]:
        pattern = values.get(f"{component}.alpha_pattern") or {}
        if not isinstance(pattern, dict):
            raise InputError(f"{shown}: {component}.alpha_pattern is {pattern!r}, expected a JSON object")
        alpha = values.get(f"{component}.lora_alpha")
        # PEFT takes them for regular expressions; what it writes are the ends of names.
        for end, value in pattern.items():
            if module == end.removeprefix("^") or module.endswith(f".{end}"):
                alpha = value
                break
        if alpha is not None and (isinstance(alpha, bool) or not isinstance(alpha, int | float)):
            raise InputError(f"{shown}: lora_alpha is {alpha!r}, expected a number: use another file")
        return alpha, values.get(f"{component}.use_rslora") is True

    return of

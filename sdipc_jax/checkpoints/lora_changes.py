"""What LoRA files do to a checkpoint's tensors, and doing it."""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from pathlib import Path

import numpy as np

from sdipc_jax.checkpoints.headers import Tensor
from sdipc_jax.checkpoints.lora_formulas import Kind, changed
from sdipc_jax.errors import InputError, printable, shortened

Fuse = Callable[[np.ndarray], np.ndarray]

_SHOWN, _LONGEST_NAME = 5, 120


@dataclass(frozen=True)
class Change:
    """What a file does to one tensor of the checkpoint.

    Attributes:
        tensors: of the file, by their roles in the formula.
        alpha: what the file's metadata say, where there is no tensor `alpha`.
        rank_stabilised: the factor is alpha over the root of the rank.
    """

    kind: Kind
    tensors: Mapping[str, Tensor]
    alpha: float | None
    rank_stabilised: bool

    def __call__(self, weight: np.ndarray, strength: float) -> np.ndarray:
        values = {role: tensor.read().astype(np.float32) for role, tensor in self.tensors.items()}
        alpha, rank = self.alpha, self.kind.rank(values)
        if "alpha" in values:
            alpha = values.pop("alpha").item()
        # Without an alpha it is the rank, and without a rank there is nothing to divide by.
        root = math.sqrt(rank) if rank and self.rank_stabilised else rank
        factor = 1.0 if alpha is None or root is None else alpha / root
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):  # Told below, by name.
            new = changed(weight.astype(np.float32), self.kind, values, factor, strength)
        if not np.isfinite(new).all():
            first = next(iter(self.tensors.values()))
            raise InputError(
                f"{printable(first.file)}: {shown_name(first.name)} makes a weight NaN or infinity, expected numbers: "
                "lower its scale or use another file"
            )
        return new


@dataclass(frozen=True)
class Lora:
    """A file that fits a checkpoint.

    Attributes:
        scale: how much of the change is made; 1 is all of it.
        changes: what it does, by component and the tensor's name in PyTorch.
        left_out: its tensors that fit nothing, where that was allowed.
    """

    file: Path
    scale: float
    changes: Mapping[tuple[str, str], Change]
    left_out: tuple[str, ...] = ()

    @property
    def notes(self) -> tuple[str, ...]:
        """What a person should know."""
        if not self.left_out:
            return ()
        return (f"{printable(self.file)}: {len(self.left_out)} tensors left out, {named(self.left_out)}",)


def changes_of(loras: Sequence[Lora], component: str) -> dict[str, Fuse]:
    """What files do to a component's tensors, by their names in PyTorch: each takes one and gives it in float32."""
    steps: dict[str, list[Fuse]] = defaultdict(list)
    for lora in loras:
        for (part, name), change in lora.changes.items():
            if part == component:
                steps[name].append(partial(change, strength=lora.scale))
    return {name: partial(_in_turn, each) for name, each in steps.items()}


def _in_turn(steps: Sequence[Fuse], weight: np.ndarray) -> np.ndarray:
    return reduce(lambda weight, step: step(weight), steps, weight)


def named(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(shown_name(name) for name in names[:_SHOWN]) + more


def shown_name(name: str) -> str:
    """A tensor's name as a message can show it, on one line: files may have names of any length."""
    return shortened(printable(name), _LONGEST_NAME)

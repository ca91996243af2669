"""What LoRA and its kin add to a weight: low rank, Hadamard and Kronecker products, plain differences, and DoRA.

In PyTorch's layouts: W is (O, I) for linear layers and (O, I, h, w) for convolutions. Written for NumPy and JAX alike.
LoRA is Hu et al. 2021, LoHa and LoKr are Yeh et al. 2023 (LyCORIS), DoRA is Liu et al. 2024.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# By their roles, such as `down`.
Tensors = Mapping[str, Any]

# The channels of a latent, and what the first convolution of an inpainting UNet reads: the latent comes first.
_LATENT, _INPAINTING = 4, 9


@dataclass(frozen=True)
class Kind:
    """A way to write a change.

    Attributes:
        required, optional: the roles of its tensors.
        formula: the change but for its factor, alpha / rank.
        ranks: the roles whose first axis is the rank, the first that is there counts. Without any the factor is 1.
    """

    required: frozenset[str]
    optional: frozenset[str]
    formula: Callable[[Tensors], Any]
    ranks: tuple[str, ...] = ()

    def rank(self, tensors: Tensors) -> int | None:
        """The rank; tensors may be anything with a shape."""
        return next((math.prod(tensors[role].shape[:1]) for role in self.ranks if role in tensors), None)


def low_rank(tensors: Tensors) -> Any:
    """LoRA: up down; with `mid`, which has the convolution's extent, the sum of up[o,m] mid[m,n,h,w] down[n,i]."""
    up, down = _matrix(tensors["up"]), tensors["down"]
    if "mid" in tensors:
        return _tucker(tensors["mid"], up.T, _matrix(down))
    return (up @ _matrix(down)).reshape(up.shape[0], *down.shape[1:])


def hadamard(tensors: Tensors) -> Any:
    """LoHa: the elementwise product of two products, (w1_a w1_b) * (w2_a w2_b)."""
    one, other = (_product(tensors, f"hada_w{n}_a", f"hada_w{n}_b", f"hada_t{n}") for n in (1, 2))
    return one * other


def kronecker(tensors: Tensors) -> Any:
    """LoKr: kron(w1, w2), either one whole or a product. Its last axis is that of the convolution's, laid out flat."""
    one, other = (
        tensors[f"lokr_w{n}"]
        if f"lokr_w{n}" in tensors
        else _product(tensors, f"lokr_w{n}_a", f"lokr_w{n}_b", f"lokr_t{n}")
        for n in (1, 2)
    )
    product = _numpy(other).kron(_matrix(one), _matrix(other))
    return product.reshape(product.shape[0], -1, *other.shape[2:])


def difference(tensors: Tensors) -> Any:
    """The change itself."""
    return tensors["diff"]


def _roles(*names: str) -> frozenset[str]:
    return frozenset(names)


_MAGNITUDES = _roles("dora_scale", "magnitude")
_KRONECKER = _roles(*(f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")))
KINDS = (
    Kind(_roles("up", "down"), _roles("mid", "alpha") | _MAGNITUDES, low_rank, ("down",)),
    Kind(
        _roles("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
        _roles("hada_t1", "hada_t2", "alpha") | _MAGNITUDES,
        hadamard,
        ("hada_w1_b",),
    ),
    Kind(_roles(), _KRONECKER | _MAGNITUDES | {"alpha"}, kronecker, ("lokr_w1_b", "lokr_w2_b")),
    Kind(_roles("diff"), _roles("alpha"), difference),
)


def kind_of(roles: frozenset[str]) -> Kind | None:
    """The kind that is written with these tensors."""
    whole = (kind for kind in KINDS if kind.required <= roles <= kind.required | kind.optional)
    return next(whole, None)


def changed(weight: Any, kind: Kind, tensors: Tensors, factor: float, strength: float) -> Any:
    """The changed weight, W + strength (W' - W).

    W' is W + factor formula(tensors), for DoRA brought to the lengths that the file gives. So strength 0 is the
    weight as it was and strength 1 the whole change, and what lies between is on the straight line.

    Args:
        weight: W, float32.
        factor: alpha / rank.

    Raises:
        ValueError or TypeError: the shapes do not fit each other or the weight.
    """
    change = factor * _fit(kind.formula(tensors), weight.shape)
    if tensors.keys() & _MAGNITUDES:
        change = _decomposed(weight + change, tensors) - weight
    return weight + strength * change


def _decomposed(weight: Any, tensors: Tensors) -> Any:
    """DoRA: every row, or every column, brought to the length that the file gives."""
    magnitude, outputs = tensors.get("magnitude"), weight.shape[0]
    if magnitude is None:
        magnitude = tensors["dora_scale"]
        # One for each input stands on the second axis; a square weight tells nothing, the place of the axis does.
        if magnitude.shape[:2] == (1, *weight.shape[1:2]):
            axes = (0, *range(2, weight.ndim))
            lengths = _numpy(weight).sqrt((weight**2).sum(axis=axes, keepdims=True))
            return weight * (magnitude.reshape(lengths.shape) / lengths)
    lengths = _numpy(weight).sqrt((weight**2).sum(axis=tuple(range(1, weight.ndim)), keepdims=True))
    return weight * (magnitude.reshape(outputs, *[1] * (weight.ndim - 1)) / lengths)


def _product(tensors: Tensors, a: str, b: str, middle: str) -> Any:
    if middle in tensors:
        return _tucker(tensors[middle], tensors[a], tensors[b])
    second = tensors[b]
    return (_matrix(tensors[a]) @ _matrix(second)).reshape(-1, *second.shape[1:])


def _tucker(middle: Any, a: Any, b: Any) -> Any:
    """Sum over m and n of a[m,o] middle[m,n,h,w] b[n,i]."""
    return _numpy(middle).einsum("mn...,mo,ni->oi...", middle, a, b, optimize=True)


def _matrix(tensor: Any) -> Any:
    return tensor.reshape(tensor.shape[0], -1)


def _fit(change: Any, shape: tuple[int, ...]) -> Any:
    """The change in the weight's shape, which may write a matrix as a 1 x 1 convolution or the other way round."""
    found = change.shape
    if found[1:2] == (_LATENT,) and shape == (found[0], _INPAINTING, *found[2:]):
        # What the first convolution of a plain UNet learnt, in one that reads a mask and a masked picture besides.
        return _numpy(change).pad(change, [(0, 0), (0, _INPAINTING - _LATENT)] + [(0, 0)] * (len(shape) - 2))
    as_matrix = found[0], math.prod(found[1:])
    if found != shape and (2 not in (len(found), len(shape)) or as_matrix != (shape[0], math.prod(shape[1:]))):
        raise ValueError(f"the change is {list(found)}")
    return change.reshape(shape)


def _numpy(array: Any) -> ModuleType:
    return jnp if isinstance(array, jax.Array) else np

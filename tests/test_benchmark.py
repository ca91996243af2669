"""How arithmetic is counted, and that a side can be asked to run. Speed itself is never tested."""

import dataclasses
from functools import partial

import benchmark
import jax
import jax.numpy as jnp
import pytest
from benchmarks.candidates import FusedAttention
from benchmarks.flops import flops_of
from benchmarks.sizes import sd15
from benchmarks.work import Ready, Work
from jax._src.cudnn import fused_attention_stablehlo

from sdipc_jax.checkpoints.bundle import Bundle, apply
from sdipc_jax.models import attention
from sdipc_jax.sampling.loop import advance
from sdipc_jax.sampling.request import begin
from tests.random_weights import random_tree


def test_products_and_convolutions_are_counted() -> None:
    x, y = jnp.ones((3, 5)), jnp.ones((5, 7))
    product = 2 * 3 * 5 * 7
    assert flops_of(jnp.matmul, x, y) == product
    assert flops_of(lambda x, y: jnp.tanh(x @ y) + 1, x, y) == product
    assert flops_of(lambda x, y: jax.lax.scan(lambda carry, _: (carry, carry @ y), x, None, length=4), x, y) == (
        4 * product
    )
    assert flops_of(lambda x, y: jax.lax.cond(x.sum() > 0, lambda: x @ y, lambda: jnp.zeros((3, 7))), x, y) == product
    pictures, kernel = jnp.ones((2, 6, 5, 4)), jnp.ones((3, 3, 2, 8))

    def convolve(pictures: jax.Array, kernel: jax.Array) -> jax.Array:
        layout = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            pictures, kernel, (1, 1), "SAME", dimension_numbers=layout, feature_group_count=2
        )

    assert flops_of(convolve, pictures, kernel) == 2 * (2 * 6 * 5 * 8) * (3 * 3 * 2)


def test_cudnn_attention_is_counted_as_the_products_that_it_stands_for(monkeypatch: pytest.MonkeyPatch) -> None:
    # To trace it where there is no cuDNN.
    for check in ("check_cudnn_version", "check_compute_capability", "is_cuda_compute_capability_equal"):
        monkeypatch.setattr(fused_attention_stablehlo, check, lambda *args, **kwargs: None)
    query, key = (jnp.ones((2, tokens, 4, 32), jnp.bfloat16) for tokens in (64, 96))
    fused = partial(jax.nn.dot_product_attention, implementation="cudnn")
    products = 2 * 2 * (2 * 4 * 64 * 96 * 32)
    assert flops_of(fused, query, key, key) == products
    assert flops_of(jax.nn.dot_product_attention, query, key, key) == products


def test_stable_diffusion_takes_what_others_counted() -> None:
    """0.803 TFLOP for an evaluation of the UNet at 64 x 64 and 2.51 for the decoder, as published counts have it."""
    config = sd15("float32")
    bundle = Bundle(config.abstract_params(), config)
    context = jax.ShapeDtypeStruct((1, 77, 768), jnp.float32)
    request, state = jax.eval_shape(lambda bundle, x: begin(bundle, x, negative=x, seeds=0), bundle, context)
    plain = dataclasses.replace(request, winograd={})
    step = flops_of(lambda bundle, request, state: advance(bundle, request, state, 0, 1), bundle, plain, state)
    assert step == pytest.approx(2 * 0.803e12, rel=2e-3)
    decode = partial(apply, config.vae_model, method="decode")
    assert flops_of(decode, bundle.params["vae"], state[0]) == pytest.approx(2.51e12, rel=5e-3)


def test_a_side_is_timed() -> None:
    timed, _ = benchmark.time_work(Work("encode", "embedded", batch=2), ["JAX"], runs=3)
    found = timed["JAX"]
    assert len(found.seconds) == 3
    assert min(found.seconds) > 0
    assert found.ready.flops > 1e6
    assert found.peak_bytes > 2**20


@pytest.mark.parametrize(("apart", "at_once"), [(False, 2), (True, 1)])
def test_sides_run_in_turns_or_apart(apart: bool, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    alive: set[str] = set()
    most: list[int] = []

    class Side:
        ready = Ready(flops=1.0, moved=0.0, compiled=1.0, versions="")

        def __init__(self, side: str, *_: object) -> None:
            self.side = side
            alive.add(side)
            most.append(len(alive))

        def run(self) -> dict[str, float]:
            ran.append(self.side)
            return {"seconds": 1.0, "peak_bytes": 1}

        def processor_seconds(self) -> float:
            return 0.0

        def end(self) -> None:
            alive.discard(self.side)

    monkeypatch.setattr(benchmark, "Process", Side)
    timed, _ = benchmark.time_work(Work("encode"), ["JAX", "torch"], runs=2, apart=apart)
    assert list(timed) == ["JAX", "torch"]
    assert ran == (["JAX", "JAX", "torch", "torch"] if apart else ["JAX", "torch", "torch", "JAX"])
    assert (max(most), alive) == (at_once, set())


def test_one_product_for_queries_keys_and_values_changes_nothing() -> None:
    """The candidate reads the parameters that are there."""
    x, context = (jnp.sin(jnp.arange(2.0 * 6 * 8).reshape(2, 6, 8) + shift) for shift in (0, 1))
    plain, fused = attention.Attention(2), FusedAttention(2)
    variables = plain.init(jax.random.key(0), x)
    for others in ((), (context,)):
        assert jnp.abs(plain.apply(variables, x, *others) - fused.apply(variables, x, *others)).max() < 1e-6


def test_weights_are_placed_leaf_by_leaf() -> None:
    """So that the process never holds them twice."""
    expected = {
        "a": {"kernel": jax.ShapeDtypeStruct((3, 4), jnp.bfloat16)},
        "b": jax.ShapeDtypeStruct((2,), jnp.float32),
    }
    order: list[tuple[int, ...]] = []
    placed = random_tree(expected, 0, place=lambda leaf, like: (order.append(leaf.shape), leaf.astype(like.dtype))[1])
    assert order == [(3, 4), (2,)]
    assert placed["a"]["kernel"].dtype == jnp.bfloat16
    assert (placed["b"] == random_tree(expected, 0)["b"]).all()

"""Whether an accelerator gives the CPU's pictures, and its fused attention the plain one's numbers.

`python -m benchmarks.on_card [--small] OUTPUT.json`
"""

import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

import sdipc_jax as sdipc
from sdipc_jax.files import write_atomically
from sdipc_jax.models import attention

DEPTHS = (40, 80, 160)
SAMPLERS = ("ddim", "dpm++2m", "euler-a", "pndm", "euler")


def pictures_differ(sampler: str, steps: int) -> dict[str, float]:
    """Mean and largest difference of whole pictures from the CPU's, in levels of 255."""
    made = []
    for device in (jax.devices("cpu")[0], jax.devices()[0]):
        with jax.default_device(device):
            bundle = jax.device_put(sdipc.load("embedded"), device)
            context = sdipc.text_prompt(bundle, sdipc.tokenize(bundle, ["red apple", "a car"]))
            made.append(np.asarray(sdipc.generate(bundle, context, seeds=3, steps=steps, sampler=sampler)))
    difference = 255 * np.abs(made[0] - made[1])
    return {"mean": float(difference.mean()), "largest": float(difference.max())}


def attention_differs(queries: int, depth: int) -> float | str:
    """The fused kernel's distance from plain attention in float32, relative; where it fails, how."""
    q, k, v = (jax.random.normal(jax.random.key(seed), (2, queries, 8, depth), jnp.bfloat16) for seed in range(3))
    try:
        # Of the deepest heads too, which the package leaves alone.
        with mock.patch.object(attention, "FUSED_DEPTH", max(DEPTHS)):
            fused = np.asarray(jax.jit(attention.dot_product_attention)(q, k, v), np.float64)
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"[:400]
    exact = np.asarray(attention._attend_at_once(*(each.astype(jnp.float32) for each in (q, k, v))), np.float64)
    return float(np.linalg.norm(fused - exact) / np.linalg.norm(exact))


def main(output: Path, small: bool) -> None:
    pictures: dict[str, Any] = {}
    distances: dict[str, Any] = {}
    result = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "attention": distances,
        "pictures": pictures,
    }

    def found(into: dict[str, Any], name: str, value: Any) -> None:
        into[name] = value
        # What there is stays, if the rest is cut off.
        write_atomically(output, (json.dumps(result, indent=2) + "\n").encode())

    for depth in DEPTHS:
        found(distances, str(depth), attention_differs(128 if small else 4096, depth))
    for sampler in SAMPLERS:
        found(pictures, sampler, pictures_differ(sampler, 2 if small else 20))


if __name__ == "__main__":
    main(Path(sys.argv[-1]), "--small" in sys.argv)

"""Whether an accelerator gives the CPU's pictures, and its fused attention the plain one's numbers.

`python -m benchmarks.on_card [--small] OUTPUT.json`
"""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import sdipc_jax as sdipc
from sdipc_jax.files import write_atomically
from sdipc_jax.models.attention import _attend_at_once, dot_product_attention

DEPTHS = (40, 80, 160)


def pictures_differ(steps: int) -> dict[str, dict[str, float]]:
    """Mean and largest difference of whole pictures from the CPU's, in levels of 255, by sampler."""
    found = {}
    for sampler in ("ddim", "pndm", "euler", "euler-a", "dpm++2m"):
        made = []
        for device in (jax.devices("cpu")[0], jax.devices()[0]):
            with jax.default_device(device):
                bundle = jax.device_put(sdipc.load("embedded"), device)
                context = sdipc.text_prompt(bundle, sdipc.tokenize(bundle, ["red apple", "a car"]))
                made.append(np.asarray(sdipc.generate(bundle, context, seeds=3, steps=steps, sampler=sampler)))
        difference = 255 * np.abs(made[0] - made[1])
        found[sampler] = {"mean": float(difference.mean()), "largest": float(difference.max())}
    return found


def attention_differs(queries: int) -> dict[str, float]:
    """The fused kernel's distance from plain attention in float32, relative, by depth of a head."""
    found = {}
    for depth in DEPTHS:
        q, k, v = (jax.random.normal(jax.random.key(seed), (2, queries, 8, depth), jnp.bfloat16) for seed in range(3))
        fused = np.asarray(jax.jit(dot_product_attention)(q, k, v), np.float64)
        exact = np.asarray(_attend_at_once(*(each.astype(jnp.float32) for each in (q, k, v))), np.float64)
        found[str(depth)] = float(np.linalg.norm(fused - exact) / np.linalg.norm(exact))
    return found


def main(output: Path, small: bool) -> None:
    result = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "pictures": pictures_differ(2 if small else 20),
        "attention": attention_differs(128 if small else 4096),
    }
    write_atomically(output, (json.dumps(result, indent=2) + "\n").encode())


if __name__ == "__main__":
    main(Path(sys.argv[-1]), "--small" in sys.argv)

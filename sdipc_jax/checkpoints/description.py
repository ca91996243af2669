"""A loaded checkpoint, told in a screen."""

from typing import Any

import jax


def describe(params: dict[str, Any], config: Any) -> str:
    """What a bundle is and holds, a line for each of its parts, without its weights."""
    leaves = {part: jax.tree.leaves(tree) for part, tree in params.items()}
    parts = [
        f"  {part}: {sum(leaf.size for leaf in each) / 1e6:.1f} million, "
        f"{sum(leaf.size * leaf.dtype.itemsize for leaf in each) / 1e6:.1f} MB"
        for part, each in leaves.items()
        if all(hasattr(leaf, "dtype") for leaf in each)
    ]
    defaults = config.defaults
    prompts = f"  prompts: (N, {config.tokens.length}, {config.unet.cross_attention_dim})"
    pictures = (
        f"  pictures: {defaults.height} x {defaults.width}, {defaults.steps} steps of {defaults.sampler}, "
        f"guidance {defaults.guidance_scale:g}"
    )
    return "\n".join([f"Bundle of {config.folder}, {config.dtype}", *parts, prompts, pictures])

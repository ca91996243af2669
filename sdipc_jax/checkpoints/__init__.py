"""Checkpoints in diffusers' folder layout, to and from parameter trees."""

from sdipc_jax.checkpoints.load import load
from sdipc_jax.checkpoints.save import save

__all__ = ["load", "save"]

"""Prompts in, pictures out: the request, the guided loop, decoding, the safety checker.

Imports prompts, checkpoints, samplers, pictures and models.
"""

from sdipc_jax.sampling.control import Control
from sdipc_jax.sampling.sample import generate, generate_with_progress
from sdipc_jax.sampling.start import Start, encode_pictures, start_from

__all__ = ["Control", "Start", "encode_pictures", "generate", "generate_with_progress", "start_from"]

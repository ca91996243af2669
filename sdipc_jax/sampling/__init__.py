"""Prompts in, pictures out: the request, the guided loop, decoding, the safety checker.

Imports prompts, checkpoints, samplers, pictures and models.
"""

from sdipc_jax.sampling.sample import generate, generate_with_progress

__all__ = ["generate", "generate_with_progress"]

"""A checkpoint's files in, a bundle of parameters and configuration out, and back.

Imports samplers, pictures and models.
"""

from sdipc_jax.checkpoints.bundle import Bundle, Config
from sdipc_jax.checkpoints.controlnets import add_controlnet
from sdipc_jax.checkpoints.embeddings import add_embedding
from sdipc_jax.checkpoints.load import from_pretrained, load
from sdipc_jax.checkpoints.lora import merge_lora
from sdipc_jax.checkpoints.save import save
from sdipc_jax.checkpoints.save_single import save_single

__all__ = [
    "Bundle",
    "Config",
    "add_controlnet",
    "add_embedding",
    "from_pretrained",
    "load",
    "merge_lora",
    "save",
    "save_single",
]

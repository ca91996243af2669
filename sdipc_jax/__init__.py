"""Pictures as prompts for Stable Diffusion, on JAX.

SD-IPC (Ding et al., NeurIPS 2023, arXiv 2305.12716): the pseudo-inverse of CLIP's text projection turns a picture's
embedding into the text state that Stable Diffusion reads. Importing this package touches no device.
"""

from sdipc_jax import tuning
from sdipc_jax.checkpoints import Bundle, Config, load, save
from sdipc_jax.errors import InputError
from sdipc_jax.prompts import (
    Projection,
    closed_form,
    convert,
    edit_prompt,
    empty_prompt,
    encode_images,
    image_prompt,
    read_pictures,
    text_prompt,
    tokenize,
    truncated_pinv,
)
from sdipc_jax.sampling import generate, generate_with_progress

__all__ = [
    "Bundle",
    "Config",
    "InputError",
    "Projection",
    "closed_form",
    "convert",
    "edit_prompt",
    "empty_prompt",
    "encode_images",
    "generate",
    "generate_with_progress",
    "image_prompt",
    "load",
    "read_pictures",
    "save",
    "text_prompt",
    "tokenize",
    "truncated_pinv",
    "tuning",
]

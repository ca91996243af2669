"""Pictures as prompts for Stable Diffusion, on JAX.

SD-IPC (Ding et al., NeurIPS 2023, arXiv 2305.12716): the pseudo-inverse of CLIP's text projection turns a picture's
embedding into the text state that Stable Diffusion reads. Importing this package touches no device.
"""

from sdipc_jax import tuning
from sdipc_jax.checkpoints import load, save
from sdipc_jax.checkpoints.bundle import Bundle, Config
from sdipc_jax.errors import InputError
from sdipc_jax.prompts.contexts import edit_prompt, empty_prompt, image_prompt, text_prompt
from sdipc_jax.prompts.projection import Projection, closed_form, convert, truncated_pinv
from sdipc_jax.prompts.tokens import tokenize
from sdipc_jax.prompts.vision import encode_images, read_pictures
from sdipc_jax.sampling.sample import generate, generate_with_progress

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

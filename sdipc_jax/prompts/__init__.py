"""Pictures and texts in, prompts as the UNet reads them out: vision, tokens, eqs. 6 to 8.

Imports checkpoints, pictures and models.
"""

from sdipc_jax.prompts.calibration import calibrate
from sdipc_jax.prompts.contexts import edit_prompt, empty_prompt, image_prompt, negative_prompt, text_prompt
from sdipc_jax.prompts.projection import Projection, closed_form, convert, truncated_pinv
from sdipc_jax.prompts.prompt import Prompt
from sdipc_jax.prompts.tokens import tokenize
from sdipc_jax.prompts.vision import encode_images, read_pictures

__all__ = [
    "Projection",
    "Prompt",
    "calibrate",
    "closed_form",
    "convert",
    "edit_prompt",
    "empty_prompt",
    "encode_images",
    "image_prompt",
    "negative_prompt",
    "read_pictures",
    "text_prompt",
    "tokenize",
    "truncated_pinv",
]

"""Pictures as prompts for Stable Diffusion, on JAX.

SD-IPC (Ding et al., NeurIPS 2023, arXiv 2305.12716): the pseudo-inverse of CLIP's text projection turns a picture's
embedding into the text state that Stable Diffusion reads. Importing this package touches no device, and imports a room
only when a name in it is asked for.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sdipc_jax import checkpoints, compilation, parallel, tuning
    from sdipc_jax.checkpoints import (
        Bundle,
        Config,
        add_controlnet,
        add_embedding,
        from_pretrained,
        load,
        merge_lora,
        save,
    )
    from sdipc_jax.errors import InputError
    from sdipc_jax.pictures import save_pictures
    from sdipc_jax.prompts import (
        Projection,
        Prompt,
        calibrate,
        closed_form,
        convert,
        edit_prompt,
        empty_prompt,
        encode_images,
        image_prompt,
        negative_prompt,
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
    "Prompt",
    "add_controlnet",
    "add_embedding",
    "calibrate",
    "checkpoints",
    "closed_form",
    "compilation",
    "convert",
    "edit_prompt",
    "empty_prompt",
    "encode_images",
    "from_pretrained",
    "generate",
    "generate_with_progress",
    "image_prompt",
    "load",
    "merge_lora",
    "negative_prompt",
    "parallel",
    "read_pictures",
    "save",
    "save_pictures",
    "text_prompt",
    "tokenize",
    "truncated_pinv",
    "tuning",
]

# Where the names are that are no modules themselves: the imports above, for those who run the code.
_ROOMS = {
    "checkpoints": (
        "Bundle",
        "Config",
        "add_controlnet",
        "add_embedding",
        "from_pretrained",
        "load",
        "merge_lora",
        "save",
    ),
    "errors": ("InputError",),
    "pictures": ("save_pictures",),
    "prompts": (
        *("Projection", "Prompt", "calibrate", "closed_form", "convert", "edit_prompt", "empty_prompt"),
        *("encode_images", "image_prompt", "negative_prompt", "read_pictures", "text_prompt", "tokenize"),
        "truncated_pinv",
    ),
    "sampling": ("generate", "generate_with_progress"),
}
_ROOM_OF = {name: room for room, names in _ROOMS.items() for name in names}


def __getattr__(name: str) -> Any:
    """What is in `__all__`, imported when it is first asked for (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name not in _ROOM_OF:
        return importlib.import_module(f"{__name__}.{name}")
    value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_ROOM_OF[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

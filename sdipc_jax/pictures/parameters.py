"""A picture's settings as text, in the form that AUTOMATIC1111's web UI writes, and that it and ComfyUI read."""

import json
from collections.abc import Mapping
from typing import Any

# The names that samplers have there.
_SAMPLERS = {
    "ddim": "DDIM",
    "pndm": "PLMS",
    "euler": "Euler",
    "euler-a": "Euler a",
    "dpm++2m": "DPM++ 2M",
    "lcm": "LCM",
    "tcd": "TCD",
}


def parameters(record: Mapping[str, Any], height: int, width: int) -> str | None:
    """The text of a record; nothing where the record is none of a sampled picture.

    What has no name there, such as the picture that is the prompt, has ours.

    >>> settings = {"steps": 20, "sampler": "euler-a", "guidance_scale": 7.0, "text": "taxi"}
    >>> print(parameters({"seed": 3, "index": 1, "input": "a, b.png", "settings": settings}, 64, 96))
    taxi
    Negative prompt:
    Steps: 20, Sampler: Euler a, CFG scale: 7.0, Seed: 3, Size: 96x64, Index: 1, Picture: "a, b.png", Version: sdipc_jax
    """
    settings = record.get("settings", {})
    if "steps" not in settings:
        return None
    sampler = settings.get("sampler")
    values = {
        "Steps": settings["steps"],
        "Sampler": _SAMPLERS.get(sampler, sampler),
        "Schedule type": "Karras" if settings.get("karras") else None,
        "CFG scale": settings.get("guidance_scale"),
        "Seed": record.get("seed"),
        "Size": f"{width}x{height}",
        "Model": settings.get("model"),
        "Denoising strength": settings.get("strength"),
        "Clip skip": settings["clip_skip"] + 1 if settings.get("clip_skip") else None,
        "Index": record.get("index"),
        "Picture": record.get("input"),
        "Alpha": settings.get("alpha"),
        "Version": "sdipc_jax",
    }
    told = ", ".join(f"{name}: {_quoted(value)}" for name, value in values.items() if value is not None)
    prompt = record.get("text") or settings.get("text") or ""
    # ComfyUI looks for the second line also where nothing is in it.
    negative = f"Negative prompt: {_one_line(settings.get('negative_prompt') or '')}".rstrip()
    return f"{_one_line(prompt)}\n{negative}\n{told}"


def _one_line(text: str) -> str:
    """A text that does not end its line."""
    return " ".join(text.split())


def _quoted(value: Any) -> str:
    """A value, in quotes where it would end too early."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(each in text for each in ',:"\n') else text

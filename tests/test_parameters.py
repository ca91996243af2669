"""Settings in PNG files, read as AUTOMATIC1111's web UI and ComfyUI read them."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sdipc_jax.pictures.sheets import read_metadata, save_png

RECORD: dict[str, Any] = {
    "input": "pictures/giraffe, at night.png",
    "index": 2,
    "seed": 7,
    "settings": {
        "model": "sd15",
        "steps": 30,
        "sampler": "dpm++2m",
        "karras": True,
        "guidance_scale": 7.5,
        "negative_prompt": 'blurry, "grey"',
        "text": "a taxi: yellow\nand old",
        "alpha": 0.9,
        "strength": None,
        "clip_skip": 1,
    },
}


def as_the_web_ui_reads(text: str) -> dict[str, str]:
    """The last line holds the values, the lines from `Negative prompt:` on what to avoid, and the others the prompt."""
    *lines, last = text.strip().split("\n")
    found = re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', last)
    assert len(found) >= 3, "a line of fewer values counts as part of the prompt"
    start = next((place for place, line in enumerate(lines) if line.startswith("Negative prompt:")), len(lines))
    values = {name: json.loads(value) if value.startswith('"') else value for name, value in found}
    values["Prompt"] = "\n".join(lines[:start])
    values["Negative prompt"] = "\n".join(lines[start:]).removeprefix("Negative prompt:").strip()
    return values


def as_comfyui_reads(text: str) -> tuple[str, str, dict[str, str]]:
    """Prompt, negative prompt, values with lower-case names; nothing is made of a text without a negative prompt."""
    steps = text.rindex("\nSteps:")
    negative = text.rindex("\nNegative prompt:", 0, steps)
    matches = re.finditer(r'\s*[^:]+:\s*(?:[^"{].*?|".*?"|\{.*?\})\s*(?:,|$)', text[steps:].split("\n")[1])
    values = dict(match.group().strip().rstrip(",").split(": ", 1) for match in matches)
    return text[:negative].strip(), text[negative + 18 : steps].strip(), {k.lower(): v for k, v in values.items()}


def written(folder: Path, record: dict[str, Any]) -> str:
    path = folder / "picture.png"
    save_png(path, np.zeros((64, 96, 3), np.uint8), record)
    assert read_metadata(path) == record
    with Image.open(path) as image:
        return str(image.info["parameters"])


def test_settings_as_the_web_ui_reads_them(tmp_path: Path) -> None:
    assert as_the_web_ui_reads(written(tmp_path, RECORD)) == {
        "Prompt": "a taxi: yellow and old",
        "Negative prompt": 'blurry, "grey"',
        "Steps": "30",
        "Sampler": "DPM++ 2M",
        "Schedule type": "Karras",
        "CFG scale": "7.5",
        "Seed": "7",
        "Size": "96x64",
        "Model": "sd15",
        "Clip skip": "2",
        "Index": "2",
        "Picture": "pictures/giraffe, at night.png",
        "Alpha": "0.9",
        "Version": "sdipc_jax",
    }


def test_settings_as_comfyui_reads_them(tmp_path: Path) -> None:
    prompt, negative, values = as_comfyui_reads(written(tmp_path, RECORD))
    assert (prompt, negative) == ("a taxi: yellow and old", 'blurry, "grey"')
    assert values["sampler"] == "DPM++ 2M"
    assert values["size"] == "96x64"
    # A picture alone: no text, no negative prompt.
    bare = {"seed": 1, "settings": {"steps": 4, "sampler": "ddim", "guidance_scale": 1.0, "negative_prompt": None}}
    assert as_comfyui_reads(written(tmp_path, bare))[:2] == ("", "")
    assert as_the_web_ui_reads(written(tmp_path, bare))["Sampler"] == "DDIM"


def test_texts_in_any_script_and_names_that_are_no_unicode(tmp_path: Path) -> None:
    text = written(tmp_path, {"text": "キリン", "input": "\udcff.png", "settings": RECORD["settings"]})
    assert as_the_web_ui_reads(text)["Prompt"] == "キリン"
    assert as_the_web_ui_reads(text)["Picture"] == "?.png"


@pytest.mark.parametrize("record", [{}, {"step": 3}, {"settings": {"output": "prompts"}}])
def test_what_is_no_sampled_picture_has_no_parameters(tmp_path: Path, record: dict[str, Any]) -> None:
    save_png(tmp_path / "sheet.png", np.zeros((8, 8, 3), np.uint8), record)
    with Image.open(tmp_path / "sheet.png") as image:
        assert "parameters" not in image.info

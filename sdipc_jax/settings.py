"""The settings that people type: one schema each for Python, the command line and files."""

from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import tyro
from pydantic import BaseModel, ConfigDict, Field

from sdipc_jax.errors import InputError

SamplerName = Literal["ddim", "pndm", "euler", "euler-a", "dpm++2m"]

Finite = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]


class Settings(BaseModel):
    """Unknown keys and values out of range are refused in one line, wherever they come from."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except pydantic.ValidationError as error:
            raise InputError(_describe(error)) from None


def _describe(error: pydantic.ValidationError) -> str:
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"{name} is not a setting: check its spelling"
    if first["type"] == "missing":
        return f"{name} is missing: give it"
    if first["type"] == "too_short":
        return f"found no {name}, expected at least one: name it"
    return f"{name} is {first['input']!r}, expected {first['msg'].removeprefix('Input should be ')}: correct it"


class Defaults(Settings):
    """What a checkpoint asks for where the user does not (`sdipc.json` in its folder)."""

    steps: Count = 50
    guidance_scale: NotNegative = 7.5
    sampler: SamplerName = "ddim"
    cutoff: NotNegative = 0.3
    scale: Positive | None = None
    height: Count
    width: Count


class CheckpointSettings(Settings):
    """What every command takes."""

    model: str = "embedded"
    """The checkpoint: `embedded`, or a diffusers pipeline folder."""
    clip: Path | None = None
    """Folder of the CLIP that the checkpoint was trained with; by default clip/ in the checkpoint's folder."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights and arithmetic of UNet, CLIP and VAE."""
    overwrite: bool = False
    """Replace the results of another run."""
    json_: Annotated[bool, tyro.conf.arg(name="json")] = False
    """Print one JSON object on stdout and nothing else there."""
    quiet: bool = False
    """Print errors only."""
    offline: bool = False
    """Never use the network."""


class ProjectionSettings(CheckpointSettings):
    """How a picture's features become a text state (eq. 6)."""

    cutoff: NotNegative | None = None
    """Singular values of the text projection below this count as 0; the checkpoint's own if left out."""
    keep_fraction: Annotated[float, Field(gt=0, le=1)] | None = None
    """Keep this share of the singular values instead of a cut-off."""
    scale: Positive | None = None
    """Length of a text state; the checkpoint's own if left out."""
    mode: Literal["tspace", "cspace"] = "tspace"
    """Where that length is measured: tspace as the authors' code, cspace as eq. 6 is written."""


class SamplingSettings(CheckpointSettings):
    """How pictures are sampled from a prompt."""

    num_images: Count = 4
    """Pictures for each prompt."""
    seed: Seed = 0
    """0 to 4294967295; picture i of a prompt depends on the seed and on i alone."""
    steps: Count | None = None
    """Sampling steps; the checkpoint's default (else 50) if left out, as for the next five."""
    guidance_scale: NotNegative | None = None
    """How strongly the prompt is followed; 1 or less is no guidance."""
    sampler: SamplerName | None = None
    """The sampling method."""
    height: Count | None = None
    """In pixels."""
    width: Count | None = None
    """In pixels."""
    negative_prompt: str = ""
    """What guidance leads away from."""
    eta: Annotated[float, Field(ge=0, le=1)] = 0.0
    """DDIM's share of fresh noise."""
    karras: bool = False
    """Karras et al.'s noise levels, for dpm++2m."""
    latents: Path | None = None
    """Safetensors file with the noise to start from: `latents`, float32, (num_images, C, height/f, width/f)."""
    truncate: bool = False
    """Cut texts that are too long instead of refusing them."""
    batch_size: Count = 4
    """Pictures sampled at once; more is faster and takes more memory."""
    output_dir: Path = Path("out")
    """Where the pictures, sheet.png and manifest.jsonl go."""


class VarySettings(SamplingSettings, ProjectionSettings):
    """Variations of each picture."""

    pictures: Annotated[tuple[Path, ...], tyro.conf.Positional, Field(min_length=1)]
    """JPEG, PNG or WebP files."""


class EditSettings(SamplingSettings, ProjectionSettings):
    """The picture with the text's change."""

    picture: Annotated[Path, tyro.conf.Positional]
    """A JPEG, PNG or WebP file."""
    text: Annotated[str, tyro.conf.Positional]
    """What to change, such as "at night"."""
    alpha: Finite = 0.9
    """Weight of the text's end state; the paper's 0.9, its authors' code has 0.6."""


class TextSettings(SamplingSettings):
    """Plain text to image, with the same samplers."""

    texts: Annotated[tuple[str, ...], tyro.conf.Positional, Field(min_length=1)]
    """Prompts."""


class PromptSettings(ProjectionSettings):
    """Pictures as prompts, in a file: `prompt_embeds` for diffusers' argument of that name, and `image_vectors`."""

    pictures: Annotated[tuple[Path, ...], tyro.conf.Positional, Field(min_length=1)]
    """JPEG, PNG or WebP files."""
    output: Path
    """The safetensors file to write."""
    text: str | None = None
    """What to change in the pictures (eq. 8)."""
    alpha: Finite = 0.9
    """Weight of the text's end state."""
    truncate: bool = False
    """Cut a text that is too long instead of refusing it."""


class SpectrumSettings(ProjectionSettings):
    """The singular values of the text projection, what the cut-off keeps of them, and the length of text states."""

    picture: Path | None = None
    """Also tell how much of this picture's energy is kept."""
    output_dir: Path = Path("out")
    """Where spectrum.png goes."""

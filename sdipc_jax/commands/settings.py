"""What people type for each command."""

from pathlib import Path
from typing import Annotated, Literal

import tyro
from pydantic import Field

from sdipc_jax.settings import (
    CommandSettings,
    Count,
    Finite,
    LocalPath,
    LoraSettings,
    ParallelSettings,
    ProjectionSettings,
    ResultSettings,
    SamplerSettings,
    SamplingSettings,
    choice,
)

_PICTURES = tyro.conf.arg(metavar="PICTURE...", help_behavior_hint="")
_TEXTS = tyro.conf.arg(metavar="TEXT...", help_behavior_hint="")


class VarySettings(SamplingSettings, ProjectionSettings):
    """Variations of each picture."""

    pictures: Annotated[tuple[Path, ...], tyro.conf.Positional, _PICTURES, Field(min_length=1)]
    """Picture files: JPEG, PNG, WebP, GIF, BMP, AVIF."""


class EditSettings(SamplingSettings, ProjectionSettings):
    """The picture with the text's change."""

    picture: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="PICTURE")]
    """A picture file."""
    text: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="TEXT")]
    """What to change, such as "at night"."""
    alpha: Finite = 0.9
    """Weight of the text's end state; the paper's 0.9, its authors' code has 0.6."""


class TextSettings(SamplingSettings):
    """Plain text to image, with the same samplers."""

    texts: Annotated[tuple[str, ...], tyro.conf.Positional, _TEXTS, Field(min_length=1)]
    """Prompts."""


class PromptSettings(ProjectionSettings, ResultSettings):
    """Pictures as prompts, in a file: `prompt_embeds` for diffusers' argument of that name, and `image_vectors`."""

    pictures: Annotated[tuple[Path, ...], tyro.conf.Positional, _PICTURES, Field(min_length=1)]
    """Picture files: JPEG, PNG, WebP, GIF, BMP, AVIF."""
    output: Annotated[Path, tyro.conf.arg(metavar="FILE")]
    """The safetensors file to write."""
    text: Annotated[str | None, choice("TEXT", "none")] = None
    """What to change in the pictures (eq. 8)."""
    alpha: Finite = 0.9
    """Weight of the text's end state."""
    truncate: bool = False
    """Cut a text that is too long instead of refusing it."""

    @property
    def result(self) -> tuple[Path, str]:
        return self.output, "--output"


class CompileSettings(SamplerSettings, CommandSettings):
    """What vary, edit and text run on one device, compiled ahead of their first use; no weights are read."""

    batch_size: Count = 4
    """Pictures sampled at once: theirs, but no more than they make in all."""


class SpectrumSettings(ProjectionSettings, ResultSettings):
    """The singular values of the text projection, what the cut-off keeps of them, and the length of text states."""

    picture: Annotated[Path | None, choice("PICTURE", "none")] = None
    """Also tell how much of this picture's energy is kept."""
    output_dir: LocalPath = Path("out")
    """Where spectrum.png goes."""

    @property
    def result(self) -> tuple[Path, str]:
        return self.output_dir / "spectrum.png", "--output-dir"


class TuneSettings(ParallelSettings, CommandSettings):
    """What both ways to tune take."""

    config: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CONFIG.yaml")]
    """The run's file; configs/ has examples and docs/settings.md the keys."""
    changes: Annotated[
        tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="KEY=VALUE...", help_behavior_hint="")
    ] = ()
    """Settings that count more than the file's."""
    allow_change: Annotated[tuple[str, ...], tyro.conf.arg(metavar="KEY...", help_behavior_hint="(default: none)")] = ()
    """Go on although these settings have changed since the checkpoint."""


class FtSettings(TuneSettings):
    """Fine-tuning on about a hundred pictures (SD-IPC-FT); run it again, and it goes on where it stopped."""


class CtSettings(TuneSettings):
    """Customising on a handful of pictures (SD-IPC-CT); run it again, and it goes on where it stopped."""


class ExportSettings(LoraSettings, CommandSettings):
    """A tuned checkpoint as a folder of its own, which diffusers opens, with its CLIP in clip/."""

    delta: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="TUNED.safetensors")]
    """What tuning wrote."""
    output: Annotated[Path, tyro.conf.arg(metavar="FOLDER")]
    """The folder to make."""
    model: str = "embedded"
    """The checkpoint that was tuned: `embedded`, or a diffusers pipeline folder."""
    clip: Annotated[Path | None, choice("FOLDER", "clip/ in the checkpoint's folder")] = None
    """Folder of the CLIP that the checkpoint was trained with."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Of the stored weights."""


def tune(
    command: Annotated[
        Annotated[FtSettings, tyro.conf.subcommand("ft")]
        | Annotated[CtSettings, tyro.conf.subcommand("ct")]
        | Annotated[ExportSettings, tyro.conf.subcommand("export")],
        tyro.conf.OmitSubcommandPrefixes,
        tyro.conf.arg(name=""),
    ],
) -> CommandSettings:
    """Tuning on one's own pictures."""
    return command

"""The options of `sdipc tune`."""

from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from sdipc_jax.settings import CommandSettings, ParallelSettings

_NONE: Any = tyro.conf.arg(metavar="KEY...", help_behavior_hint="(default: none)")


class TuneSettings(ParallelSettings, CommandSettings):
    """What both ways to tune take."""

    config: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CONFIG.yaml")]
    """The run's file; configs/ has examples."""
    changes: Annotated[
        tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="KEY=VALUE...", help_behavior_hint="")
    ] = ()
    """Settings that count more than the file's."""
    allow_change: Annotated[tuple[str, ...], _NONE] = ()
    """Go on although these settings have changed since the checkpoint."""


class FtSettings(TuneSettings):
    """Fine-tuning on about a hundred pictures (SD-IPC-FT); run it again, and it goes on where it stopped."""


class CtSettings(TuneSettings):
    """Customising on a handful of pictures (SD-IPC-CT); run it again, and it goes on where it stopped."""


class ExportSettings(CommandSettings):
    """A tuned checkpoint as a folder of its own, which diffusers opens, with its CLIP in clip/."""

    delta: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="TUNED.safetensors")]
    """What tuning wrote."""
    output: Annotated[Path, tyro.conf.arg(metavar="FOLDER")]
    """The folder to make."""
    model: str = "embedded"
    """The checkpoint that was tuned: `embedded`, or a diffusers pipeline folder."""
    clip: Annotated[
        Path | None,
        tyro.conf.arg(
            constructor=str, metavar="FOLDER", help_behavior_hint="(default: clip/ in the checkpoint's folder)"
        ),
    ] = None
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

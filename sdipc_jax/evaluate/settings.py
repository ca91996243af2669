"""What people type for the command `evaluate`."""

from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import tyro
from pydantic import Field

from sdipc_jax.settings import (
    Count,
    LocalPath,
    NotNegative,
    ProjectionSettings,
    ResultSettings,
    SamplerName,
    Seed,
    choice,
)


def _own(metavar: str) -> Any:
    """Help for an option that the checkpoint decides if it is left out; the schema judges what is typed."""
    return tyro.conf.arg(constructor=str, metavar=metavar, help_behavior_hint="(default: the checkpoint's own)")


class EvaluateSettings(ProjectionSettings, ResultSettings):
    """Measures a checkpoint the way the paper does: retrieval, recognition, likeness, editing."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")] = "embedded"
    """The checkpoint: `embedded`, or a diffusers pipeline folder."""
    corpus: Path = Path("build/corpus.npz")
    """The drawings, as scripts/build_corpus.py writes them."""
    split: Literal["cells", "unseen", "style", "train"] = "cells"
    """`cells`: held-out drawings of known things; `unseen`: things never seen; `style`: a style never seen."""
    count: Annotated[int, Field(ge=4)] = 128
    """Pictures given as prompts."""
    seeds: Count = 1
    """How often each is sampled."""
    seed: Seed = 0
    """The first seed."""
    full: bool = False
    """At least 256 pictures and three seeds, and text prompts that name the style besides: for the model card."""
    steps: Annotated[Count | None, _own("INT")] = None
    """Sampling steps."""
    guidance_scale: Annotated[NotNegative | None, _own("FLOAT")] = None
    """How strongly the prompt is followed; 1 or less is no guidance."""
    sampler: Annotated[SamplerName | None, _own("|".join(get_args(SamplerName)))] = None
    """The sampling method."""
    batch_size: Count = 8
    """Pictures sampled at once."""
    output_dir: Annotated[LocalPath | None, choice("FOLDER", "a new one, out/COMMAND-001 and so on")] = None
    """Where evaluation.json, evaluation.md and the sheets go."""

    @property
    def result(self) -> tuple[Path, str]:
        return self.folder / "evaluation.json", "--output-dir"

"""What people type for the command `evaluate`."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import tyro
from pydantic import Field, model_validator

from sdipc_jax.evaluate.table_settings import TABLES, TableName
from sdipc_jax.settings import (
    CommandSettings,
    Count,
    LocalPath,
    NotNegative,
    ProjectionSettings,
    ResultSettings,
    SamplerName,
    Seed,
    choice,
)

# What a table's file does not say.
_BESIDE_A_FILE = {"model", "config", "output_dir", "overwrite", *CommandSettings.model_fields}


def _own(metavar: str) -> Any:
    """Help for an option that the checkpoint decides if it is left out; the schema judges what is typed."""
    return tyro.conf.arg(constructor=str, metavar=metavar, help_behavior_hint="(default: the checkpoint's own)")


class EvaluateSettings(ProjectionSettings, ResultSettings):
    """Measures a checkpoint the way the paper does: retrieval, recognition, likeness, editing."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")] = "embedded"
    """The checkpoint: `embedded`, or a diffusers pipeline folder; or with a CONFIG.yaml one of the paper's tables:
    spaces (1), variation (2), customise (3), edit (4) or ablation (5 and 6)."""
    config: Annotated[Path | None, tyro.conf.Positional, choice("CONFIG.yaml", "none: the checkpoint is measured")] = (
        None
    )
    """The table's file: which checkpoint, data and judges. Then no option but --output-dir and those of every command
    is taken, and the same command with the same --output-dir goes on where it stopped."""
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

    @model_validator(mode="after")
    def _a_table_and_its_file(self) -> Self:
        if self.config is None:
            if self.model in TABLES and not Path(self.model).exists():
                raise ValueError(f"found the table {self.model} without its file, expected CONFIG.yaml behind it")
            return self
        if self.model not in TABLES:
            raise ValueError(f"found {self.model!r} before {self.config}, expected one of {', '.join(TABLES)}")
        fields = type(self).model_fields
        beside = [
            name
            for name in fields.keys() - _BESIDE_A_FILE
            if getattr(self, name) != fields[name].get_default(call_default_factory=True)
        ]
        if beside:
            option = min(beside).replace("_", "-")
            raise ValueError(f"found --{option} beside {self.config}, expected it in the file: move it there")
        return self

    @property
    def table(self) -> TableName | None:
        """Which of the paper's tables is asked for."""
        return None if self.config is None else next(name for name in TABLES if name == self.model)

    @property
    def result(self) -> tuple[Path, str]:
        return self.folder / f"{self.table or 'evaluation'}.json", "--output-dir"

"""A run's file: what to tune, on which pictures, and where the results go."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BeforeValidator, model_validator

from sdipc_jax.datasets.examples import EXAMPLE_COLUMNS, class_name
from sdipc_jax.errors import InputError, printable
from sdipc_jax.files import read_yaml
from sdipc_jax.records import Record
from sdipc_jax.settings import READ_BY_YAML, Count, Fit, LocalPath, LoraSettings, Side
from sdipc_jax.tuning.settings import TuningSettings

# What decides no number of the result, or something else stands for: digests of weights and pictures, and `steps`.
_NO_NUMBERS = {
    *("model", "clip", *LoraSettings.model_fields, "data", "columns", "epochs", "output_dir", "tensorboard"),
    *("save_every", "keep", "sample_every", "sample_pictures"),
}
# What may change between two parts of a run, for those who ask for it: the state keeps its form and its meaning.
CHANGEABLE = {
    *("learning_rate", "prompt_learning_rate", "weight_decay", "clip_norm", "betas", "text_weight", "dropout"),
    *("steps", "schedule", "rematerialise", "devices", "processes"),
}


def _named(found: Any) -> Any:
    names = [*found, *found.values()] if isinstance(found, dict) else found if isinstance(found, (list, tuple)) else ()
    # Numbers are names where they are as they were typed: see `_check_names`.
    if not all(isinstance(name, str | int) and not isinstance(name, bool) for name in names):
        raise ValueError(f"names as text, since {READ_BY_YAML}")
    if isinstance(found, (list, tuple)):
        return {str(name): class_name(str(name)) for name in found}
    return found


class RunSettings(LoraSettings, TuningSettings):
    """The file of `sdipc tune`, on top of how to tune."""

    model: str = "embedded"
    """The checkpoint to tune: `embedded`, or a diffusers pipeline folder."""
    clip: Path | None = None
    """Folder of the CLIP that the checkpoint was trained with; by default clip/ in the checkpoint's folder."""
    data: LocalPath
    """A folder of pictures with one subfolder a class (or of one class, without subfolders), a .jsonl file with
    `picture` (from the file's folder), `class` and `caption` on each line, .tar shards or .parquet files with the same.
    A caption may also stand in a .txt of the picture's name beside it (docs/datasets.md)."""
    columns: dict[str, str] | None = None
    """Which column is which, such as `{picture: image, caption: text}`; every other column is ignored. Without it,
    there must be no others."""
    classes: Annotated[dict[str, str], BeforeValidator(_named)] | None = None
    """The classes to use, all if left out: a list, or a mapping from the folders' names to those for captions."""
    per_class: Count | None = None
    """Pictures of each class, the first by name; all if left out."""
    caption: str = "a photo of a {}"
    """The caption of pictures without one; {} is the class."""
    fit: Fit = "crop"
    """What the vision tower sees of a picture that is not square: its middle (`crop`), or all of it, with bars (`pad`)
    or out of proportion (`squash`). The target is cut in any case."""
    random_crop: bool = False
    """Cut pictures to the target's shape at a random place instead of in the middle."""
    random_flip: bool = False
    """Mirror pictures, each with probability one half."""
    height: Side | None = None
    """Of the targets in pixels; the checkpoint's own if left out."""
    width: Side | None = None
    """Of the targets in pixels; the checkpoint's own if left out."""
    each_class: bool = False
    """Every class is a concept of its own: all are tuned in one program, each with the result of a run of its own."""
    output_dir: LocalPath
    """The run's folder: checkpoints, metrics, samples, results."""
    save_every: Count = 50
    """Updates between two checkpoints."""
    keep: Count = 2
    """Checkpoints that are kept."""
    sample_every: Count | None = None
    """Updates between two sheets of samples; none if left out."""
    sample_pictures: Count = 4
    """Pictures on a sheet, of each concept."""
    tensorboard: bool = False
    """Also write metrics for TensorBoard (`pip install 'sdipc-jax[tensorboard]'`)."""

    @model_validator(mode="after")
    def _checked(self) -> Self:
        if self.mode == "ft" and self.each_class:
            raise ValueError("each_class is set in mode ft, expected mode ct: customise, or leave it out")
        if unknown := [name for name in self.columns or {} if name not in EXAMPLE_COLUMNS]:
            expected = ", ".join(EXAMPLE_COLUMNS)
            raise ValueError(f"columns names {unknown[0]!r}, expected some of {expected}: correct it")
        return self

    @property
    def tuning(self) -> TuningSettings:
        """How to tune, alone."""
        return TuningSettings(**{name: getattr(self, name) for name in TuningSettings.model_fields})

    @property
    def augments(self) -> bool:
        """Whether a picture differs from time to time, so that nothing of it can be computed once."""
        return self.random_crop or self.random_flip

    def identity(self) -> Record:
        """What decides the run's numbers, as JSON has it."""
        # Left out where it is as it was before there was a choice: runs of that time go on.
        usual = {"fit"} if self.fit == "crop" else set()
        return self.model_dump(mode="json", exclude=_NO_NUMBERS | usual)


def read_run(file: Path, mode: Literal["ft", "ct"], overrides: Sequence[str] = ()) -> RunSettings:
    """A run's settings.

    Args:
        mode: that the command names.
        overrides: `KEY=VALUE`, VALUE as in YAML.

    Raises:
        InputError: the file cannot be read or is no YAML mapping, an override has no =, or a value is refused.
    """
    name = printable(file)
    found = read_yaml(file, "a run's settings in YAML", "a run's settings")
    _check_names(found.get("classes"), yaml.load(file.read_bytes(), yaml.BaseLoader).get("classes"))
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator:
            raise InputError(f"found {override!r}, expected KEY=VALUE, such as steps=30: write it so")
        try:
            found[key] = yaml.safe_load(value)
            if key == "classes":
                _check_names(found[key], yaml.load(value, yaml.BaseLoader))
        except yaml.YAMLError:
            raise InputError(f"found {override!r}, expected a value as in YAML: put it in quotes") from None
    if found.setdefault("mode", mode) != mode:
        raise InputError(f"{name}: mode is {found['mode']!r}, expected {mode}: use `sdipc tune {found['mode']}`")
    try:
        return RunSettings(**found)
    except InputError as error:
        raise InputError(f"{name}: {error}") from None


def _check_names(found: Any, typed: Any) -> None:
    """Refuses names that YAML takes for something else, such as `no` and `007`.

    Args:
        found: a list, or a mapping of names to names.
        typed: the same as it was typed.
    """
    if isinstance(found, dict) and isinstance(typed, dict):
        found, typed = [*found, *found.values()], [*typed, *typed.values()]
    if not (isinstance(found, list) and isinstance(typed, list)):
        return
    for value, name in zip(found, typed, strict=False):
        if isinstance(name, str) and not isinstance(value, str) and str(value) != name:
            raise InputError(f"classes is read with {value} for {name}, expected names, since {READ_BY_YAML}")


def check_unchanged(before: Record, now: Record, allowed: Sequence[str]) -> list[str]:
    """Refuses to go on with what another run has begun.

    Args:
        before: the identity that the checkpoint was saved under.
        allowed: names that may differ; they must be `CHANGEABLE`.

    Returns:
        What differs and may, a line each.

    Raises:
        InputError: with everything that differs and may not.
    """
    for name in allowed:
        if name not in CHANGEABLE:
            raise InputError(
                f"allow-change is {name}, expected one of {', '.join(sorted(CHANGEABLE))}: everything else needs a run "
                "of its own, with another output_dir"
            )
    changed = [name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]
    lines = {name: f"{name}: {before.get(name)} -> {now.get(name)}" for name in changed}
    refused = [name for name in changed if name not in allowed]
    if refused:
        safe = [name for name in refused if name in CHANGEABLE]
        advice = f", or --allow-change {' '.join(safe)}" if safe == refused else ""
        raise InputError(
            f"found a checkpoint of a run with other settings ({'; '.join(lines[name] for name in refused)}), expected "
            f"the same: change them back, choose another output_dir{advice}"
        )
    return [lines[name] for name in changed]

"""The keys of a job's and of a run's file, for docs/settings.md, and every command's options, for docs/commands.md.

python scripts/document_settings.py > docs/settings.md
python scripts/document_settings.py commands > docs/commands.md
"""

import sys
from collections.abc import Collection
from typing import Any, Literal, get_args, get_origin

import tyro
from pydantic.fields import FieldInfo

from sdipc_jax import cli
from sdipc_jax.batch.settings import JobSettings
from sdipc_jax.commands.settings import CtSettings, FtSettings, TunedSettings
from sdipc_jax.datasets.rows import Row
from sdipc_jax.settings import CommandSettings, Settings
from sdipc_jax.tuning.config import RunSettings

_FILES = (
    ("A job: `sdipc batch JOB.yaml`", JobSettings),
    ("A row of a job's data set", Row),
    ("A run: `sdipc tune ft CONFIG.yaml` and `sdipc tune ct CONFIG.yaml`", RunSettings),
)
_HEAD = """# What a YAML file may say

Written by `python scripts/document_settings.py`. Where the default is `none`, the checkpoint decides or the setting is
off, as its meaning says. On the command line the options of `vary`, `edit` and `text` have the same names with hyphens,
and `sdipc COMMAND --help` lists them.
"""
_COMMANDS = """# Commands

Written by `python scripts/document_settings.py commands`. What all commands take comes first; exit codes are 0 done,
1 a bug, 2 refused input, 3 some items failed, 75 interrupted and resumable, 130 interrupted.
"""
_TUNE: dict[str, type[Settings]] = {"tune ft": FtSettings, "tune ct": CtSettings, "tune export": TunedSettings}


def document_commands() -> str:
    """The page of all commands."""
    kinds = {name: cli.settings_of(name) for name in cli.COMMANDS if name != "tune"} | _TUNE
    pages = [f"## Every command\n\n{_options(CommandSettings, ())}"]
    for name, kind in kinds.items():
        summary = " ".join((kind.__doc__ or "").split())
        pages.append(f"## `sdipc {name}`\n\n{summary}\n\n{_options(kind, CommandSettings.model_fields)}")
    return "\n".join([_COMMANDS, *pages])


def _options(settings: type[Settings], left_out: Collection[str]) -> str:
    fields = {name: field for name, field in settings.model_fields.items() if name not in left_out}
    rows = [
        f"| `{_typed(name, field)}` | {_stated(field)} | {_cell(_meaning(field))} |" for name, field in fields.items()
    ]
    return "\n".join(["| option | default | meaning |", "|---|---|---|", *rows]) + "\n"


def _typed(name: str, field: FieldInfo) -> str:
    """An option as it is typed, or the place of what has no name on the command line."""
    if tyro.conf.Positional in field.metadata:
        return next((each.metavar for each in field.metadata if getattr(each, "metavar", None)), name.upper())
    return f"--{name.removesuffix('_').replace('_', '-')}"


def _stated(field: FieldInfo) -> str:
    """The default as the command's help says it."""
    hint = next((each.help_behavior_hint for each in field.metadata if getattr(each, "help_behavior_hint", None)), "")
    return _cell(str(hint).removeprefix("(default: ").removesuffix(")")) if hint else _default(field)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def document() -> str:
    """The whole page."""
    return "\n".join([_HEAD, *(f"## {title}\n\n{_table(settings)}" for title, settings in _FILES)])


def _table(settings: type[Settings]) -> str:
    rows = [f"| `{name}` | {_default(field)} | {_meaning(field)} |" for name, field in settings.model_fields.items()]
    return "\n".join(["| key | default | meaning |", "|---|---|---|", *rows]) + "\n"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "must be given"
    if field.default in (None, (), ""):
        return "none"
    return f"`{str(field.default).lower() if isinstance(field.default, bool) else field.default}`"


def _meaning(field: FieldInfo) -> str:
    text = " ".join((field.description or "").split())
    choices = _choices(field.annotation)
    return f"{text} One of {', '.join(f'`{each}`' for each in choices)}." if choices else text


def _choices(annotation: Any) -> tuple[str, ...]:
    """The strings that a setting may be, if it is one of a few."""
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    return next(filter(None, map(_choices, get_args(annotation))), ())


if __name__ == "__main__":
    print(document_commands() if sys.argv[1:] == ["commands"] else document(), end="")

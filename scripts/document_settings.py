"""The keys of a job's and of a run's file, for docs/settings.md.

python scripts/document_settings.py > docs/settings.md
"""

from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from sdipc_jax.batch.settings import JobSettings
from sdipc_jax.datasets.rows import Row
from sdipc_jax.settings import Settings
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
    print(document(), end="")

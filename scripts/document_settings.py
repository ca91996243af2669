"""The keys of a job's and of a run's file, for docs/settings.md, and every command's options, for docs/commands.md.

python scripts/document_settings.py > docs/settings.md
python scripts/document_settings.py commands > docs/commands.md
"""

import re
import sys
from collections.abc import Mapping

from pydantic.fields import FieldInfo

from sdipc_jax import cli
from sdipc_jax.batch.settings import JobSettings
from sdipc_jax.commands import manual
from sdipc_jax.datasets.rows import Row
from sdipc_jax.evaluate.table_settings import DataSettings, TableSettings
from sdipc_jax.settings import Settings
from sdipc_jax.tuning.config import RunSettings

_FILES = (
    ("A job: `sdipc batch JOB.yaml`", JobSettings),
    ("A row of a job's data set", Row),
    ("A run: `sdipc tune ft CONFIG.yaml` and `sdipc tune ct CONFIG.yaml`", RunSettings),
    ("A table: `sdipc evaluate TABLE CONFIG.yaml`", TableSettings),
    ("A data set of a table: `data` and `retrieval`", DataSettings),
)
_HEAD = """# What a YAML file may say

Written by `python scripts/document_settings.py`. Where the default is `none`, the checkpoint decides or the setting is
off, as its meaning says. On the command line the options of `vary`, `edit` and `text` have the same names with hyphens,
and `sdipc COMMAND --help` lists them.
"""
_COMMANDS = """# Commands

Written by `python scripts/document_settings.py commands`; `sdipc COMMAND --help` says the same. Exit codes are 0 done,
1 a bug, 2 refused input, 3 some items failed, 75 interrupted and resumable, 130 interrupted. Options may also be spelt
as diffusers spells its arguments, such as `--num-inference-steps` and `--prompt`.
"""


def document_commands() -> str:
    """The page of all commands: what each has alone, then what several have."""
    pages, shared = list[str](), dict[type[Settings], dict[str, FieldInfo]]()
    for name in cli.COMMANDS:
        kind = cli.settings_of(name)
        own = {each: field for each, field in kind.model_fields.items() if manual.is_placed(field)}
        links = []
        for group, fields in manual.groups(kind):
            if group is kind:
                own |= fields
            else:
                shared.setdefault(group, {}).update(fields)
                links.append(f"[{_title(group)}](#{_anchor(_title(group))})")
        table = f"\n\n{_options(own)}" if own else "\n"
        pages.append(f"## `sdipc {name}`\n\n{manual.summary(kind)}{table}\nBesides: {'; '.join(links)}.\n")
    pages += [f"## {_title(group)}\n\n{_options(fields)}" for group, fields in shared.items()]
    return "\n".join([_COMMANDS, *pages])


def _title(group: type[Settings]) -> str:
    return manual.summary(group).removesuffix(".")


def _anchor(title: str) -> str:
    """What the site calls a heading."""
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")


def _options(fields: Mapping[str, FieldInfo]) -> str:
    rows = [
        f"| `{_cell(manual.typed(name, field))}` | {_cell(_default(field, hint=True))} | {_cell(_meaning(field))} |"
        for name, field in fields.items()
    ]
    return "\n".join(["| option | default | meaning |", "|---|---|---|", *rows]) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def document() -> str:
    """The whole page."""
    return "\n".join([_HEAD, *(f"## {title}\n\n{_table(settings)}" for title, settings in _FILES)])


def _table(settings: type[Settings]) -> str:
    rows = [f"| `{name}` | {_default(field)} | {_meaning(field)} |" for name, field in settings.model_fields.items()]
    return "\n".join(["| key | default | meaning |", "|---|---|---|", *rows]) + "\n"


def _default(field: FieldInfo, hint: bool = False) -> str:
    """What holds where a setting is left out; with `hint`, in the words of the command's help."""
    if field.is_required():
        return "must be given"
    found = manual.default(field) if hint or field.default not in (None, (), "") else "none"
    plain = str(field.default)
    return f"`{found}`" if found != "none" and found in (plain, plain.lower()) else found


def _meaning(field: FieldInfo) -> str:
    text = " ".join((field.description or "").split())
    choices = manual.choices(field.annotation)
    return f"{text} One of {', '.join(f'`{each}`' for each in choices)}." if choices else text


if __name__ == "__main__":
    print(document_commands() if sys.argv[1:] == ["commands"] else document(), end="")

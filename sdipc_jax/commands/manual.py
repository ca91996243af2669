"""What `--help` says: every option of a command in groups, those that are used most first."""

from collections.abc import Iterator
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

import tyro
from pydantic.fields import FieldInfo

from sdipc_jax.commands.listing import row
from sdipc_jax.settings import CommandSettings, ParallelSettings, Settings

Fields = dict[str, FieldInfo]
_MOST_USED = (
    *("num_images", "seed", "steps", "guidance_scale", "sampler", "negative_prompt", "height", "width", "fast"),
    *("model", "output_dir"),
)
# What few need comes last.
_LAST = (ParallelSettings, CommandSettings)
_KINDS: dict[Any, str] = {int: "INT", float: "FLOAT", str: "TEXT", Path: "FILE"}


def groups(kind: type[Settings]) -> Iterator[tuple[type[Settings], Fields]]:
    """The options of a command: its own and those that are used most, then those of each schema it has with others."""
    fields = {name: field for name, field in kind.model_fields.items() if not is_placed(field)}
    declared = {
        each: [name for name in fields if name in vars(each).get("__annotations__", ())]
        for each in kind.__mro__
        if issubclass(each, Settings)
    }
    first = [*declared.pop(kind), *_MOST_USED]
    shown = {name: fields.pop(name) for name in first if name in fields}
    if shown:
        yield kind, shown
    for each in sorted(declared, key=lambda each: _LAST.index(each) if each in _LAST else -1):
        if found := {name: fields.pop(name) for name in declared[each] if name in fields}:
            yield each, found


def summary(kind: type[Settings]) -> str:
    """What a schema is for, in a sentence."""
    return " ".join((kind.__doc__ or "").split())


def is_placed(field: FieldInfo) -> bool:
    """Whether a setting is typed without its name."""
    return tyro.conf.Positional in field.metadata


def typed(name: str, field: FieldInfo) -> str:
    """An option as it is typed, or what stands in the place of a setting that is typed without its name."""
    if is_placed(field):
        return _said(field, "metavar") or "|".join(choices(field.annotation)) or name.upper()
    return f"--{name.removesuffix('_').replace('_', '-')}"


def default(field: FieldInfo) -> str:
    """What holds where an option is left out; nothing for those that must be given."""
    if hint := _said(field, "help_behavior_hint"):
        return hint.removeprefix("(default: ").removesuffix(")")
    if field.is_required():
        return ""
    if field.default in (None, (), ""):
        return "none"
    return str(field.default).lower() if isinstance(field.default, bool) else str(field.default)


def choices(annotation: Any) -> tuple[str, ...]:
    """The strings that a setting may be, if it is one of a few."""
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    return next(filter(None, map(choices, get_args(annotation))), ())


def page(name: str, kind: type[Settings]) -> str:
    """The whole page of a command."""
    placed = {each: field for each, field in kind.model_fields.items() if is_placed(field)}
    places = " ".join(
        typed(each, field) if field.is_required() else f"[{typed(each, field)}]" for each, field in placed.items()
    )
    needed = "".join(
        f" {typed(each, field)} {_value(field)}"
        for each, field in kind.model_fields.items()
        if field.is_required() and each not in placed
    )
    parts = [f"usage: sdipc {' '.join(filter(None, [name, places]))}{needed} [OPTIONS]", summary(kind)]
    if placed:
        parts.append("\n".join(_entry(typed(each, field), field) for each, field in placed.items()))
    for group, fields in groups(kind):
        title = "Its options, the most used ones first" if group is kind else summary(group).removesuffix(".")
        parts.append("\n".join([f"{title}:", *(_entry(_option(each, field), field) for each, field in fields.items())]))
    return "\n\n".join(parts)


def _option(name: str, field: FieldInfo) -> str:
    return f"{typed(name, field)} {_value(field)}".rstrip()


def _value(field: FieldInfo) -> str:
    """What is typed behind an option's name."""
    if metavar := _said(field, "metavar"):
        return metavar
    if found := choices(field.annotation):
        return "|".join(found)
    return _kind(field.annotation)


def _kind(annotation: Any) -> str:
    if get_origin(annotation) is Annotated:
        return _kind(get_args(annotation)[0])
    found = [each for each in get_args(annotation) if each is not NoneType]
    return _kind(found[0]) if found else _KINDS.get(annotation, "")


def _said(field: FieldInfo, attribute: str) -> str:
    return next((str(getattr(each, attribute)) for each in field.metadata if getattr(each, attribute, None)), "")


def _entry(left: str, field: FieldInfo) -> str:
    text = " ".join((field.description or "").split())
    if not (field.annotation is bool or is_placed(field)):
        text += f" (default: {default(field)})" if not field.is_required() else " (must be given)"
    return row(left, text)

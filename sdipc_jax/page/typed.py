"""Settings as the command that a person would type for them."""

import shlex
from typing import Any

import tyro

from sdipc_jax.settings import Settings

# Of the run and not of its pictures.
_LEFT_OUT = {"output_dir", "json_", "quiet", "overwrite"}
# What an option takes as one word.
_JOINED = {"guidance_interval"}


def as_typed(command: str, settings: Settings) -> str:
    """The command that makes the same pictures, in a folder of its own.

    Settings that are as they would be anyway are left out, so what the checkpoint decides stays the checkpoint's.
    """
    positional: list[str] = []
    options: list[str] = []
    for name, field in type(settings).model_fields.items():
        value = getattr(settings, name)
        if tyro.conf.Positional in field.metadata:
            positional += _words(value)
        elif name not in _LEFT_OUT and value != field.default:
            options += _option(name, value)
    if any(word.startswith("-") for word in positional):
        return shlex.join(["sdipc", command, *options, "--", *positional])
    # Before the options: those that take several values would take these too.
    return shlex.join(["sdipc", command, *positional, *options])


def _option(name: str, value: Any) -> list[str]:
    option = "--" + name.replace("_", "-")
    if value is True:
        return [option]
    words = [",".join(_words(value))] if name in _JOINED else _words(value)
    # A text that begins with a dash would be taken for an option.
    return [f"{option}={words[0]}"] if len(words) == 1 and words[0].startswith("-") else [option, *words]


def _words(value: Any) -> list[str]:
    return [str(each) for each in value] if isinstance(value, tuple) else [str(value)]

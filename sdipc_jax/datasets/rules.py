"""What is taken from a data set and what is passed over: one set of rules, for files in folders and in archives."""

import codecs
import json
from collections import Counter
from typing import Any

from sdipc_jax.errors import InputError, printable
from sdipc_jax.pictures.formats import FORMATS, identify

# Names of pictures that can be read. What has another name is judged by its first bytes.
ENDINGS = frozenset(ending for each in FORMATS if each.decoder is not None for ending in each.endings)
HEAD = 128
# Copies, and what is not all there yet, whatever their bytes are.
_UNFINISHED = {".bak", ".crdownload", ".download", ".orig", ".part", ".partial", ".tmp"}
# Other programs' folders, with pictures of their own: those of macOS's archives and of Synology's thumbnails.
_FOREIGN = ("__MACOSX", "@eaDir")

DOTTED, LINKED = "names that begin with a dot", "links to folders"
_ONE = {DOTTED: "name that begins with a dot", LINKED: "link to a folder"}
_KINDS_SHOWN = 10


def passed_over(name: str) -> str | None:
    """Why nothing of this name, a path in its data set, is looked at; None if it is.

    >>> passed_over("a/._b.jpg"), passed_over("./b.jpg")
    ('names that begin with a dot', None)
    """
    for part in name.split("/"):
        if part in _FOREIGN:
            return f"in {part}"
        if part.startswith(".") and part not in (".", ".."):
            return DOTTED
    return None


def kind(name: str) -> str:
    """What a file that is not taken is counted as: its name's ending.

    >>> kind("a/b.TIF"), kind("README")
    ('.tif', 'without an ending')
    """
    ending = ending_of(name)
    return printable(ending[:20]) if ending else "without an ending"


def ending_of(name: str) -> str:
    """The lower-case ending of a name with its dot; "" if it has none."""
    base = name.rpartition("/")[2]
    return base[base.rindex(".") :].lower() if "." in base[1:] else ""


def is_picture(name: str, head: bytes) -> bool:
    """Whether a file whose name does not tell is a picture that can be read, by its first bytes."""
    found = None if ending_of(name) in _UNFINISHED or name.endswith("~") else identify(head)
    return found is not None and found.decoder is not None


def told(passed: Counter[str]) -> tuple[str, ...]:
    """What was passed over, for a person: no line or one.

    >>> told(Counter({".tif": 3, DOTTED: 1}))
    ('4 files not taken: 3 .tif, 1 name that begins with a dot',)
    """
    passed = +passed
    total = passed.total()
    if not total:
        return ()
    most_first = sorted(passed.items(), key=lambda each: (-each[1], each[0]))
    kinds = [f"{count} {_ONE.get(what, what) if count == 1 else what}" for what, count in most_first]
    more = [f"and {len(kinds) - _KINDS_SHOWN} other kinds"] if len(kinds) > _KINDS_SHOWN else []
    return (f"{total} file{'s'[: total > 1]} not taken: {', '.join([*kinds[:_KINDS_SHOWN], *more])}",)


def text_of(data: bytes) -> str:
    """A text file's content, without its byte-order mark and the space around it.

    Raises:
        UnicodeDecodeError: it is not UTF-8, and no mark says that it is UTF-16.
    """
    wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return data.decode("utf-16" if wide else "utf-8-sig").strip()


def object_of(data: bytes) -> dict[str, Any]:
    """The JSON object in a line or a file.

    Raises:
        InputError: it is none, or has a key twice.
    """
    try:
        values = json.loads(data.decode("utf-8-sig"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise InputError(f"found no JSON ({error}), expected an object: correct it") from None
    if not isinstance(values, dict):
        raise InputError(f"found a JSON {type(values).__name__}, expected an object: correct it")
    return values


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        name = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {name[:40]!r} twice")
    return values

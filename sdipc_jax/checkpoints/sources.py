"""Where a checkpoint is, from what was typed: `embedded`, an alias, an id on the hub, a folder or a file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from sdipc_jax.checkpoints import hub
from sdipc_jax.checkpoints.aliases import ALIASES, MOVED
from sdipc_jax.errors import InputError, printable
from sdipc_jax.spelling import nearest

EMBEDDED = Path(__file__).parent.parent / "embedded"


@dataclass(frozen=True)
class Source:
    """A folder or file.

    Attributes:
        origin: the hub's repository and commit that it was fetched from.
        note: what a person should know about it.
        defaults: what it asks for where the user does not.
    """

    path: Path
    origin: str | None = None
    note: str | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)


def find(name: str | Path, revision: str | None = None, parts: Sequence[str] = hub.PARTS) -> Source:
    """The folder or file that a name stands for, fetched if need be. What is there under the name comes first.

    Args:
        name: `embedded`, an alias, `ORG/NAME[@REVISION]`, a folder or a file.
        revision: of a repository on the hub.
        parts: of a pipeline there, those that are wanted.

    Raises:
        InputError: there is no such thing, or it cannot be fetched.
    """
    if name == "embedded":
        return Source(EMBEDDED)
    if Path(name).exists():
        if revision is not None:
            raise InputError(f"{printable(name)}: found a folder or file, expected an id for --revision: leave it out")
        return Source(Path(name))
    text = str(name)
    if text in ALIASES:
        alias = ALIASES[text]
        return replace(_fetched(alias.repository, revision or alias.commit, parts), defaults=alias.defaults)
    repository, at, written = text.partition("@")
    if hub.REPOSITORY.fullmatch(repository) and Path(repository).suffix != ".safetensors":
        if at and revision is not None:
            raise InputError(f"{text}: found a revision here and in --revision, expected one of them: leave one out")
        if repository not in MOVED:
            return _fetched(repository, written or revision, parts)
        note = f"{repository} was deleted: {MOVED[repository]} is used"
        return replace(_fetched(MOVED[repository], written or revision, parts), note=note)
    meant = nearest(text, ("embedded", *ALIASES))
    raise InputError(
        f"{printable(name)}: no such folder or file, expected 'embedded', {', '.join(ALIASES)}, an id on the hub "
        f"(ORG/NAME), a folder or a .safetensors file: {f'did you mean {meant}?' if meant else 'check the spelling'}"
    )


def find_lora(name: str | Path) -> Path:
    """The LoRA file that a name stands for, fetched if need be. What is there under the name comes first.

    Args:
        name: a file, `ORG/NAME[@REVISION]` or `ORG/NAME[@REVISION]/FILE.safetensors`.

    Raises:
        InputError: it cannot be fetched, or the repository has several and none is named.
    """
    owner, _, rest = str(name).partition("/")
    repository, _, file = rest.partition("/")
    repository, _, revision = repository.partition("@")
    is_id = hub.REPOSITORY.fullmatch(f"{owner}/{repository}") and Path(repository).suffix != ".safetensors"
    if Path(name).exists() or not is_id or (file and Path(file).suffix != ".safetensors"):
        return Path(name)
    return hub.fetch_lora(f"{owner}/{repository}", revision or None, file or None)


def _fetched(repository: str, revision: str | None, parts: Sequence[str]) -> Source:
    shows = hub.WHOLE if parts == hub.PARTS else (f"{parts[0]}/config.json", "config.json")
    snapshot = hub.fetch(repository, revision, partial(hub.choose, parts=parts), shows)
    return Source(snapshot.folder, snapshot.origin)

"""The command `models`: which checkpoints have names here, and what is in the cache."""

from dataclasses import dataclass

from sdipc_jax.checkpoints import hub
from sdipc_jax.checkpoints.aliases import ALIASES
from sdipc_jax.checkpoints.sources import find
from sdipc_jax.commands.settings import ModelsSettings
from sdipc_jax.errors import printable
from sdipc_jax.records import Record, Report


@dataclass(frozen=True)
class Models:
    """What was listed or fetched: a record each."""

    records: list[Record]

    def to_json(self) -> Record:
        """What `--json` prints."""
        return {"records": self.records}

    def __str__(self) -> str:
        return "\n".join(str(record["line"]) for record in self.records)


def models(settings: ModelsSettings, report: Report) -> Models:
    """Lists them, or fetches and verifies some."""
    if settings.action == "fetch":
        return Models([_fetch(name, report, len(settings.names), done) for done, name in enumerate(settings.names)])
    records = []
    for name, alias in ALIASES.items():
        kept = hub.cached(alias.repository, alias.commit)
        size = f"{alias.gigabytes:.1f} GB"
        state = "in the cache" if kept else "not fetched"
        line = f"{name:10} {size:>8}  {state:12}  {alias.repository}@{alias.commit[:8]}  ({alias.licence})"
        values: Record = {
            "name": name,
            "repository": alias.repository,
            "commit": alias.commit,
            "licence": alias.licence,
            "gigabytes": alias.gigabytes,
            "clip": alias.clip,
            "cached": None if kept is None else str(kept.folder),
        }
        records.append(values | {"line": line})
    return Models(records)


def _fetch(name: str, report: Report, count: int, done: int) -> Record:
    source = find(name)
    # Reading a file of the cache compares it with its digest.
    digests = {
        str(path.relative_to(source.path)): hub.sha256(path)
        for path in sorted(source.path.rglob("*"))
        if path.is_file()
    }
    report((done + 1) / count)
    line = f"{name}: {source.origin or 'already here'}, {len(digests)} files verified in {printable(source.path)}"
    clip = ALIASES[name].clip if name in ALIASES else None
    if clip is not None and hub.cached(ALIASES[clip].repository, ALIASES[clip].commit) is None:
        line += f"; to be shown pictures it needs {clip} too"
    return {"name": name, "origin": source.origin, "folder": str(source.path), "digests": digests, "line": line}

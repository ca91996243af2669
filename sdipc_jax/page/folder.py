"""The page's folder: each request's inputs and results in a folder of its own, of the last so many requests."""

import json
import secrets
import shutil
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

from sdipc_jax.errors import InputError
from sdipc_jax.pictures.formats import FORMATS
from sdipc_jax.pictures.outputs import unique_stems
from sdipc_jax.pictures.reading import decode_picture
from sdipc_jax.records import Record
from sdipc_jax.settings import MANIFEST

KEPT = 200
MAX_BYTES = 20_000_000
_INPUTS = "inputs"
_ENDINGS = {each.name: each.endings[0] for each in FORMATS}


class Folder:
    """Requests by names that nobody guesses; the oldest is removed where there are more than are kept."""

    def __init__(self, root: Path, kept: int = KEPT) -> None:
        self.root, self.kept = root, kept
        self._requests: OrderedDict[str, Path] = OrderedDict()
        self._lock = threading.Lock()
        # A picture at the limit takes 150 MB of memory: one is decoded at a time.
        self._decoding = threading.Lock()

    def new(self) -> str:
        """A name for a request."""
        name = secrets.token_hex(8)
        with self._lock:
            self._requests[name] = self.root / name
            removed = [self._requests.popitem(last=False)[1] for _ in range(len(self._requests) - self.kept)]
        for path in removed:
            shutil.rmtree(path, ignore_errors=True)
        return name

    def place(self, name: str) -> Path:
        """A request's folder; it need not be there."""
        return self.root / name

    def remove(self, name: str) -> None:
        """Forgets a request that came to nothing."""
        with self._lock:
            self._requests.pop(name, None)
        shutil.rmtree(self.root / name, ignore_errors=True)

    def receive(self, name: str, files: Sequence[tuple[str, bytes]]) -> tuple[list[Path], list[Record]]:
        """Keeps the pictures that can be read, under safe names and with the ending of what they are.

        Args:
            files: what they are called, and their bytes.

        Returns:
            Where they are, and a record of each that cannot be used.
        """
        good: list[tuple[str, str, bytes]] = []
        failures: list[Record] = []
        # Whatever a browser or a program says of folders is no part of a name.
        titles = [title.replace("\\", "/").rpartition("/")[2] or "picture" for title, _ in files]
        for title, (_, data) in zip(titles, files, strict=True):
            try:
                good.append((title, _kind(title, data, self._decoding), data))
            except InputError as error:
                failures.append({"input": title, "error": str(error)})
        paths: list[Path] = []
        folder = self.place(name) / _INPUTS
        if good:
            folder.mkdir(parents=True)
        stems = unique_stems(title.rpartition(".")[0] or title for title, _, _ in good)
        for stem, (_, kind, data) in zip(stems, good, strict=True):
            paths.append(folder / f"{stem}{_ENDINGS[kind]}")
            paths[-1].write_bytes(data)
        return paths, failures

    def records(self, name: str) -> list[Record]:
        """The pictures that are whole so far, as the manifest has them."""
        try:
            text = (self.place(name) / MANIFEST).read_text(encoding="utf-8")
        except OSError:
            return []
        # The last line may be on its way.
        lines = text[: text.rfind("\n") + 1].splitlines()
        return [record for record in map(json.loads, lines) if "file" in record]

    def find(self, name: str, file: str) -> Path | None:
        """A file of a request that is kept: an input, a result or the sheet; None for everything else."""
        with self._lock:
            folder = self._requests.get(name)
        if folder is None:
            return None
        there = [path for each in (folder, folder / _INPUTS) if each.is_dir() for path in each.iterdir()]
        # What is asked for is compared with what is there, and never opened as it is.
        found = {path.relative_to(folder).as_posix(): path for path in there if path.is_file()}
        return found.get(file)


def _kind(title: str, data: bytes, lock: threading.Lock) -> str:
    if len(data) > MAX_BYTES:
        raise InputError(f"{title}: found more than {MAX_BYTES // 10**6} MB, expected a picture: scale it down")
    if not data:
        raise InputError(f"{title}: found an empty file, expected a picture: get it again")
    with lock:
        return decode_picture(data, title).format

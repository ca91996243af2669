"""A run's checkpoints: written beside the training, whole or not there at all, and never silently wrong.

`N/` holds the state after N updates as Orbax writes it, and MANIFEST.json, written last, with the sha256 of each array
and each file, the settings, the versions and the position in the data. A folder is called `N.partial` until it is
whole, and `N.corrupt` when it turned out to be damaged.
"""

import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.options import AsyncOptions, AtomicityMode, AtomicityOptions, MultiprocessingOptions

from sdipc_jax.errors import InputError, one_line, printable
from sdipc_jax.files import rename, write_atomically
from sdipc_jax.parallel import gather, is_first
from sdipc_jax.records import Record, digest_of

MANIFEST = "MANIFEST.json"
# The results of a run may differ in the last bits between versions of these.
_PACKAGES = ("sdipc-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
_PARTIAL, _CORRUPT = ".partial", ".corrupt"
# For what is written beside the arrays.
_SPARE_BYTES = 2**20


@dataclass(frozen=True)
class Saved:
    """A checkpoint that was verified.

    Attributes:
        step: updates done.
        values: what was saved beside the arrays.
        versions: of the packages that wrote it.
    """

    folder: Path
    step: int
    values: Record
    versions: Mapping[str, str]
    arrays: Mapping[str, Record]

    def restore(self, like: Any) -> Any:
        """The arrays, on the host.

        Args:
            like: a tree with their structure, shapes and dtypes.

        Raises:
            InputError: the tree is another, or an array is not what was saved.
        """
        named = _named(like)
        for name in sorted(named.keys() | self.arrays.keys()):
            here = named.get(name)
            expected = None if here is None else (list(here.shape), str(here.dtype))
            there = self.arrays.get(name)
            found = None if there is None else (there["shape"], there["dtype"])
            if found != expected:
                raise InputError(
                    f"{printable(self.folder)}: {name} is {found or 'missing'}, expected {expected or 'nothing'}: "
                    "it is another run's, choose another output_dir"
                )
        abstract = {name: np.empty(leaf.shape, leaf.dtype) for name, leaf in named.items()}
        try:
            with _checkpointer() as checkpointer:
                found = checkpointer.restore(self.folder.resolve(), args=ocp.args.StandardRestore(abstract))
        except Exception as error:  # Orbax and its file drivers raise almost anything.
            raise InputError(
                f"{printable(self.folder)}: could not be read ({_reason(error)}) although it was whole a moment ago, "
                "expected it to stay as it is: bring the folder back, and give the same command again"
            ) from error
        for name, array in found.items():
            if _sha256(array) != self.arrays[name]["sha256"]:
                raise InputError(
                    f"{printable(self.folder)}: {name} is not what was saved although its files are: the memory or "
                    "the file system is faulty"
                )
        return jax.tree.unflatten(jax.tree.structure(like), [found[name] for name in named])


class Checkpoints:
    """The checkpoints in a folder. Use as a context: at its end the last one is whole, or an error says why not.

    Args:
        folder: where they go.
        keep: how many stay.
        log: told what was saved, once it will survive anything, and what was found damaged.
    """

    def __init__(self, folder: Path, keep: int, log: Callable[[str], None]) -> None:
        self.folder, self._keep, self._log = folder, keep, log
        self._writer = ThreadPoolExecutor(1, "checkpoints")
        self._pending: Future[None] | None = None

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._checkpointer = _checkpointer()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.wait()
        finally:
            self._writer.shutdown()
            self._checkpointer.close()

    def newest(self) -> Saved | None:
        """The newest checkpoint that is whole, or None at the start of a run. All processes must call it.

        Damaged ones are set aside as `N.corrupt`, and what a killed process had not finished is removed.

        Raises:
            InputError: there are checkpoints, and none is whole.
        """
        saved = self._newest() if is_first() else None
        step = gather("" if saved is None else str(saved.step))[0]
        return saved if is_first() or not step else _verify(self.folder / step, int(step))

    def _newest(self) -> Saved | None:
        names = [each.name for each in self.folder.iterdir()]
        for name in names:
            if re.fullmatch(rf"\d+{_PARTIAL}", name):
                shutil.rmtree(self.folder / name, ignore_errors=True)
        damaged = []
        for step in sorted((int(name) for name in names if re.fullmatch(r"0|[1-9]\d*", name)), reverse=True):
            folder = self.folder / str(step)
            try:
                return _verify(folder, step)
            except _Damage as damage:
                aside = self._set_aside(folder)
                self._log(f"warning: checkpoint {step} is damaged ({damage}); set aside as {aside.name}")
                damaged.append(f"{step} ({damage})")
        damaged += sorted(name for name in names if re.search(rf"\d{_CORRUPT}(-\d+)?$", name))
        if damaged:
            raise InputError(
                f"{printable(self.folder)}: found no checkpoint that is whole, but damaged ones: {', '.join(damaged)}; "
                "expected one to go on from: bring one back, or start anew with another output_dir"
            )
        return None

    def save(self, step: int, tree: Any, values: Record) -> None:
        """Begins to save, and returns when the arrays are copied. Waits for the checkpoint before, if need be.

        Args:
            step: updates done.
            tree: arrays, the same on every process.
            values: what JSON can hold.

        Raises:
            InputError: the checkpoint before could not be written.
        """
        self.wait()
        # A copy, because the next step may write its results over the arrays.
        arrays = {name: np.array(leaf) for name, leaf in _named(tree).items()}
        self._pending = self._writer.submit(self._save, step, arrays, values)

    def wait(self) -> None:
        """Waits until what was begun is saved.

        Raises:
            InputError: it could not be written.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _save(self, step: int, arrays: Mapping[str, np.ndarray], values: Record) -> None:
        final, partial = self.folder / str(step), self.folder / f"{step}{_PARTIAL}"
        size = sum(array.nbytes for array in arrays.values())
        try:
            if not self.folder.is_dir():
                raise FileNotFoundError("the folder is gone")
            if shutil.disk_usage(self.folder).free < size + _SPARE_BYTES:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._checkpointer.save(partial.resolve(), args=ocp.args.StandardSave(dict(arrays)))
            self._checkpointer.wait_until_finished()
            if is_first():
                manifest = {
                    "step": step,
                    "values": values,
                    "versions": versions(),
                    "arrays": {
                        name: {"shape": list(array.shape), "dtype": str(array.dtype), "sha256": _sha256(array)}
                        for name, array in arrays.items()
                    },
                    "files": _file_digests(partial),
                }
                manifest["sha256"] = digest_of(manifest)
                write_atomically(partial / MANIFEST, json.dumps(manifest, indent=1).encode())
                rename(partial, final)
        except Exception as error:  # Orbax and its file drivers raise almost anything.
            if is_first():
                shutil.rmtree(partial, ignore_errors=True)
            raise InputError(
                f"{printable(final)}: the checkpoint of {size} bytes could not be written ({_reason(error)}), expected "
                "a folder with room for it: free some space or bring the folder back, and give the same command again; "
                "the checkpoints before are intact"
            ) from error
        self._log(f"saved step {step}")
        if is_first():
            self._remove_old()

    def _remove_old(self) -> None:
        steps = sorted(int(each.name) for each in self.folder.iterdir() if re.fullmatch(r"0|[1-9]\d*", each.name))
        for step in steps[: -self._keep]:
            # A name that says so first: nothing that is half removed looks like a checkpoint.
            doomed = self.folder / f"{step}{_PARTIAL}"
            os.replace(self.folder / str(step), doomed)
            shutil.rmtree(doomed, ignore_errors=True)

    def _set_aside(self, folder: Path) -> Path:
        aside, count = folder.with_name(folder.name + _CORRUPT), 1
        while aside.exists():
            count += 1
            aside = folder.with_name(f"{folder.name}{_CORRUPT}-{count}")
        try:
            rename(folder, aside)
        except OSError as error:
            raise InputError(
                f"{printable(folder)}: {error.strerror}, expected to rename the damaged checkpoint to {aside.name}: "
                "move it out of the way"
            ) from None
        return aside


def versions() -> dict[str, str]:
    """Of the packages that the results depend on."""
    return {name: version(name) for name in _PACKAGES}


def minor_changes(before: Mapping[str, str]) -> list[str]:
    """The packages whose minor version is another now, a line each."""
    now = versions()

    def minor(text: str) -> str:
        return ".".join(text.split(".")[:2])

    return [
        f"{name} {before.get(name, 'unknown')} -> {now[name]}"
        for name in now
        if minor(before.get(name, "unknown")) != minor(now[name])
    ]


class _Damage(Exception):
    """What is wrong with a checkpoint."""


def _checkpointer() -> ocp.AsyncCheckpointer:
    # Orbax tells of every step that it takes. Errors come as exceptions.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    # Named, processes wait for each other on their hosts. Otherwise Orbax has their devices exchange something, which
    # the other thread's training does too, on each process in an order of its own.
    together = MultiprocessingOptions(active_processes=set(range(jax.process_count())))
    return ocp.AsyncCheckpointer(
        ocp.StandardCheckpointHandler(multiprocessing_options=together),
        multiprocessing_options=together,
        # Where a folder cannot be made, Orbax's threads would wait for it for minutes, the process's end too.
        async_options=AsyncOptions(create_directories_asynchronously=False),
        atomicity_options=AtomicityOptions(mode=AtomicityMode.COMMIT_FILE, allow_legacy_atomic_rename=False),
    )


def _verify(folder: Path, step: int) -> Saved:
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        expected = manifest.pop("sha256")
        if digest_of(manifest) != expected or manifest["step"] != step:
            raise _Damage(f"{MANIFEST} is not what was written")
        found = _file_digests(folder)
    except OSError as error:
        raise _Damage(f"{Path(error.filename or MANIFEST).name}: {error.strerror}") from None
    except (ValueError, KeyError, AttributeError, TypeError):
        raise _Damage(f"{MANIFEST} is not what was written") from None
    for name, digest in manifest["files"].items():
        if found.get(name) != digest:
            raise _Damage(f"{name} {'is not what was written' if name in found else 'is missing'}")
    return Saved(folder, step, manifest["values"], manifest["versions"], manifest["arrays"])


def _reason(error: Exception) -> str:
    return one_line(error)[:500] or type(error).__name__


def _named(tree: Any) -> dict[str, Any]:
    leaves, _ = jax.tree.flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _sha256(array: np.ndarray) -> str:
    content: Any = np.ascontiguousarray(array).view(np.uint8)
    return hashlib.sha256(content).hexdigest()


def _file_digests(folder: Path) -> dict[str, str]:
    digests = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path != folder / MANIFEST:
            with path.open("rb") as stream:
                digests[path.relative_to(folder).as_posix()] = hashlib.file_digest(stream, "sha256").hexdigest()
    return digests

"""Checkpoints from the Hugging Face hub, through `huggingface_hub` alone: the fewest files, of one commit, verified.

The files lie in its cache, which other programs share; `HF_HOME`, `HF_HUB_CACHE`, `HF_ENDPOINT`, `HF_TOKEN`,
`HF_HUB_OFFLINE` and the others of its variables are honoured.
"""

import hashlib
import os
import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from sdipc_jax.checkpoints.tensors import RUNS_CODE, weight_names
from sdipc_jax.errors import InputError, one_line, printable

REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
# Of a pipeline; nothing else of a repository is ever fetched.
PARTS = (
    *("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"),
    *("scheduler", "safety_checker", "feature_extractor", "clip"),
)
# Any of these is there where a whole pipeline, or a repository of one part, was fetched.
WHOLE = ("model_index.json", "config.json")
# What diffusers calls a LoRA.
LORA_FILE = "pytorch_lora_weights.safetensors"
_TRIES, _LONGEST_WAIT = 5, 60.0
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Entry:
    """A file of a repository: its path, its size, and its sha256 where the hub knows it."""

    path: str
    size: int
    sha256: str | None = None


@dataclass(frozen=True)
class Snapshot:
    """A repository at one commit, in the cache."""

    folder: Path
    repository: str
    commit: str

    @property
    def origin(self) -> str:
        return f"{self.repository}@{self.commit}"


# Which of a repository's files are fetched.
Choose = Callable[[Iterable[Entry], str], list[Entry]]


def choose(entries: Iterable[Entry], repository: str, parts: Sequence[str] = PARTS) -> list[Entry]:
    """The fewest files that make a pipeline or a CLIP: configurations, and safetensors of one variant for each part.

    Args:
        parts: of a pipeline, those that are wanted.

    Raises:
        InputError: there are no weights, or only files that could run code when opened.
    """
    listed = {entry.path: entry for entry in entries}
    pipeline = "model_index.json" in listed
    folders = parts if pipeline else ("",)
    chosen = ["model_index.json"] if pipeline and parts == PARTS else []
    found = False
    for folder in folders:
        inside = [path for path in listed if str(PurePosixPath(path).parent) == (folder or ".")]
        texts = [path for path in inside if path.endswith((".json", ".txt")) and ".index." not in path]
        weights = _weights(inside)
        if folder in ("", "unet", "vae", "text_encoder") and not weights and inside:
            pickles = sorted(path for path in inside if path.endswith(RUNS_CODE))
            has = f"{pickles[0]}, which can run code when it is opened" if pickles else "no weights"
            raise InputError(
                f"{repository}: found {has} in {folder or 'it'}, expected safetensors: use another repository of the "
                "same checkpoint"
            )
        found |= bool(weights)
        chosen += [*texts, *weights]
    if not found:
        raise InputError(
            f"{repository}: found neither a pipeline nor a CLIP, expected model_index.json, or config.json with "
            "model.safetensors: check the id"
        )
    return [listed[path] for path in dict.fromkeys(chosen)]


def _weights(paths: Sequence[str]) -> list[str]:
    """The safetensors of the first variant that is there, with the index where they are several."""
    names = {PurePosixPath(path).name: path for path in paths}
    for found, pattern in weight_names():
        if found in names:
            shards = [path for name, path in sorted(names.items()) if pattern and re.fullmatch(pattern, name)]
            return [names[found], *shards]
    return []


def offline() -> bool:
    """The network must not be used."""
    from huggingface_hub import constants

    asked = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    return asked or bool(constants.HF_HUB_OFFLINE)


def choose_one(entries: Iterable[Entry], repository: str, file: str | None) -> Entry:
    """One safetensors file: the one with this path, else what diffusers calls a LoRA, else the only one there is."""
    listed = {entry.path: entry for entry in entries if entry.path.endswith(".safetensors")}
    usual = LORA_FILE if LORA_FILE in listed else None
    paths = [path for path in listed if path == (file or usual or path)]
    if len(paths) == 1:
        return listed[paths[0]]
    found = ", ".join(map(printable, sorted(listed)[:8])) or "no safetensors file"
    raise InputError(
        f"{repository}: found {found}, expected {printable(file) if file else 'one LoRA file'}: name it, as in "
        f"{repository}/FILE.safetensors"
    )


def cached(repository: str, revision: str | None = None, files: Sequence[str] = WHOLE) -> Snapshot | None:
    """What an earlier run has fetched of a repository, if one of these files was among it."""
    from huggingface_hub import try_to_load_from_cache

    for name in files:
        path = try_to_load_from_cache(repository, name, revision=revision)
        if isinstance(path, str):
            folder = Path(path).parents[len(PurePosixPath(name).parts) - 1]
            return Snapshot(folder, repository, folder.name)
    return None


def fetch_lora(repository: str, revision: str | None = None, file: str | None = None) -> Path:
    """Fetches one LoRA file, or takes it from the cache where there is no network. See `fetch`."""
    chosen = [file or LORA_FILE]

    def choose(entries: Iterable[Entry], repository: str) -> list[Entry]:
        found = choose_one(entries, repository, file)
        chosen[:] = [found.path]
        return [found]

    folder = fetch(repository, revision, choose, chosen).folder
    return folder / chosen[0]


def fetch(
    repository: str, revision: str | None = None, choose: Choose = choose, files: Sequence[str] = WHOLE
) -> Snapshot:
    """Fetches a checkpoint, or takes it from the cache where there is no network.

    Args:
        repository: the id, `ORG/NAME`.
        revision: a branch, tag or commit; the newest if None.
        choose: which of a repository's files are fetched.
        files: any of these shows that the cache has them.

    Raises:
        InputError: one line that says what is wrong with the repository, the network or the files.
    """
    name = repository if revision is None else f"{repository}@{revision}"
    if offline():
        if (kept := cached(repository, revision, files)) is not None:
            return kept
        raise InputError(
            f"{name}: not in the cache, and the network must not be used: run `sdipc models fetch {name}` where there "
            "is one"
        )
    from huggingface_hub import HfApi, errors
    from huggingface_hub.hf_api import RepoFile

    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None, library_name="sdipc-jax")
    try:
        commit = revision if revision and _COMMIT.fullmatch(revision) else None
        if commit is None:
            commit = str(_patiently(lambda: api.repo_info(repository, revision=revision)).sha)
        listed = _patiently(lambda: list(api.list_repo_tree(repository, recursive=True, revision=commit)))
        found = [entry for entry in listed if isinstance(entry, RepoFile)]
        entries = [Entry(file.path, file.size, file.lfs.sha256 if file.lfs else None) for file in found]
        folder = Path()
        for entry in choose(entries, repository):
            folder = _download(api, repository, commit, entry)
        _remember(repository, revision, commit)
        return Snapshot(folder, repository, commit)
    except (errors.LocalEntryNotFoundError, ConnectionError, TimeoutError) as error:
        if (kept := cached(repository, revision, files)) is not None:
            return kept
        if isinstance(error.__cause__, errors.FileMetadataError):
            raise InputError(_explained(error.__cause__, name)) from None
        raise InputError(f"{name}: {_reason(error)}, expected the hub to answer: check the network") from None
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(_explained(error, name)) from None
    except Exception as error:  # Of the library beneath: httpx, requests, whichever it is.
        if (kept := cached(repository, revision, files)) is not None:
            return kept
        raise InputError(f"{name}: {_reason(error)}, expected the hub to answer: check the network") from None


def _download(api: Any, repository: str, commit: str, entry: Entry) -> Path:
    """A file in the cache, with the size and the sha256 that the hub has told; else it is not there."""
    kept = _kept(repository, commit, entry.path)
    path = Path(_patiently(lambda: api.hf_hub_download(repository, entry.path, revision=commit)))
    if kept is None:
        size, real = path.stat().st_size, path.resolve()
        wrong = f"{size} bytes, expected {entry.size}" if size != entry.size else ""
        if not wrong and entry.sha256 is not None and (found := _digest(path)) != entry.sha256:
            wrong = f"sha256 {found}, expected {entry.sha256}"
        if wrong:
            path.unlink(missing_ok=True)
            real.unlink(missing_ok=True)
            raise InputError(f"{repository}: {printable(entry.path)} has {wrong}: it was damaged on its way, try again")
    depth = len(PurePosixPath(entry.path).parts)
    return path.parents[depth - 1]


def _kept(repository: str, commit: str, path: str) -> str | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repository, path, revision=commit)
    return found if isinstance(found, str) else None


def _remember(repository: str, revision: str | None, commit: str) -> None:
    """Which commit the branch or tag was, for runs without a network."""
    from huggingface_hub import constants, file_download

    if revision is None or not _COMMIT.fullmatch(revision):
        folder = Path(constants.HF_HUB_CACHE, file_download.repo_folder_name(repo_id=repository, repo_type="model"))
        reference = folder / "refs" / (revision or "main")
        if folder.is_dir() and (not reference.is_file() or reference.read_text() != commit):
            reference.parent.mkdir(parents=True, exist_ok=True)
            reference.write_text(commit)


def sha256(path: Path) -> str:
    """A file's digest. A file in the hub's cache has its digest as a name, and must have it.

    Raises:
        InputError: it has another one.
    """
    found, real = _digest(path), path.resolve()
    if real.parent.name == "blobs" and _SHA256.fullmatch(real.name) and real.name != found:
        raise InputError(
            f"{printable(path)}: has sha256 {found}, expected {real.name}: the cache is damaged, delete the file and "
            "run `sdipc models fetch`"
        )
    return found


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _patiently(action: Callable[[], _Result]) -> _Result:
    """Waits as long as the hub asks for where there were too many requests."""
    from huggingface_hub import errors

    for attempt in range(_TRIES):
        try:
            return action()
        except errors.HfHubHTTPError as error:
            response = getattr(error, "response", None)
            if getattr(response, "status_code", None) != 429 or attempt == _TRIES - 1:
                raise
            asked = response.headers.get("Retry-After", "") if response is not None else ""
            time.sleep(min(float(asked) if asked.isdecimal() else 2.0**attempt, _LONGEST_WAIT))
    raise AssertionError


def _explained(error: Exception, name: str) -> str:
    from huggingface_hub import errors

    repository = name.partition("@")[0]
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        return (
            f"{name}: its authors ask for agreement first: accept its licence on the hub's page {repository}, and set "
            "HF_TOKEN"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{name}: no such revision, expected a branch, a tag or a commit of {repository}: check it"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"{name}: no such repository, or one that is not public: check the id, or set HF_TOKEN"
    if isinstance(error, errors.DisabledRepoError):
        return f"{name}: the hub has disabled this repository: use another one of the same checkpoint"
    if isinstance(error, errors.HFValidationError):
        return f"{name}: not an id, expected ORG/NAME: check it"
    if isinstance(error, errors.FileMetadataError):
        return f"{name}: the answer lacks the commit or size of a file, as behind a proxy: fetch it without the proxy"
    if status == 429:
        return f"{name}: too many requests, also after waiting as long as the hub asked for: try again later"
    if status is not None:
        return f"{name}: the hub answers with status {status}, expected a file: try again later"
    return f"{name}: {_reason(error)}, expected its files: try again"


def _reason(error: Exception) -> str:
    text = one_line(error)
    return printable(text[:200]) or type(error).__name__

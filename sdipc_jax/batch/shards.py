"""What a shard of results is: a tar file, a folder, or a file of vectors. Whole under its name or not there at all."""

import contextlib
import hashlib
import io
import json
import os
import shutil
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
from etils import epath
from jaxtyping import Float32, Shaped, UInt8
from PIL import Image
from safetensors import deserialize

from sdipc_jax.batch import storage
from sdipc_jax.batch.settings import JobSettings
from sdipc_jax.checkpoints.tensors import to_safetensors
from sdipc_jax.pictures.sheets import contact_sheet, png_text, thumbnail
from sdipc_jax.records import Record

# A file's name, from the output folder, with its bytes and sha256.
Files = dict[str, tuple[int, str]]

_BLOCK = tarfile.BLOCKSIZE
_LOSSLESS = 100
_ON_A_SHEET, _IN_A_LINE = 64, 8


class Shard(ABC):
    """Receives a shard's results, and gives them their place when all are there."""

    @abstractmethod
    def __init__(self, folder: epath.Path, shard: int) -> None: ...

    @abstractmethod
    def add(self, record: Record, data: bytes) -> None:
        """Takes a result; `record["file"]` is its name in the shard.

        Raises:
            OSError: it cannot be written; the shard is as it was before.
        """

    @abstractmethod
    def finish(self) -> Files:
        """Publishes the shard.

        Raises:
            OSError: it cannot be written; nothing is there under its name, or what was there before.
        """

    @abstractmethod
    def close(self) -> None:
        """Removes what is not published."""

    @staticmethod
    @abstractmethod
    def read(folder: epath.Path, shard: int, records: Sequence[Record]) -> Iterator[tuple[Record, bytes]]:
        """The results of a published shard, as they were added; the records are those that are done, in order."""


class TarShard(Shard):
    """`shard-00000.tar`: each picture with its record beside it, `000000000.png` and `000000000.json`."""

    def __init__(self, folder: epath.Path, shard: int) -> None:
        self.path = folder / f"{shard_name(shard)}.tar"
        storage.remove_leftovers(folder, shard_name(shard))
        self.spool, self.held = storage.begin(self.path, Path.touch)
        self.stream = self.spool.open("wb")

    def add(self, record: Record, data: bytes) -> None:
        beside = f"{os.path.splitext(record['file'])[0]}.json"
        storage.append(self.stream, _member(record["file"], data) + _member(beside, json.dumps(record).encode()))

    def finish(self) -> Files:
        storage.append(self.stream, bytes(2 * _BLOCK))
        storage.retrying(lambda: storage.sync(self.stream))
        files = {self.path.name: (self.stream.tell(), storage.digest(epath.Path(self.spool)))}
        storage.publish(self.spool, self.path)
        return files

    def close(self) -> None:
        self.stream.close()
        os.close(self.held)
        self.spool.unlink(missing_ok=True)

    @staticmethod
    def read(folder: epath.Path, shard: int, records: Sequence[Record]) -> Iterator[tuple[Record, bytes]]:
        with (folder / f"{shard_name(shard)}.tar").open("rb") as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            for record in records:
                member = tar.extractfile(record["file"])
                assert member is not None
                yield record, member.read()


class FolderShard(Shard):
    """`shard-00000/`: the pictures as files; their records stand in the shard's manifest alone.

    `shard-00000.png`, which is no part of it, shows the first of them.
    """

    def __init__(self, folder: epath.Path, shard: int) -> None:
        self.path = folder / shard_name(shard)
        self.files: Files = {}
        self.shown: dict[int, tuple[str, np.ndarray]] = {}
        storage.remove_leftovers(folder, shard_name(shard))
        self.spool, self.held = self.path, -1
        if storage.is_local(folder):
            spool, self.held = storage.begin(self.path, Path.mkdir)
            self.spool = epath.Path(spool)
        else:
            self.path.mkdir(parents=True, exist_ok=True)

    def add(self, record: Record, data: bytes) -> None:
        storage.write(self.spool / record["file"], data)
        self.files[f"{self.path.name}/{record['file']}"] = (len(data), hashlib.sha256(data).hexdigest())
        row = record["row"]
        if len(self.shown) < _ON_A_SHEET or row < max(self.shown):
            with Image.open(io.BytesIO(data)) as image:
                self.shown[row] = (f"{row} {Path(record['inputs'][0]).stem}", thumbnail(np.asarray(image)))
        if len(self.shown) > _ON_A_SHEET:
            del self.shown[max(self.shown)]

    def finish(self) -> Files:
        # The sheet is for people: the shard does not depend on it.
        with contextlib.suppress(OSError):
            storage.write(self.path.with_name(f"{self.path.name}.png"), self._sheet())
        if storage.is_local(self.path):
            storage.publish(Path(self.spool), self.path)
        return self.files

    def _sheet(self) -> bytes:
        rows = [self.shown[row] for row in sorted(self.shown)]
        lines = [rows[first : first + _IN_A_LINE] for first in range(0, len(rows), _IN_A_LINE)]
        sheet = contact_sheet(
            [[picture for _, picture in line] for line in lines],
            [", ".join(name for name, _ in line) for line in lines],
        )
        stream = io.BytesIO()
        sheet.save(stream, "PNG")
        return stream.getvalue()

    def close(self) -> None:
        if storage.is_local(self.path):
            os.close(self.held)
            shutil.rmtree(self.spool, ignore_errors=True)

    @staticmethod
    def read(folder: epath.Path, shard: int, records: Sequence[Record]) -> Iterator[tuple[Record, bytes]]:
        for record in records:
            yield record, (folder / shard_name(shard) / record["file"]).read_bytes()


class VectorShard(Shard):
    """`shard-00000.safetensors`: `image_vectors` (N, D), bfloat16, a row for each good row of the job, with their ids
    and inputs in the metadata fields `ids` and `files`."""

    def __init__(self, folder: epath.Path, shard: int) -> None:
        self.path = folder / f"{shard_name(shard)}.safetensors"
        self.added: list[tuple[Record, bytes]] = []
        storage.remove_leftovers(folder, shard_name(shard))

    def add(self, record: Record, data: bytes) -> None:
        self.added.append((record, data))

    def finish(self) -> Files:
        rows = sorted(self.added, key=lambda each: each[0]["row"])
        arrays = {}
        if rows:
            vectors = np.frombuffer(b"".join(data for _, data in rows), ml_dtypes.bfloat16)
            arrays["image_vectors"] = vectors.reshape(len(rows), -1)
        metadata = {
            "ids": json.dumps([record["id"] for record, _ in rows]),
            "files": json.dumps([record["inputs"] for record, _ in rows]),
        }
        data = to_safetensors(arrays, metadata)
        storage.write(self.path, data)
        return {self.path.name: (len(data), hashlib.sha256(data).hexdigest())}

    def close(self) -> None:
        self.added = []

    @staticmethod
    def read(folder: epath.Path, shard: int, records: Sequence[Record]) -> Iterator[tuple[Record, bytes]]:
        for _, tensor in deserialize((folder / f"{shard_name(shard)}.safetensors").read_bytes()):
            data, length = tensor["data"], len(tensor["data"]) // len(records)
            for place, record in enumerate(records):
                yield record, bytes(data[place * length : (place + 1) * length])


def container(job: JobSettings) -> type[Shard]:
    """What the job's shards are."""
    if job.vectors:
        return VectorShard
    return TarShard if job.container == "tar" else FolderShard


def shard_name(shard: int) -> str:
    """What files of a shard are called after.

    >>> shard_name(12)
    'shard-00012'
    """
    return f"shard-{shard:05d}"


def file_name(row: int, job: JobSettings) -> str:
    """A result's name in its shard: by row, so that no input's name can matter."""
    return f"{row:09d}" if job.vectors else f"{row:09d}.{job.format}"


def encode(result: Shaped[np.ndarray, "..."], record: Record, job: JobSettings, sampling: Record) -> bytes:
    """The file of a picture, or the bytes of a vector, as the job asks for.

    Args:
        record: what is told of the row.
        sampling: what the job tells of all rows, and the checkpoint has decided; nothing that says where files lie, so
            that equal pictures are equal files.
    """
    return encode_vector(result) if job.vectors else encode_picture(result, record, job, sampling)


def encode_picture(pixels: UInt8[np.ndarray, "H W 3"], record: Record, job: JobSettings, sampling: Record) -> bytes:
    """A picture's file. A PNG has the settings in it as other programs read them; the record stands beside it."""
    stream = io.BytesIO()
    if job.format == "webp":
        options: Record = {"quality": job.quality, "lossless": job.quality == _LOSSLESS}
    else:
        options = {"pnginfo": png_text(record | {"settings": sampling | record}, *pixels.shape[:2])}
    Image.fromarray(pixels).save(stream, job.format.upper(), **options)
    return stream.getvalue()


def encode_vector(vector: Float32[np.ndarray, " D"]) -> bytes:
    """A vector in bfloat16, rounded to even."""
    return vector.astype(ml_dtypes.bfloat16).tobytes()


def _member(name: str, data: bytes) -> bytes:
    """A file in a tar archive: the same bytes whoever writes it, and when."""
    header = tarfile.TarInfo(name)
    header.size = len(data)
    return header.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % _BLOCK)

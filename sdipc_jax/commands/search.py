"""The command `search`: a picture or a text and many pictures in, the nearest of them out."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
from jaxtyping import Float

from sdipc_jax.commands.inputs import expand
from sdipc_jax.commands.joint import encode_files, joint_space
from sdipc_jax.commands.outcome import Answer
from sdipc_jax.commands.settings import SearchSettings
from sdipc_jax.errors import InputError, printable
from sdipc_jax.prompts.joint import JointSpace
from sdipc_jax.prompts.ridge import unit
from sdipc_jax.records import Record, Report

_SHARDS, _JOB = "shard-*.safetensors", "job.json"
_ENDINGS = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".avif", ".heic"}
_DTYPES: dict[str, Any] = {"F32": np.float32, "BF16": ml_dtypes.bfloat16}


def search(settings: SearchSettings, report: Report) -> Answer:
    """Pictures ranked by the cosine of their vectors and the query's in the joint space."""
    space, query = joint_space(settings), Path(settings.query)
    is_picture = query.is_file()
    if not is_picture and query.suffix.lower() in _ENDINGS:
        raise InputError(f"{printable(query)}: no such file, expected a picture or a text: check the path")
    notes: list[str] = []
    failures: list[Record] = []
    if settings.where.is_file() or any(settings.where.glob(_SHARDS)):
        names, vectors = _written(space, settings.where)
    else:
        paths, notes = expand([settings.where])
        kept = space.kept_pictures({"folder": str(settings.where.resolve())})
        found = kept.read()
        known = {} if found is None else dict(zip(*found, strict=True))
        encoded = encode_files(space, paths, report, known)
        digests = [record["input_sha256"] for record in encoded.records]
        if set(digests) != set(known):
            kept.write(digests, encoded.vectors)
        names, vectors, failures = [each["input"] for each in encoded.records], encoded.vectors, encoded.failures
        notes += kept.notes
    asked = encode_files(space, [query]).vectors if is_picture else space.texts([settings.query])
    scores = unit(vectors) @ asked[0]
    best = np.argsort(-scores, kind="stable")[: settings.top]
    records = [{"input": names[place], "cosine": round(float(scores[place]), 4)} for place in best]
    lines = [f"{record['cosine']:7.3f}  {printable(record['input'])}" for record in records]
    return Answer(records, lines, failures, (*space.config.notes, *notes, *space.notes))


def _written(space: JointSpace, where: Path) -> tuple[list[str], Float[np.ndarray, "N D_joint"]]:
    """Names and vectors that `batch` or `prompt` wrote, which lie in the space of texts, in the joint space.

    Raises:
        InputError: there are none, they were made with another CLIP, or the projection does not lead back.
    """
    if not space.config.inverse_reaches:
        raise InputError(
            f"{printable(where)}: found vectors of what this UNet reads, from which none of the joint space follow: "
            "name the folder of pictures instead"
        )
    files = [where] if where.is_file() else sorted(where.glob(_SHARDS))
    job = where / _JOB
    names: list[str] = []
    rows = []
    for file in files:
        try:
            with safetensors.safe_open(file, "np") as opened:
                metadata = opened.metadata() or {}
            tensors = dict(safetensors.deserialize(file.read_bytes()))
            given = json.loads(metadata.get("files", "[]"))
            made = json.loads(metadata["checkpoint"] if "checkpoint" in metadata else job.read_text())
            if "image_vectors" not in tensors and not given:
                # A shard of which all rows have failed.
                continue
            tensor = tensors["image_vectors"]
            vectors = np.frombuffer(tensor["data"], _DTYPES[tensor["dtype"]]).reshape(tensor["shape"])
        except (OSError, safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{printable(file)}: found no vectors ({type(error).__name__}), expected what batch writes with "
                "vectors: true or what prompt writes: name another"
            ) from None
        _check_made_with(space, file, made.get("checkpoint", made))
        names += [each if isinstance(each, str) else "+".join(map(_name, each)) for each in given]
        rows.append(vectors.astype(np.float32))
    if not rows or len(names) != sum(map(len, rows)) or rows[0].shape[1] != len(space.tower.projection):
        raise InputError(
            f"{printable(where)}: found no vectors of this checkpoint with their files' names, expected some: name "
            "another"
        )
    return names, unit(np.concatenate(rows) @ space.tower.projection.astype(np.float64))


def _name(given: Any) -> str:
    return str(given.get("input", given)) if isinstance(given, dict) else str(given)


def _check_made_with(space: JointSpace, file: Path, checkpoint: Record) -> None:
    """Refuses vectors of another CLIP."""
    own = {name: digest for name, digest in space.files.items() if name == "tuned" or name.endswith(".safetensors")}
    there = {name: digest for name, digest in checkpoint.items() if name == "tuned" or name in own}
    if there != own:
        raise InputError(
            f"{printable(file)}: found vectors of another CLIP, expected those of {printable(space.config.folder)}: "
            "name the checkpoint that made them with --model, --clip and --tuned"
        )

"""What tests of `sdipc batch` share: pictures, jobs, and a device that costs nothing."""

import json
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from sdipc_jax import cli
from sdipc_jax.batch.items import Item
from sdipc_jax.batch.sampler import Batch
from sdipc_jax.commands import batch as command


def draw(path: Path, seed: int, size: tuple[int, int] = (24, 20)) -> Path:
    """A picture of noise, another for each seed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    Image.fromarray(pixels).save(path, "PNG")
    return path


def draw_all(folder: Path, count: int) -> Path:
    """A folder of pictures, in the order of their seeds."""
    for seed in range(count):
        draw(folder / f"{seed:05d}.png", seed)
    return folder


def write_job(path: Path, **values: Any) -> Path:
    """A job's file; without an output_dir it is the folder beside it of the same name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = {"output_dir": str(path.with_suffix(""))} | {
        name: str(value) if isinstance(value, Path) else value for name, value in values.items()
    }
    path.write_text(yaml.safe_dump(values))
    return path


def write_rows(path: Path, rows: Sequence[Any]) -> Path:
    """A file of JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def records(folder: Path) -> list[dict[str, Any]]:
    """The lines of all shards' manifests, in order."""
    lines = []
    for path in sorted(folder.glob("shard-*.jsonl")):
        lines += [json.loads(line) for line in path.read_text().splitlines()[1:]]
    return lines


def manifest(folder: Path) -> dict[str, Any]:
    """The job's manifest."""
    return json.loads((folder / "manifest.json").read_text())


class Stub:
    """A device whose pictures have one colour, that of the item's id; each of its batches takes `seconds`."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.batches: list[Batch] = []
        self.encoded = 0

    def __call__(self, *_: Any) -> "Stub":
        return self

    def vectors(self, items: Sequence[Item]) -> np.ndarray:
        self.encoded += len(items)
        return np.stack([item.pixels[0].mean((0, 1)) for item in items])

    def pictures(self, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        time.sleep(self.seconds)
        self.batches.append(batch)
        colours = np.array([[*bytes.fromhex(item_id[:6])] for item_id in batch.ids], np.uint8)
        pictures = np.broadcast_to(colours[:, None, None], (len(colours), *batch.size, 3))
        return pictures, np.zeros(len(colours), bool)


def main() -> int:
    """`sdipc` with a device that costs nothing: `python -m tests.batch_jobs SECONDS batch JOB.yaml`."""
    command.batch = partial(command.batch, make_device=Stub(float(sys.argv[1])))  # type: ignore[assignment]
    return cli.main(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())

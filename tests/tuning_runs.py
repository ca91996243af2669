"""Runs of `sdipc tune` in processes of their own, on a checkpoint in miniature."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests import processes
from tests.tiny import SMALL_UNET, write_checkpoint

PATIENCE = 300


def write_small_checkpoint(folder: Path, seed: int = 0) -> Path:
    """A checkpoint folder whose programs compile fast."""
    return write_checkpoint(folder, unet=SMALL_UNET, seed=seed)


def write_pictures(folder: Path, classes: Mapping[str, int]) -> Path:
    """A data set of noise: so many pictures of each class."""
    for number, (name, count) in enumerate(classes.items()):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            pixels = np.random.default_rng([number, index]).integers(0, 256, (40, 34 + index % 9, 3), np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index:03}.png")
    return folder


@dataclass
class Run:
    """A run's folder and the command that fills it.

    Attributes:
        folder: the run's output_dir.
        cache: compiled programs, so that only the first process compiles.
        values: of the run's file.
        devices: CPU devices that processes see.
    """

    folder: Path
    mode: str
    cache: Path
    values: dict[str, Any]
    devices: int = 1

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """The command, begun."""
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        config = self.folder.with_suffix(".yaml")
        config.write_text(json.dumps(self.values | {"output_dir": str(self.folder)}))
        return processes.start(
            ["-m", "sdipc_jax.cli", "tune", self.mode, config, *arguments],
            self.devices,
            JAX_COMPILATION_CACHE_DIR=str(self.cache),
            JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0.1",
            XLA_FLAGS=os.environ.get("XLA_FLAGS") or "--xla_backend_optimization_level=0",
        )

    def finish(self, *arguments: str, code: int = 0) -> str:
        """Runs the command to its end, and gives its stderr."""
        return end(self.start(*arguments), code)

    def wait_for(self, condition: Callable[[], bool], process: subprocess.Popen[str]) -> bool:
        """Waits until something is true, or the process has ended before."""
        deadline = time.monotonic() + PATIENCE
        while process.poll() is None:
            if condition():
                return True
            assert time.monotonic() < deadline
            time.sleep(0.001)
        return False

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def steps(self) -> list[int]:
        """The checkpoints that there are."""
        names = os.listdir(self.checkpoints) if self.checkpoints.is_dir() else []
        return sorted(int(name) for name in names if name.isdecimal())

    def lines(self) -> int:
        """Updates in metrics.jsonl."""
        path = self.folder / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def metrics(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    def log(self) -> list[str]:
        """The lines of log.txt, without the time."""
        path = self.folder / "log.txt"
        return [line.split(" ", 1)[1] for line in path.read_text().splitlines()] if path.exists() else []

    def saving(self) -> bool:
        """Whether a checkpoint is half written."""
        names = os.listdir(self.checkpoints) if self.checkpoints.is_dir() else []
        return any(name.endswith(".partial") for name in names)

    def result(self) -> dict[str, Any]:
        """Everything that an uninterrupted run must agree with, to the bit."""
        newest = self.checkpoints / str(self.steps()[-1])
        manifest = json.loads((newest / "MANIFEST.json").read_text())
        return {
            "arrays": {name: array["sha256"] for name, array in manifest["arrays"].items()},
            "data": manifest["values"]["data"],
            "metrics": (self.folder / "metrics.jsonl").read_bytes(),
            "tuned": {path.name: path.read_bytes() for path in self.folder.glob("*.safetensors")},
        }

    def leftovers(self) -> list[str]:
        """Files that no finished run has."""
        names = [path.name for path in self.folder.rglob("*")]
        return [name for name in names if name.endswith((".partial", ".tmp")) or ".corrupt" in name]


def end(process: subprocess.Popen[str], code: int = 0) -> str:
    """Waits for a process that must end with this code, and gives its stderr."""
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == code, errors
    assert "Traceback" not in errors, errors
    return errors


def kill(process: subprocess.Popen[str]) -> None:
    """kill -9."""
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=PATIENCE)

"""What is timed, and how the sides and the one who times them talk: a line of JSON each way."""

import dataclasses
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from sdipc_jax.checkpoints.bundle import Config

Model = Literal["sd15", "embedded", "sdxl", "small sdxl"]
Part = Literal["product", "copy", "unet", "decode", "encode", "picture", "tune"]

# Sides of the square matrices of the product; numbers of the array that is copied.
PRODUCT, COPIED = 4096, 2**27
GUIDANCE = 7.5


@dataclass(frozen=True)
class Work:
    """One thing to time.

    Attributes:
        part: a matrix product and a copy, which tell what the machine can do; one guided evaluation of the UNet with
            the sampler's step; decoding; encoding pictures to vectors; whole pictures from prompts; a step of
            SD-IPC-CT.
        model: `sd15` or `sdxl`, with random weights, or `embedded`; `small sdxl` is for rehearsals.
        batch: pictures.
        steps: of whole pictures.
        fast: what `--fast` stands for instead, in this package.
        row: steps of the UNet that come one after the other.
    """

    part: Part
    model: Model = "sd15"
    batch: int = 1
    steps: int = 0
    dtype: str = "float32"
    fast: bool = False
    row: int = 1

    @property
    def title(self) -> str:
        """For people."""
        names = {
            "product": f"matrix product, {PRODUCT} x {PRODUCT}",
            "copy": f"copy of {COPIED * 4 / 2**30:g} GiB",
            "unet": f"{self.row} guided UNet steps in a row" if self.row > 1 else "guided UNet step",
            "decode": "decoding",
            "encode": "pictures to vectors",
            "picture": f"picture, {self.steps} steps" + (" (JAX: --fast)" if self.fast else ""),
            "tune": "step of SD-IPC-CT",
        }
        return names[self.part] + (f", batch {self.batch}" if self.part not in ("product", "copy") else "")


@dataclass(frozen=True)
class Ready:
    """What a side tells before it is timed.

    Attributes:
        flops: useful ones of a run, matrix products and convolutions; 0 where the side does not count them.
        moved: bytes read and written by a copy.
        compiled: seconds until the first run was done.
        versions: of what was used, in words.
    """

    flops: float
    moved: float
    compiled: float
    versions: str


class Side(Protocol):
    """Something that can be timed."""

    def make(self, work: Work) -> tuple[Ready, Callable[[], Any]]:
        """The run of a work, which ends when its result is there."""

    def peak_bytes(self) -> int:
        """The most memory so far: the device's, or the process's where the device is the CPU."""


def serve(side: Side) -> None:
    """Runs whenever it is asked to, and says how long it took."""
    # Whatever libraries print must not come between.
    answers, sys.stdout = sys.stdout, sys.stderr

    def answer(value: Any) -> None:
        print(json.dumps(value), file=answers, flush=True)

    ready, run = side.make(Work(**json.loads(sys.stdin.readline())))
    answer(dataclasses.asdict(ready))
    for _ in sys.stdin:
        started = time.perf_counter()
        run()
        answer({"seconds": time.perf_counter() - started, "peak_bytes": side.peak_bytes()})


def process_peak() -> int:
    """The most memory that this process has had."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def tuning_batch(config: Config, count: int) -> Any:
    """Random pictures and latents of a step of SD-IPC-CT."""
    generator = np.random.default_rng(0)
    channels, height, width = config.latent_shape(config.defaults.height, config.defaults.width)
    side = config.vision_side.vision.image_size
    return {
        "latents": generator.standard_normal((count, height, width, channels), np.float32),
        "deviation": np.full((count, height, width, channels), 0.1, np.float32),
        "pixels": generator.standard_normal((count, side, side, 3), np.float32),
    }

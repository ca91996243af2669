"""How much of the bare sampler's speed `sdipc batch` keeps, with everything that it does besides.

python scripts/benchmark_batch.py               # the embedded checkpoint, batch 16, 50 steps, 8 batches
python scripts/benchmark_batch.py --steps 10 --batches 20

The bare sampler is `generate` under `jit` on prompts that are there, run before and after the job. The job is counted
from its first finished batch until its last shard is on the disk: reading, encoding, writing, waiting, all in all. The
CPU's time, of all threads, tells more where other programs share the cores and the device is the CPU itself.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import sdipc_jax as sdipc
from sdipc_jax.batch.sampler import Batch, Sampler
from sdipc_jax.batch.settings import BatchSettings
from sdipc_jax.commands import batch as command

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


# Seconds, and the CPU's seconds in all threads.
Clock = tuple[float, float]


def clock() -> Clock:
    return time.perf_counter(), time.process_time()


def seconds_each(started: Clock, count: int) -> Clock:
    """What a picture took since then."""
    wall, cpu = clock()
    return (wall - started[0]) / count, (cpu - started[1]) / count


class Timed:
    """A sampler that notes when its first batch was done."""

    def __init__(self, *arguments: Any) -> None:
        self.sampler = Sampler.make(*arguments)
        self.first: Clock | None = None

    def vectors(self, items: Any) -> np.ndarray:
        return self.sampler.vectors(items)

    def pictures(self, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        results = self.sampler.pictures(batch)
        self.first = self.first or clock()
        return results


def bare(model: str, batch: int, batches: int, steps: int | None) -> Clock:
    """What the jitted sampler alone takes for a picture."""
    bundle = sdipc.load(model)
    context = sdipc.text_prompt(bundle, sdipc.tokenize(bundle, ["a red apple"] * batch))
    sample = jax.jit(
        lambda bundle, context, indices: sdipc.generate(bundle, context, seeds=0, indices=indices, steps=steps)
    )
    indices = jnp.arange(batch, dtype=jnp.uint32)
    jax.block_until_ready(sample(bundle, context, indices))
    started = clock()
    for number in range(batches):
        jax.block_until_ready(sample(bundle, context, indices + batch * number))
    return seconds_each(started, batch * batches)


def job(model: str, batch: int, batches: int, steps: int | None) -> tuple[Clock, float]:
    """What a whole job takes for a picture after its first batch, and the share in which the device waited."""
    made: list[Timed] = []

    def make(*arguments: Any) -> Timed:
        made.append(Timed(*arguments))
        return made[0]

    names = sorted(path.name for path in EXAMPLES.glob("*.png"))
    with tempfile.TemporaryDirectory() as folder:
        rows = [f'{{"picture": "{EXAMPLES / names[n % len(names)]}"}}\n' for n in range(batch * (batches + 1))]
        Path(folder, "rows.jsonl").write_text("".join(rows))
        values = {"source": f"{folder}/rows.jsonl", "output_dir": f"{folder}/out", "model": model, "batch_size": batch}
        lines = [f"{name}: {value}\n" for name, value in (values | ({"steps": steps} if steps else {})).items()]
        # A shard's end in the middle, too.
        Path(folder, "job.yaml").write_text("".join(lines) + f"shard_size: {batch * max(1, (batches + 1) // 2)}\n")
        outcome = command.batch(BatchSettings(job=Path(folder, "job.yaml")), lambda done: None, make)
        assert made[0].first is not None
        found = seconds_each(made[0].first, batch * batches)
    assert isinstance(outcome, command.BatchOutcome)
    assert outcome.progress.done == len(rows)
    return found, outcome.progress.waiting or 0.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--steps", type=int, default=None, help="the checkpoint's own if left out")
    options = parser.parse_args()
    if jax.local_device_count() != 1:
        sys.exit("benchmark_batch.py: compares on one device: unset JAX_NUM_CPU_DEVICES")
    settings = (options.model, options.batch, options.batches, options.steps)
    before = bare(*settings)
    whole, waiting = job(*settings)
    alone = [(first + second) / 2 for first, second in zip(before, bare(*settings), strict=True)]
    device = jax.local_devices()[0]
    print(f"{device.device_kind}, jax {jax.__version__}, batch {options.batch}, {options.batches} batches")
    for name, bare_seconds, seconds in zip(("", " of the CPU"), alone, whole, strict=True):
        print(
            f"a picture takes the bare sampler {bare_seconds:.4f} s{name}, sdipc batch {seconds:.4f} s{name}: "
            f"{bare_seconds / seconds:.3f} of its speed"
        )
    print(f"the device waited for the host {waiting:.1%} of the time")
    return 0


if __name__ == "__main__":
    sys.exit(main())

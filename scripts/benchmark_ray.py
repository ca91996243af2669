"""What `sdipc batch --on ray` costs beside `sdipc batch`: the same job with one worker and in a process of its own.

.venv-ray/bin/python scripts/benchmark_ray.py       # the embedded checkpoint, batch 16, 50 steps, 3 shards of 32

Counted is the time from each finished shard to the next, which leaves out how long either takes to start; the median of
all shards stands for each way. Each way runs twice, in turns. `make ray-test` makes the environment.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from statistics import median

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def seconds(folder: Path, options: list[str], shards: int, batch: int, steps: list[str]) -> list[float]:
    """A picture's seconds, by each shard of a job but the first."""
    folder.mkdir()
    names = sorted(path.name for path in EXAMPLES.glob("*.png"))
    size = 2 * batch
    rows = [f'{{"picture": "{EXAMPLES / names[n % len(names)]}"}}\n' for n in range(size * (shards + 1))]
    (folder / "rows.jsonl").write_text("".join(rows))
    lines = [f"source: {folder}/rows.jsonl", f"output_dir: {folder}/out", f"batch_size: {batch}", f"shard_size: {size}"]
    (folder / "job.yaml").write_text("\n".join([*lines, *steps]) + "\n")
    command = [sys.executable, "-m", "sdipc_jax.cli", "batch", str(folder / "job.yaml"), "--quiet", *options]
    subprocess.run(command, check=True, env=os.environ | {"RAY_USAGE_STATS_ENABLED": "0"})
    times = sorted(path.stat().st_mtime_ns for path in (folder / "out").glob("shard-*.jsonl"))
    assert len(times) == shards + 1
    return [(later - earlier) / 1e9 / size for earlier, later in pairwise(times)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--shards", type=int, default=3)
    parser.add_argument("--steps", type=int, default=None, help="the checkpoint's own if left out")
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    steps = [f"steps: {options.steps}"] if options.steps else []
    ways: dict[str, list[str]] = {"sdipc batch": [], "sdipc batch --on ray": ["--on", "ray", "--workers", "1"]}
    found: dict[str, list[float]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.rounds):
            for way, more in ways.items():
                place = Path(folder, f"{number}-{len(more)}")
                found[way] += seconds(place, more, options.shards, options.batch, steps)
    medians = [median(each) for each in found.values()]
    for (way, each), middle in zip(found.items(), medians, strict=True):
        print(f"{way}: {middle:.4f} s a picture ({', '.join(f'{one:.4f}' for one in each)})")
    print(f"overhead {medians[1] / medians[0] - 1:+.1%}")


if __name__ == "__main__":
    main()

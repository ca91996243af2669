"""What it takes to load Stable Diffusion 1.5's sizes from one fp16 file, beside diffusers' `from_single_file`.

    .venv-newest/bin/python scripts/measure_loading.py --folder build/loading     # which make parity-newest installs

The file has random weights and is made once. Each loading is a process of its own, begins when its libraries are
imported and ends when every weight has been read and is in memory. The file's pages are dropped from the page cache
before each, and the share that is still there is told. The sides take turns; a process before them has traced and
compiled whatever is kept between processes. Peaks are resident memory above what the libraries take, with pages of the
file that are mapped.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

SIDES = ("this package", "diffusers")
DTYPES = ("float32", "float16")


def by_us(folder: Path, dtype: str) -> Iterator[Any]:
    """Imports this package and its libraries, then loads the file."""
    import jax

    import sdipc_jax as sdipc
    from sdipc_jax.compilation import keep_compiled

    keep_compiled()
    yield
    bundle = sdipc.load(folder / "one.safetensors", dtype=dtype, vae_dtype=dtype)
    yield jax.block_until_ready(bundle.params)


def by_diffusers(folder: Path, dtype: str) -> Iterator[Any]:
    """Imports diffusers and its libraries, then loads the file and touches every page that is only mapped so far."""
    import torch
    from diffusers import StableDiffusionPipeline

    yield
    pipeline = StableDiffusionPipeline.from_single_file(
        str(folder / "one.safetensors"), config=str(folder / "pipeline"), local_files_only=True,
        torch_dtype=getattr(torch, dtype), safety_checker=None,
    )  # fmt: skip
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        for parameter in part.parameters():
            parameter.data.view(-1)[::1024].sum()
    yield pipeline


def load(side: str, folder: Path, dtype: str) -> dict[str, float]:
    """Seconds and bytes of one loading, in this process."""
    steps = {"this package": by_us, "diffusers": by_diffusers}[side](folder, dtype)
    next(steps)
    before, started = _peak(), time.perf_counter()
    kept = next(steps)
    seconds = time.perf_counter() - started
    assert kept
    return {"seconds": seconds, "bytes": _peak() - before}


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def dropped(file: Path) -> float:
    """Drops a file's pages, and gives the share of it that is in memory all the same."""
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    command = ["fincore", "--bytes", "--noheadings", "--output", "RES", str(file)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout) / file.stat().st_size


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--one", nargs=2, metavar=("SIDE", "DTYPE"), help="load once, in this process")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    if arguments.one:
        print(json.dumps(load(arguments.one[0], folder, arguments.one[1])))
        return
    if not (folder / "one.safetensors").is_file():
        command = [sys.executable, "-m", "tests.parity_newest.single_full", "write", str(folder)]
        subprocess.run(command, check=True, cwd=Path(__file__).parents[1])
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    left = []
    for run in range(arguments.runs + 1):
        for dtype in DTYPES:
            for side in SIDES if run % 2 else reversed(SIDES):
                left.append(dropped(folder / "one.safetensors"))
                command = [sys.executable, __file__, "--folder", str(folder), "--one", side, dtype]
                told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                if run:
                    found.setdefault((side, dtype), []).append(json.loads(told.splitlines()[-1]))
    print(f"pages of the file in memory before loading: {100 * max(left):.1f}% at most\n")
    print("| | weights, GB | seconds, median (all) | peak, GB |\n|---|---|---|---|")
    weights = (folder / "one.safetensors").stat().st_size / 1e9
    for (side, dtype), runs in sorted(found.items(), key=lambda item: DTYPES.index(item[0][1])):
        seconds = [run["seconds"] for run in runs]
        peak = max(run["bytes"] for run in runs) / 1e9
        size = weights * (2 if dtype == "float32" else 1)
        every = ", ".join(f"{each:.1f}" for each in seconds)
        print(f"| {side}, {dtype} | {size:.2f} | {statistics.median(seconds):.1f} ({every}) | {peak:.2f} |")


if __name__ == "__main__":
    main()

"""What the parts of a picture take, in this package and in PyTorch, against what the machine can do.

    python scripts/benchmark.py --small                       # the checkpoint that ships
    python scripts/benchmark.py                               # Stable Diffusion 1.5, random weights
    .venv-parity/bin/python scripts/benchmark.py --against torch     # beside PyTorch, which make parity installs

Each side is a process of its own, stopped while the other runs; this package's finds its programs compiled by a process
before it. A number is the median of so many runs, taken in the order A B B A, or with --apart one side after the other.
No ratio is printed where other processes took more than 5% of the processor meanwhile: they slow PyTorch more than JAX.
FLOP are useful ones: matrix products and convolutions, counted; their share is that of a matrix product timed in the
same way.
"""

import dataclasses
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from benchmarks.candidates import CANDIDATES
from benchmarks.work import Model, Part, Ready, Work

from sdipc_jax.files import write_atomically

SCRIPTS = Path(__file__).resolve().parent
SIDES = {
    "JAX": ("benchmarks.jax_side",),
    "torch": ("benchmarks.torch_side",),
    "torch.compile": ("benchmarks.torch_side", "--compile=default"),
    "torch, max-autotune": ("benchmarks.torch_side", "--compile=max-autotune"),
    "torch, reduce-overhead": ("benchmarks.torch_side", "--compile=reduce-overhead"),
}
# What runs beside this package; PyTorch's modes take minutes each to compile.
AGAINST = {
    "nothing": ["JAX"],
    "torch": ["JAX", "torch", "torch.compile"],
    "torch-modes": ["JAX", "torch, max-autotune", "torch, reduce-overhead"],
    "torch-reduce-overhead": ["JAX", "torch, reduce-overhead"],
    "torch-max-autotune": ["JAX", "torch, max-autotune"],
}
MACHINE = (Work("product"), Work("copy"))


@dataclass(frozen=True)
class Options:
    """Times the parts of a picture."""

    small: bool = False
    """The checkpoint that ships, instead of Stable Diffusion 1.5's sizes with random weights."""
    model: Literal["sd15", "sdxl"] = "sd15"
    """Whose sizes; of SDXL the UNet's step alone, without PyTorch."""
    against: Literal["nothing", "torch", "torch-modes", "torch-reduce-overhead", "torch-max-autotune"] = "nothing"
    """Run PyTorch beside: as it is and through torch.compile, or through torch.compile at its best, in its two best
    modes or in one."""
    parts: tuple[Part, ...] = ("unet", "decode", "encode", "picture")
    """What to time; a step of tuning takes --small."""
    batch: tuple[int, ...] = (1,)
    """Pictures at once; 64 are encoded."""
    steps: tuple[int, ...] = (20,)
    """Of whole pictures."""
    row: int = 1
    """Steps of the UNet that come one after the other, and share what a prompt needs once."""
    runs: int = 5
    """Of each side."""
    fast: bool = False
    """Whole pictures as --fast has them in this package, beside PyTorch's of --steps."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of weights and arithmetic."""
    fused_depth: int | None = None
    """The deepest heads that take the GPU's fused attention; as this package has it if left out."""
    candidate: str | None = None
    """What to put in the package's place for this run, one of those in benchmarks/candidates.py."""
    again: bool = True
    """Time a second process of this package's, which finds the programs of the first."""
    apart: bool = False
    """One side after the other, where memory does not hold them beside each other. The machine may change its speed
    meanwhile, which runs in turns would share."""
    machine: bool = True
    """Time a product and a copy too, which the rest is told as a share of."""
    json: Path = Path("build/benchmark.json")
    """Where the numbers go, besides the table."""


@dataclass(frozen=True)
class Timed:
    """One side's numbers for a work.

    Attributes:
        compiled: seconds until the first run was done in a process that had nothing compiled before; this package's
            other numbers are of a second process, which found the programs of the first.
    """

    ready: Ready
    compiled: float
    seconds: list[float]
    peak_bytes: int

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


class Process:
    """A side that waits to be told to run, and is stopped while it waits."""

    def __init__(self, side: str, work: Work, cache: str, flags: Sequence[str] = (), alone: bool = True) -> None:
        module, *own = SIDES[side]
        flags = [*own, *(flags if side == "JAX" else ())]
        command = [sys.executable, "-m", module, *flags]
        # The random weights are those of the tests.
        paths = os.pathsep.join(filter(None, (str(SCRIPTS), str(SCRIPTS.parent), os.environ.get("PYTHONPATH"))))
        kept = {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        if not alone:
            # Or JAX takes three quarters of a GPU's memory, and PyTorch, which waits beside it, has too little.
            kept["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
        environment, pipe = os.environ | kept | {"PYTHONPATH": paths}, subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)
        self.ready = Ready(**self._ask(dataclasses.asdict(work)))
        self._process.send_signal(signal.SIGSTOP)

    def run(self) -> dict[str, float]:
        """One run."""
        self._process.send_signal(signal.SIGCONT)
        found = self._ask("run")
        self._process.send_signal(signal.SIGSTOP)
        return found

    def processor_seconds(self) -> float:
        """That it has used so far, in all threads."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()

    def _ask(self, question: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            sys.exit(f"benchmark.py: a side ended with code {self._process.wait()}; its message is above")
        return json.loads(answer)


def busy_seconds() -> float:
    """What all processors have worked since the machine started."""
    user, nice, system, _, _, *rest = map(int, Path("/proc/stat").read_text().splitlines()[0].split()[1:])
    return (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK")


def time_work(
    work: Work, sides: list[str], runs: int, flags: Sequence[str] = (), again: bool = True, apart: bool = False
) -> tuple[dict[str, Timed], float]:
    """Every side's numbers, and the share of the processors that others took meanwhile."""
    if apart and len(sides) > 1:
        one_by_one = [time_work(work, [side], runs, flags, again) for side in sides]
        merged = {side: timed for sides_of_one, _ in one_by_one for side, timed in sides_of_one.items()}
        return merged, max(others for _, others in one_by_one)
    alone = len(sides) == 1
    processes: dict[str, Process] = {}
    compiled: dict[str, float] = {}
    try:
        with tempfile.TemporaryDirectory() as cache:
            for side in sides:
                processes[side] = Process(side, work, cache, flags, alone)
                compiled[side] = processes[side].ready.compiled
                if side == "JAX" and again:
                    processes[side].end()
                    processes[side] = Process(side, work, cache, flags, alone)
        seconds: dict[str, list[float]] = {side: [] for side in sides}
        peaks = dict.fromkeys(sides, 0)
        before = busy_seconds(), sum(each.processor_seconds() for each in processes.values())
        # A B B A A B B A ...: no side is always the first.
        orders = itertools.islice(itertools.cycle((sides, sides[::-1])), runs)
        for side in itertools.chain.from_iterable(orders):
            found = processes[side].run()
            seconds[side].append(found["seconds"])
            peaks[side] = int(found["peak_bytes"])
        own = sum(each.processor_seconds() for each in processes.values()) - before[1]
        total = sum(map(sum, seconds.values())) * len(os.sched_getaffinity(0))
        others = max(0.0, busy_seconds() - before[0] - own) / total
        return {
            side: Timed(processes[side].ready, compiled[side], seconds[side], peaks[side]) for side in sides
        }, others
    finally:
        for process in processes.values():
            process.end()


def works(options: Options) -> list[Work]:
    """What was asked for."""
    model: Model = options.model
    if options.small:
        model = "embedded" if model == "sd15" else "small sdxl"
    found = []
    for part in options.parts:
        batches = (64,) if part == "encode" else options.batch
        steps = options.steps if part == "picture" else (0,)
        in_row = max(options.row, 1) if part == "unet" else 1
        fast = options.fast and part == "picture"
        found += [Work(part, model, batch, count, options.dtype, fast, in_row) for batch in batches for count in steps]
    return found


def row(work: Work, sides: list[str], timed: dict[str, Timed], others: float, product: float) -> list[str]:
    """A line of the table."""
    ours = timed["JAX"]
    rate = ours.ready.flops / ours.median
    cells = [work.title]
    cells += [f"{timed[side].median:.4g}" if side in timed else "-" for side in sides]
    rivals = [each.median for side, each in timed.items() if side != "JAX"]
    if len(sides) > 1 and not rivals:
        cells.append("-")
    elif rivals:
        cells.append(f"{min(rivals) / ours.median:.2f}" if others <= 0.05 else f"not told: others took {others:.0%}")
    moved = f"{ours.ready.moved / ours.median / 1e9:.3g} GB/s" if ours.ready.moved else "-"
    cells.append(f"{rate / 1e9:.4g}" if rate else moved)
    cells.append(f"{rate / product:.0%}" if rate and product else "-")
    cells.append(f"{ours.compiled:.1f}, {ours.ready.compiled:.1f}")
    cells += [f"{timed[side].peak_bytes / 2**30:.2f}" if side in timed else "-" for side in sides]
    return cells


def main(options: Options) -> None:
    """Prints the table as it grows, and writes all numbers."""
    if "tune" in options.parts and not options.small:
        sys.exit(
            "benchmark.py: found the part tune without --small, expected both: the step is timed on its checkpoint"
        )
    if options.model == "sdxl" and (set(options.parts) != {"unet"} or options.against != "nothing"):
        sys.exit("benchmark.py: found --model sdxl with other parts or PyTorch, expected --parts unet alone")
    if options.candidate not in (None, *CANDIDATES):
        sys.exit(f"benchmark.py: candidate is {options.candidate!r}, expected one of {', '.join(CANDIDATES)}")
    sides = AGAINST[options.against]
    flags = [] if options.fused_depth is None else [f"--fused-depth={options.fused_depth}"]
    flags += [] if options.candidate is None else [f"--candidate={options.candidate}"]
    product = 0.0
    record = []
    heading = ["", *(f"{side}, s" for side in sides), *(["best of PyTorch / JAX"] if len(sides) > 1 else [])]
    heading += ["GFLOP/s", "of the product", "first run, s: cold, cached", *(f"{side}, peak GiB" for side in sides)]
    machine = [dataclasses.replace(each, dtype=options.dtype) for each in MACHINE] if options.machine else []
    for place, work in enumerate([*machine, *works(options)]):
        beside = ["JAX"] if work.part in ("product", "copy") else sides
        timed, others = time_work(work, beside, options.runs, flags, options.again, options.apart)
        if work.part == "product":
            product = timed["JAX"].ready.flops / timed["JAX"].median
        if place == 0:
            print("; ".join(each.ready.versions for each in timed.values()))
            print(f"\n| {' | '.join(heading)} |\n|{'---|' * len(heading)}")
        print(f"| {' | '.join(row(work, sides, timed, others, product))} |", flush=True)
        numbers = {side: dataclasses.asdict(each) for side, each in timed.items()}
        record.append({"work": dataclasses.asdict(work), "sides": numbers, "others": others})
        # What there is stays, if the rest is cut off.
        options.json.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(options.json, (json.dumps(record, indent=2) + "\n").encode())


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))

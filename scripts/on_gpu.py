"""What is to be measured on a GPU, in the order in which it matters, for when one is at hand for a quarter of an hour.

    python scripts/on_gpu.py                       # goes on where it stopped; writes build/on_gpu/*.json and table.md
    python scripts/on_gpu.py --seconds 560         # where a command may last ten minutes
    python scripts/on_gpu.py --rehearse            # every step at tiny sizes, on any machine

Each step is a process of its own with a time of its own, after which it is ended with all that it has started; its
result is written at once, so that the list can be cut off anywhere. What has a result is not run again, and what
PyTorch has compiled for a step that was cut off is found again. What needs PyTorch needs diffusers and transformers in
the same Python.

A few steps want packages that nothing else needs. They lie in a folder of their own, since tokamax asks for another
typeguard than tyro does:

    pip install --no-deps --target build/packages qwix tokamax typeguard==2.13.3 immutabledict einshape tensorboardx
"""

import contextlib
import dataclasses
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tyro
from benchmarks.candidates import PACKAGES

from sdipc_jax.files import write_atomically

SCRIPTS = Path(__file__).resolve().parent
# Tried one at a time, beside the flags as they are.
CANDIDATES = {
    "command buffers with convolutions and loops": (
        "--xla_gpu_enable_command_buffer=FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,CONVOLUTION,WHILE"
    ),
    "cuDNN fuses what surrounds convolutions": "--xla_gpu_experimental_enable_conv_fusion=true",
    "no Triton products": "--xla_gpu_enable_triton_gemm=false",
    "all tilings tried": "--xla_gpu_exhaustive_tiling_search=true",
}
# What stands in the package's place for a run (benchmarks/candidates.py), and the package that it needs.
IN_PLACE = {
    "fused-projections": "",
    "tokamax-attention": "tokamax",
    "tokamax-geglu": "tokamax",
    "int8": "qwix",
    "fp8": "qwix",
}
# Of drawings, which `scripts/build_corpus.py` writes.
CORPUS = "build/corpus.npz"


@dataclass(frozen=True)
class Step:
    """One thing to measure.

    Attributes:
        name: of its result's file.
        seconds: after which it is ended.
        command: arguments of Python, from the folder of the scripts; `{output}` is where the result goes.
        flags: XLA's, besides those of the environment.
        needs: a package, or a file, without which it is left out.
    """

    name: str
    seconds: int
    command: tuple[str, ...]
    flags: str = ""
    needs: str = ""


@dataclass(frozen=True)
class Options:
    """Runs the list."""

    rehearse: bool = False
    """Tiny sizes, one run each: whether every step can be run at all."""
    seconds: int = 840
    """For all steps together; what does not fit is left for the next time."""
    only: tuple[str, ...] = ()
    """Steps whose names begin so, all if left out."""
    output: Path = Path("build/on_gpu")
    """Where results go."""
    packages: Path = Path("build/packages")
    """Where those lie that only a few steps want."""


@dataclass(frozen=True)
class Result:
    """What became of a step.

    Attributes:
        outcome: `done`, `failed` or `out of time`, with the last lines of its output, or `left out` for want of
            something.
        found: what it wrote, all of it if it is done.
    """

    step: str
    outcome: str
    seconds: float
    found: Any = None
    last_lines: list[str] = field(default_factory=list)


def steps(rehearse: bool) -> list[Step]:
    """All steps, the most important first."""

    def benchmark(*arguments: str, small: bool = False) -> tuple[str, ...]:
        sizes: tuple[str, ...] = ("--dtype", "bfloat16", "--runs", "3")
        if rehearse or small:
            sizes = ("--small", "--runs", "1" if rehearse else "5")
        return ("benchmark.py", *sizes, *arguments, "--json", "{output}")

    # Weights of such sizes take ten seconds to draw, and the UNet forty to compile; the machine itself is timed once,
    # and of what is only compared with its like no second process is.
    def compared(*arguments: str) -> tuple[str, ...]:
        return benchmark("--no-machine", "--no-again", *arguments)

    count = ("--steps", "2" if rehearse else "20")
    many = ("--steps", "2" if rehearse else "50")
    batches = ("1",) if rehearse else ("1", "16")
    picture = ("--parts", "picture")
    found = [Step("correctness", 180, ("-m", "benchmarks.on_card", *(["--small"] if rehearse else []), "{output}"))]
    found.append(Step("picture, batch 1", 200, benchmark(*picture, *many, *(["--no-machine"] if rehearse else []))))
    if not rehearse:
        found.append(Step("picture, batch 16", 200, benchmark("--no-machine", *picture, *count, "--batch", "16")))
    torch = "torch diffusers transformers"
    beside: tuple[str, ...] = ("--against", "torch-reduce-overhead", *picture, *many)
    found.append(Step("PyTorch's reduce-overhead, batch 1", 240, compared(*beside), needs=torch))
    for batch in batches:
        found.append(Step(f"as it is, batch {batch}", 120, compared("--parts", "unet", "--batch", batch)))
    for name, flags in CANDIDATES.items():
        for batch in batches:
            command = compared("--parts", "unet", "--batch", batch)
            found.append(Step(f"{name}, batch {batch}", 180, command, flags))
    for batch in batches:
        unet = ("--parts", "unet", "--batch", batch)
        found.append(Step(f"fused attention to depth 256, batch {batch}", 120, compared(*unet, "--fused-depth", "256")))
        for name, needs in IN_PLACE.items():
            found.append(Step(f"{name}, batch {batch}", 150, compared(*unet, "--candidate", name), needs=needs))
    beside = ("--against", "torch-max-autotune", *picture, *many)
    found.append(Step("PyTorch's max-autotune, batch 1", 480, compared(*beside), needs=torch))
    if not rehearse:
        for mode in ("reduce-overhead", "max-autotune"):
            beside = ("--against", f"torch-{mode}", *picture, *count, "--batch", "16")
            found.append(Step(f"PyTorch's {mode}, batch 16", 480, compared(*beside), needs=torch))
    for batch in ("1",) if rehearse else ("1", "8"):
        sdxl = compared("--model", "sdxl", "--parts", "unet", "--batch", batch)
        found.append(Step(f"SDXL, batch {batch}", 240, sdxl))
    for name in ("int8", "fp8"):
        fast = ("measure_fast.py", "--candidate", name, "--count", "2" if rehearse else "64", "--only", "ddim, 20")
        found.append(Step(f"what {name} loses", 240, (*fast, "--json", "{output}"), needs=f"qwix {CORPUS}"))
    found.append(Step("tuning step", 120, benchmark("--no-machine", "--parts", "tune", "--batch", "4", small=True)))
    return found


def missing(needs: str, packages: Path) -> list[str]:
    """Those of these packages and files that are not there, and how to come by them."""
    found = []
    for each in needs.split():
        if "/" in each:
            # A file: packages have no slash in their names.
            if not Path(each).is_file():
                found.append(f"there is no {each}: python scripts/build_corpus.py writes it")
        elif not (importlib.util.find_spec(each) or (packages / each).is_dir()):
            found.append(f"there is no {each}: see the head of scripts/on_gpu.py")
    return found


def run(step: Step, output: Path, left: float, packages: Path) -> Result:
    """One step, ended when its time or all time is over."""
    if wanted := missing(step.needs, packages):
        return Result(step.name, "left out", 0.0, last_lines=wanted)
    result = output / f"{step.name}.found.json"
    command = [sys.executable, *(each.replace("{output}", str(result)) for each in step.command)]
    if command[1].endswith(".py"):
        command[1] = str(SCRIPTS / command[1])
    paths = os.pathsep.join(filter(None, (str(SCRIPTS), str(SCRIPTS.parent), os.environ.get("PYTHONPATH"))))
    flags = f"{os.environ.get('XLA_FLAGS', '')} {step.flags}".strip()
    environment = os.environ | {"PYTHONPATH": paths, PACKAGES: str(packages)} | ({"XLA_FLAGS": flags} if flags else {})
    environment.setdefault("TORCHINDUCTOR_CACHE_DIR", str((output / "inductor").resolve()))
    if "cpu" not in (platforms := environment.get("JAX_PLATFORMS", "cpu")):
        # Results are compared with the CPU's.
        environment["JAX_PLATFORMS"] = f"{platforms},cpu"
    started = time.monotonic()
    # Not a pipe, which a process that is left over would keep open.
    with tempfile.TemporaryFile("w+", errors="replace") as told:
        ran = subprocess.Popen(command, env=environment, stdout=told, stderr=told, start_new_session=True)
        try:
            ran.wait(timeout=min(step.seconds, left))
            outcome = "done" if ran.returncode == 0 and result.is_file() else "failed"
        except subprocess.TimeoutExpired:
            outcome = "out of time"
        finally:
            # With what it has started: that is stopped where it waits, and would keep a GPU's memory for ever.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(ran.pid, signal.SIGKILL)
            ran.wait()
        told.seek(0)
        lines = [] if outcome == "done" else told.read().splitlines()[-12:]
    # Of what was cut off or failed too, as far as it came.
    found = json.loads(result.read_text()) if result.is_file() else None
    result.unlink(missing_ok=True)
    return Result(step.name, outcome, time.monotonic() - started, found, lines)


def table(results: list[Result]) -> str:
    """The results as Markdown: seconds of each side, the median of its runs, by work."""
    rows = ["| step | | JAX, s | others, s | peak, GiB |", "|---|---|---|---|---|"]
    for each in results:
        if each.outcome != "done":
            rows.append(f"| {each.step} | {each.outcome} | | | |")
        if each.found is not None and not isinstance(each.found, list):
            rows.append(f"| {each.step} | {json.dumps(each.found)} | | | |")
            continue
        for entry in each.found or ():
            work, sides = entry["work"], dict(entry["sides"])
            if work["part"] in ("product", "copy"):
                continue
            medians = {
                side: sorted(numbers["seconds"])[len(numbers["seconds"]) // 2] for side, numbers in sides.items()
            }
            others = ", ".join(f"{side} {seconds:.4g}" for side, seconds in medians.items() if side != "JAX")
            peak = sides["JAX"]["peak_bytes"] / 2**30
            rows.append(f"| {each.step} | {work['part']} | {medians['JAX']:.4g} | {others} | {peak:.2f} |")
    return "\n".join(rows) + "\n"


def main(options: Options) -> None:
    """Runs what has no result yet, and writes the table after every step."""
    options.output.mkdir(parents=True, exist_ok=True)
    ends = time.monotonic() + options.seconds
    results: list[Result] = []
    for step in steps(options.rehearse):
        if options.only and not step.name.startswith(options.only):
            continue
        file = options.output / f"{step.name}.json"
        if file.is_file():
            results.append(Result(**json.loads(file.read_text())))
            continue
        left = ends - time.monotonic()
        if left < 10:
            print(f"{step.name}: left for the next time")
            continue
        if options.rehearse:
            # Whether it can be run, on whatever machine.
            step = dataclasses.replace(step, seconds=options.seconds)
        result = run(step, options.output, left, options.packages)
        print(f"{step.name}: {result.outcome} in {result.seconds:.0f} s", *result.last_lines, sep="\n    ", flush=True)
        # What had too little time because all of it was over is tried again, and so is what wanted something.
        if result.outcome != "left out" and (result.outcome != "out of time" or left > step.seconds):
            write_atomically(file, (json.dumps(dataclasses.asdict(result), indent=2) + "\n").encode())
        results.append(result)
        write_atomically(options.output / "table.md", table(results).encode())
    if options.rehearse and any(each.outcome not in ("done", "left out") for each in results):
        sys.exit("on_gpu.py: some steps did not come through")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))

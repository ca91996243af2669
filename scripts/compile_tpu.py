"""Compiles the sampler and the tuning step for TPU pods on a machine that has none, and tells what a chip will hold.

python scripts/compile_tpu.py --topology v5e:2x4 --batch 4

Nothing runs: the package libtpu compiles for a topology that it knows by name. Sizes are those of Stable Diffusion 1.5
with ViT-L/14, or with --model sdxl those of SDXL at 1024 x 1024, which is sampled and not tuned. `make tpu-compile`
installs what this needs.
"""

import itertools
import math
import multiprocessing
import os
import re
import resource
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

# libtpu is not to look for a TPU nor to be the only one of its kind on this machine, and JAX is not to start one.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import tyro
from benchmarks.sizes import sd15, sdxl
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sdipc_jax.checkpoints.bundle import Bundle, Config
from sdipc_jax.errors import InputError
from sdipc_jax.parallel import AXIS, make_mesh
from sdipc_jax.parallel.sampling import advance_on, division, finish_on
from sdipc_jax.prompts.prompt import abstract_prompt
from sdipc_jax.sampling.request import begin
from sdipc_jax.tuning import TuningSettings
from sdipc_jax.tuning.losses import Batch
from sdipc_jax.tuning.program import still, train_step
from sdipc_jax.tuning.step import State, make_optimizer, moving
from sdipc_jax.tuning.trainable import split

# Memory of a chip in GiB (cloud.google.com/tpu/docs, the page of each version).
MEMORY = {"v4": 32, "v5e": 16, "v5p": 95, "v6e": 32}
_GIB = 2**30
_STACK = 4 * _GIB
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}
_COLLECTIVE = re.compile(
    r" = (?P<shapes>\(.*?\)|\S+) "
    r"(?P<name>all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute|collective-broadcast)(-start)?\("
)
_SHAPE = re.compile(r"\b(?P<dtype>[a-z]+\d*)\[(?P<sides>[\d,]*)\]")


Program = Literal["generate", "tune"]
SIZES = {"sd15": sd15, "sdxl": sdxl}


@dataclass(frozen=True)
class Options:
    """Compiles programs for TPU topologies and prints what a chip holds and does."""

    topology: tuple[str, ...] = ("v5e:2x4",)
    """Version and shape, such as v5e:2x4, v5e:16x16, v6e:2x4."""
    batch: tuple[int, ...] = (4,)
    """Pictures on each chip."""
    model: Literal["sd15", "sdxl"] = "sd15"
    """Whose sizes."""
    program: tuple[Program, ...] = ("generate", "tune")
    """The sampler's loop and decoder, the step of SD-IPC-FT, or both."""
    rematerialise: bool = False
    """Tune with activations computed again in the backward pass."""


@dataclass(frozen=True)
class Measured:
    """What the compiler says of a program, for one chip.

    Attributes:
        arguments: bytes of weights and other inputs.
        temporaries: bytes at the worst moment, besides arguments and results.
        flops: with the body of a loop counted once.
        collectives: bytes of the results by name of the operation.
        kernels: how often hand-written (Pallas) kernels are called.
        seconds: that compiling took.
    """

    arguments: int
    temporaries: int
    flops: float
    collectives: dict[str, int]
    kernels: int
    seconds: float


def topology_mesh(name: str) -> Mesh:
    """A mesh of all chips of a topology.

    Raises:
        InputError: libtpu does not know it.
    """
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    except Exception as error:
        raise InputError(f"topology is {name!r}, expected one that libtpu knows, such as v5e:2x4: {error}") from None
    return make_mesh(None, devices)


def lower_generation(mesh: Mesh, config: Config, batch: int) -> dict[str, Any]:
    """The sampler's two programs, by name; the first takes an evaluation of the UNet for a body of its loop."""
    count = batch * mesh.size
    bundle = Bundle(config.abstract_params(), config)
    request, state = jax.eval_shape(partial(begin, seeds=0), bundle, abstract_prompt(config, count))
    parts = jax.tree.map(partial(_on, mesh), division(request), request)
    bundle, state = _on(mesh, P(), bundle), _on(mesh, P(AXIS), state)
    bound = _on(mesh, P(), jax.ShapeDtypeStruct((), jnp.int32))
    return {
        "sampling, a step": advance_on.lower(mesh, bundle, parts, state, bound, bound),
        "decoding": finish_on.lower(mesh, bundle, state),
    }


def lower_tuning(mesh: Mesh, config: Config, batch: int, settings: TuningSettings) -> dict[str, Any]:
    """The step of tuning, by name, with all that can be cached in a cache."""
    bundle = Bundle(config.abstract_params(), config)
    params, frozen = jax.eval_shape(partial(split, settings=settings), bundle)
    optimizer = jax.eval_shape(make_optimizer(settings).init, params)
    count: Any = jax.ShapeDtypeStruct((), jnp.int32)
    state = State(count, params, None, optimizer, frozen, settings, base="")
    pictures, side = batch * mesh.size, config.vision_side.vision.image_size
    channels, height, width = config.latent_shape(config.defaults.height, config.defaults.width)
    inputs: Any = {
        "latents": (pictures, height, width, channels),
        "deviation": (pictures, height, width, channels),
        "pixels": (pictures, side, side, 3),
        "text": (pictures, config.tokens.length, config.text.hidden_size),
    }
    arrays: Batch = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32), inputs, is_leaf=lambda each: isinstance(each, tuple)
    )
    moves, stays = _on(mesh, P(), moving(state)), _on(mesh, P(), still(state))
    train: Any = train_step(mesh)
    return {"tuning, a step": train.lower(moves, stays, _on(mesh, P(AXIS), arrays))}


def measure(lowered: Any) -> Measured:
    """Compiles a program and asks what came of it."""
    started = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - started
    memory, text = compiled.memory_analysis(), compiled.as_text()
    collectives: dict[str, int] = {}
    for name, size in collectives_of(text):
        collectives[name] = collectives.get(name, 0) + size
    return Measured(
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        flops=compiled.cost_analysis()["flops"],
        collectives=collectives,
        kernels=text.count('custom_call_target="tpu_custom_call"'),
        seconds=seconds,
    )


def collectives_of(text: str) -> Iterator[tuple[str, int]]:
    """The name and the bytes of the result of every collective in a compiled program's text.

    >>> list(collectives_of("x = (f32[2,3]{1,0}, bf16[4]) all-reduce(a, b), y = f32[] add(c, d)"))
    [('all-reduce', 32)]
    """
    for match in _COLLECTIVE.finditer(text):
        shapes = _SHAPE.finditer(match["shapes"])
        size = sum(
            _BYTES[each["dtype"]] * math.prod(map(int, filter(None, each["sides"].split(",")))) for each in shapes
        )
        yield match["name"], size


def _on(mesh: Mesh, spec: P, tree: Any) -> Any:
    """Shapes that lie on the mesh."""
    sharding = NamedSharding(mesh, spec)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)


def _line(name: str, measured: Measured, memory: float) -> str:
    used = (measured.arguments + measured.temporaries) / _GIB
    collectives = ", ".join(f"{each} {size / 2**20:.1f} MiB" for each, size in measured.collectives.items()) or "none"
    return (
        f"{name} | {measured.arguments / _GIB:.2f} | {measured.temporaries / _GIB:.2f} | {used / memory:.0%} of "
        f"{memory:g} | {measured.flops / 1e12:.3g} | {collectives} | {measured.kernels} | {measured.seconds:.0f}"
    )


def compile_one(model: str, topology: str, batch: int, program: Program, rematerialise: bool) -> None:
    """Prints a line for each program of this kind."""
    config, mesh = SIZES[model]("bfloat16"), topology_mesh(topology)
    if program == "generate":
        lowered = lower_generation(mesh, config, batch)
    else:
        settings = TuningSettings(steps=1000, dtype="bfloat16", rematerialise=rematerialise)
        lowered = lower_tuning(mesh, config, batch, settings)
    for name, each in lowered.items():
        title = f"{topology}, {batch}, {name}"
        try:
            print(_line(title, measure(each), MEMORY[topology.partition(":")[0]]), flush=True)
        except jax.errors.JaxRuntimeError as error:
            found = re.search(r"Used .*? of .*? hbm\.", str(error))
            print(f"{title} | does not fit: {found[0] if found else str(error).splitlines()[0]}", flush=True)


def main(options: Options) -> None:
    """Prints a table with a line for each program."""
    columns = "inputs GiB | temporaries GiB | memory GiB | TFLOP | collectives | Pallas kernels | compiled in s"
    print(f"topology, batch a chip, program | {columns}\n{' | '.join(['---'] * 8)}", flush=True)
    # The compiler can take its process down with it: it has overflowed a stack of 8 MiB.
    limit = resource.getrlimit(resource.RLIMIT_STACK)[1]
    resource.setrlimit(resource.RLIMIT_STACK, (_STACK if limit == resource.RLIM_INFINITY else limit, limit))
    processes = multiprocessing.get_context("spawn")
    programs = [each for each in options.program if (options.model, each) != ("sdxl", "tune")]
    for topology, batch, program in itertools.product(options.topology, options.batch, programs):
        process = processes.Process(
            target=compile_one, args=(options.model, topology, batch, program, options.rematerialise)
        )
        process.start()
        process.join()
        if process.exitcode:
            print(f"{topology}, {batch}, {program} | the compiler ended with {process.exitcode}", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))

"""Programs compiled before they are needed, without weights: how long it took, and what memory they will use."""

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from sdipc_jax.checkpoints.bundle import Bundle, for_sampling
from sdipc_jax.checkpoints.delta import load_delta, tuned_config
from sdipc_jax.checkpoints.load import configure
from sdipc_jax.commands.settings import CompileSettings
from sdipc_jax.prompts.contexts import text_prompt, without_skip
from sdipc_jax.prompts.prompt import abstract_prompt
from sdipc_jax.prompts.tokens import empty_tokens
from sdipc_jax.prompts.vision import encode_images
from sdipc_jax.records import Report
from sdipc_jax.sampling.decoding import finish
from sdipc_jax.sampling.loop import advance
from sdipc_jax.sampling.request import begin, decide, winograd_kernels


@dataclass(frozen=True)
class Program:
    """A compiled program.

    Attributes:
        seconds: to compile it, or to find it compiled.
        arguments, temporaries: bytes on the device, weights among the first.
    """

    name: str
    seconds: float
    arguments: int
    temporaries: int


@dataclass(frozen=True)
class Compiled:
    """What `sdipc compile` did."""

    programs: list[Program]

    def to_json(self) -> dict[str, Any]:
        """What `--json` prints."""
        return {"programs": [asdict(program) for program in self.programs]}

    def __str__(self) -> str:
        lines = [f"{'':20} {'seconds':>8} {'arguments':>14} {'temporaries':>14}"]
        for each in self.programs:
            sizes = (f"{size / 2**20:.1f} MiB" for size in (each.arguments, each.temporaries))
            lines.append(f"{each.name:20} {each.seconds:8.1f} {' '.join(f'{size:>14}' for size in sizes)}")
        return "\n".join(lines)


def compile(settings: CompileSettings, report: Report) -> Compiled:
    """What `vary`, `edit` and `text` run on one device for these settings, into the user's cache."""
    config = configure(settings)
    if settings.tuned is not None:
        config = tuned_config(config, load_delta(settings.tuned))
    values = decide(config, settings)
    bundle = Bundle(config.abstract_params(), config)
    tokens = jax.ShapeDtypeStruct(empty_tokens(config).shape, jnp.int32)
    context, negative = (abstract_prompt(config, count) for count in (settings.batch_size, 1))

    def first(bundle: Bundle, context: Any, negative: Any) -> Any:
        chosen = ("steps", "guidance_scale", "guidance_interval", "cache_interval", "sampler", "height", "width")
        options = {name: getattr(values, name) for name in chosen} | {"karras": settings.karras, "eta": settings.eta}
        return begin(bundle, context, negative=negative, seeds=0, **options)

    request, state = jax.eval_shape(first, bundle, context, negative)

    # What is left of it when there are prompts.
    sampled = for_sampling(bundle)

    def programs_of() -> Iterator[tuple[str, Callable[[], jax.stages.Compiled]]]:
        if config.clip is not None:
            side = config.clip.vision.image_size
            yield (
                "picture encoder",
                partial(encode_images.ahead, bundle, jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)),
            )
        weights = jax.ShapeDtypeStruct(tokens.shape, jnp.float32) if settings.prompt_weights else None
        for each in dict.fromkeys((bundle.config, without_skip(bundle).config)):
            yield "text encoder", partial(text_prompt.ahead, replace(bundle, config=each), tokens, weights)
        if request.winograd:
            height, width = state[0].shape[1:3]
            yield "kernels", partial(winograd_kernels.ahead, sampled, height, width)
        # The bounds are traced, whatever they are.
        yield "sampling", partial(advance.ahead, sampled, request, state, 0, 1)
        yield "decoding", partial(finish.ahead, sampled, state)

    programs = []
    for name, program in programs_of():
        started = time.perf_counter()
        memory: Any = program().memory_analysis()
        seconds = time.perf_counter() - started
        programs.append(Program(name, seconds, memory.argument_size_in_bytes, memory.temp_size_in_bytes))
        report(len(programs) / 5)
    report(1.0)
    return Compiled(programs)

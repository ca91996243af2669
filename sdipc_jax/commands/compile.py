"""Programs compiled before they are needed, without weights: how long it took, and what memory they will use."""

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sdipc_jax.checkpoints.bundle import Bundle, for_sampling
from sdipc_jax.checkpoints.controlnets import with_controlnets
from sdipc_jax.checkpoints.delta import load_delta, tuned_config
from sdipc_jax.checkpoints.load import configure
from sdipc_jax.commands.controls import when_and_where
from sdipc_jax.commands.settings import CompileSettings
from sdipc_jax.prompts.contexts import text_prompt, without_skip
from sdipc_jax.prompts.prompt import abstract_prompt
from sdipc_jax.prompts.tokens import empty_tokens
from sdipc_jax.prompts.vision import encode_images
from sdipc_jax.records import Report
from sdipc_jax.sampling import Control, encode_pictures, start_from, weights
from sdipc_jax.sampling.control import embed_control
from sdipc_jax.sampling.decoding import finish
from sdipc_jax.sampling.loop import advance
from sdipc_jax.sampling.request import begin, decide, winograd_kernels
from sdipc_jax.sampling.start import first_evaluation


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
    """What `vary`, `edit`, `mix` and `text` run on one device for these settings, into the user's cache.

    Of masks, pictures and what is started from or shown it matters that they are there: no such file is read.
    """
    config = with_controlnets(configure(settings), settings.controlnet)
    if settings.tuned is not None:
        config = tuned_config(config, load_delta(settings.tuned))
    values = decide(config, settings)
    bundle = Bundle(config.abstract_params(), config)
    tokens = jax.ShapeDtypeStruct(empty_tokens(config).shape, jnp.int32)
    context, negative = (abstract_prompt(config, count) for count in (settings.batch_size, 1))
    size = values.height, values.width
    pictures = jax.ShapeDtypeStruct((settings.batch_size, *size, 3), jnp.float32)
    redone = pictures.update(shape=pictures.shape[:3]) if settings.mask_image or settings.pad else None
    counted = when_and_where(config, settings, values, first_evaluation(settings.share_taken, values.steps))
    if counted is not None:
        places = np.ones((1, settings.mixed, *config.latent_shape(*size)[1:]), np.float32)
        counted = weights.and_the_rest(counted * weights.over_places(places) if settings.mask else counted)
        prompts = counted.shape[1]
        context = jax.tree.map(lambda leaf: leaf.update(shape=(len(leaf), prompts, *leaf.shape[1:])), context)

    def first(bundle: Bundle, context: Any, negative: Any, pictures: Any, redone: Any) -> Any:
        chosen = ("steps", "guidance_scale", "guidance_interval", "cache_interval", "sampler", "height", "width")
        options = {name: getattr(values, name) for name in chosen} | {"karras": settings.karras, "eta": settings.eta}
        if settings.starts:
            options["start"] = start_from(bundle, pictures, settings.share_taken, redone)
        numbers = zip(*map(settings.each, ("control_scale", "control_start", "control_end")), strict=True)
        options["controls"] = [Control(pictures[:1], *each) for each in numbers]
        return begin(bundle, context, weights=counted, negative=negative, seeds=0, **options)

    request, state = jax.eval_shape(first, bundle, context, negative, pictures, redone)

    # What is left of it when there are prompts.
    sampled = for_sampling(bundle)
    one = pictures.update(shape=(1, *size, 3))

    def programs_of() -> Iterator[tuple[str, Callable[[], jax.stages.Compiled]]]:
        if config.clip is not None:
            side = config.clip.vision.image_size
            yield (
                "picture encoder",
                partial(encode_images.ahead, bundle, jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)),
            )
        weighted = jax.ShapeDtypeStruct(tokens.shape, jnp.float32) if settings.prompt_weights else None
        for each in dict.fromkeys((bundle.config, without_skip(bundle).config)):
            yield "text encoder", partial(text_prompt.ahead, replace(bundle, config=each), tokens, weighted)
        # Which kernels have another form is found out by it, also where none has.
        yield "kernels", partial(winograd_kernels.ahead, sampled, *state[0].shape[1:3])
        if settings.starts:
            yield "start", partial(encode_pictures.ahead, sampled, one)
        for place in range(len(config.controlnets)):
            yield "control picture", partial(embed_control.ahead, sampled, place, one)
        # The bounds are traced, whatever they are.
        yield "sampling", partial(advance.ahead, sampled, request, state, 0, 1)
        yield "decoding", partial(finish.ahead, sampled, state)

    programs, wanted = [], list(programs_of())
    for name, program in wanted:
        started = time.perf_counter()
        memory: Any = program().memory_analysis()
        seconds = time.perf_counter() - started
        programs.append(Program(name, seconds, memory.argument_size_in_bytes, memory.temp_size_in_bytes))
        report(len(programs) / len(wanted))
    return Compiled(programs)

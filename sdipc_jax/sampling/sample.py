"""From prompts to pictures: the request, the loop, the decoding, in one call or with a progress bar.

`begin`, `advance` and `finish` are compiled on their own, so that a progress bar that goes through the steps in
pieces runs the very program that `generate` runs in one go.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial
from math import ceil
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Bool, Float

from sdipc_jax.checkpoints.bundle import Bundle
from sdipc_jax.prompts.prompt import AnyPrompt
from sdipc_jax.sampling.control import Control
from sdipc_jax.sampling.decoding import finish
from sdipc_jax.sampling.loop import advance
from sdipc_jax.sampling.request import Request, State, begin
from sdipc_jax.sampling.start import Start

_SECONDS_BETWEEN_REPORTS = 1.0


def generate(
    bundle: Bundle,
    context: AnyPrompt | Float[Array, "N R L D"],
    *,
    weights: Float[Array | np.ndarray, "#N R ..."] | None = None,
    negative: AnyPrompt | None = None,
    seeds: Any = None,
    indices: Any = 0,
    latents: Float[Array, "N C h w"] | None = None,
    start: Start | None = None,
    controls: Sequence[Control] = (),
    kept: Float[Array | np.ndarray, "#N *R L"] | None = None,
    steps: int | None = None,
    guidance_scale: Any = None,
    guidance_interval: tuple[float, float] | None = None,
    cache_interval: int | None = None,
    sampler: str | None = None,
    eta: Any = 0.0,
    height: int | None = None,
    width: int | None = None,
    karras: bool = False,
    differentiable: bool = False,
) -> Float[Array, "N H W 3"]:
    """Samples one picture a prompt.

    Works under `jit`, `vmap`, `shard_map` and `pmap`. New values of seeds, guidance, eta, prompts and latents compile
    nothing; shapes, `steps` and `sampler` are static, and so is whether there is guidance, and either interval.

    Args:
        context: prompts, as `image_prompt`, `edit_prompt` and `text_prompt` give them; or R of them for each picture,
            (N, R, L, D), whose outputs are added in each layer of cross-attention.
        weights: of the R prompts, (N, R, layers, evaluations, h, w), or with fewer axes at the end and axes of 1, as
            `sampling.weights` makes them; equal ones with a sum of 1 if None. New values compile nothing. One prompt
            with the weight 1 runs the program of (N, L, D).
        negative: what guidance leads away from, one for each picture or one for all; the empty text if None, which for
            SDXL is zeros where the checkpoint says so.
        seeds: 0 to 2^32 - 1, one a picture or one for all. They may be left out where `latents` are given: samplers
            that draw more noise then take that of seed 0.
        indices: numbers the variations of a seed. Picture n depends on `fold_in(key(seeds[n]), indices[n])` alone,
            not on its batch.
        latents: noise of unit variance to start from, instead of the seed's.
        start: pictures to start from, and what of them is redone, as `sampling.start_from` makes it; `latents` are then
            the noise that is added.
        controls: what the bundle's ControlNets are shown, one for each of them in their order (`add_controlnet`), and
            how much and when it counts. Where only the outermost layers run (`cache_interval`), ControlNets do not, and
            what they gave last stays.
        kept: how much of each token's attention counts, 0 to 1, (N, L) or of each of R prompts (N, R, L); weights are
            multiplied after the softmax. All of it if None.
        steps, guidance_scale, sampler, height, width: the checkpoint's defaults if None. Guidance of 1 or less is
            no guidance, as in diffusers; where the host knows that of all pictures, another program runs, which
            leaves the negative half of the work away. A full LCM is told the scale and never has that half.
        guidance_interval: the lowest and the highest timestep at which guidance acts, as shares of the timesteps of
            training, 0 to 1; at the others the negative half of the work is left away (Kynkaanniemi et al. 2024, who
            count in noise levels).
        cache_interval: at every so many evaluations the whole UNet runs; at the others its first and last layers do,
            on the deep features of the last whole run (Ma et al. 2024, DeepCache); 1 is all of it, always. Where
            neither interval is given, the checkpoint's own counts, and if it has none nothing is left away.
        eta: DDIM's share of fresh noise, 0 to 1 (Song et al. 2021, eq. 16), and TCD's; other samplers ignore it.
        karras: Karras et al.'s noise levels, for `dpm++2m`.
        differentiable: make `jax.grad` work through the pictures, for prompts, weights and the bundle's parameters. Of
            each step only what comes in is kept, so that it takes the memory of one step and the latents of all.

    Returns:
        Pictures in [0, 1], float32. One that the checkpoint's safety checker flags is black.

    Raises:
        InputError: an unknown sampler, steps out of range, sides that are no multiple of f, latents or prompts of
            another shape, no prompts, an interval that is none, both intervals, and on the host: seeds, indices,
            guidance or eta out of range. (Values on a device are taken as they are: to look at them would be to wait
            for them.)
    """
    request, state = begin(
        bundle,
        context,
        weights=weights,
        negative=negative,
        seeds=seeds,
        indices=indices,
        latents=latents,
        start=start,
        controls=controls,
        kept=kept,
        steps=steps,
        guidance_scale=guidance_scale,
        guidance_interval=guidance_interval,
        cache_interval=cache_interval,
        sampler=sampler,
        eta=eta,
        height=height,
        width=width,
        karras=karras,
    )
    state = advance(bundle, request, state, 0, request.evaluations, differentiable=differentiable)
    # Decoding needs the memory that the UNet's other kernels have.
    del request
    return finish(bundle, state)[0]


def generate_with_progress(
    bundle: Bundle, context: AnyPrompt, report: Callable[[int, int], None], **settings: Any
) -> tuple[Float[Array, "N H W 3"], Bool[Array, " N"]]:
    """`generate` in pieces of about a second, on the host.

    Args:
        report: called with the evaluations done and their total after every piece.
        settings: as for `generate`.

    Returns:
        The pictures, bit for bit those of `generate`, and which of them the safety checker flagged.
    """
    request, state = begin(bundle, context, **settings)
    state = in_pieces(partial(advance, bundle, request), request, state, report)
    del request  # As in `generate`.
    return finish(bundle, state)


def in_pieces(
    advance: Callable[[State, int, int], State],
    request: Request,
    state: State,
    report: Callable[[int, int], None],
    piece: int | None = None,
) -> State:
    """All evaluations of the loop, in pieces of so many, or of about a second.

    Pieces end where the whole UNet runs next: deep features do not leave the loop.
    """
    total = request.evaluations
    step = 1 if request.cache_interval is None else int(request.cache_interval)
    done, size = 0, piece or 1
    while done < total:
        last = min(done + step * ceil(size / step), total)
        started = time.perf_counter()
        state = jax.block_until_ready(advance(state, done, last))
        if piece is None:
            # The first piece may have compiled, so it only sets the pace for the second.
            size = max(1, int(_SECONDS_BETWEEN_REPORTS * (last - done) / (time.perf_counter() - started)))
        done = last
        report(done, total)
    return state

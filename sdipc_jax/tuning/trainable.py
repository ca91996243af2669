"""What trains: the tree of parameters in two, of which only the first has gradients (arXiv 2305.12716, section 4.2)."""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sdipc_jax.checkpoints.bundle import Bundle, Config, Params
from sdipc_jax.checkpoints.keys import flatten, unflatten
from sdipc_jax.errors import InputError
from sdipc_jax.models.deep_prompts import CLIPDeepPrompts, DeepPrompts
from sdipc_jax.prompts.contexts import empty_prompt
from sdipc_jax.prompts.projection import Projection, closed_form
from sdipc_jax.prompts.prompt import context_of
from sdipc_jax.samplers.noise_levels import DDIMOptions, alpha_bars, read_options
from sdipc_jax.tracing import under_our_rules
from sdipc_jax.tuning.settings import TuningSettings

# The variants that train a layer in the place of the inverse.
_LAYERS = ("fc", "fc_init")


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["params", "projection", "start", "alpha_bars"],
    meta_fields=["config", "prediction_type"],
)
@dataclasses.dataclass(frozen=True)
class Frozen:
    """What the loss reads and training does not change.

    Attributes:
        params: all of the UNet, and where deep prompts train of the vision tower, that is not trained.
        projection: eq. 6's matrices and scale, or a fitted map.
        start: the start token's state, (1, 1, D).
        alpha_bars: the share of signal in the variance at each timestep, (T,).
        config: of the tuned checkpoint, in the dtype of the arithmetic.
        prediction_type: what the UNet predicts, `epsilon` or `v_prediction`.
    """

    params: Params
    projection: Projection
    start: Float[Array, "1 1 D"]
    alpha_bars: Float[Array, " T"]
    config: Config
    prediction_type: str


def split(bundle: Bundle, settings: TuningSettings, projection: Projection | None = None) -> tuple[Params, Frozen]:
    """The leaves that train, float32, and everything else that a step reads.

    A bundle that is tuned already goes on from what it has.

    Args:
        projection: eq. 6 with another cut-off, scale or mode than the checkpoint's, or what `calibrate` gives.

    Raises:
        InputError: the checkpoint cannot take pictures as prompts or predicts the sample, or the settings do not fit.
    """
    config = bundle.config
    if projection is not None and projection.centre is not None:
        check_variant(settings)
    dtype = settings.dtype or config.dtype
    side = config.vision_side
    options = read_options(DDIMOptions, config.scheduler, steps=1)
    if options.prediction_type == "sample":
        raise InputError("the UNet predicts the sample, expected epsilon or v_prediction: use another checkpoint")
    projection = closed_form(bundle) if projection is None else projection
    trained: dict[tuple[str, ...], Any] = {}
    if settings.trains_kv:
        unet = flatten(bundle.params["unet"], ("unet",))
        trained |= {path: leaf for path, leaf in unet.items() if path[-3:-1] in (("attn2", "to_k"), ("attn2", "to_v"))}
    if settings.trains_prompts:
        prompts = _prompts(bundle, settings)
        side = dataclasses.replace(side, prompts=prompts)
        trained |= flatten(_prompt_params(bundle, prompts, settings), ("clip", "deep_prompts"))
    if settings.variant in _LAYERS:
        trained["clip", "inverse", "kernel"] = _layer(projection, settings)
    frozen = {"unet": bundle.params["unet"]}
    if settings.trains_prompts:
        frozen["clip"] = {"vision_model": bundle.params["clip"]["vision_model"]}
    rest = {path: jnp.asarray(leaf, dtype) for path, leaf in flatten(frozen).items() if path not in trained}
    return unflatten({path: jnp.array(leaf, jnp.float32) for path, leaf in trained.items()}), Frozen(
        params=unflatten(rest),
        projection=projection,
        start=context_of(empty_prompt(bundle))[:, :1],
        alpha_bars=jnp.asarray(alpha_bars(options, zero_snr=options.rescale_betas_zero_snr)),
        config=dataclasses.replace(config, clip=side, dtype=dtype),
        prediction_type=options.prediction_type,
    )


def check_variant(settings: TuningSettings) -> None:
    """Refuses to train a layer in the place of the inverse, where a fitted map takes its place already.

    Raises:
        InputError: that is asked for.
    """
    if settings.variant in _LAYERS:
        raise InputError(
            f"variant is {settings.variant}, which trains a layer in the place of the inverse, expected both, kv or "
            "prompts where the inverse does not reach and a map is fitted: choose one of them"
        )


def trained_projection(projection: Projection, params: Params, settings: TuningSettings) -> Projection:
    """The converter with the layer that trains in the place of the inverse, if one does."""
    if settings.variant not in _LAYERS:
        return projection
    return dataclasses.replace(projection, inverse=params["clip"]["inverse"]["kernel"])


def merge(trained: Mapping[str, Any], rest: Mapping[str, Any]) -> Params:
    """One tree with the leaves of both."""
    return unflatten(flatten(trained) | flatten(rest))


def _prompts(bundle: Bundle, settings: TuningSettings) -> DeepPrompts:
    side = bundle.config.vision_side
    if side.prompts is None:
        patches = (side.vision.image_size // side.vision.patch_size) ** 2
        return DeepPrompts(settings.prompts(patches), settings.overwrite_first_layer)
    asked = DeepPrompts(settings.prompt_length or side.prompts.length, settings.overwrite_first_layer)
    if asked != side.prompts:
        raise InputError(f"the checkpoint has {side.prompts} already, expected {asked}: settings must agree with it")
    return asked


@under_our_rules
def _prompt_params(bundle: Bundle, prompts: DeepPrompts, settings: TuningSettings) -> Params:
    if bundle.config.vision_side.prompts is not None:
        return bundle.params["clip"]["deep_prompts"]
    model = CLIPDeepPrompts(bundle.config.vision_side.vision, prompts.length)
    return jax.jit(model.init)(_key(settings))["params"]


@under_our_rules
def _layer(projection: Projection, settings: TuningSettings) -> Float[Array, "D_joint D_text"]:
    if settings.variant == "fc_init":
        return projection.inverse
    bound = projection.inverse.shape[0] ** -0.5
    # As PyTorch's linear layers start.
    return jax.random.uniform(_key(settings), projection.inverse.shape, jnp.float32, -bound, bound)


def _key(settings: TuningSettings) -> Array:
    return jax.random.key(settings.seed, impl="threefry2x32")

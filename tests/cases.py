"""Random checkpoints in miniature: configurations, weights and inputs, the same for JAX, PyTorch and golden files.

Each list has at least six configurations that differ where implementations go wrong: head counts, channels that are
odd multiples, non-square and odd latents, one-block levels, linear projections.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial
from typing import Any

import jax
import numpy as np

from sdipc_jax.models import (
    AutoencoderKL,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModel,
    StableDiffusionSafetyChecker,
    UNet2DConditionModel,
    UNetConfig,
    VAEConfig,
)
from sdipc_jax.models.attention import GEGLU, Attention, BasicTransformerBlock, FeedForward, Transformer2DModel
from sdipc_jax.models.clip import CLIPEncoderLayer
from sdipc_jax.models.layers import GroupNorm, layer_norm
from sdipc_jax.models.unet import ResnetBlock2D, TimestepEmbedding
from sdipc_jax.models.vae import DownEncoderBlock2D, MidBlock, UpDecoderBlock2D
from tests.random_weights import random_params

_CROSS_DOWN, _DOWN, _CROSS_UP, _UP = "CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"


@dataclass(frozen=True)
class Case:
    """A network with its parameters and inputs, all made from the seed."""

    name: str
    module: Any
    inputs: tuple[np.ndarray, ...]
    weights: Callable[[], dict[str, Any]]
    """Makes the parameters. Not before a test asks for them: every process of a test run makes all cases."""
    named: dict[str, np.ndarray] = field(default_factory=dict)
    """Inputs that the module takes by name."""

    @cached_property
    def params(self) -> dict[str, Any]:
        """The network's parameters."""
        return self.weights()

    def run(self, function: Callable[..., Any] | None = None) -> Any:
        """The network's outputs as NumPy arrays.

        Args:
            function: to call with variables and inputs instead of the module. What was traced is used again for an
                equal one: a test that changes what the module's code calls passes the `apply` of a clone.
        """
        return jax.tree.map(np.asarray, _run(function or self.module.apply, self.params, self.inputs, self.named))


# LLVM's optimisations are half of the compilation, and these networks are too small to gain by them.
@partial(jax.jit, static_argnums=0, compiler_options={"xla_backend_optimization_level": 0})
def _run(
    function: Callable[..., Any], params: dict[str, Any], inputs: tuple[np.ndarray, ...], named: dict[str, np.ndarray]
) -> Any:
    return function({"params": params}, *inputs, **named)


@cache
def decode_after_encode(module: AutoencoderKL) -> Callable[..., Any]:
    """For `Case.run`: mean and log-variance of the latents, and the pictures of the mean."""

    def both(variables: Any, pictures: Any) -> tuple[Any, Any, Any]:
        mean, log_variance = module.apply(variables, pictures, method="encode")
        return mean, log_variance, module.apply(variables, mean, method="decode")

    return both


@cache
def unet_cases() -> list[Case]:
    """UNets with latents (h, w) and prompts of length L."""

    def case(name: str, size: tuple[int, int], length: int, seed: int, **options: Any) -> Case:
        config = UNetConfig(sample_size=8, **options)
        generator = np.random.default_rng(seed)
        inputs = (
            generator.standard_normal((2, *size, config.in_channels), np.float32),
            np.array([3.0, 741.0], np.float32),
            generator.standard_normal((2, length, config.cross_attention_dim), np.float32),
        )
        module = UNet2DConditionModel(config)
        return Case(name, module, inputs, partial(random_params, module, *inputs, seed=seed))

    two = {"down_block_types": (_CROSS_DOWN, _DOWN), "up_block_types": (_UP, _CROSS_UP)}
    return [
        case("sd1", (8, 8), 7, 0, block_out_channels=(32, 64), norm_num_groups=8, cross_attention_dim=24,
             attention_head_dim=8, layers_per_block=2, **two),
        case("sd2", (8, 12), 5, 1, block_out_channels=(32, 96), norm_num_groups=16, cross_attention_dim=40,
             attention_head_dim=(2, 6), use_linear_projection=True, upcast_attention=True, layers_per_block=1, **two),
        case("odd-latents", (13, 9), 5, 2, block_out_channels=(24, 48, 72), norm_num_groups=6, cross_attention_dim=16,
             attention_head_dim=(3, 4, 6), layers_per_block=1, down_block_types=(_CROSS_DOWN, _DOWN, _CROSS_DOWN),
             up_block_types=(_CROSS_UP, _UP, _CROSS_UP)),
        case("one-level", (5, 7), 3, 3, block_out_channels=(30,), norm_num_groups=5, cross_attention_dim=8,
             attention_head_dim=5, layers_per_block=1, down_block_types=(_CROSS_DOWN,), up_block_types=(_CROSS_UP,)),
        case("only-cross-attention", (8, 6), 4, 4, block_out_channels=(16, 48), norm_num_groups=4,
             cross_attention_dim=20, attention_head_dim=(1, 3), only_cross_attention=(True, False), layers_per_block=1,
             down_block_types=(_CROSS_DOWN, _CROSS_DOWN), up_block_types=(_CROSS_UP, _CROSS_UP)),
        case("sine-first", (6, 10), 6, 5, block_out_channels=(40, 40), norm_num_groups=20, cross_attention_dim=32,
             attention_head_dim=4, flip_sin_to_cos=False, freq_shift=1, center_input_sample=True, norm_eps=1e-3,
             layers_per_block=2, in_channels=3, out_channels=5, **two),
    ]  # fmt: skip


@cache
def sdxl_unet_cases() -> list[Case]:
    """UNets of SDXL's kind: deeper transformers, a pooled text and sizes."""

    def case(name: str, size: tuple[int, int], pooled: int, ids: int, each: int, seed: int, **options: Any) -> Case:
        sizes: Any = {"addition_time_embed_dim": each, "projection_class_embeddings_input_dim": pooled + ids * each}
        config = UNetConfig(sample_size=8, addition_embed_type="text_time", **sizes, **options)
        generator = np.random.default_rng(seed)
        inputs = (
            generator.standard_normal((2, *size, config.in_channels), np.float32),
            np.array([3.0, 741.0], np.float32),
            generator.standard_normal((2, 5, config.cross_attention_dim), np.float32),
        )
        named = {
            "text_embeds": generator.standard_normal((2, pooled), np.float32),
            "time_ids": generator.integers(0, 1537, (2, ids)).astype(np.float32),
        }
        module = UNet2DConditionModel(config)
        return Case(name, module, inputs, partial(random_params, module, *inputs, seed=seed, **named), named)

    two = {"down_block_types": (_DOWN, _CROSS_DOWN), "up_block_types": (_CROSS_UP, _UP)}
    return [
        case("sdxl", (8, 12), 20, 6, 16, 10, block_out_channels=(16, 32, 48), norm_num_groups=8, cross_attention_dim=40,
             attention_head_dim=(1, 2, 3), layers_per_block=1, use_linear_projection=True,
             transformer_layers_per_block=(1, 2, 3), down_block_types=(_DOWN, _CROSS_DOWN, _CROSS_DOWN),
             up_block_types=(_CROSS_UP, _CROSS_UP, _UP)),
        case("sdxl-odd", (7, 5), 5, 6, 7, 11, block_out_channels=(24, 40), norm_num_groups=8, cross_attention_dim=24,
             attention_head_dim=(3, 5), layers_per_block=2, transformer_layers_per_block=2, **two),
        case("ssd", (8, 6), 12, 6, 8, 12, block_out_channels=(16, 32), norm_num_groups=4, cross_attention_dim=16,
             attention_head_dim=4, layers_per_block=2, mid_block_type="UNetMidBlock2D", use_linear_projection=True,
             transformer_layers_per_block=(1, (2, 1)), reverse_transformer_layers_per_block=((1, 2, 3), 1), **two),
        case("koala", (6, 6), 9, 6, 10, 13, block_out_channels=(20, 40), norm_num_groups=10, cross_attention_dim=8,
             attention_head_dim=(2, 4), layers_per_block=1, mid_block_type=None, transformer_layers_per_block=(1, 3),
             **two),
        case("sdxl-sine-first", (4, 6), 16, 6, 12, 14, block_out_channels=(32, 32), norm_num_groups=16,
             cross_attention_dim=20, attention_head_dim=(2, 8), layers_per_block=1, flip_sin_to_cos=False, freq_shift=1,
             transformer_layers_per_block=(2, 1), **two),
        case("refiner", (5, 4), 8, 5, 6, 15, block_out_channels=(30,), norm_num_groups=5, cross_attention_dim=12,
             attention_head_dim=5, layers_per_block=1, transformer_layers_per_block=4, down_block_types=(_CROSS_DOWN,),
             up_block_types=(_CROSS_UP,)),
    ]  # fmt: skip


@cache
def vae_cases() -> list[Case]:
    """Autoencoders with pictures."""

    def case(name: str, size: tuple[int, int], seed: int, **options: Any) -> Case:
        levels = len(options["block_out_channels"])
        config = VAEConfig(
            down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels, **options
        )
        pictures = np.random.default_rng(seed).standard_normal((2, *size, 3), np.float32)
        module = AutoencoderKL(config)
        return Case(name, module, (pictures,), partial(random_params, module, pictures, seed=seed))

    return [
        case("sd", (16, 16), 0, block_out_channels=(16, 32, 32), layers_per_block=2, norm_num_groups=8),
        case("non-square", (24, 16), 1, block_out_channels=(16, 32, 48, 48), layers_per_block=1, norm_num_groups=4),
        case("one-level", (5, 7), 2, block_out_channels=(24,), layers_per_block=1, norm_num_groups=6),
        case("odd-multiples", (12, 20), 3, block_out_channels=(18, 30), layers_per_block=2, norm_num_groups=6),
        case("more-latents", (8, 16), 4, block_out_channels=(8, 40), layers_per_block=1, norm_num_groups=2,
             latent_channels=7),
        case("three-layers", (8, 8), 5, block_out_channels=(12, 20, 28), layers_per_block=3, norm_num_groups=4),
    ]  # fmt: skip


@cache
def text_cases() -> list[Case]:
    """Text towers with tokens."""

    def case(name: str, length: int, seed: int, **options: Any) -> Case:
        config = CLIPTextConfig(vocab_size=61, max_position_embeddings=length, **options)
        tokens = np.random.default_rng(seed).integers(0, 61, (3, length), np.int32)
        module = CLIPTextModel(config)
        return Case(name, module, (tokens,), partial(random_params, module, tokens, seed=seed))

    return [
        case("sd1", 12, 0, hidden_size=32, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4),
        case("sd2", 9, 1, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=6,
             hidden_act="gelu"),
        case("one-head", 7, 2, hidden_size=24, intermediate_size=40, num_hidden_layers=1, num_attention_heads=1),
        case("many-heads", 5, 3, hidden_size=40, intermediate_size=24, num_hidden_layers=4, num_attention_heads=20),
        case("epsilon", 8, 4, hidden_size=16, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
             layer_norm_eps=1e-2),
        case("long", 77, 5, hidden_size=36, intermediate_size=72, num_hidden_layers=2, num_attention_heads=3),
    ]  # fmt: skip


@cache
def sdxl_text_cases() -> list[Case]:
    """Text towers with texts, as SDXL reads them: start, words, end, and pads of either kind or none."""

    def case(name: str, pad: int, seed: int, **options: Any) -> Case:
        config = CLIPTextConfig(vocab_size=61, max_position_embeddings=8, **options)
        tokens = np.full((3, 8), pad, np.int32)
        ends = np.array([4, 1, 7], np.int32)
        for row, end in zip(tokens, ends, strict=True):
            row[: end + 1] = [59, *np.random.default_rng(seed).integers(1, 59, end - 1), 60]
        second = "projection_dim" in options
        module = CLIPTextModelWithProjection(config) if second else CLIPTextModel(config)
        inputs = (tokens, ends) if second else (tokens,)
        return Case(name, module, inputs, partial(random_params, module, *inputs, seed=seed))

    wide = {"hidden_size": 40, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 5}
    return [
        case("first", 60, 0, **wide),
        case("second", 0, 1, **wide, hidden_act="gelu", projection_dim=24),
        case("second-square", 0, 2, **wide, hidden_act="gelu", projection_dim=40),
        case("second-padded-with-ends", 60, 3, **wide, hidden_act="gelu", projection_dim=16),
    ]


@cache
def sdxl_states(module: CLIPTextModel | CLIPTextModelWithProjection) -> Callable[..., Any]:
    """For `Case.run`: what SDXL reads of a tower, the states before its last layer and of the second the pooled."""

    def read(variables: Any, *inputs: Any) -> tuple[Any, ...]:
        options: Any = {"output_hidden_states": True} if len(inputs) == 1 else {}
        outputs: Any = module.apply(variables, *inputs, **options)
        return (outputs[1][-2],) if len(inputs) == 1 else (outputs[1][-2], outputs[0])

    return read


def _vision_configs() -> dict[str, CLIPVisionConfig]:
    return {
        "sd1": CLIPVisionConfig(hidden_size=32, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
                                image_size=28, patch_size=7, projection_dim=24),
        "sd2": CLIPVisionConfig(hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=6,
                                image_size=32, patch_size=8, hidden_act="gelu", projection_dim=20),
        "one-patch": CLIPVisionConfig(hidden_size=24, intermediate_size=40, num_hidden_layers=1, num_attention_heads=1,
                                      image_size=8, patch_size=8, projection_dim=8),
        "cut-edge": CLIPVisionConfig(hidden_size=40, intermediate_size=24, num_hidden_layers=2, num_attention_heads=20,
                                     image_size=30, patch_size=8, projection_dim=40),
        "epsilon": CLIPVisionConfig(hidden_size=16, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                                    image_size=16, patch_size=4, layer_norm_eps=1e-2, projection_dim=16),
        "small-patches": CLIPVisionConfig(hidden_size=36, intermediate_size=72, num_hidden_layers=4,
                                          num_attention_heads=3, image_size=12, patch_size=2, projection_dim=12),
    }  # fmt: skip


def _with_pixels(name: str, module: Any, size: int, seed: int) -> Case:
    pixels = np.random.default_rng(seed).standard_normal((4, size, size, 3), np.float32)
    return Case(name, module, (pixels,), partial(random_params, module, pixels, seed=seed))


@cache
def vision_cases() -> list[Case]:
    """Vision towers with preprocessed pictures."""
    return [
        _with_pixels(name, CLIPVisionModel(config), config.image_size, seed)
        for seed, (name, config) in enumerate(_vision_configs().items())
    ]


@cache
def safety_cases() -> list[Case]:
    """Safety checkers with preprocessed pictures, and thresholds that some of them exceed."""
    made = []
    for seed, (name, config) in enumerate(_vision_configs().items()):
        case = _with_pixels(name, StableDiffusionSafetyChecker(config), config.image_size, seed)
        typical = np.float32(config.projection_dim**-0.5)
        thresholds = {
            f"{kind}_embeds_weights": np.random.default_rng(seed).uniform(1.2, 2.2, count).astype(np.float32) * typical
            for kind, count in (("special_care", 3), ("concept", 17))
        }
        made.append(replace(case, weights=partial(_united, case.weights, thresholds)))
    return made


def _united(weights: Callable[[], dict[str, Any]], more: dict[str, Any]) -> dict[str, Any]:
    return weights() | more


@cache
def block_cases() -> list[Case]:
    """Every block alone, with inputs of standard deviation 1 and 0.01: only small inputs show a wrong epsilon."""
    vae = VAEConfig(
        block_out_channels=(24, 24),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=6,
    )
    picture, tokens, context, time = (2, 5, 7, 24), (2, 9, 24), (2, 4, 24), (2, 12)
    blocks: dict[str, tuple[Any, tuple[tuple[int, ...], ...]]] = {
        "group-norm-1e-5": (GroupNorm(6, 1e-5), (picture,)),
        "group-norm-1e-6": (GroupNorm(6, 1e-6), (picture,)),
        "layer-norm": (layer_norm(1e-5, np.float32), (tokens,)),
        "self-attention": (Attention(4), (tokens,)),
        "cross-attention": (Attention(3), (tokens, context)),
        "vae-attention": (Attention(1, qkv_bias=True, norm_groups=6), (tokens,)),
        "geglu": (GEGLU(40), (tokens,)),
        "feed-forward": (FeedForward(), (tokens,)),
        "time-embedding": (TimestepEmbedding(48), (time,)),
        "transformer-block": (BasicTransformerBlock(4), (tokens, context)),
        "transformer": (Transformer2DModel(4, 6), (picture, context)),
        "transformer-linear": (Transformer2DModel(2, 6, use_linear_projection=True), (picture, context)),
        "resnet": (ResnetBlock2D(36, 6, 1e-5), (picture, time)),
        "resnet-same-width": (ResnetBlock2D(24, 6, 1e-5), (picture, time)),
        "vae-resnet": (ResnetBlock2D(36, 6, 1e-6), (picture,)),
        "vae-middle": (MidBlock(vae), (picture,)),
        "vae-down": (DownEncoderBlock2D(vae, 0), (picture,)),
        "vae-up": (UpDecoderBlock2D(vae, 1), (picture,)),
        "clip-layer": (_clip_layer(), (tokens,)),
        "transformer-deep": (Transformer2DModel(4, 6, depth=3, use_linear_projection=True), (picture, context)),
    }
    cases = []
    for seed, (name, (module, shapes)) in enumerate(blocks.items()):
        generator = np.random.default_rng(seed)
        inputs = tuple(generator.standard_normal(shape, np.float32) for shape in shapes)
        weights = cache(partial(random_params, module, *inputs, seed=seed))
        cases.append(Case(f"{name}-1", module, inputs, weights))
        cases.append(Case(f"{name}-0.01", module, tuple(np.float32(0.01) * x for x in inputs), weights))
    return cases


def _clip_layer() -> CLIPEncoderLayer:
    return CLIPEncoderLayer(CLIPTextConfig(hidden_size=24, intermediate_size=48, num_attention_heads=4))

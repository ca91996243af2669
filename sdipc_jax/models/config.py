"""Architectures, read from the JSON files of a checkpoint.

Each class lists the options that are built (its fields, with the defaults of diffusers and transformers), the ones
that exist there but are built for one value alone (`FIXED`), and the ones that change no number (`IGNORED`). Any
other key, or another value of a fixed one, is refused by name: an option is honoured or refused, never ignored.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from sdipc_jax.errors import InputError

# What every transformers configuration may carry and no forward pass reads.
_TRANSFORMERS_KEYS = frozenset(
    """add_cross_attention architectures attention_dropout bad_words_ids begin_suppress_tokens bos_token_id
    chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample dropout dtype
    early_stopping encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty finetuning_task
    forced_bos_token_id forced_eos_token_id gradient_checkpointing id2label initializer_factor initializer_range
    is_decoder is_encoder_decoder label2id length_penalty max_length min_length model_type no_repeat_ngram_size
    num_beam_groups num_beams num_return_sequences output_attentions output_hidden_states output_scores pad_token_id
    prefix problem_type pruned_heads remove_invalid_values repetition_penalty return_dict return_dict_in_generate
    sep_token_id suppress_tokens task_specific_params temperature tf_legacy_loss tie_encoder_decoder
    tie_word_embeddings tokenizer_class top_k top_p torch_dtype torchscript transformers_version typical_p
    use_bfloat16""".split()
)


class Architecture:
    """A frozen dataclass that knows how to read and write its JSON file."""

    CLASS_NAME: ClassVar[str]
    FIXED: ClassVar[Mapping[str, Any]] = {}
    IGNORED: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def from_json(cls, values: Mapping[str, Any], source: str) -> Self:
        """Reads the configuration.

        Args:
            values: the parsed JSON object.
            source: what to call it in errors, such as `unet/config.json`.

        Raises:
            InputError: a key is unknown, has a value that is not supported, or does not fit the others.
        """
        fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
        found = {}
        for name, value in values.items():
            if name in fields:
                value = tuple(value) if isinstance(value, list) else value
                _check_type(fields[name].default, value, f"{source}: {name}")
                found[name] = value
            elif name in cls.FIXED:
                if value != cls.FIXED[name]:
                    raise InputError(
                        f"{source}: {name} is {value!r}, only {cls.FIXED[name]!r} is supported: "
                        "use a Stable Diffusion 1.x or 2.x checkpoint"
                    )
            elif not name.startswith("_") and name not in cls.IGNORED:
                raise InputError(
                    f"{source}: {name} is not an option of {cls.CLASS_NAME} that is known here: "
                    "remove it if it changes nothing, else this checkpoint is not supported"
                )
        try:
            return cls(**found)
        except InputError as error:
            raise InputError(f"{source}: {error}") from None

    def to_json(self) -> dict[str, Any]:
        """The configuration as diffusers or transformers writes it."""
        return dataclasses.asdict(self) | dict(self.FIXED)  # type: ignore[call-overload]


def _check_type(default: Any, value: Any, name: str) -> None:
    kind = type(default)
    scalars = value if isinstance(value, tuple) else (value,)
    expected = type(default[0]) if kind is tuple else kind
    allowed = (int, float) if expected is float else (expected,)
    per_block = name.endswith(("attention_head_dim", "only_cross_attention"))
    if isinstance(value, tuple) != (kind is tuple) and not per_block:
        raise InputError(f"{name} is {value!r}, expected {'a list' if kind is tuple else 'one value'}")
    if not all(type(scalar) in allowed for scalar in scalars):
        raise InputError(f"{name} is {value!r}, expected {expected.__name__}")
    if not all(0 <= scalar <= 1_000_000 for scalar in scalars if not isinstance(scalar, str)):
        raise InputError(f"{name} is {value!r}, expected values from 0 to 1,000,000")


def _check_multiples(name: str, values: tuple[int, ...], divisors: tuple[int, ...], of: str) -> None:
    for value, divisor in zip(values, divisors, strict=True):
        if divisor < 1 or value % divisor:
            raise InputError(f"{name} {value} is not a multiple of {of} {divisor}")


@dataclass(frozen=True)
class CLIPTextConfig(Architecture):
    """The CLIP text tower (transformers' CLIPTextConfig)."""

    CLASS_NAME = "CLIPTextModel"
    IGNORED = _TRANSFORMERS_KEYS | {"text_config_dict"}

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        _check_multiples("hidden_size", (self.hidden_size,), (self.num_attention_heads,), "num_attention_heads")
        _check_activation(self.hidden_act)


@dataclass(frozen=True)
class CLIPVisionConfig(Architecture):
    """The CLIP vision tower (transformers' CLIPVisionConfig)."""

    CLASS_NAME = "CLIPVisionModel"
    IGNORED = _TRANSFORMERS_KEYS | {"vision_config_dict"}

    hidden_size: int = 768
    intermediate_size: int = 3072
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        _check_multiples("hidden_size", (self.hidden_size,), (self.num_attention_heads,), "num_attention_heads")
        _check_activation(self.hidden_act)
        if self.num_channels != 3:
            raise InputError(f"num_channels is {self.num_channels}, expected 3")


def _check_activation(name: str) -> None:
    if name not in ("quick_gelu", "gelu"):
        raise InputError(f"hidden_act is {name!r}, expected 'quick_gelu' or 'gelu'")


@dataclass(frozen=True)
class UNetConfig(Architecture):
    """The denoiser (diffusers' UNet2DConditionModel). Channels and heads are listed from the finest level down.

    `attention_head_dim` is, as in diffusers, the number of heads, whatever its name says.
    """

    CLASS_NAME = "UNet2DConditionModel"
    FIXED: ClassVar[Mapping[str, Any]] = {
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "downsample_padding": 1,
        "mid_block_scale_factor": 1,
        "act_fn": "silu",
        "transformer_layers_per_block": 1,
        "reverse_transformer_layers_per_block": None,
        "encoder_hid_dim": None,
        "encoder_hid_dim_type": None,
        "num_attention_heads": None,
        "dual_cross_attention": False,
        "class_embed_type": None,
        "addition_embed_type": None,
        "addition_time_embed_dim": None,
        "num_class_embeds": None,
        "resnet_time_scale_shift": "default",
        "resnet_skip_time_act": False,
        "resnet_out_scale_factor": 1.0,
        "time_embedding_type": "positional",
        "time_embedding_dim": None,
        "time_embedding_act_fn": None,
        "timestep_post_act": None,
        "time_cond_proj_dim": None,
        "conv_in_kernel": 3,
        "conv_out_kernel": 3,
        "projection_class_embeddings_input_dim": None,
        "attention_type": "default",
        "class_embeddings_concat": False,
        "cross_attention_norm": None,
        "addition_embed_type_num_heads": 64,
    }
    # Dropout is off in sampling. The middle block of this type takes no notice of the third in diffusers either.
    IGNORED = frozenset({"dropout", "num_train_timesteps", "mid_block_only_cross_attention"})

    sample_size: int = 64
    in_channels: int = 4
    out_channels: int = 4
    center_input_sample: bool = False
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    only_cross_attention: tuple[bool, ...] = (False,)
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int = 1280
    attention_head_dim: tuple[int, ...] = (8,)
    use_linear_projection: bool = False
    upcast_attention: bool = False

    def __post_init__(self) -> None:
        levels = len(self.block_out_channels)
        for name in ("attention_head_dim", "only_cross_attention"):
            value = getattr(self, name)
            value = value if isinstance(value, tuple) else (value,)
            object.__setattr__(self, name, value * levels if len(value) == 1 else value)
        for name in ("down_block_types", "up_block_types", "attention_head_dim", "only_cross_attention"):
            if len(getattr(self, name)) != levels:
                raise InputError(f"{name} has {len(getattr(self, name))} entries, expected {levels}, one a level")
        _check_blocks("down_block_types", self.down_block_types, ("CrossAttnDownBlock2D", "DownBlock2D"))
        _check_blocks("up_block_types", self.up_block_types, ("CrossAttnUpBlock2D", "UpBlock2D"))
        _check_multiples(
            "block_out_channels", self.block_out_channels, (self.norm_num_groups,) * levels, "norm_num_groups"
        )
        _check_multiples("block_out_channels", self.block_out_channels, self.attention_head_dim, "attention_head_dim")


@dataclass(frozen=True)
class VAEConfig(Architecture):
    """The autoencoder (diffusers' AutoencoderKL)."""

    CLASS_NAME = "AutoencoderKL"
    FIXED: ClassVar[Mapping[str, Any]] = {
        "act_fn": "silu",
        "shift_factor": None,
        "latents_mean": None,
        "latents_std": None,
        "use_quant_conv": True,
        "use_post_quant_conv": True,
        "mid_block_add_attention": True,
    }
    # diffusers' Stable Diffusion pipeline does not read force_upcast.
    IGNORED = frozenset({"force_upcast"})

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int = 32
    scaling_factor: float = 0.18215

    def __post_init__(self) -> None:
        levels = len(self.block_out_channels)
        for name in ("down_block_types", "up_block_types"):
            if len(getattr(self, name)) != levels:
                raise InputError(f"{name} has {len(getattr(self, name))} entries, expected {levels}, one a level")
        _check_blocks("down_block_types", self.down_block_types, ("DownEncoderBlock2D",))
        _check_blocks("up_block_types", self.up_block_types, ("UpDecoderBlock2D",))
        _check_multiples(
            "block_out_channels", self.block_out_channels, (self.norm_num_groups,) * levels, "norm_num_groups"
        )

    @property
    def downscale(self) -> int:
        """Pixels per latent along one side: f = 2^(levels - 1)."""
        return 2 ** (len(self.block_out_channels) - 1)


def _check_blocks(name: str, found: tuple[str, ...], known: tuple[str, ...]) -> None:
    for block in found:
        if block not in known:
            raise InputError(f"{name} names {block!r}, supported are {', '.join(known)}")

"""Architectures, read from the JSON files of a checkpoint.

Each class lists the options that are built (its fields, with the defaults of diffusers and transformers), the ones
that exist there but are built for one value alone (`FIXED`), and the ones that change no number (`IGNORED`). Any
other key, or another value of a fixed one, is refused by name: an option is honoured or refused, never ignored.
"""

import dataclasses
from collections.abc import Iterator, Mapping
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


# Fields that may be one value for all levels of a network, and of these the one that may list values for each layer.
_PER_LAYER = "transformer_layers_per_block"
_PER_LEVEL = ("attention_head_dim", "only_cross_attention", _PER_LAYER)


# How many blocks the transformers of a level have: all of them, or that of each layer.
Depth = int | tuple[int, ...]


class Architecture:
    """A frozen dataclass that knows how to read and write its JSON file."""

    CLASS_NAME: ClassVar[str]
    FIXED: ClassVar[Mapping[str, Any]] = {}
    IGNORED: ClassVar[frozenset[str]] = frozenset()
    # Fields that may be null, which is their default, and what they are otherwise.
    OPTIONAL: ClassVar[Mapping[str, type]] = {}

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
                found[name] = _checked(fields[name].default, value, f"{source}: {name}", cls.OPTIONAL.get(name))
            elif name in cls.FIXED:
                only = cls.FIXED[name]
                # Null where a flag is meant is false.
                if value != only and not (only is False and value is None):
                    raise InputError(
                        f"{source}: {name} is {value!r}, only {only!r} is supported: "
                        "use a Stable Diffusion 1.x, 2.x or SDXL checkpoint"
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


def _checked(default: Any, value: Any, name: str, optional: type | None = None) -> Any:
    """A value of a file as its field has it: lists become tuples, and null where a flag is meant is false."""
    if optional is not None and value is None:
        return None
    if type(default) is bool and value is None:
        return False
    value = _as_tuple(value)
    kind = type(default) if optional is None else optional
    scalars = tuple(_scalars(value, deep=name.endswith(_PER_LAYER)))
    # Where a list may be left out it is one of numbers of blocks.
    expected = type((default or (1,))[0]) if kind is tuple else kind
    allowed = (int, float) if expected is float else (expected,)
    if isinstance(value, tuple) != (kind is tuple) and not name.endswith(_PER_LEVEL):
        raise InputError(f"{name} is {value!r}, expected {'a list' if kind is tuple else 'one value'}")
    if not all(type(scalar) in allowed for scalar in scalars):
        raise InputError(f"{name} is {value!r}, expected {expected.__name__}")
    if not all(0 <= scalar <= 1_000_000 for scalar in scalars if not isinstance(scalar, str)):
        raise InputError(f"{name} is {value!r}, expected values from 0 to 1,000,000")
    return value


def _as_tuple(value: Any) -> Any:
    return tuple(map(_as_tuple, value)) if isinstance(value, list) else value


def _scalars(value: Any, deep: bool) -> Iterator[Any]:
    for each in value if isinstance(value, tuple) else (value,):
        yield from _scalars(each, False) if deep and isinstance(each, tuple) else (each,)


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

    `attention_head_dim` is, as in diffusers, the number of heads, whatever its name says. The transformers of a level
    have `transformer_layers_per_block` blocks, or as many as it lists for each layer; the way up mirrors the way down
    unless `reverse_transformer_layers_per_block` lists its own, from the coarsest level on.
    """

    CLASS_NAME = "UNet2DConditionModel"
    OPTIONAL: ClassVar[Mapping[str, type]] = {
        "mid_block_type": str,
        "reverse_transformer_layers_per_block": tuple,
        "addition_embed_type": str,
        "addition_time_embed_dim": int,
        "projection_class_embeddings_input_dim": int,
        "time_cond_proj_dim": int,
    }
    FIXED: ClassVar[Mapping[str, Any]] = {
        "downsample_padding": 1,
        "mid_block_scale_factor": 1,
        "act_fn": "silu",
        "encoder_hid_dim": None,
        "encoder_hid_dim_type": None,
        "num_attention_heads": None,
        "dual_cross_attention": False,
        "class_embed_type": None,
        "num_class_embeds": None,
        "resnet_time_scale_shift": "default",
        "resnet_skip_time_act": False,
        "resnet_out_scale_factor": 1.0,
        "time_embedding_type": "positional",
        "time_embedding_dim": None,
        "time_embedding_act_fn": None,
        "timestep_post_act": None,
        "conv_in_kernel": 3,
        "conv_out_kernel": 3,
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
    mid_block_type: str | None = "UNetMidBlock2DCrossAttn"
    transformer_layers_per_block: tuple[Depth, ...] = (1,)
    reverse_transformer_layers_per_block: tuple[Depth, ...] | None = None
    addition_embed_type: str | None = None
    addition_time_embed_dim: int | None = None
    projection_class_embeddings_input_dim: int | None = None
    time_cond_proj_dim: int | None = None

    def __post_init__(self) -> None:
        levels = len(self.block_out_channels)
        for name in _PER_LEVEL:
            value = getattr(self, name)
            value = value if isinstance(value, tuple) else (value,)
            object.__setattr__(self, name, value * levels if len(value) == 1 else value)
        for name in ("down_block_types", "up_block_types", *_PER_LEVEL):
            if len(getattr(self, name)) != levels:
                raise InputError(f"{name} has {len(getattr(self, name))} entries, expected {levels}, one a level")
        _check_blocks("down_block_types", self.down_block_types, ("CrossAttnDownBlock2D", "DownBlock2D"))
        _check_blocks("up_block_types", self.up_block_types, ("CrossAttnUpBlock2D", "UpBlock2D"))
        _check_multiples(
            "block_out_channels", self.block_out_channels, (self.norm_num_groups,) * levels, "norm_num_groups"
        )
        _check_multiples("block_out_channels", self.block_out_channels, self.attention_head_dim, "attention_head_dim")
        if self.mid_block_type is not None:
            _check_blocks("mid_block_type", (self.mid_block_type,), ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D"))
        self._check_depths()
        self._check_addition()

    @property
    def embeds_guidance(self) -> bool:
        """Whether the network is told the guidance scale, and so needs no negative half (full LCMs)."""
        return self.time_cond_proj_dim is not None

    def depth_down(self, level: int, layer: int) -> int:
        """Blocks of the transformer after a layer on the way down."""
        return _depth(self.transformer_layers_per_block[level], layer)

    def depth_up(self, level: int, layer: int) -> int:
        """Blocks of the transformer after a layer on the way up."""
        depths = self.reverse_transformer_layers_per_block or self.transformer_layers_per_block[::-1]
        return _depth(depths[len(self.block_out_channels) - 1 - level], layer)

    @property
    def repaints(self) -> bool:
        """Whether the UNet was trained to repaint a part of a picture, and reads mask and masked latents besides."""
        return self.in_channels == 2 * self.out_channels + 1

    @property
    def depth_middle(self) -> int:
        """Blocks of the transformer in the middle."""
        return _depth(self.transformer_layers_per_block[-1], 0)

    def _check_depths(self) -> None:
        levels, reverse = len(self.block_out_channels), self.reverse_transformer_layers_per_block
        listed = [each for each in self.transformer_layers_per_block if isinstance(each, tuple)]
        if listed and reverse is None:
            raise InputError(f"{_PER_LAYER} lists layers, expected reverse_{_PER_LAYER} beside it: add it")
        for name, depths, layers in (
            (_PER_LAYER, self.transformer_layers_per_block, self.layers_per_block),
            (f"reverse_{_PER_LAYER}", reverse or (1,) * levels, self.layers_per_block + 1),
        ):
            lengths = {len(each) for each in depths if isinstance(each, tuple)} - {layers}
            if lengths or len(depths) != levels:
                raise InputError(f"{name} is {depths}, expected {levels} numbers or lists of {layers}: correct it")

    def _check_addition(self) -> None:
        sizes = (self.addition_time_embed_dim, self.projection_class_embeddings_input_dim)
        if self.addition_embed_type not in (None, "text_time"):
            raise InputError(f"addition_embed_type is {self.addition_embed_type!r}, supported is 'text_time'")
        if (self.addition_embed_type is None) != (sizes == (None, None)) or sizes.count(None) == 1:
            raise InputError(
                f"addition_embed_type is {self.addition_embed_type!r} with addition_time_embed_dim {sizes[0]} and "
                f"projection_class_embeddings_input_dim {sizes[1]}, expected all of them or none: correct them"
            )


def _depth(of_level: Depth, layer: int) -> int:
    return of_level[layer] if isinstance(of_level, tuple) else of_level


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
    # Whether float16 is too small for its activations, as for SDXL's.
    force_upcast: bool = True

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

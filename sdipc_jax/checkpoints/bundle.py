"""A checkpoint in memory: parameters as a pytree, everything else static."""

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from sdipc_jax.checkpoints.control_side import ControlSide
from sdipc_jax.checkpoints.description import describe
from sdipc_jax.checkpoints.lora_changes import Lora
from sdipc_jax.errors import InputError
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
from sdipc_jax.models.deep_prompts import DeepPrompts, PromptedCLIPVisionModel
from sdipc_jax.models.given import shapes
from sdipc_jax.models.layers import DType
from sdipc_jax.pictures.preprocessing import Preprocessing
from sdipc_jax.samplers import SchedulerConfig
from sdipc_jax.settings import Defaults, Fit
from sdipc_jax.tracing import under_our_rules

Params = dict[str, Any]

# SDXL is told height and width of the original, top and left of the crop, and height and width of the target.
SIZES = 6


@dataclass(frozen=True)
class SpecialTokens:
    """The ids that prompts are framed with, and the length L that they are padded to."""

    start: int
    end: int
    pad: int
    length: int


@dataclass(frozen=True)
class Embedding:
    """A word that a file adds to the text encoders.

    Attributes:
        word: what it is called in texts: the file's name without its ending.
        vectors: how many tokens it is.
        tensors: the component that reads each of the file's tensors, and the tensor's name.
    """

    word: str
    file: str
    vectors: int
    tensors: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class VisionSide:
    """What is read from the CLIP: its vision tower with its preprocessing, and the width of the joint space.

    `text` is its own text tower, which calibration alone reads; None where that is the checkpoint's. `prompts` and
    `trained_inverse` tell what tuning has added to its parameters: deep prompts, and a trained layer in the place of
    the pseudo-inverse.
    """

    folder: str
    vision: CLIPVisionConfig
    preprocessing: Preprocessing
    projection_dim: int
    text: CLIPTextConfig | None = None
    prompts: DeepPrompts | None = None
    trained_inverse: bool = False

    def model(self, dtype: DType) -> CLIPVisionModel | PromptedCLIPVisionModel:
        """The vision tower, with deep prompts if there are any."""
        if self.prompts is None:
            return CLIPVisionModel(self.vision, dtype)
        return PromptedCLIPVisionModel(self.vision, self.prompts, dtype)


@dataclass(frozen=True)
class SafetySide:
    """The safety checker's vision tower and preprocessing, which happens on the device and so in one way only."""

    vision: CLIPVisionConfig
    preprocessing: Preprocessing

    def __post_init__(self) -> None:
        settings = self.preprocessing
        for option in ("do_resize", "do_rescale", "do_normalize", "resample"):
            found, expected = getattr(settings, option), getattr(Preprocessing, option)
            if found != expected:
                raise InputError(
                    f"feature_extractor/preprocessor_config.json: {option} is {found}, sdipc supports {expected} for "
                    "the safety checker: use the file of Stable Diffusion 1.x"
                )
        edges = (settings.size, settings.size) if isinstance(settings.size, int) else settings.size
        if settings.do_center_crop and any(crop > edge for crop, edge in zip(settings.crop_size, edges, strict=True)):
            raise InputError(
                f"feature_extractor/preprocessor_config.json: crop_size is {settings.crop_size}, expected at most "
                f"the size, {edges}: use the file of Stable Diffusion 1.x"
            )


@dataclass(frozen=True)
class Config:
    """Everything about a checkpoint but its weights. Hashable: a static argument of compiled functions.

    Attributes:
        folder: of the pipeline, or its single file.
        text_2, tokens_2: SDXL's second text tower, which is what tells SDXL from the others here.
        force_zeros_for_empty_prompt: a negative prompt that is left out is zeros, and not the states of the empty text.
        vae_dtype: of the VAE, where it is not `dtype`.
        elsewhere: where parts are that are not there, folder or file by part.
        average: the UNet's weights are the moving average that a single file has beside them.
        origins: the hub's repositories and commits that the parts were fetched from.
        loras: what is fused into the weights.
    """

    folder: str
    unet: UNetConfig
    vae: VAEConfig
    text: CLIPTextConfig
    scheduler: SchedulerConfig
    tokens: SpecialTokens
    defaults: Defaults
    clip: VisionSide | None = None
    safety: SafetySide | None = None
    dtype: str = "float32"
    text_2: CLIPTextConfig | None = None
    tokens_2: SpecialTokens | None = None
    force_zeros_for_empty_prompt: bool = False
    vae_dtype: str | None = None
    elsewhere: tuple[tuple[str, str], ...] = ()
    average: bool = False
    # What follows changes no program, so that none is compiled anew for it.
    origins: tuple[tuple[str, str], ...] = field(default=(), compare=False)
    loras: tuple[Lora, ...] = field(default=(), compare=False)
    # What a person should know of how it was put together.
    notes: tuple[str, ...] = field(default=(), compare=False)
    embeddings: tuple[Embedding, ...] = ()
    clip_skip: int = 0
    controlnets: tuple[ControlSide, ...] = ()

    def place(self, part: str) -> Path:
        """Where a part's weights and configuration are: a folder of its own, or a file that holds others too."""
        elsewhere = dict(self.elsewhere).get(part)
        if elsewhere is not None:
            return Path(elsewhere)
        return Path(self.folder) if Path(self.folder).is_file() else Path(self.folder, part)

    @property
    def compute_dtype(self) -> DType:
        """The dtype of the weights and arithmetic of UNet, CLIP and VAE."""
        return jnp.dtype(self.dtype)

    @property
    def unet_model(self) -> UNet2DConditionModel:
        return UNet2DConditionModel(self.unet, self.compute_dtype)

    @property
    def vae_model(self) -> AutoencoderKL:
        # Activations of autoencoders exceed what float16 holds, unless they were trained not to, and in SDXL's bfloat16
        # shows.
        upcast = self.vae.force_upcast and (self.dtype == "float16" or self.text_2 is not None)
        return AutoencoderKL(self.vae, jnp.dtype(self.vae_dtype or ("float32" if upcast else self.dtype)))

    @property
    def text_model(self) -> CLIPTextModel:
        return CLIPTextModel(self.text, self.compute_dtype)

    @property
    def text_towers(self) -> dict[str, CLIPTextConfig]:
        """The text encoders by the names of their components."""
        return {"text_encoder": self.text} | ({} if self.text_2 is None else {"text_encoder_2": self.text_2})

    @property
    def text_model_2(self) -> CLIPTextModelWithProjection:
        """SDXL's second text tower.

        Raises:
            InputError: there is none.
        """
        if self.text_2 is None:
            raise InputError(f"{self.folder} has no text_encoder_2, expected SDXL: use another checkpoint")
        return CLIPTextModelWithProjection(self.text_2, self.compute_dtype)

    @property
    def towers(self) -> tuple[tuple[CLIPTextConfig, SpecialTokens], ...]:
        """The text towers with the tokens that frame their texts."""
        second = () if self.text_2 is None or self.tokens_2 is None else ((self.text_2, self.tokens_2),)
        return ((self.text, self.tokens), *second)

    @property
    def vision_model(self) -> CLIPVisionModel | PromptedCLIPVisionModel:
        return self.vision_side.model(self.compute_dtype)

    @property
    def vision_side(self) -> VisionSide:
        """The CLIP that sees pictures.

        Raises:
            InputError: there is none.
        """
        if self.clip is None:
            raise InputError(
                f"{self.folder} has no clip/ folder, expected the CLIP that this checkpoint was trained with: "
                'pass --clip FOLDER (in Python clip="default" is its family\'s)'
            )
        return self.clip

    @property
    def clip_text(self) -> CLIPTextConfig:
        """The text tower of the CLIP that sees pictures."""
        return self.vision_side.text or self.text

    @property
    def reads_an_earlier_layer(self) -> bool:
        """Whether the UNet reads the CLIP's text tower before its last layer, as those of SD 2.x and SDXL do."""
        whole = self.clip_text
        if self.text_2 is not None:
            return True
        return self.text.hidden_size == whole.hidden_size and self.text.num_hidden_layers < whole.num_hidden_layers

    @property
    def inverse_reaches(self) -> bool:
        """Whether the CLIP's text projection is one of the states that the UNet reads, so that eq. 6 gives them."""
        return self.text.hidden_size == self.clip_text.hidden_size and not self.reads_an_earlier_layer

    def check_inverse(self) -> None:
        """Refuses a CLIP whose text projection is not one of the states that the UNet reads: eq. 6 does not reach them.

        Raises:
            InputError: that, or there is none.
        """
        whole = self.clip_text
        if self.text_2 is not None:
            raise InputError(
                "SDXL's UNet reads its text towers before their last layers, where the inverse does not reach: pass "
                "--calibrate ridge (in Python sdipc.calibrate)"
            )
        if whole.hidden_size != self.text.hidden_size:
            raise InputError(
                f"text_projection is ({self.vision_side.projection_dim}, {whole.hidden_size}) but the UNet reads "
                f"{self.text.hidden_size}-wide prompts: pass --clip with the CLIP this checkpoint was trained with, or "
                "--calibrate ridge (in Python sdipc.calibrate)"
            )
        if self.reads_an_earlier_layer:
            raise InputError(
                f"the text encoder has {self.text.num_hidden_layers} layers and the CLIP's text tower "
                f"{whole.num_hidden_layers}: the inverse needs the last layer, as Stable Diffusion 1.x has: "
                "pass --calibrate ridge (in Python sdipc.calibrate)"
            )

    @property
    def clip_is_second_tower(self) -> bool:
        """Whether the CLIP's text tower has the shape of SDXL's second one."""
        whole, second = self.clip_text, self.text_2
        return second is not None and (whole.hidden_size, whole.num_hidden_layers, self.vision_side.projection_dim) == (
            second.hidden_size,
            second.num_hidden_layers,
            second.projection_dim,
        )

    def negative_text(self, typed: str | None) -> str | None:
        """What a negative prompt that is left out stands for: the empty text, but None where that is zeros."""
        return "" if typed is None and not self.force_zeros_for_empty_prompt else typed

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, height / f, width / f).

        Raises:
            InputError: a side is not a positive multiple of f.
        """
        f = self.vae.downscale
        for name, side in (("height", height), ("width", width)):
            if side < f or side % f:
                raise InputError(f"{name} is {side}, expected a multiple of {f}: try {max(f, round(side / f) * f)}")
        return self.vae.latent_channels, height // f, width // f

    def added_inputs(self, count: int) -> dict[str, jax.ShapeDtypeStruct]:
        """The shapes of what the UNet reads beside latents, time and prompts: SDXL's pooled texts and sizes."""
        if self.text_2 is None:
            return {}
        return {
            "text_embeds": jax.ShapeDtypeStruct((count, self.text_2.projection_dim), jnp.float32),
            "time_ids": jax.ShapeDtypeStruct((count, SIZES), jnp.float32),
        }

    @under_our_rules
    def abstract_params(self) -> Params:
        """The shapes and dtypes of all parameters, a tree for each part of the pipeline."""
        f, base = self.vae.downscale, 2 ** (len(self.unet.block_out_channels) - 1)
        latents = ((1, base, base, self.unet.in_channels), jnp.float32)
        context = ((1, 1, self.unet.cross_attention_dim), jnp.float32)
        added = {name: (each.shape, each.dtype) for name, each in self.added_inputs(1).items()}
        tree = {
            "unet": shapes(self.unet_model, latents, ((1,), jnp.float32), context, **added),
            "vae": shapes(self.vae_model, ((1, f, f, 3), jnp.float32)),
            "text_encoder": shapes(self.text_model, ((1, self.tokens.length), jnp.int32)),
        }
        if self.text_2 is not None:
            tokens, ends = ((1, self.tokens.length), jnp.int32), ((1,), jnp.int32)
            tree["text_encoder_2"] = shapes(self.text_model_2, tokens, ends)
        if self.embeddings:
            count = sum(each.vectors for each in self.embeddings)
            tree["embeddings"] = {
                component: jax.ShapeDtypeStruct((count, tower.hidden_size), self.compute_dtype)
                for component, tower in self.text_towers.items()
            }
        if self.clip is not None:
            vision, joint = self.clip.vision, self.clip.projection_dim
            model = self.clip.model(self.compute_dtype)
            tower = shapes(model, ((1, vision.image_size, vision.image_size, 3), jnp.float32))
            # Small, and the source of everything else: float32 whatever the dtype.
            tree["clip"] = tower | {
                "visual_projection": {"kernel": jax.ShapeDtypeStruct((vision.hidden_size, joint), jnp.float32)},
                "text_projection": {"kernel": jax.ShapeDtypeStruct((self.clip_text.hidden_size, joint), jnp.float32)},
                "logit_scale": jax.ShapeDtypeStruct((), jnp.float32),
            }
            if self.clip.trained_inverse:
                kernel = jax.ShapeDtypeStruct((joint, self.text.hidden_size), jnp.float32)
                tree["clip"]["inverse"] = {"kernel": kernel}
        for place, side in enumerate(self.controlnets):
            network = side.abstract_params(self.compute_dtype, context, added)
            tree.setdefault("controlnets", {})[str(place)] = network
        if self.safety is not None:
            size = self.safety.vision.image_size
            checker = StableDiffusionSafetyChecker(self.safety.vision)
            tree["safety_checker"] = shapes(checker, ((1, size, size, 3), jnp.float32))
        return tree


def with_fit(config: Config, fit: Fit) -> Config:
    """The configuration with which pictures of another shape than the vision tower's are fitted to it in this way."""
    if config.clip is None or config.clip.preprocessing.fit == fit:
        return config
    preprocessing = replace(config.clip.preprocessing, fit=fit)
    return replace(config, clip=replace(config.clip, preprocessing=preprocessing))


@under_our_rules
def apply(module: nn.Module, params: Params, *inputs: Any, **options: Any) -> Any:
    """A network's output."""
    return module.apply({"params": params}, *inputs, **options)


@partial(jax.tree_util.register_dataclass, data_fields=["params"], meta_fields=["config"])
@dataclass(frozen=True, repr=False)
class Bundle:
    """A loaded checkpoint. A pytree whose leaves are the parameters; pass it to jitted functions as an argument."""

    params: Params
    config: Config

    def __repr__(self) -> str:
        """A screen of what it is, and not its weights."""
        return describe(self.params, self.config)


def for_sampling(bundle: Bundle) -> Bundle:
    """What is read once there are prompts: their makers' memory is free as soon as no one holds the whole bundle."""
    kept = ("unet", "vae", "safety_checker", "controlnets")
    return Bundle({name: tree for name, tree in bundle.params.items() if name in kept}, bundle.config)

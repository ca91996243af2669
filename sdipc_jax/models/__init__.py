"""Parameters and arrays in, arrays out: the networks of Stable Diffusion as Flax Linen modules with PyTorch's numbers.

Imports no other room.
"""

from sdipc_jax.models.clip import CLIPTextModel, CLIPTextModelWithProjection, CLIPVisionModel
from sdipc_jax.models.config import CLIPTextConfig, CLIPVisionConfig, UNetConfig, VAEConfig
from sdipc_jax.models.controlnet import ControlNetConditioningEmbedding, ControlNetConfig, ControlNetModel
from sdipc_jax.models.safety import StableDiffusionSafetyChecker
from sdipc_jax.models.unet import UNet2DConditionModel
from sdipc_jax.models.vae import AutoencoderKL

__all__ = [
    "AutoencoderKL",
    "CLIPTextConfig",
    "CLIPTextModel",
    "CLIPTextModelWithProjection",
    "CLIPVisionConfig",
    "CLIPVisionModel",
    "ControlNetConditioningEmbedding",
    "ControlNetConfig",
    "ControlNetModel",
    "StableDiffusionSafetyChecker",
    "UNet2DConditionModel",
    "UNetConfig",
    "VAEConfig",
]

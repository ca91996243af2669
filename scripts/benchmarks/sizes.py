"""The sizes of real checkpoints, for programs that need no weights or random ones."""

import dataclasses

from sdipc_jax.checkpoints.bundle import Config, SpecialTokens, VisionSide
from sdipc_jax.models import CLIPTextConfig, CLIPVisionConfig, UNetConfig, VAEConfig
from sdipc_jax.pictures.preprocessing import Preprocessing
from sdipc_jax.samplers import SchedulerConfig
from sdipc_jax.settings import Defaults

SDXL_UNET = UNetConfig(
    sample_size=128,
    block_out_channels=(320, 640, 1280),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    cross_attention_dim=2048,
    attention_head_dim=(5, 10, 20),
    use_linear_projection=True,
    transformer_layers_per_block=(1, 2, 10),
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
)
_VAE = VAEConfig(
    block_out_channels=(128, 256, 512, 512),
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    layers_per_block=2,
)
_OPENAI_L = CLIPTextConfig(
    hidden_size=768, intermediate_size=3072, projection_dim=768, num_hidden_layers=12, num_attention_heads=12
)


def sd15(dtype: str) -> Config:
    """Stable Diffusion 1.5 with OpenAI's ViT-L/14."""
    scheduler = {
        **{"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        **{"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1},
    }
    vision = CLIPVisionConfig(1024, 4096, 768, 24, 16, image_size=224, patch_size=14)
    return Config(
        folder="sd15",
        unet=UNetConfig(cross_attention_dim=768),
        vae=_VAE,
        text=_OPENAI_L,
        scheduler=SchedulerConfig.from_json(scheduler),
        tokens=SpecialTokens(start=49406, end=49407, pad=49407, length=77),
        defaults=Defaults(height=512, width=512),
        clip=VisionSide("clip", vision, Preprocessing(), 768),
        dtype=dtype,
    )


def small_sdxl(dtype: str) -> Config:
    """A thousandth of SDXL, which every machine runs."""
    config = sdxl(dtype)
    unet = dataclasses.replace(
        config.unet,
        block_out_channels=(32, 64, 64),
        attention_head_dim=(2, 4, 4),
        transformer_layers_per_block=(1, 1, 2),
    )
    return dataclasses.replace(config, unet=unet, defaults=Defaults(height=128, width=128, sampler="euler"))


def sdxl(dtype: str) -> Config:
    """SDXL's base with OpenCLIP's ViT-bigG/14."""
    scheduler = {
        **{"_class_name": "EulerDiscreteScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.00085},
        **{"beta_end": 0.012, "timestep_spacing": "leading", "steps_offset": 1},
    }
    big_g = CLIPTextConfig(
        hidden_size=1280,
        intermediate_size=5120,
        projection_dim=1280,
        num_hidden_layers=32,
        num_attention_heads=20,
        hidden_act="gelu",
    )
    vision = CLIPVisionConfig(
        hidden_size=1664,
        intermediate_size=8192,
        projection_dim=1280,
        num_hidden_layers=48,
        num_attention_heads=16,
        image_size=224,
        patch_size=14,
        hidden_act="gelu",
    )
    return Config(
        folder="sdxl",
        unet=SDXL_UNET,
        vae=dataclasses.replace(_VAE, scaling_factor=0.13025, force_upcast=True, sample_size=1024),
        text=_OPENAI_L,
        scheduler=SchedulerConfig.from_json(scheduler),
        tokens=SpecialTokens(start=49406, end=49407, pad=49407, length=77),
        defaults=Defaults(height=1024, width=1024, sampler="euler", guidance_scale=5.0),
        clip=VisionSide("clip", vision, Preprocessing(), 1280, big_g),
        dtype=dtype,
        text_2=big_g,
        tokens_2=SpecialTokens(start=49406, end=49407, pad=0, length=77),
        force_zeros_for_empty_prompt=True,
    )

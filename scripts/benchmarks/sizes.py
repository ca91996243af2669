"""The sizes of real checkpoints, for programs that need no weights or random ones."""

from sdipc_jax.checkpoints.bundle import Config, SpecialTokens, VisionSide
from sdipc_jax.models import CLIPTextConfig, CLIPVisionConfig, UNetConfig, VAEConfig
from sdipc_jax.pictures.preprocessing import Preprocessing
from sdipc_jax.samplers import SchedulerConfig
from sdipc_jax.settings import Defaults


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
        vae=VAEConfig(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
        ),
        text=CLIPTextConfig(
            hidden_size=768, intermediate_size=3072, projection_dim=768, num_hidden_layers=12, num_attention_heads=12
        ),
        scheduler=SchedulerConfig.from_json(scheduler),
        tokens=SpecialTokens(start=49406, end=49407, pad=49407, length=77),
        defaults=Defaults(height=512, width=512),
        clip=VisionSide("clip", vision, Preprocessing(), 768),
        dtype=dtype,
    )

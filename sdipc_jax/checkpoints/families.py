"""What the shapes of a single file do not say, a row a family; and the kinds of files that are something else."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sdipc_jax.checkpoints.vocabulary import END

OPEN_CLIP_PAD = "!"
_BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}
# As the families' own scheduler files have them, whichever class.
_COMMON = _BETAS | {"clip_sample": False, "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1}


@dataclass(frozen=True)
class Family:
    """One family of checkpoints.

    Attributes:
        name: as options and tables call it.
        title: as people call it.
        width: of the states that the UNet reads.
        heads: of the UNet's attention on each level, or None where each has 64 channels.
        sizes: of latents, by prediction type.
        pad: what its tokenizer fills texts up with.
        text_layers: the last one that is read of the (first) text tower.
        text_parts: the text towers.
        scaling_factor: of the latents.
        schedulers: class by prediction type, with the fields that are its own.
        architecture: how modelspec's names for it begin.
        clip: the CLIP that it was trained with, by its alias.
    """

    name: str
    title: str
    width: int
    heads: int | None
    sizes: Mapping[str, int]
    pad: str
    text_layers: int
    scaling_factor: float
    schedulers: Mapping[str, str]
    architecture: str
    clip: str
    text_parts: tuple[str, ...] = ("text_encoder",)
    unet: Mapping[str, Any] = field(default_factory=dict)
    vae: Mapping[str, Any] = field(default_factory=dict)
    scheduler_fields: Mapping[str, Any] = field(default_factory=dict)

    def scheduler(self, prediction: str) -> dict[str, Any]:
        """Its scheduler_config.json."""
        named = {"_class_name": self.schedulers.get(prediction, "DDIMScheduler"), "prediction_type": prediction}
        return _COMMON | dict(self.scheduler_fields) | named


FAMILIES = (
    Family(
        name="sd1",
        title="Stable Diffusion 1.x",
        width=768,
        heads=8,
        sizes={"epsilon": 64, "v_prediction": 64},
        pad=END,
        text_layers=12,
        scaling_factor=0.18215,
        schedulers={"epsilon": "PNDMScheduler"},
        architecture="stable-diffusion-v1",
        clip="clip-l",
    ),
    Family(
        name="sd2",
        title="Stable Diffusion 2.x",
        width=1024,
        heads=None,
        sizes={"epsilon": 64, "v_prediction": 96},
        pad=OPEN_CLIP_PAD,
        # Of ViT-H's 24.
        text_layers=23,
        scaling_factor=0.18215,
        schedulers={"epsilon": "PNDMScheduler", "v_prediction": "DDIMScheduler"},
        architecture="stable-diffusion-v2",
        clip="clip-h",
    ),
    Family(
        name="sdxl",
        title="Stable Diffusion XL",
        width=2048,
        heads=None,
        sizes={"epsilon": 128, "v_prediction": 128},
        pad=END,
        text_layers=12,
        scaling_factor=0.13025,
        schedulers={"epsilon": "EulerDiscreteScheduler", "v_prediction": "EulerDiscreteScheduler"},
        architecture="stable-diffusion-xl",
        clip="clip-bigg",
        text_parts=("text_encoder", "text_encoder_2"),
        unet={"addition_embed_type": "text_time", "addition_time_embed_dim": 256},
        vae={"force_upcast": True, "sample_size": 1024},
        scheduler_fields={"timestep_spacing": "leading", "interpolation_type": "linear", "use_karras_sigmas": False},
    ),
)

SD1, SD2, SDXL = FAMILIES


def family_for(width: int, *, linear: bool, added: bool) -> Family:
    """The family of a UNet.

    Args:
        width: of the prompts that it reads. Where no family has it, somebody has trained a UNet from nothing, and how
            it is built says like which.
        linear: its transformers begin with a linear layer, not with a convolution.
        added: something is added to the time's embedding.
    """
    by_width = next((family for family in FAMILIES if family.width == width), None)
    return by_width or (SDXL if added else SD2 if linear else SD1)


# What other files are, by names that no Stable Diffusion 1.x, 2.x or XL has; the first that is found says it.
OTHERS: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), what)
    for pattern, what in (
        (
            r"(.*\.)?scaled_fp8|.*\.scale_weight|.*\.scale_input|.*\.weight_scale(_inv)?",
            "weights in scaled 8-bit floats",
        ),
        (r".*\.(quant_state\..*|absmax|quant_map|nested_absmax)", "weights in 4 bits (bitsandbytes)"),
        (r".*\.lora_(down|up|mid|A|B)\..*|lora_.*|.*\.hada_w1_a|.*\.lokr_w1.*", "a LoRA: pass it with --lora"),
        (r"emb_params|clip_[lg]|string_to_param.*|<.*>", "a textual inversion: pass it with --embedding"),
        (r"(.*\.)?control_model\..*|controlnet_cond_embedding\..*|(.*\.)?input_hint_block\..*", "a ControlNet"),
        (r"(image_proj|ip_adapter)\..*", "an IP-Adapter"),
        (r".*motion_modules\..*", "a motion module (AnimateDiff)"),
        (r".*joint_blocks\.\d+\..*|.*\.norm1_context\..*add_k_proj.*", "Stable Diffusion 3"),
        (r"(.*\.)?(double_blocks|single_transformer_blocks)\.\d+\..*", "FLUX"),
        (r".*\.(time_stack|time_mixer|temporal_transformer_blocks)\b.*", "Stable Video Diffusion"),
        (r"conditioner\.embedders\.0\.open_clip\..*", "Stable Video Diffusion"),
        (r"(.*\.)?add_embedding\.image_norm\..*|encoder_hid_proj\.image_embeds\..*|prior_embedding", "Kandinsky"),
        (r".*\.channelwise\.\d+\..*|clf\.1\.weight", "Stable Cascade"),
        (r"(.*\.)?caption_projection\..*|(.*\.)?y_embedder\.y_proj\..*", "PixArt"),
        (r"embedder\..*|noise_augmentor\..*", "an unCLIP checkpoint"),
        (r"depth_model\..*", "a depth checkpoint"),
        (r"cc_projection\..*", "Zero123"),
        (r"edm_vpred\.sigma_(max|min)", "CosXL, with EDM's noise levels"),
        (r"edm_(mean|std)", "Playground 2.5, with EDM's noise levels"),
    )
)

# What a UNet with other channels is, by what it takes and by its width.
INPUTS = {
    8: "an instruct-pix2pix checkpoint",
    7: "an upscaler",
    5: "a depth checkpoint",
}
REFINER_WIDTH = 1280
UNCLIP_CLASSES = (2048, 1536)

# What may lie in a file and decides nothing.
JUNK = re.compile(
    r"(.*\.)?(position_ids|attn_mask|logit_scale)|betas|alphas_cumprod(_prev)?|(sqrt|log_one_minus|posterior)_.*|logvar"
    r"|lvlb_weights|denoiser\..*|first_stage_model\.loss\..*|global_step|model_ema\.(decay|num_updates)"
)
# What decides how a file is sampled, although it holds no weight.
V_PREDICTION_MARK, ZERO_SNR_MARK = "v_pred", "ztsnr"

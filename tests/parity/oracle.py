"""The PyTorch twins of the random networks: diffusers' and transformers' own classes with the same weights."""

from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock, FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import TimestepEmbedding
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_blocks import DownEncoderBlock2D, UNetMidBlock2D, UpDecoderBlock2D
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from transformers import (
    CLIPConfig,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModel,
)
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

from sdipc_jax.checkpoints.keys import flatten, to_torch, torch_name
from tests.cases import Case

torch.set_grad_enabled(False)
# Threads have to wait for each other at every layer, and these layers are too small for that.
torch.set_num_threads(1)


def state_dict(params: dict[str, Any]) -> dict[str, torch.Tensor]:
    """A parameter tree under PyTorch's names and layouts."""
    return {
        torch_name(path): torch.tensor(np.ascontiguousarray(to_torch(path, np.asarray(leaf))))
        for path, leaf in flatten(params).items()
    }


def with_weights(module: torch.nn.Module, params: dict[str, Any]) -> Any:
    """The module in eval mode with the tree's weights; every one of its own must be among them."""
    missing, extra = module.load_state_dict(state_dict(params), strict=False)
    assert not extra, extra
    assert not [name for name in missing if not name.endswith("position_ids")], missing
    return module.eval()


def options(config: Any) -> dict[str, Any]:
    """A configuration as keyword arguments of its PyTorch class."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in config.to_json().items()}


def nchw(x: np.ndarray) -> torch.Tensor:
    """A channels-last array as PyTorch wants it."""
    return torch.tensor(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))


def array(x: torch.Tensor) -> np.ndarray:
    """A tensor of any dtype; NumPy has no bfloat16, and float64 holds them all."""
    return x.numpy() if x.dtype == torch.float32 else x.double().numpy()


def nhwc(x: torch.Tensor) -> np.ndarray:
    """A PyTorch picture, channels last."""
    return array(x).transpose(0, 2, 3, 1)


def unet(case: Case) -> Any:
    """The UNet of a case."""
    return with_weights(UNet2DConditionModel(**options(case.module.config)), case.params)


def vae(case: Case) -> Any:
    """The autoencoder of a case."""
    return with_weights(AutoencoderKL(**options(case.module.config)), case.params)


def text(case: Case) -> Any:
    """The text tower of a case."""
    return with_weights(CLIPTextModel(CLIPTextConfig(**options(case.module.config))), case.params)


def vision(case: Case) -> Any:
    """The vision tower of a case."""
    return with_weights(CLIPVisionModel(CLIPVisionConfig(**options(case.module.config))), case.params)


def run_unet(case: Case, dtype: torch.dtype = torch.float32) -> np.ndarray:
    """What PyTorch's UNet gives."""
    sample, timesteps, context = case.inputs
    inputs = nchw(sample).to(dtype), torch.tensor(timesteps), torch.tensor(context).to(dtype)
    added = {name: torch.tensor(value) for name, value in case.named.items()}
    return nhwc(unet(case).to(dtype)(*inputs, added_cond_kwargs=added or None).sample)


def run_vae(case: Case, dtype: torch.dtype = torch.float32) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean and log-variance of the latents, and the pictures of the mean."""
    model = vae(case).to(dtype)
    latents = model.encode(nchw(case.inputs[0]).to(dtype)).latent_dist
    return nhwc(latents.mean), nhwc(latents.logvar), nhwc(model.decode(latents.mean).sample)


def run_text(case: Case, dtype: torch.dtype = torch.float32) -> np.ndarray:
    """The last hidden states."""
    model, tokens = text(case).to(dtype), torch.tensor(case.inputs[0], dtype=torch.long)
    # transformers makes the causal mask of the dtype's lowest value, in the default dtype.
    torch.set_default_dtype(dtype)
    try:
        return array(model(tokens).last_hidden_state)
    finally:
        torch.set_default_dtype(torch.float32)


def run_sdxl_text(case: Case, dtype: torch.dtype = torch.float32) -> tuple[np.ndarray, ...]:
    """The states before the last layer, and of the second tower the pooled embedding."""
    second = case.module.__class__.__name__ == "CLIPTextModelWithProjection"
    config = CLIPTextConfig(**options(case.module.config), eos_token_id=60)
    kind = CLIPTextModelWithProjection if second else CLIPTextModel
    outputs = with_weights(kind(config), case.params).to(dtype)(
        torch.tensor(case.inputs[0], dtype=torch.long), output_hidden_states=True
    )
    states = array(outputs.hidden_states[-2])
    return (states, array(outputs.text_embeds)) if second else (states,)


def run_vision(case: Case, dtype: torch.dtype = torch.float32) -> np.ndarray:
    """The pooled output."""
    return array(vision(case).to(dtype)(nchw(case.inputs[0]).to(dtype)).pooler_output)


def _block(name: str) -> torch.nn.Module:
    width, groups = 24, 6
    resnet = {"groups": groups, "in_channels": width, "temb_channels": 12}
    vae = {"num_layers": 1, "in_channels": width, "out_channels": width, "resnet_groups": groups}
    blocks = {
        "group-norm-1e-5": lambda: torch.nn.GroupNorm(groups, width, eps=1e-5),
        "group-norm-1e-6": lambda: torch.nn.GroupNorm(groups, width, eps=1e-6),
        "layer-norm": lambda: torch.nn.LayerNorm(width, eps=1e-5),
        "self-attention": lambda: Attention(width, heads=4, dim_head=6),
        "cross-attention": lambda: Attention(width, cross_attention_dim=width, heads=3, dim_head=8),
        "vae-attention": lambda: Attention(width, heads=1, dim_head=width, bias=True, norm_num_groups=groups, eps=1e-6),
        "geglu": lambda: GEGLU(width, 40),
        "feed-forward": lambda: FeedForward(width, activation_fn="geglu"),
        "time-embedding": lambda: TimestepEmbedding(12, 48),
        "transformer-block": lambda: BasicTransformerBlock(width, 4, 6, cross_attention_dim=width),
        "transformer": lambda: Transformer2DModel(4, 6, width, cross_attention_dim=width, norm_num_groups=groups),
        "transformer-linear": lambda: Transformer2DModel(
            2, 12, width, cross_attention_dim=width, norm_num_groups=groups, use_linear_projection=True
        ),
        "transformer-deep": lambda: Transformer2DModel(
            4, 6, width, num_layers=3, cross_attention_dim=width, norm_num_groups=groups, use_linear_projection=True
        ),
        "resnet": lambda: ResnetBlock2D(out_channels=36, eps=1e-5, **resnet),
        "resnet-same-width": lambda: ResnetBlock2D(out_channels=width, eps=1e-5, **resnet),
        "vae-resnet": lambda: ResnetBlock2D(out_channels=36, eps=1e-6, **resnet | {"temb_channels": None}),
        "vae-middle": lambda: UNetMidBlock2D(
            width, temb_channels=None, resnet_groups=groups, attention_head_dim=width, resnet_eps=1e-6
        ),
        "vae-down": lambda: DownEncoderBlock2D(**vae, downsample_padding=0),
        "vae-up": lambda: UpDecoderBlock2D(**vae | {"num_layers": 2}, temb_channels=None),
        "clip-layer": lambda: CLIPEncoderLayer(
            CLIPTextConfig(hidden_size=width, intermediate_size=48, num_attention_heads=4, attn_implementation="eager")
        ),
    }
    return blocks[name]()


def run_block(case: Case) -> np.ndarray:
    """What PyTorch's block gives."""
    name = case.name.rsplit("-", 1)[0]
    module = with_weights(_block(name), case.params)
    inputs = [nchw(x) if x.ndim == 4 else torch.tensor(x) for x in case.inputs]
    if name == "clip-layer":
        outputs = module(*inputs, attention_mask=None, causal_attention_mask=None)[0]
    elif name.startswith("transformer") and name != "transformer-block":
        outputs = module(inputs[0], encoder_hidden_states=inputs[1]).sample
    elif name == "transformer-block":
        outputs = module(inputs[0], encoder_hidden_states=inputs[1])
    elif name.startswith(("resnet", "vae-resnet")):
        outputs = module(inputs[0], inputs[1] if len(inputs) > 1 else None)
    else:
        outputs = module(*inputs)
    return nhwc(outputs) if outputs.ndim == 4 else outputs.numpy()


def run_safety(case: Case) -> np.ndarray:
    """Which pictures are flagged."""
    vision = case.module.config
    config = CLIPConfig(projection_dim=vision.projection_dim, vision_config=options(vision))
    checker = with_weights(StableDiffusionSafetyChecker(config), case.params)
    pictures = np.ones((len(case.inputs[0]), 2, 2, 3), np.float32)
    return np.asarray(checker(nchw(case.inputs[0]), pictures)[1])

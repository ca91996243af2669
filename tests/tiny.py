"""A checkpoint folder in miniature, with random weights: every part of a Stable Diffusion pipeline, and its CLIP."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from sdipc_jax import Bundle, save
from sdipc_jax.checkpoints.bundle import Config, SafetySide, SpecialTokens, VisionSide
from sdipc_jax.models import CLIPTextConfig, CLIPVisionConfig, UNetConfig, VAEConfig
from sdipc_jax.pictures.preprocessing import Preprocessing
from sdipc_jax.samplers import SchedulerConfig
from sdipc_jax.settings import Defaults
from tests.random_weights import random_tree

START, END = "<|startoftext|>", "<|endoftext|>"

SCHEDULER = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.39.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}

# A UNet of one level, with the tiny checkpoint's shapes: it compiles in half the time.
SMALL_UNET = UNetConfig(
    sample_size=8,
    block_out_channels=(16,),
    down_block_types=("CrossAttnDownBlock2D",),
    up_block_types=("CrossAttnUpBlock2D",),
    norm_num_groups=4,
    cross_attention_dim=24,
    attention_head_dim=(2,),
    layers_per_block=1,
)


def write_tokenizer(folder: Path, pad: str = END) -> SpecialTokens:
    """A byte-level CLIP tokenizer without merges: one token a letter."""
    letters = [*map(chr, range(33, 127)), *map(chr, range(161, 173)), *map(chr, range(174, 256))]
    letters += [chr(256 + n) for n in range(256 - len(letters))]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), START, END]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": pad}
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 20, "do_lower_case": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(special | settings))
    return SpecialTokens(tokens.index(START), tokens.index(END), tokens.index(pad), 20)


def tiny_bundle(folder: Path, *, safety: bool = False, seed: int = 0, pad: str = END, **changes: Any) -> Bundle:
    """A bundle whose tokenizer lies in `folder`. Latents have f = 4; pictures are 32 by 32 unless told otherwise."""
    tokens = write_tokenizer(folder / "tokenizer", pad)
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=28,
        patch_size=7,
        projection_dim=24,
    )
    preprocessing = Preprocessing(size=28, crop_size=(28, 28))
    config = Config(
        folder=str(folder),
        unet=UNetConfig(
            sample_size=8,
            block_out_channels=(16, 32),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            norm_num_groups=4,
            cross_attention_dim=24,
            attention_head_dim=(2, 4),
            layers_per_block=1,
        ),
        vae=VAEConfig(
            block_out_channels=(8, 16, 16),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            norm_num_groups=4,
        ),
        text=CLIPTextConfig(
            vocab_size=514,
            hidden_size=24,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=3,
            max_position_embeddings=20,
            projection_dim=24,
        ),
        scheduler=SchedulerConfig.from_json(SCHEDULER),
        tokens=tokens,
        defaults=Defaults(steps=4, cutoff=0.3, height=32, width=32),
        clip=VisionSide(str(folder / "clip"), vision, preprocessing, 24),
        safety=SafetySide(vision, preprocessing) if safety else None,
    )
    config = dataclasses.replace(config, **changes)
    params = random_tree(config.abstract_params(), seed)
    return Bundle(jax_tree(params), config)


SDXL_SCHEDULER = {
    "_class_name": "EulerDiscreteScheduler",
    "_diffusers_version": "0.39.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "interpolation_type": "linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "trained_betas": None,
    "use_karras_sigmas": False,
}


def tiny_sdxl(folder: Path, *, seed: int = 0, **changes: Any) -> Bundle:
    """SDXL in miniature, without a CLIP: two towers that pad in two ways, and a UNet that reads both and sizes."""
    tokens_2 = write_tokenizer(folder / "tokenizer_2", pad="!")
    second = CLIPTextConfig(
        vocab_size=514,
        hidden_size=40,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=5,
        max_position_embeddings=20,
        projection_dim=32,
        hidden_act="gelu",
    )
    unet = UNetConfig(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        cross_attention_dim=24 + 40,
        attention_head_dim=(2, 4),
        layers_per_block=1,
        use_linear_projection=True,
        transformer_layers_per_block=(1, 2),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=32 + 6 * 8,
    )
    parts: dict[str, Any] = {
        "unet": unet,
        "scheduler": SchedulerConfig.from_json(SDXL_SCHEDULER),
        "defaults": Defaults(steps=4, sampler="euler", guidance_scale=5.0, height=32, width=32),
        "clip": None,
        "text_2": second,
        "tokens_2": tokens_2,
        "force_zeros_for_empty_prompt": True,
    }
    return tiny_bundle(folder, seed=seed, **parts | changes)


def quick_unet(unet: UNetConfig) -> UNetConfig:
    """One that compiles in half the time: it reads prompts in its middle alone."""
    return dataclasses.replace(
        unet,
        block_out_channels=(16,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        only_cross_attention=(False,),
        attention_head_dim=(2,),
        transformer_layers_per_block=(1,),
    )


def jax_tree(params: dict[str, Any]) -> dict[str, Any]:
    """The tree with JAX arrays as leaves."""
    return {name: jax_tree(leaf) if isinstance(leaf, dict) else jnp.asarray(leaf) for name, leaf in params.items()}


def write_checkpoint(folder: Path, **changes: Any) -> Path:
    """A whole checkpoint folder."""
    save(tiny_bundle(folder.with_name(f"{folder.name}-parts"), **changes), folder)
    return folder

"""Checkpoints in miniature as single files have them: CLIP's vocabulary, 32 groups, heads by family."""

import dataclasses
from pathlib import Path

from sdipc_jax.checkpoints.bundle import Bundle, SpecialTokens
from sdipc_jax.checkpoints.families import SD1, Family
from sdipc_jax.checkpoints.vocabulary import write_vocabulary
from sdipc_jax.models import CLIPTextConfig, UNetConfig, VAEConfig
from sdipc_jax.samplers import SchedulerConfig
from sdipc_jax.settings import Defaults
from tests.random_weights import random_tree
from tests.tiny import jax_tree, tiny_bundle

WIDTH = 64


def family_bundle(folder: Path, family: Family = SD1) -> Bundle:
    """A bundle of a family: two levels, prompts of 64 channels, no CLIP. Its tokenizer lies in `folder`."""
    (folder / "tokenizer").mkdir(parents=True)
    write_vocabulary(folder / "tokenizer", family.pad)
    channels = (32, 64) if family.heads else (64, 128)
    config = dataclasses.replace(
        tiny_bundle(folder.with_name(f"{folder.name}-parts")).config,
        folder=str(folder),
        unet=UNetConfig(
            sample_size=family.sizes["epsilon"],
            block_out_channels=channels,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=WIDTH,
            attention_head_dim=tuple(family.heads or width // 64 for width in channels),
            use_linear_projection=family.heads is None,
            layers_per_block=1,
        ),
        vae=VAEConfig(
            block_out_channels=(32, 32),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            scaling_factor=family.scaling_factor,
        ),
        text=CLIPTextConfig(
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=2,
            num_attention_heads=1,
            projection_dim=WIDTH,
            hidden_act="quick_gelu" if family is SD1 else "gelu",
        ),
        scheduler=SchedulerConfig.from_json(family.scheduler("epsilon")),
        tokens=SpecialTokens(49406, 49407, 0 if family.pad == "!" else 49407, 77),
        defaults=Defaults(steps=4, height=32, width=32),
        clip=None,
    )
    return Bundle(jax_tree(random_tree(config.abstract_params(), 0)), config)

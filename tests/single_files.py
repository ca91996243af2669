"""Checkpoints in miniature as single files have them: CLIP's vocabulary, 32 groups, heads by family."""

import dataclasses
from pathlib import Path
from typing import Any

from sdipc_jax.checkpoints.bundle import Bundle, SpecialTokens
from sdipc_jax.checkpoints.families import OPEN_CLIP_PAD, SD1, SD2, Family
from sdipc_jax.checkpoints.vocabulary import write_vocabulary
from sdipc_jax.models import CLIPTextConfig, UNetConfig, VAEConfig
from sdipc_jax.samplers import SchedulerConfig
from sdipc_jax.settings import Defaults
from tests.random_weights import random_tree
from tests.tiny import jax_tree, tiny_bundle

WIDTH = 64


def family_bundle(folder: Path, family: Family = SD1) -> Bundle:
    """A bundle of a family: two levels, text towers of 64 channels, no CLIP. Its tokenizers lie in `folder`."""
    towers = len(family.text_parts)
    for name, pad in (("tokenizer", family.pad), ("tokenizer_2", OPEN_CLIP_PAD))[:towers]:
        (folder / name).mkdir(parents=True)
        write_vocabulary(folder / name, pad)
    text = CLIPTextConfig(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=1,
        projection_dim=WIDTH,
        hidden_act="gelu" if family is SD2 else "quick_gelu",
    )
    tokens = SpecialTokens(49406, 49407, 0 if family.pad == OPEN_CLIP_PAD else 49407, 77)
    second: dict[str, Any] = {
        "text_2": dataclasses.replace(text, hidden_act="gelu"),
        "tokens_2": dataclasses.replace(tokens, pad=0),
        "force_zeros_for_empty_prompt": True,
    }
    added: dict[str, Any] = {
        "projection_class_embeddings_input_dim": WIDTH + 6 * 256,
        "transformer_layers_per_block": (1, 2),
    }
    attention = ["CrossAttnDownBlock2D", "DownBlock2D"], ["UpBlock2D", "CrossAttnUpBlock2D"]
    down, up = (tuple(reversed(kinds)) if towers == 2 else tuple(kinds) for kinds in attention)
    channels = (32, 64) if family.heads else (64, 128)
    config = dataclasses.replace(
        tiny_bundle(folder.with_name(f"{folder.name}-parts")).config,
        folder=str(folder),
        unet=UNetConfig(
            sample_size=family.sizes["epsilon"],
            block_out_channels=channels,
            down_block_types=down,
            up_block_types=up,
            cross_attention_dim=WIDTH * towers,
            attention_head_dim=tuple(family.heads or width // 64 for width in channels),
            use_linear_projection=family.heads is None,
            layers_per_block=1,
            **dict(family.unet) | (added if towers == 2 else {}),
        ),
        vae=VAEConfig(
            block_out_channels=(32, 32),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            scaling_factor=family.scaling_factor,
            **family.vae,
        ),
        text=text,
        scheduler=SchedulerConfig.from_json(family.scheduler("epsilon")),
        tokens=tokens,
        defaults=Defaults(steps=4, height=32, width=32),
        clip=None,
        **second if towers == 2 else {},
    )
    return Bundle(jax_tree(random_tree(config.abstract_params(), 0)), config)

"""What CompVis' and Stability's single files call the tensors that diffusers and transformers name otherwise.

A row is a module of diffusers beside the module of the file; what stands below it keeps its name, but for the layers of
a residual block, which have rows of their own. `{down}` and `{up}` count a UNet's blocks through all levels, `{mirror}`
counts the decoder's levels from the other end. Together the rows of a table are a bijection onto a network's tensors;
they are the same for Stable Diffusion 1.x, 2.x and XL.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Piece:
    """Where the values of a tensor are in a single file.

    Attributes:
        name: the file's tensor, without the part's prefix.
        third: which third of it along the first axis, if it holds queries, keys and values together.
        transposed: it multiplies from the other side.
    """

    name: str
    third: int | None = None
    transposed: bool = False


Rows = tuple[tuple[str, str], ...]

UNET: Rows = (
    ("conv_in", "input_blocks.0.0"),
    ("time_embedding.linear_1", "time_embed.0"),
    ("time_embedding.linear_2", "time_embed.2"),
    # Of full LCMs.
    ("time_embedding.cond_proj", "time_embed.cond_proj"),
    # Of SDXL.
    ("add_embedding.linear_1", "label_emb.0.0"),
    ("add_embedding.linear_2", "label_emb.0.2"),
    ("down_blocks.{b}.resnets.{i}", "input_blocks.{down}.0"),
    ("down_blocks.{b}.attentions.{i}", "input_blocks.{down}.1"),
    ("down_blocks.{b}.downsamplers.0.conv", "input_blocks.{last_down}.0.op"),
    ("mid_block.resnets.0", "middle_block.0"),
    ("mid_block.attentions.0", "middle_block.1"),
    ("mid_block.resnets.1", "middle_block.2"),
    ("up_blocks.{b}.resnets.{i}", "output_blocks.{up}.0"),
    ("up_blocks.{b}.attentions.{i}", "output_blocks.{up}.1"),
    ("up_blocks.{b}.upsamplers.0.conv", "output_blocks.{last_up}.{after_attention}.conv"),
    ("conv_norm_out", "out.0"),
    ("conv_out", "out.2"),
)
UNET_BLOCK: Rows = (
    ("norm1", "in_layers.0"),
    ("conv1", "in_layers.2"),
    ("time_emb_proj", "emb_layers.1"),
    ("norm2", "out_layers.0"),
    ("conv2", "out_layers.3"),
    ("conv_shortcut", "skip_connection"),
)

# What a ControlNet has beside the blocks of a UNet.
CONTROL: Rows = (
    ("controlnet_cond_embedding.conv_in", "input_hint_block.0"),
    ("controlnet_cond_embedding.blocks.{b}", "input_hint_block.{seen}"),
    ("controlnet_cond_embedding.conv_out", "input_hint_block.14"),
    ("controlnet_down_blocks.{b}", "zero_convs.{b}.0"),
    ("controlnet_mid_block", "middle_block_out.0"),
)

VAE: Rows = (
    ("encoder.down_blocks.{b}.resnets.{i}", "encoder.down.{b}.block.{i}"),
    ("encoder.down_blocks.{b}.downsamplers.0.conv", "encoder.down.{b}.downsample.conv"),
    ("decoder.up_blocks.{b}.resnets.{i}", "decoder.up.{mirror}.block.{i}"),
    ("decoder.up_blocks.{b}.upsamplers.0.conv", "decoder.up.{mirror}.upsample.conv"),
    *(
        (f"{side}.mid_block.{ours}", f"{side}.mid.{theirs}")
        for side in ("encoder", "decoder")
        for ours, theirs in (
            ("resnets.0", "block_1"),
            ("resnets.1", "block_2"),
            ("attentions.0.group_norm", "attn_1.norm"),
            ("attentions.0.to_q", "attn_1.q"),
            ("attentions.0.to_k", "attn_1.k"),
            ("attentions.0.to_v", "attn_1.v"),
            ("attentions.0.to_out.0", "attn_1.proj_out"),
        )
    ),
    *((f"{side}.conv_norm_out", f"{side}.norm_out") for side in ("encoder", "decoder")),
    *((f"{side}.{name}", f"{side}.{name}") for side in ("encoder", "decoder") for name in ("conv_in", "conv_out")),
    ("quant_conv", "quant_conv"),
    ("post_quant_conv", "post_quant_conv"),
)
VAE_BLOCK: Rows = (
    *((name, name) for name in ("norm1", "conv1", "norm2", "conv2")),
    ("conv_shortcut", "nin_shortcut"),
)

OPEN_CLIP: Rows = (
    ("text_model.embeddings.token_embedding", "token_embedding"),
    ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
    *(
        (f"text_model.encoder.layers.{{b}}.{ours}", f"transformer.resblocks.{{b}}.{theirs}")
        for ours, theirs in (
            ("layer_norm1", "ln_1"),
            ("layer_norm2", "ln_2"),
            ("mlp.fc1", "mlp.c_fc"),
            ("mlp.fc2", "mlp.c_proj"),
            ("self_attn.out_proj", "attn.out_proj"),
        )
    ),
    ("text_model.final_layer_norm", "ln_final"),
)
_OPEN_CLIP_THIRDS = re.compile(r"text_model\.encoder\.layers\.(\d+)\.self_attn\.([qkv])_proj\.(weight|bias)")
# Stored as it multiplies from the right. A file that adds `.weight` has a linear layer's orientation instead.
OPEN_CLIP_PROJECTION, LINEAR_PROJECTION = "text_projection", "text_projection.weight"


def unet_names(names: Iterable[str], layers: int, attention: Sequence[bool] = ()) -> dict[str, Piece]:
    """Where each of diffusers' tensors of a UNet or a ControlNet is.

    Args:
        names: of diffusers, such as a tree expects.
        layers: residual blocks a level on the way down.
        attention: which levels on the way up have any, from the coarsest.
    """

    def values(b: int, i: int) -> dict[str, int]:
        return {
            # Convolutions with an activation after each.
            "seen": 2 * (b + 1),
            "down": 1 + b * (layers + 1) + i,
            "last_down": (b + 1) * (layers + 1),
            "up": b * (layers + 1) + i,
            "last_up": b * (layers + 1) + layers,
            "after_attention": 2 if b < len(attention) and attention[b] else 1,
        }

    return _renamed(names, (*UNET, *CONTROL), UNET_BLOCK, values)


def vae_names(names: Iterable[str], levels: int) -> dict[str, Piece]:
    """Where each of diffusers' tensors of an autoencoder is."""
    return _renamed(names, VAE, VAE_BLOCK, lambda b, i: {"mirror": levels - 1 - b})


def open_clip_names(names: Iterable[str], *, linear_projection: bool = False) -> dict[str, Piece]:
    """Where each of transformers' tensors of a text tower is in OpenCLIP's.

    Args:
        linear_projection: the file calls its projection `text_projection.weight`.
    """
    table = {}
    rest = []
    for name in names:
        if match := _OPEN_CLIP_THIRDS.fullmatch(name):
            stored = f"transformer.resblocks.{match[1]}.attn.in_proj_{match[3]}"
            table[name] = Piece(stored, third="qkv".index(match[2]))
        elif name == LINEAR_PROJECTION:
            table[name] = Piece(name) if linear_projection else Piece(OPEN_CLIP_PROJECTION, transposed=True)
        else:
            rest.append(name)
    return table | _renamed(rest, OPEN_CLIP, (), lambda b, i: {})


def same_names(names: Iterable[str]) -> dict[str, Piece]:
    """Of a file that has diffusers' and transformers' names."""
    return {name: Piece(name) for name in names}


def _renamed(
    names: Iterable[str], modules: Rows, block: Rows, values: Callable[[int, int], Mapping[str, int]]
) -> dict[str, Piece]:
    patterns = [(_pattern(ours), ours, theirs) for ours, theirs in modules]
    table = {}
    for name in names:
        for pattern, ours, theirs in patterns:
            if match := pattern.fullmatch(name):
                found = match.groupdict()
                b, i = int(found.get("b") or 0), int(found.get("i") or 0)
                rest = found["rest"]
                if ".resnets." in ours and block:
                    rest = _inner(rest, block)
                table[name] = Piece(theirs.format(b=b, i=i, **values(b, i)) + rest)
                break
        else:
            raise KeyError(name)
    return table


def _pattern(row: str) -> re.Pattern[str]:
    text = re.escape(row).replace(r"\{b\}", r"(?P<b>\d+)").replace(r"\{i\}", r"(?P<i>\d+)")
    return re.compile(rf"{text}(?P<rest>(\..+)?)")


def _inner(rest: str, block: Rows) -> str:
    """`.conv1.weight` of a residual block, as the file has it."""
    for ours, theirs in block:
        if rest.startswith(f".{ours}."):
            return f".{theirs}.{rest.removeprefix(f'.{ours}.')}"
    raise KeyError(rest)

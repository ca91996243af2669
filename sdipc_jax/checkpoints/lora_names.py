"""What LoRA files call a checkpoint's modules, and the tensors that they have for each.

Nothing is guessed from a name: every spelling of every module that the checkpoint has is written into a table, and
files are looked up in it. (Underscores cannot be turned back into dots.)
"""

import re
from collections.abc import Iterable, Iterator, Mapping

# How the files spell a component: what stands before a module's name, with underscores and with dots.
_UNDERSCORED = {
    "unet": ("lora_unet_", "lycoris_unet_", "lycoris_"),
    "text_encoder": ("lora_te_", "lora_te1_", "lycoris_te_", "lycoris_te1_"),
    "text_encoder_2": ("lora_te2_", "lycoris_te2_"),
}
_DOTTED = {
    "unet": ("unet.", "", "base_model.model.", "unet.base_model.model.", "diffusion_model.", "model.diffusion_model."),
    "text_encoder": ("text_encoder.",),
    "text_encoder_2": ("text_encoder_2.",),
}

# What stands after a module's name, by the role of the tensor in its formula.
_ROLES = {
    "down": "lora_down.weight lora_A.weight lora_A.default.weight lora.down.weight lora_linear_layer.down.weight "
    "down.weight",
    "up": "lora_up.weight lora_B.weight lora_B.default.weight lora.up.weight lora_linear_layer.up.weight up.weight",
    "mid": "lora_mid.weight",
    "alpha": "alpha",
    "dora_scale": "dora_scale",
    "magnitude": "lora_magnitude_vector lora_magnitude_vector.weight lora_magnitude_vector.default.weight",
    **{f"hada_{name}": f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f"lokr_{name}": f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
    "diff": "diff w_norm",
    "diff_b": "diff_b b_norm",
}
_SUFFIXES = {f".{suffix}": role for role, suffixes in _ROLES.items() for suffix in suffixes.split()}
# Kinds that are known and not built.
UNSUPPORTED = {
    **dict.fromkeys((".oft_blocks", ".oft_diag", ".oft_R.weight", ".oft_r", ".boft_R", ".boft_s"), "OFT or BOFT"),
    **dict.fromkeys((".a1.weight", ".a2.weight", ".b1.weight", ".b2.weight"), "GLoRA"),
    **dict.fromkeys((".on_input", ".ia3_l"), "IA3"),
    ".lora_E": "AdaLoRA",
}

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "time_embedding.cond_proj": "time_embed.cond_proj",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_MIDDLE = {"resnets.0": "middle_block.0", "attentions.0": "middle_block.1", "resnets.1": "middle_block.2"}
_PLACE = re.compile(
    r"(?:(down|up)_blocks\.(\d+)|mid_block)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.?(.*)"
)


def spellings(modules: Mapping[str, Iterable[str]], layers_per_block: int) -> dict[str, tuple[str, str]]:
    """Every way to write a module in front of a role, and the component and module that it means.

    Args:
        modules: the modules' names in PyTorch, by component.
        layers_per_block: of the UNet.
    """
    table = {}
    for component, names in modules.items():
        known = set(names)
        for name in known:
            for spelled in {name, *_others(component, name, known, layers_per_block)}:
                for prefix in _DOTTED.get(component, ()):
                    table[prefix + spelled] = component, name
                for prefix in _UNDERSCORED.get(component, ()):
                    table[prefix + spelled.replace(".", "_")] = component, name
    return table


def split(key: str) -> tuple[str, str] | None:
    """A key's module as it is spelled, and the tensor's role; None if the key ends in no role.

    >>> split("unet.mid_block.attentions.0.proj_in.lora_A.weight")
    ('unet.mid_block.attentions.0.proj_in', 'down')
    """
    endings = (suffix for suffix in _SUFFIXES if key.endswith(suffix))
    suffix = max(endings, key=len, default=None)
    return None if suffix is None else (key.removesuffix(suffix), _SUFFIXES[suffix])


def _others(component: str, name: str, known: set[str], layers: int) -> Iterator[str]:
    if component == "unet":
        if original := ldm_name(name, known, layers):
            yield original
        if match := re.fullmatch(r"(.*\.attn[12])\.(to_q|to_k|to_v|to_out)(\.0)?", name):
            yield f"{match[1]}.processor.{match[2]}_lora"
        return
    yield name.removeprefix("text_model.")
    if match := re.fullmatch(r"(.*\.self_attn)\.(q|k|v|out)_proj", name):
        yield f"{match[1]}.to_{match[2]}_lora"


def ldm_name(name: str, known: set[str], layers: int) -> str | None:
    """A module of the UNet under the name of CompVis' and Stability's own code (LDM and SGM), or None if it has none.

    Args:
        known: all modules of the UNet.
        layers: resnets in a block on the way down.

    >>> ldm_name("down_blocks.1.attentions.0.proj_in", set(), 2)
    'input_blocks.4.1.proj_in'
    """
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    match = _PLACE.fullmatch(name)
    if match is None:
        return None
    way, block, kind, index, rest = match[1], int(match[2] or 0), match[3], int(match[4]), match[5]
    inner = _RESNET.get(rest, rest) if kind == "resnets" else rest
    first = block * (layers + 1)
    if way is None:
        place = _MIDDLE[f"{kind}.{index}"]
    elif kind in ("resnets", "attentions"):
        number = first + index + (1 if way == "down" else 0)
        place = f"{'input' if way == 'down' else 'output'}_blocks.{number}.{0 if kind == 'resnets' else 1}"
    elif kind == "downsamplers":
        place, inner = f"input_blocks.{first + layers + 1}.0", "op"
    else:
        attends = any(each.startswith(f"up_blocks.{block}.attentions.") for each in known)
        place = f"output_blocks.{first + layers}.{2 if attends else 1}"
    return f"{place}.{inner}"

"""What LoRA files call a checkpoint's modules, and the tensors that they have for each.

Nothing is guessed from a name: every spelling of every module that the checkpoint has is written into a table, and
files are looked up in it. (Underscores cannot be turned back into dots.)
"""

import re
from collections.abc import Iterable, Iterator, Mapping

from sdipc_jax.checkpoints.names_ldm import unet_names

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


def spellings(modules: Mapping[str, Iterable[str]], layers_per_block: int) -> dict[str, tuple[str, str]]:
    """Every way to write a module in front of a role, and the component and module that it means.

    Args:
        modules: the modules' names in PyTorch, by component.
        layers_per_block: of the UNet.
    """
    table = {}
    for component, names in modules.items():
        known = set(names)
        originals = _originals(known, layers_per_block) if component == "unet" else {}
        for name in known:
            for spelled in {name, originals.get(name, name), *_others(component, name)}:
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


def _originals(modules: set[str], layers: int) -> dict[str, str]:
    """The UNet's modules under the names of CompVis' and Stability's own code (LDM and SGM)."""
    blocks = {name.split(".")[1] for name in modules if name.startswith("up_blocks.")}
    attends = [any(name.startswith(f"up_blocks.{block}.attentions.") for name in modules) for block in sorted(blocks)]
    weights = unet_names((f"{name}.weight" for name in modules), layers, attends)
    return {name.removesuffix(".weight"): piece.name.removesuffix(".weight") for name, piece in weights.items()}


def _others(component: str, name: str) -> Iterator[str]:
    if component == "unet":
        if match := re.fullmatch(r"(.*\.attn[12])\.(to_q|to_k|to_v|to_out)(\.0)?", name):
            yield f"{match[1]}.processor.{match[2]}_lora"
        return
    yield name.removeprefix("text_model.")
    if match := re.fullmatch(r"(.*\.self_attn)\.(q|k|v|out)_proj", name):
        yield f"{match[1]}.to_{match[2]}_lora"

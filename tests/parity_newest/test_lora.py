"""LoRA files of every kind as PEFT makes and merges them, and in dialects that diffusers reads, weight by weight."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file

from sdipc_jax import Bundle
from sdipc_jax.checkpoints.keys import flatten, to_torch, torch_name
from sdipc_jax.checkpoints.lora import merge_lora

TOLERANCE = 1e-5
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
# One linear layer of each kind, a 1x1 and two 3x3 convolutions, and the layer that reads the time.
TARGETS = [*ATTENTION, "proj_in", "ff.net.0.proj", "conv1", "conv_in", "time_emb_proj"]
RANK, ALPHA = 3, 2.0

KINDS: dict[str, Any] = {
    "lora": peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, init_lora_weights=False),
    "rslora": peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, init_lora_weights=False, use_rslora=True
    ),
    "ranks of their own": peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, init_lora_weights=False,
        rank_pattern={"conv1": 5}, alpha_pattern={"conv1": 7.0, "attn2.to_k": 1.0},
    ),
    "dora": peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, init_lora_weights=False, use_dora=True),
    "loha": peft.LoHaConfig(r=RANK, alpha=ALPHA, target_modules=TARGETS, init_weights=False),
    "loha with core": peft.LoHaConfig(
        r=RANK, alpha=ALPHA, target_modules=TARGETS, init_weights=False, use_effective_conv2d=True
    ),
    # Where both factors are whole, LyCORIS and this package divide by nothing, and PEFT by a rank that plays no part.
    "lokr": peft.LoKrConfig(r=1, alpha=ALPHA, target_modules=TARGETS, init_weights=False),
    "lokr of products": peft.LoKrConfig(
        r=1, alpha=ALPHA, target_modules=TARGETS, init_weights=False, decompose_both=True
    ),
    "lokr with core": peft.LoKrConfig(
        r=1, alpha=ALPHA, target_modules=TARGETS, init_weights=False, use_effective_conv2d=True
    ),
}  # fmt: skip


def compare(bundle: Bundle, component: str, expected: dict[str, torch.Tensor], before: Bundle) -> None:
    """Every weight is the other side's, and some have changed."""
    found = {
        torch_name(path): to_torch(path, np.asarray(leaf)) for path, leaf in flatten(bundle.params[component]).items()
    }
    old = {
        torch_name(path): to_torch(path, np.asarray(leaf)) for path, leaf in flatten(before.params[component]).items()
    }
    expected = {f"text_model.{name}" if component == "text_encoder" and not name.startswith("text_model.") else name:
                value for name, value in expected.items() if "position_ids" not in name}  # fmt: skip
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value.detach().numpy(), rtol=TOLERANCE, atol=TOLERANCE, err_msg=name)
    assert any(np.abs(found[name] - old[name]).max() > 1e-3 for name in found)


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_merged_as_peft_merges_it(tiny: Bundle, tiny_folder: Path, tmp_path: Path, kind: str) -> None:
    torch.manual_seed(0)
    config = KINDS[kind]
    model = peft.get_peft_model(UNet2DConditionModel.from_pretrained(tiny_folder / "unet"), config)
    for name, parameter in model.named_parameters():
        if "lora_magnitude_vector" in name:
            # Else the change would keep the lengths.
            parameter.data *= 1 + 0.2 * torch.rand_like(parameter)
        elif parameter.requires_grad:
            parameter.data = 0.3 * torch.randn_like(parameter)
    tensors = {name: value.contiguous() for name, value in peft.get_peft_model_state_dict(model).items()}
    metadata: dict[str, Any] = {}
    if isinstance(config, peft.LoraConfig):
        metadata = {"unet.lora_alpha": ALPHA, "unet.r": RANK, "unet.alpha_pattern": config.alpha_pattern}
        metadata |= {"unet.use_rslora": config.use_rslora}
    else:
        modules = {name.rpartition(".")[0] for name in tensors}
        tensors |= {f"{module}.alpha": torch.tensor(ALPHA) for module in modules}
    file = tmp_path / "lora.safetensors"
    save_file(tensors, file, {"lora_adapter_metadata": json.dumps(metadata)})
    compare(merge_lora(tiny, file), "unet", model.merge_and_unload().state_dict(), tiny)


def _random(shape: tuple[int, ...], name: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    return 0.3 * torch.randn(shape, generator=generator)


def _targets(model: torch.nn.Module, names: list[str]) -> dict[str, tuple[int, ...]]:
    found = {name.removesuffix(".weight"): tuple(value.shape) for name, value in model.state_dict().items()}
    return {name: shape for name, shape in found.items() if len(shape) > 1 and name.endswith(tuple(names))}


def _kohya(component: str, module: str) -> str:
    return f"{'lora_unet' if component == 'unet' else 'lora_te'}_{module.replace('.', '_')}"


def _old(component: str, module: str) -> str:
    if component == "unet":
        block, _, name = module.replace("to_out.0", "to_out").rpartition(".")
        return f"unet.{block}.processor.{name}_lora"
    return f"text_encoder.{module}.lora_linear_layer"


DIALECTS: dict[str, Any] = {
    "kohya": (_kohya, "lora_down.weight", "lora_up.weight"),
    "peft": (lambda component, module: f"{component}.{module}", "lora_A.weight", "lora_B.weight"),
    "old": (_old, "down.weight", "up.weight"),
}


@pytest.mark.parametrize("scale", [1.0, 0.6])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_each_dialect_is_read_as_diffusers_reads_it(
    tiny: Bundle, tiny_folder: Path, tmp_path: Path, dialect: str, scale: float
) -> None:
    spell, down, up = DIALECTS[dialect]
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_folder, safety_checker=None)
    tensors = {}
    for component, names in (("unet", ATTENTION), ("text_encoder", ["q_proj", "v_proj", "out_proj"])):
        for module, shape in _targets(getattr(pipeline, component), names).items():
            # The name in files, which transformers 5 has shortened.
            full = module if component == "unet" or module.startswith("text_model.") else f"text_model.{module}"
            key = spell(component, full)
            tensors[f"{key}.{down}"] = _random((RANK, shape[1]), f"{key} down")
            tensors[f"{key}.{up}"] = _random((shape[0], RANK), f"{key} up")
            if dialect == "kohya":
                tensors[f"{key}.alpha"] = torch.tensor(1.5)
    file = tmp_path / "lora.safetensors"
    save_file(tensors, file)
    pipeline.load_lora_weights(tmp_path, weight_name=file.name)
    pipeline.fuse_lora(lora_scale=scale)
    pipeline.unload_lora_weights()
    found = merge_lora(tiny, file, scale)
    compare(found, "unet", pipeline.unet.state_dict(), tiny)
    compare(found, "text_encoder", pipeline.text_encoder.state_dict(), tiny)

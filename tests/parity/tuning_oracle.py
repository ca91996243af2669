"""SD-IPC's tuning in plain PyTorch: diffusers' UNet, transformers' CLIP with prompts put in by hand."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch.nn import functional
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from sdipc_jax import tuning
from sdipc_jax.checkpoints.keys import flatten, to_torch, torch_name
from tests.parity.oracle import nchw


def by_name(params: dict[str, Any]) -> dict[str, np.ndarray]:
    """Trained leaves as PyTorch has them."""
    return {
        f"{path[0]}.{torch_name(path[1:])}": np.array(to_torch(path, np.asarray(leaf)), order="C")
        for path, leaf in flatten(params).items()
    }


class Twin:
    """The method in PyTorch, from a checkpoint's files and the first values of the deep prompts."""

    def __init__(self, folder: Path, state: tuning.State) -> None:
        self.unet = UNet2DConditionModel.from_pretrained(folder / "unet").requires_grad_(False)
        self.clip = CLIPModel.from_pretrained(folder / "clip").requires_grad_(False)
        self.text_encoder = CLIPTextModel.from_pretrained(folder / "text_encoder").requires_grad_(False)
        self.tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
        self.schedule = DDIMScheduler.from_pretrained(folder / "scheduler")
        self.scale = float(state.frozen.projection.scale)
        self.inverse = torch.linalg.pinv(self.clip.text_projection.weight.double(), atol=0.3, rtol=0).float()
        self.trained = {
            f"unet.{name}": parameter.requires_grad_(True)
            for name, parameter in self.unet.named_parameters()
            if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))
        }
        with torch.no_grad():
            self.start = self.states([""])[:, :1]
        for name, value in by_name(state.params).items():
            if name.startswith("clip.deep_prompts."):
                self.trained[name] = torch.nn.Parameter(torch.tensor(value))

    def features(self, pixels: torch.Tensor, keep: torch.Tensor | None) -> torch.Tensor:
        tower = self.clip.vision_model
        part = {name.removeprefix("clip.deep_prompts."): value for name, value in self.trained.items()}
        prompts = functional.linear(part["embeddings"], part["projection.weight"], part["projection.bias"])
        prompts = prompts.expand(len(pixels), -1, -1, -1)
        prompts = prompts if keep is None else prompts * keep
        x = tower.pre_layrnorm(tower.embeddings(pixels))
        for index, layer in enumerate(tower.encoder.layers):
            patches = x[:, 1:] if index == 0 else x[:, 1 + part["embeddings"].shape[1] :]
            x = torch.cat([x[:, :1], prompts[:, index], patches], dim=1)
            x = layer(x, None, None)[0]
        epsilon = tower.post_layernorm.eps
        x = functional.layer_norm(x, x.shape[-1:], part["layer_norm.weight"], part["layer_norm.bias"], epsilon)
        return tower.post_layernorm(x[:, 0])

    def states(self, texts: Sequence[str]) -> torch.Tensor:
        tokens = self.tokenizer(list(texts), padding="max_length", return_tensors="pt").input_ids
        return self.text_encoder(tokens).last_hidden_state

    def loss(
        self, batch: dict[str, np.ndarray], draws: tuning.Draws, text_weight: float = 0.0, captions: Sequence[str] = ()
    ) -> torch.Tensor:
        """Eq. 9, of pictures with these captions."""
        keep = None if draws.keep is None else torch.tensor(np.asarray(draws.keep))
        joint = self.clip.visual_projection(self.features(nchw(batch["pixels"]), keep))
        state = joint @ self.inverse.T
        vector = self.scale * state / state.norm(dim=-1, keepdim=True)
        start, length = self.start.expand(len(vector), -1, -1), self.tokenizer.model_max_length
        contexts = [torch.cat([start, vector[:, None].expand(-1, length - 1, -1)], dim=1)]
        weights = [1.0]
        if text_weight:
            contexts.append(self.states(captions))
            weights.append(text_weight)
        latents = nchw(batch["latents"]) + nchw(batch["deviation"]) * nchw(np.asarray(draws.latent_noise))
        noise, timesteps = nchw(np.asarray(draws.noise)), torch.tensor(np.asarray(draws.timesteps)).long()
        noisy = self.schedule.add_noise(latents, noise, timesteps)
        target = noise
        if self.schedule.config.prediction_type == "v_prediction":
            target = self.schedule.get_velocity(latents, noise, timesteps)
        losses = [functional.mse_loss(self.unet(noisy, timesteps, context).sample, target) for context in contexts]
        return sum(weight * loss for weight, loss in zip(weights, losses, strict=True))

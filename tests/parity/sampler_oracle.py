"""diffusers' schedulers on the same stand-in for the model."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    TCDScheduler,
)
from diffusers.utils import logging

from tests.sampler_cases import GOLDEN, STABLE_DIFFUSION, first_noise, fresh_noise, model, steps_of

# It warns of fields that a class does not know.
logging.set_verbosity_error()

CLASSES = {
    "ddim": DDIMScheduler,
    "pndm": PNDMScheduler,
    "euler": EulerDiscreteScheduler,
    "euler-a": EulerAncestralDiscreteScheduler,
    "dpm++2m": DPMSolverMultistepScheduler,
    "lcm": LCMScheduler,
    "tcd": TCDScheduler,
}


@contextmanager
def quiet() -> Iterator[None]:
    """diffusers 0.39 warns of what NumPy 2 does with PyTorch's tensors, and of what it cannot divide."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@quiet()
def make(name: str, fields: dict[str, Any], steps: int, karras: bool = False) -> Any:
    """The scheduler, ready to run."""
    changes: dict[str, Any] = {"skip_prk_steps": True} if name == "pndm" else {}
    if karras:
        changes["use_karras_sigmas"] = True
    scheduler = CLASSES[name].from_config(fields, **changes)
    scheduler.set_timesteps(steps)
    return scheduler


@quiet()
@torch.no_grad()
def reference(
    name: str, fields: dict[str, Any], steps: int, eta: float = 0.0, karras: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Timesteps (n,), and latents after each evaluation (n, *SHAPE)."""
    scheduler = make(name, fields, steps, karras)
    noises = torch.from_numpy(fresh_noise(len(scheduler.timesteps)))
    x = torch.from_numpy(first_noise()) * scheduler.init_noise_sigma
    states = []
    for timestep, noise in zip(scheduler.timesteps, noises, strict=True):
        output = model(torch.tanh, scheduler.scale_model_input(x, timestep), timestep.float())
        if name == "ddim":
            x = scheduler.step(output, timestep, x, eta=eta, variance_noise=noise).prev_sample
        else:
            options = {"eta": eta} if name == "tcd" else {}
            with mock.patch(f"{type(scheduler).__module__}.randn_tensor", return_value=noise, create=True):
                x = scheduler.step(output, timestep, x, **options).prev_sample
        states.append(x.numpy())
    return scheduler.timesteps.numpy(), np.stack(states)


def golden_samplers() -> dict[str, np.ndarray]:
    """The last latents of each golden case."""
    return {
        case: reference(name, STABLE_DIFFUSION | fields, steps_of(case), eta, karras)[1][-1]
        for case, (name, fields, eta, karras) in GOLDEN.items()
    }

"""A scheduler's file in, arrays for each step and the step itself out: pure mathematics.

Imports no other room.
"""

from sdipc_jax.samplers.classes import CHECKPOINT, chosen_sampler, default_sampler
from sdipc_jax.samplers.methods import SAMPLERS, Sampler, Schedule
from sdipc_jax.samplers.noise_levels import SchedulerConfig

__all__ = ["CHECKPOINT", "SAMPLERS", "Sampler", "Schedule", "SchedulerConfig", "chosen_sampler", "default_sampler"]

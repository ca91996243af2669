"""Every sampler against diffusers' class, evaluation by evaluation."""

import itertools
import warnings
from typing import Any

import numpy as np
import pytest
import torch

from sdipc_jax.errors import InputError
from sdipc_jax.samplers import SAMPLERS, SchedulerConfig
from tests.parity.sampler_oracle import golden_samplers, make, reference
from tests.sampler_cases import STABLE_DIFFUSION, relative_errors, trajectory

pytestmark = pytest.mark.filterwarnings("ignore")

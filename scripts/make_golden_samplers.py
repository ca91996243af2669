"""Writes tests/golden/samplers.npz: what diffusers' schedulers make of a stand-in for the model.

Run with the environment of `make parity`.
"""

from pathlib import Path

import numpy as np

from tests.parity.sampler_oracle import golden_samplers

if __name__ == "__main__":
    folder = Path(__file__).parents[1] / "tests" / "golden"
    np.savez_compressed(folder / "samplers.npz", allow_pickle=False, **golden_samplers())

"""Writes tests/golden/*.npz: what PyTorch gives for the networks of tests/cases.py.

Run by `make golden` in the environment of `make parity`; the tests without PyTorch compare with these files.
"""

import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests import cases  # noqa: E402
from tests.parity import oracle  # noqa: E402


def main() -> None:
    """Writes every golden file."""
    golden = ROOT / "tests/golden"
    golden.mkdir(exist_ok=True)
    models: dict[str, np.ndarray] = {}
    for case in cases.block_cases():
        models[f"block/{case.name}"] = oracle.run_block(case)
    for case in cases.unet_cases():
        models[f"unet/{case.name}"] = oracle.run_unet(case)
    for case in cases.vae_cases():
        for part, array in zip(("mean", "log_variance", "pictures"), oracle.run_vae(case), strict=True):
            models[f"vae/{case.name}/{part}"] = array
    for case in cases.text_cases():
        models[f"text/{case.name}"] = oracle.run_text(case)
    for case in cases.vision_cases():
        models[f"vision/{case.name}"] = oracle.run_vision(case)
    for case in cases.safety_cases():
        models[f"safety/{case.name}"] = oracle.run_safety(case)
    np.savez_compressed(golden / "models.npz", allow_pickle=False, **models)


if __name__ == "__main__":
    main()

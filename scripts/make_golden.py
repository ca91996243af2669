"""Writes tests/golden/*.npz: what PyTorch gives for networks, samplers and whole pictures.

Run by `make golden` in the environment of `make parity`; the tests without PyTorch compare with these files.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests import cases  # noqa: E402
from tests.parity import oracle  # noqa: E402
from tests.parity.picture_oracle import golden_pictures  # noqa: E402
from tests.parity.sampler_oracle import golden_samplers  # noqa: E402
from tests.parity.sdxl_oracle import golden_families  # noqa: E402
from tests.picture_cases import write_picture  # noqa: E402
from tests.sdxl_cases import write_checkpoints  # noqa: E402
from tests.tiny import write_checkpoint  # noqa: E402


def golden_models() -> dict[str, np.ndarray]:
    """The outputs of the networks of tests/cases.py."""
    made: dict[str, np.ndarray] = {}
    for kind, networks, run in (
        ("block", cases.block_cases(), oracle.run_block),
        ("unet", [*cases.unet_cases(), *cases.sdxl_unet_cases()], oracle.run_unet),
        ("text", cases.text_cases(), oracle.run_text),
        ("vision", cases.vision_cases(), oracle.run_vision),
        ("safety", cases.safety_cases(), oracle.run_safety),
    ):
        made |= {f"{kind}/{case.name}": run(case) for case in networks}
    for case in cases.sdxl_text_cases():
        for part, array in zip(("states", "pooled"), oracle.run_sdxl_text(case), strict=False):
            made[f"sdxl text/{case.name}/{part}"] = array
    for case in cases.vae_cases():
        for part, array in zip(("mean", "log_variance", "pictures"), oracle.run_vae(case), strict=True):
            made[f"vae/{case.name}/{part}"] = array
    return made


def main() -> None:
    """Writes every golden file."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = write_checkpoint(Path(temporary, "checkpoint"))
        pictures = golden_pictures(folder, write_picture(Path(temporary, "clouds.png")))
        families = golden_families(write_checkpoints(Path(temporary, "families")))
    for name, arrays in (
        ("models", golden_models()),
        ("samplers", golden_samplers()),
        ("pictures", pictures),
        ("families", families),
    ):
        np.savez_compressed(ROOT / f"tests/golden/{name}.npz", allow_pickle=False, **arrays)


if __name__ == "__main__":
    main()

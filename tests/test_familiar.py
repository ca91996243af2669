"""Notes on pictures that are unlike what a checkpoint knows."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import sdipc_jax as sdipc
from sdipc_jax import cli
from sdipc_jax.errors import InputError
from sdipc_jax.prompts.familiar import FILE, Familiar

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_the_nearest_caption_counts_and_lengths_do_not() -> None:
    familiar = Familiar(np.eye(3, dtype=np.float32)[:2], 0.9, "by hand")
    found = familiar.nearest(np.array([[3.0, 0, 4.0], [0, -2.0, 0], [0, 0.1, 0]]))
    np.testing.assert_allclose(found, [0.6, 0.0, 1.0], atol=1e-12)


def test_what_is_written_is_read(tiny: sdipc.Bundle, tmp_path: Path) -> None:
    side = dataclasses.replace(tiny.config.vision_side, folder=str(tmp_path))
    config = dataclasses.replace(tiny.config, clip=side)
    assert Familiar.of(config) is None
    captions = np.random.default_rng(0).normal(size=(50, 24)).astype(np.float32)
    captions /= np.linalg.norm(captions, axis=1, keepdims=True)
    Familiar(captions, 0.75, "by hand").write(tmp_path)
    found = Familiar.of(config)
    assert found is not None
    assert (found.least, found.measured_by) == (0.75, "by hand")
    # A byte a number.
    np.testing.assert_allclose(found.captions, captions, atol=0.01)
    np.testing.assert_allclose(found.nearest(captions), 1, atol=1e-3)
    (tmp_path / FILE).write_bytes((tmp_path / FILE).read_bytes()[:-1])
    with pytest.raises(InputError, match=r"captions\.safetensors: not readable, expected the captions' vectors"):
        Familiar.of(config)


def test_a_photograph_has_a_note_and_a_drawing_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = pytest.importorskip("skimage.data")
    for name in ("gravel", "coffee"):
        Image.fromarray(np.asarray(getattr(data, name)())).convert("RGB").save(tmp_path / f"{name}.png")
    drawings = [str(EXAMPLES / f"{name}.png") for name in ("giraffe", "automobile", "green-apple", "red-heart")]
    photographs = [str(tmp_path / "gravel.png"), str(tmp_path / "coffee.png")]
    output = ["--output", str(tmp_path / "prompts.safetensors"), "--overwrite"]
    assert cli.main(["prompt", *drawings, *output]) == 0
    assert "unlike" not in capsys.readouterr().out
    assert cli.main(["prompt", drawings[0], *photographs, *output]) == 0
    (note,) = [line for line in capsys.readouterr().out.splitlines() if "unlike" in line]
    assert note.endswith(f": 2 pictures, the first is {photographs[0]}")
    assert "unlike what this checkpoint knows (cosine with the nearest of its captions below 0." in note

"""Measuring a converter, on one whose numbers are known."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import sdipc_jax as sdipc
from sdipc_jax.checkpoints.bundle import Bundle
from sdipc_jax.commands.spectrum import Spectrum, measure, plot

MADE = Spectrum([4.0, 2.0, 0.5], rank=2, scale=27.5, end_norm=27.6, caption_cosine=0.98)


def with_projection(bundle: Bundle, matrix: np.ndarray) -> Bundle:
    """The bundle with another text projection, and a vision projection that passes features on."""
    visual = {"kernel": jnp.eye(bundle.config.vision_side.vision.hidden_size, len(matrix))}
    clip = bundle.params["clip"] | {"text_projection": {"kernel": jnp.asarray(matrix)}, "visual_projection": visual}
    return dataclasses.replace(bundle, params=bundle.params | {"clip": clip})


def test_known_singular_values(tiny: Bundle) -> None:
    """A diagonal text projection: what is kept of a picture is what lies along the axes that are kept."""
    values = np.linspace(4.8, 0.2, 24)
    bundle = with_projection(tiny, np.diag(values).astype(np.float32))
    features = np.zeros((1, 32), np.float32)
    features[0, [0, 1, 23]] = 2, 1, 2
    found = measure(bundle, sdipc.closed_form(bundle, cutoff=0.5, scale=3.0), features)
    np.testing.assert_allclose(found.singular_values, values, rtol=1e-6)
    assert found.rank == 22
    assert found.scale == 3
    assert found.energy_kept == pytest.approx(5 / 9)
    assert found.round_trip_error == pytest.approx(2 / 3)
    states = np.asarray(sdipc.text_prompt(bundle, sdipc.tokenize(bundle, ["a photo of a cat"])))
    assert 0 < found.end_norm < 10 * np.abs(states).max() * 24
    assert 0.5 < found.caption_cosine < 1


def test_what_keeps_everything_gives_everything_back(tiny: Bundle) -> None:
    bundle = with_projection(tiny, np.eye(24, dtype=np.float32))
    features = np.random.default_rng(0).standard_normal((1, 32)).astype(np.float32)
    found = measure(bundle, sdipc.closed_form(bundle), features)
    assert found.rank == 24
    assert found.energy_kept == pytest.approx(1)
    assert found.round_trip_error == pytest.approx(0, abs=1e-6)
    assert found.caption_cosine == pytest.approx(1)
    # The scale that is measured where none is given is that very norm.
    assert found.scale == pytest.approx(found.end_norm, rel=1e-5)
    assert measure(bundle, sdipc.closed_form(bundle)).energy_kept is None


def test_text_for_people() -> None:
    assert str(MADE).splitlines() == [
        "singular values  4 to 0.5, 3 in all",
        "kept             2, of which the smallest is 2",
        "scale            27.5 (mean norm of the end token's state: 27.6)",
        "captions         cosine 0.9800 between a text state and what the inverse gives back",
    ]
    more = dataclasses.replace(MADE, energy_kept=0.75, round_trip_error=0.5, plot="out/spectrum.png")
    assert str(more).splitlines()[4:] == [
        "picture          75.0% of its energy kept, round-trip error 0.5000",
        "plot             out/spectrum.png",
    ]
    assert more.to_json()["energy_kept"] == 0.75


def test_plot_has_a_dot_for_every_value(tmp_path: Path) -> None:
    plot(MADE, tmp_path / "a.png")
    plot(dataclasses.replace(MADE, rank=3), tmp_path / "b.png")
    images = [np.asarray(Image.open(tmp_path / name).convert("RGB")).astype(int) for name in ("a.png", "b.png")]
    orange = [int(((image[..., 0] > 200) & (image[..., 2] < 80)).sum()) for image in images]
    # The last value is counted as 0 in the first picture alone; what remains in the second is the legend's dot.
    assert orange[0] > orange[1] > 0
    assert len(list(tmp_path.iterdir())) == 2

"""Measuring a converter, on one whose numbers are known."""

import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import sdipc_jax as sdipc
from sdipc_jax import cli
from sdipc_jax.checkpoints.bundle import Bundle
from sdipc_jax.checkpoints.text_tower import load_text_tower
from sdipc_jax.commands.spectrum import Spectrum, measure, measure_map, plot
from sdipc_jax.evaluate.conversions import compare
from sdipc_jax.prompts.calibration import caption_vectors, fit_captions
from sdipc_jax.prompts.everyday import everyday_captions


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No calibration is kept in the user's cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


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


def test_a_fitted_map_is_told(tiny: Bundle) -> None:
    captions = everyday_captions(60)
    calibration = fit_captions(tiny, load_text_tower(tiny.config), captions, 0.5)
    features = np.random.default_rng(0).standard_normal((1, 32)).astype(np.float32)
    found = measure_map(tiny, calibration, features)
    assert found.rank == calibration.map.rank == np.sum(calibration.map.deviations**2 >= 0.5 * np.mean(
        calibration.map.deviations**2
    ))  # fmt: skip
    assert found.outside is not None
    assert 0 < found.outside < 1
    lines = str(dataclasses.replace(found, plot="out/spectrum.png")).splitlines()
    assert lines[0] == "fitted           to 60 captions, ridge 0.5"
    assert lines[1] == f"R^2              {calibration.r2[0]:.4f} of captions that were not fitted"
    assert lines[-2] == f"picture          {100 * found.outside:.1f}% of it lies outside of the captions' span"
    assert measure_map(tiny, calibration).outside is None


def test_comparison_on_a_case_with_a_known_answer(tiny: Bundle) -> None:
    """Pictures whose joint vectors are their captions' own: the inverse is exact, and finds every caption."""
    bundle = with_projection(tiny, np.asarray(tiny.params["clip"]["text_projection"]["kernel"]))
    tower = load_text_tower(tiny.config)
    captions = everyday_captions(200)
    w = caption_vectors(tower, captions[:60])
    features = np.concatenate([w, np.zeros((60, 8))], axis=1).astype(np.float32)
    table = compare(bundle, tower, features, captions[:60], captions, cutoff=0.0, ridge=0.01)
    assert [name for name, _ in table.rows] == [
        "raw inverse", "inverse, cut-off 0", "Tikhonov", "inverse, mean shift", "ridge", "ridge, mean shift"
    ]  # fmt: skip
    assert table["raw inverse", "cosine"].value == pytest.approx(1, abs=1e-4)
    assert table["raw inverse", "R@1"].value == 1
    assert table["raw inverse", "R^2"].value > 0.99
    assert table["ridge", "R^2"].value > 0.9
    assert "30 pictures, each against 60 captions; ridge 0.01, fitted to 200." in table.note
    shuffled = compare(bundle, tower, features[::-1].copy(), captions[:60], captions, cutoff=0.0, ridge=0.01)
    assert shuffled["raw inverse", "R@1"].value < 0.2
    few = compare(bundle, tower, features[:20], captions[:20], captions, cutoff=0.0)
    assert "ridge, mean shift" not in [name for name, _ in few.rows]
    with pytest.raises(sdipc.InputError, match="found 9 pictures to compare on, expected at least 10"):
        compare(bundle, tower, features[:9], captions[:9], captions, cutoff=0.0)


def test_compare_reads_a_folder_of_captioned_pictures(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for seed, caption in enumerate(everyday_captions(12)):
        noise = np.random.default_rng(seed).integers(0, 256, (28, 28, 3), np.uint8)
        Image.fromarray(noise).save(folder / f"{seed}.png")
        (folder / f"{seed}.txt").write_text(caption)
    options = ["--model", str(tiny_folder), "--output-dir", str(tmp_path / "out"), "--compare", str(folder)]
    file = tmp_path / "captions.txt"
    file.write_text("\n".join(everyday_captions(60)))
    ridge = ["--calibrate", "ridge", "--calibrate-captions", str(file)]
    assert cli.main(["spectrum", *options, *ridge, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["calibration"]["captions"] == 60
    assert found["compared"] == json.loads((tmp_path / "out/compare.json").read_text())
    assert set(found["compared"]["rows"]) == {"raw inverse", "inverse, cut-off 0.3", "Tikhonov", "ridge"}
    assert 0 <= found["compared"]["rows"]["ridge"]["R@1"]["value"] <= 1
    assert cli.main(["spectrum", *options, *ridge]) == 2
    assert "is there already" in capsys.readouterr().err
    assert cli.main(["spectrum", *options, "--overwrite"]) == 0
    said = capsys.readouterr().out
    assert "| ridge |" in said
    assert "singular values  " in said

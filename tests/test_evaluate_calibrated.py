"""`evaluate` where the states that the UNet reads do not lead to the joint space: SDXL by a fitted map."""

from pathlib import Path

import numpy as np
import pytest

import sdipc_jax as sdipc
from sdipc_jax.checkpoints.text_tower import load_text_tower
from sdipc_jax.commands.evaluate import EvaluateSettings
from sdipc_jax.commands.evaluate import measure as evaluate
from sdipc_jax.evaluate import retrieval
from tests.test_evaluate import write_corpus
from tests.test_sdxl_pictures import CAPTIONS, quick_sdxl

pytestmark = pytest.mark.usefixtures("compile_quickly")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quick_sdxl(tmp_path_factory.mktemp("sdxl"))


def test_captions_are_compared_by_the_clips_own_tower(folder: Path) -> None:
    bundle = sdipc.load(folder / "sdxl")
    # This CLIP has weights of its own, and the text projection of the second tower.
    tower = load_text_tower(bundle.config)
    found = retrieval.joint_vectors(bundle, ["a bee", "no"], tower)
    assert found.shape == (2, 32)
    states = retrieval.end_states(bundle, ["a bee", "no"])
    assert states.shape == (2, 24 + 40 + 32)
    prompt = sdipc.text_prompt(bundle, sdipc.tokenize(bundle, ["a bee", "no"]))
    np.testing.assert_allclose(states[:, 64:], prompt.pooled, rtol=1e-4, atol=1e-5)


def test_the_command_measures_sdxl(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "captions.txt").write_text("\n".join(CAPTIONS))
    evaluation = evaluate(
        EvaluateSettings(
            model=str(folder / "sdxl"), corpus=write_corpus(tmp_path / "corpus.npz"), count=4, steps=1, batch_size=8,
            output_dir=tmp_path / "out", calibrate_captions=tmp_path / "captions.txt",
        ),
        lambda done: None,
    )  # fmt: skip
    tables = evaluation.to_json()["tables"]
    assert list(tables) == ["retrieval", "recognition", "similarity", "editing"]
    retrieved = evaluation.tables[0]
    assert [name for name, _ in retrieved.rows] == ["C-space", "T-space"]
    assert "reached by a map fitted to captions" in retrieved.note

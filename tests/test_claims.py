"""docs/results: verdicts, and pages that hold what the JSONs beside them say."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from sdipc_jax.evaluate.metrics import kernel_distance
from sdipc_jax.evaluate.tables import Estimate

sys.path.insert(0, "scripts")

from claims import card, verdicts
from claims.learnt import CAPTIONED, PROMPTED, held, losses
from claims.pages import write_pages
from claims.results import kept
from claims.tuned import UNTRAINED, UNTUNED, Measured, distances, table

RESULTS = Path("docs/results")


@pytest.mark.parametrize(
    ("interval", "side", "limit", "verdict"),
    [
        ((0.1, 0.3), "above", 0.0, "holds"),
        ((-0.3, -0.1), "above", 0.0, "does not"),
        ((-0.1, 0.1), "above", 0.0, "cannot be told"),
        ((0.0, 0.2), "above", 0.0, "cannot be told"),
        ((1.0, 1.1), "below", 1.15, "holds"),
        ((1.2, 1.4), "below", 1.15, "does not"),
        ((1.1, 1.2), "below", 1.15, "cannot be told"),
    ],
)
def test_verdicts(interval: tuple[float, float], side: verdicts.Side, limit: float, verdict: str) -> None:
    assert verdicts.judged(Estimate(sum(interval) / 2, interval), side, limit) == verdict


def test_claims_stand_on_the_side_of_the_papers_numbers() -> None:
    theirs = {claim.text: claim for claim in (*verdicts.VARIATION, *verdicts.ABLATION)}
    signs = {text: claim.side for text, claim in theirs.items() if claim.paper[0] in "+-" and not claim.limit}
    assert signs == {text: "above" if theirs[text].paper[0] == "+" else "below" for text in signs}
    # Table 5's prompts alone lower CLIP-I; Table 6's lower DINO.
    assert sorted(text for text, side in signs.items() if side == "below") == [
        "FT (C) makes variations less like the picture (Table 5), by own CLIP",
        "after FT (C) edits keep less of the picture (Table 6)",
    ]


def test_pages_are_what_the_numbers_beside_them_say(tmp_path: Path) -> None:
    for path in (*RESULTS.glob("*.json"), *RESULTS.glob("*.png")):
        shutil.copy(path, tmp_path)
    write_pages(tmp_path)
    written = {path.name: path.read_text() for path in tmp_path.glob("*.md")}
    assert written == {path.name: path.read_text() for path in RESULTS.glob("*.md")}
    # And they would be told apart.
    changed = json.loads((tmp_path / "spaces-plain.json").read_text())
    changed["gap"]["distance of the means"] = 0.123
    (tmp_path / "spaces-plain.json").write_text(json.dumps(changed))
    write_pages(tmp_path)
    assert (tmp_path / "summary.md").read_text() != written["summary.md"]


def test_pictures_are_made_once(tmp_path: Path) -> None:
    made = []

    def make() -> np.ndarray:
        made.append(1)
        return np.arange(12, dtype=np.uint8).reshape(1, 2, 2, 3)

    pictures = [kept(tmp_path / "a" / "b.npy", make) for _ in range(2)]
    assert len(made) == 1
    assert [each.tolist() for each in pictures] == [np.arange(12).reshape(1, 2, 2, 3).tolist()] * 2


def test_a_conversion_has_to_be_better_on_all() -> None:
    def found(**gains: tuple[float, float]) -> dict[str, object]:
        column = "similarity, EffNet-Lite0"
        rows = {
            f"{name} - SD-IPC": {column: {"value": sum(each) / 2, "interval": each}} for name, each in gains.items()
        }
        return {"tables": {"conversions drawn": {"title": "", "note": "", "columns": [column], "rows": rows}}}

    one = found(ridge=(0.1, 0.2), shift=(0.1, 0.2), tikhonov=(0.1, 0.2))
    other = found(ridge=(0.1, 0.3), shift=(-0.1, 0.2))
    assert verdicts.better_on_all([one, other]) == ["ridge"]


def test_a_card_tells_the_latest_training_of_a_stage() -> None:
    lines = [{"stage": "plain", "step": step, "minutes": 1.0, "loss": 1 / step} for step in (5, 10)]
    # Begun anew, so that what was before does not count.
    lines += [{"stage": "unet", "step": step, "minutes": 0.1 * step, "loss": 9.0} for step in (100, 200)]
    lines += [{"stage": "unet", "step": step, "minutes": 0.1 * step, "loss": 1 / step} for step in range(1, 92)]
    lines += [{"stage": "export", "recall_1": 0.1}]
    stages = card.condensed("".join(json.dumps(line) + "\n" for line in lines).splitlines())["stages"]
    assert [line["step"] for line in stages["unet"]] == [1, 11, 21, 31, 41, 51, 61, 71, 81, 91]
    assert {line["step"] for line in stages["plain"]} == {5, 10}


def test_losses_are_told_of_the_first_and_the_last_quarter(tmp_path: Path) -> None:
    lines = [{"step": n + 1, "loss_image": float(n), "loss_text": 2.0 * n} for n in range(8)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "kv").mkdir()
    (tmp_path / "kv" / "metrics.jsonl").write_text("".join(json.dumps({"step": 1, "loss_image": 3.0}) + "\n"))
    found = losses({"FT": tmp_path, "FT (U)": tmp_path / "kv"})
    assert [found["FT", column].value for column in found.columns] == [0.5, 6.5, 1.0, 13.0]
    assert dict(found.rows)["FT (U)"][2:] == (None, None)
    assert found["FT (U)", "picture, last"].value == 3.0


def test_gains_stand_over_no_tuning_and_over_prompts_that_are_not_trained() -> None:
    scores = {UNTUNED: [1.0, 2.0], UNTRAINED: [2.0, 2.0], "FT": [4.0, 5.0], "FT (U)": [0.0, 0.0]}
    found = table("", "", "", {kind: [{"score": np.array(each)}] for kind, each in scores.items()}, ["FT"])
    assert {row: found[row, "score"].value for row, _ in found.rows} == {
        **{kind: np.mean(each) for kind, each in scores.items()},
        f"{UNTRAINED} - {UNTUNED}": 0.5,
        f"FT - {UNTUNED}": 3.0,
        f"FT (U) - {UNTUNED}": -1.5,
        f"FT - {UNTRAINED}": 2.5,
    }


def test_what_a_run_changes_of_the_losses_on_its_own_drawings_and_on_others() -> None:
    def errors(*means: float) -> list[dict[str, np.ndarray]]:
        pairs = (means[:2], means[2:])
        return [{PROMPTED: np.array([a, a + 2]), CAPTIONED: np.array([b])} for a, b in pairs]

    found = held({"ft-unseen": {UNTUNED: errors(1, 2, 3, 4), "ft-unseen-kv": errors(0, 2, 5, 4.5)}})
    assert [[each.value for each in values if each] for _, values in found.rows] == [[2, 2, 4, 4], [-1, 0, 2, 0.5]]
    assert [row for row, _ in found.rows] == [f"ft-unseen, {UNTUNED}", f"ft-unseen-kv - {UNTUNED}"]
    assert found.columns[0] == "tuned on, under the picture"
    assert found.columns[3] == "others, under the caption"


def test_sets_nearer_to_real_ones_are_told_from_those_further_off() -> None:
    random = np.random.default_rng(0)
    real = random.normal(size=(60, 4)).astype(np.float32)
    pictures = np.zeros((40, 1, 1, 3), np.uint8)
    sets = {UNTUNED: real[:40] + 1, "FT on 1": real[:40] + 0.5, "FT on 2": real[:40] + 1}
    found = distances({kind: [Measured({}, {"own": each}, pictures)] for kind, each in sets.items()}, {"own": real})
    column = "kernel distance, own"
    assert found[UNTUNED, column].value == kernel_distance(sets[UNTUNED], real)
    assert found[f"FT on 2 / {UNTUNED}", column].interval == (1, 1)
    assert (found[f"FT on 1 / {UNTUNED}", column].interval or (0, 1))[1] < 1

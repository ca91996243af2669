"""The pictures of a run and the order in which it sees them."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sdipc_jax.datasets.examples import data_digest
from sdipc_jax.errors import InputError
from sdipc_jax.tuning.config import RunSettings, check_unchanged, read_run
from sdipc_jax.tuning.data import Batches, Draw, augment, find_examples
from tests.tuning_runs import write_pictures


def settings(data: Path, **values: Any) -> RunSettings:
    return RunSettings(**{"data": data, "output_dir": "out", "batch_size": 4} | values)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_pictures(tmp_path / "data", {"cat": 3, "fire_engine": 4})


def numbers(batches: Batches, count: int) -> list[list[list[int]]]:
    return [[[draw.reference for draw in concept] for concept in next(batches)[0]] for _ in range(count)]


def test_a_folder_with_a_subfolder_a_class(folder: Path) -> None:
    (folder / "cat" / "notes.txt").touch()
    (folder / "cat" / ".hidden.png").touch()
    found = find_examples(settings(folder))
    assert [each.path.parent.name for each in found] == ["cat"] * 3 + ["fire_engine"] * 4
    assert [each.caption for each in found[2:4]] == ["a photo of a cat", "a photo of a fire engine"]
    assert found[1].size == (40, 35)
    assert found[1].read().shape == (40, 35, 3)
    faces = find_examples(settings(folder, caption="a photo of a person", per_class=2))
    assert [(each.label, each.caption) for each in faces[1:3]] == [
        ("cat", "a photo of a person"),
        ("fire_engine", "a photo of a person"),
    ]
    named = find_examples(settings(folder, classes={"fire_engine": "truck"}))
    assert {each.caption for each in named} == {"a photo of a truck"}
    both = find_examples(settings(folder, classes=["fire_engine", "cat"], per_class=1))
    assert [each.caption for each in both] == ["a photo of a fire engine", "a photo of a cat"]
    # One class needs no subfolder.
    assert [each.label for each in find_examples(settings(folder / "cat"))] == ["cat"] * 3


def test_json_lines(folder: Path) -> None:
    file = folder / "train.jsonl"
    rows = [
        {"picture": "cat/001.png", "class": "cat", "caption": "my cat"},
        {"picture": str(folder / "cat/000.png"), "class": "cat"},
        {"picture": "fire_engine/000.png", "caption": "red"},
    ]
    file.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    found = find_examples(settings(file))
    assert [(each.path.name, each.label, each.caption) for each in found] == [
        ("001.png", "cat", "my cat"),
        ("000.png", "cat", "a photo of a cat"),
        ("000.png", "", "red"),
    ]
    for line, match in [
        ("{", "line 1: found no JSON"),
        ('{"picture": "a.png", "colour": "x"}', "line 1: found"),
        ('{"class": "cat"}', "line 1: found"),
        ('{"picture": 3, "class": "cat"}', "expected texts"),
        ('{"picture": "cat/001.png"}', "no class and no caption"),
    ]:
        file.write_text(line)
        with pytest.raises(InputError, match=match):
            find_examples(settings(file))
    assert len(find_examples(settings(file, mode="ct"))) == 1


def test_all_bad_pictures_are_named_at_once(folder: Path) -> None:
    (folder / "cat/000.png").write_bytes(b"8BPS nothing")
    (folder / "fire_engine/002.png").write_bytes((folder / "fire_engine/002.png").read_bytes()[:300])
    with pytest.raises(InputError, match="2 of 7 pictures cannot be used") as error:
        find_examples(settings(folder))
    assert "cat/000.png: found a PSD" in str(error.value)
    assert "fire_engine/002.png: found a damaged PNG" in str(error.value)


def test_data_that_is_not_there_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no pictures of dog"):
        find_examples(settings(folder, classes=["cat", "dog"]))
    with pytest.raises(InputError, match="nothing is there"):
        find_examples(settings(tmp_path / "none"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="found no pictures"):
        find_examples(settings(tmp_path / "empty"))


def test_a_picture_that_changes_later_is_refused(folder: Path) -> None:
    found = find_examples(settings(folder))
    digest = data_digest(found)
    Image.new("RGB", (40, 40), "red").save(folder / "cat/001.png")
    with pytest.raises(InputError, match="another picture than at the start"):
        found[1].read()
    again = find_examples(settings(folder))
    assert data_digest(again) != digest
    assert data_digest(again[:1]) != data_digest(again[:2])


def test_every_picture_once_before_one_comes_again(folder: Path) -> None:
    chosen = settings(folder, seed=5)
    examples = find_examples(chosen)

    def batches(**values: Any) -> Batches:
        return Batches(examples, settings(folder, **{"seed": 5} | values), [range(7)], len)

    seen = numbers(batches(), 14)
    # 56 places, eight rounds of seven: the fourth batch of each round and the first of the next share one.
    flat = [number for batch in seen for number in batch[0]]
    rounds = [flat[first : first + 7] for first in range(0, 56, 7)]
    assert all(sorted(each) == list(range(7)) for each in rounds)
    assert len(set(map(tuple, rounds))) > 4
    assert numbers(batches(), 14) == seen
    assert numbers(batches(seed=6), 14) != seen
    # From a position, in another process.
    first = batches()
    numbers(first, 5)
    state = json.loads(json.dumps(first.state()))
    second = batches()
    second.restore(state)
    assert numbers(second, 9) == seen[5:]
    assert next(batches())[1] == [4]


def test_concepts_have_orders_of_their_own(folder: Path) -> None:
    chosen = settings(folder, mode="ct", batch_size=3)
    examples = find_examples(chosen)
    many = numbers(Batches(examples, chosen, [range(3), range(3, 7)], len), 8)
    for index, pictures in enumerate([range(3), range(3, 7)]):
        alone = numbers(Batches(examples, chosen, [pictures], len), 8)
        assert [batch[index] for batch in many] == [batch[0] for batch in alone]


def test_targets_places_and_flips_are_drawn_for_each_time(folder: Path) -> None:
    chosen = settings(folder, ab_training=True, random_crop=True, random_flip=True)
    examples = find_examples(chosen)
    batches = Batches(examples, chosen, [range(7)], lambda draws: draws)
    draws = [draw for _ in range(100) for draw in next(batches)[1][0]]
    assert all(examples[draw.reference].label == examples[draw.target].label for draw in draws)
    assert all(draw.reference != draw.target for draw in draws)
    assert 0.4 < np.mean([draw.flip for draw in draws]) < 0.6
    assert 0.4 < np.mean([draw.place for draw in draws]) < 0.6
    assert len(Counter((draw.place, draw.flip) for draw in draws)) > 390
    plain = Batches(examples, settings(folder), [range(7)], lambda draws: draws)
    assert {(draw.reference == draw.target, draw.place, draw.flip) for draw in next(plain)[1][0]} == {
        (True, 0.5, False)
    }


def test_augmentation_by_hand(folder: Path) -> None:
    picture = np.arange(2 * 6 * 3, dtype=np.uint8).reshape(2, 6, 3)
    crop, flip = settings(folder, random_crop=True), settings(folder, random_flip=True)
    np.testing.assert_array_equal(augment(picture, 8, 8, Draw(0, 0, 0.5, False), crop), picture[:, 2:4])
    np.testing.assert_array_equal(augment(picture, 8, 8, Draw(0, 0, 1.0, False), crop), picture[:, 4:])
    np.testing.assert_array_equal(augment(picture, 8, 16, Draw(0, 0, 0.0, True), crop), picture[:, 5:1:-1])
    np.testing.assert_array_equal(augment(picture, 8, 8, Draw(0, 0, 0.5, True), flip), picture[:, ::-1])
    tall = picture.transpose(1, 0, 2)
    np.testing.assert_array_equal(augment(tall, 8, 8, Draw(0, 0, 1.0, False), crop), tall[4:])


def test_a_run_is_read_from_yaml_and_overrides(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("data: pictures\noutput_dir: out\nlearning_rate: 1e-4\nclasses: [a_b, c]\n")
    found = read_run(file, "ct", ["learning_rate=2e-3", "clip_norm=null", "data=other"])
    assert (found.mode, found.learning_rate, found.clip_norm, found.data) == ("ct", 2e-3, None, Path("other"))
    assert (found.steps, found.text_weight) == (30, 0)
    assert found.classes == {"a_b": "a b", "c": "c"}
    assert found.tuning.learning_rate == 2e-3
    for changes, match in [
        (["learning_rate"], "expected KEY=VALUE"),
        (["learning_rte=1"], "run.yaml: learning_rte is not a setting"),
        (["batch_size=0"], "run.yaml: batch_size is 0"),
        (["mode=ft"], "mode is 'ft', expected ct"),
        (["seed=[1"], "as in YAML"),
    ]:
        with pytest.raises(InputError, match=match):
            read_run(file, "ct", changes)
    with pytest.raises(InputError, match="each_class is set in mode ft"):
        read_run(file, "ft", ["each_class=true"])
    for text, match in [("- a\n", "found no mapping"), ("a: [\n", "no readable YAML")]:
        file.write_text(text)
        with pytest.raises(InputError, match=match):
            read_run(file, "ft")
    with pytest.raises(InputError, match="No such file"):
        read_run(tmp_path / "none.yaml", "ft")


@pytest.mark.parametrize(
    "name, mode, pictures, updates",
    [
        ("imagenet", "ft", 100, 2500),
        ("celeba-hq", "ft", 100, 1250),
        ("places365", "ft", 100, 2500),
        ("concept", "ct", 5, 30),
        ("embedded-ct", "ct", 12, 30),
        ("embedded-ft", "ft", 12, 60),
    ],
)
def test_the_configurations_that_ship(name: str, mode: Any, pictures: int, updates: int) -> None:
    folder = Path(__file__).parent.parent
    found = read_run(folder / f"configs/tune-{name}.yaml", mode)
    assert found.for_pictures(pictures).steps == updates
    assert found.variant == "both"
    if found.classes is not None and found.per_class is not None:
        assert len(found.classes) * found.per_class == pictures
    if name.startswith("embedded"):
        examples = find_examples(found.model_copy(update={"data": folder / found.data}))
        assert len(examples) == pictures
        assert {"green apple", "owl"} < {each.caption for each in examples}


def test_a_changed_run_is_refused_with_what_has_changed() -> None:
    before = {"learning_rate": 1e-5, "prompt_length": 50, "data": "100 pictures, ab"}
    assert check_unchanged(before, dict(before), []) == []
    now = before | {"learning_rate": 1e-4}
    with pytest.raises(InputError, match=r"learning_rate: 1e-05 -> 0\.0001.*--allow-change learning_rate"):
        check_unchanged(before, now, [])
    assert check_unchanged(before, now, ["learning_rate"]) == ["learning_rate: 1e-05 -> 0.0001"]
    with pytest.raises(InputError) as error:
        check_unchanged(before, now | {"prompt_length": 20, "data": "99 pictures, cd"}, ["learning_rate"])
    assert "data: 100 pictures, ab -> 99 pictures, cd; prompt_length: 50 -> 20" in str(error.value)
    assert "--allow-change" not in str(error.value)
    with pytest.raises(InputError, match="allow-change is prompt_length, expected one of"):
        check_unchanged(before, now, ["prompt_length"])

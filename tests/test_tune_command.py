"""`sdipc tune`: what it writes, that it goes on to the bit, and what it refuses before anything is compiled."""

import json
import math
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

import sdipc_jax as sdipc
from sdipc_jax import cli, parallel, tuning
from sdipc_jax.checkpoints.bundle import Bundle
from sdipc_jax.checkpoints.keys import flatten
from sdipc_jax.tuning.config import RunSettings
from sdipc_jax.tuning.data import Draw, find_examples
from sdipc_jax.tuning.feed import Feed
from sdipc_jax.tuning.program import still, train_step
from sdipc_jax.tuning.step import moving, with_moving
from tests.compare import relative_error
from tests.tuning_runs import Run, end, kill, write_pictures, write_small_checkpoint


@pytest.fixture(scope="session")
def small_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_checkpoint(tmp_path_factory.mktemp("small") / "checkpoint")


@pytest.fixture(scope="session")
def small(small_folder: Path) -> Bundle:
    return sdipc.load(str(small_folder))


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures") / "data", {"cat": 4, "dog": 5})


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def values(small_folder: Path, data: Path) -> dict[str, Any]:
    """Two pictures a batch, two batches an update, a checkpoint every third of eight updates."""
    return {
        "model": str(small_folder),
        "data": str(data),
        "steps": 8,
        "save_every": 3,
        "batch_size": 2,
        "accumulate": 2,
        "prompt_length": 2,
        "ema": 0.9,
        "learning_rate": 1e-3,
    }


@pytest.fixture(scope="module")
def clean(values: dict[str, Any], cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that nothing interrupts."""
    run = Run(tmp_path_factory.mktemp("clean") / "run", "ct", cache, values | {"sample_every": 8, "tensorboard": True})
    run.finish()
    return run


def test_what_a_run_writes(clean: Run, small_folder: Path, data: Path, small: Bundle) -> None:
    assert clean.log() == ["starts at step 0", "saved step 3", "saved step 6", "saved step 8"]
    lines = clean.metrics()
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert all(line["loss"] == line["loss_image"] and line["gradient_norm"] > 0 for line in lines)
    assert lines[0]["learning_rate"] == float(np.float32(1e-3))
    seen = [number for line in lines for number in line["pictures"]]
    assert [sorted(seen[first : first + 9]) for first in (0, 9, 18)] == [list(range(9))] * 3
    pictures = [json.loads(line) for line in (clean.folder / "pictures.jsonl").read_text().splitlines()]
    assert [line["class"] for line in pictures] == ["cat"] * 4 + ["dog"] * 5
    assert pictures[0]["picture"] == str(data / "cat/000.png")
    assert (clean.folder / "samples/step-000008.png").is_file()
    assert list((clean.folder / "tensorboard").iterdir())
    assert clean.steps() == [6, 8]
    assert clean.leftovers() == []
    tuned = sdipc.load(str(small_folder), tuned=clean.folder / "tuned.safetensors")
    was, now = flatten(small.params), flatten(tuned.params)
    moved = {path[0] for path, leaf in now.items() if path not in was or not np.array_equal(leaf, was[path])}
    assert moved == {"unet", "clip"}


def test_a_complete_run_has_nothing_to_do(clean: Run) -> None:
    before = clean.result()
    assert "nothing to do" in clean.finish()
    assert clean.result() == before


def test_export(clean: Run, small_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["tune", "export", str(clean.folder / "tuned.safetensors"), "--model", str(small_folder)]
    folder = tmp_path / "exported"
    assert cli.main([*arguments, "--output", str(folder), "--dtype", "bfloat16", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["files"] == [str(folder)]
    tuned = sdipc.load(str(small_folder), tuned=clean.folder / "tuned.safetensors")
    exported = sdipc.load(str(folder))
    assert exported.config.clip is not None
    assert exported.config.clip.prompts is not None
    for path, leaf in flatten(exported.params).items():
        np.testing.assert_array_equal(leaf, flatten(tuned.params)[path].astype(jax.numpy.bfloat16).astype(leaf.dtype))
    assert cli.main([*arguments, "--output", str(folder)]) == 2


def test_killed_and_asked_to_stop_it_goes_on_to_the_bit(clean: Run, values: dict[str, Any], tmp_path: Path) -> None:
    run = Run(tmp_path / "run", "ct", clean.cache, values)
    process = run.start()
    assert run.wait_for(run.saving, process)
    kill(process)
    process = run.start()
    assert run.wait_for(lambda: run.lines() >= 5, process)
    process.send_signal(signal.SIGTERM)
    started = time.monotonic()
    message = end(process, 75)
    assert time.monotonic() - started < 10
    stopped = run.lines()
    assert f"interrupted; {stopped} of 8 updates are saved" in message
    assert run.steps()[-1] == stopped
    process = run.start()
    assert run.wait_for(lambda: f"goes on after step {stopped}" in run.log(), process)
    end(process)
    assert run.leftovers() == []
    expected = clean.result()
    assert run.result() == expected


def test_a_damaged_checkpoint_is_set_aside_and_the_run_the_same(clean: Run, tmp_path: Path) -> None:
    run = Run(tmp_path / "run", "ct", clean.cache, clean.values)
    shutil.copytree(clean.folder, run.folder)
    (run.folder / "tuned.safetensors").unlink()
    arrays = max((run.checkpoints / "8").rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)
    content = bytearray(arrays.read_bytes())
    content[len(content) // 2] ^= 1
    arrays.write_bytes(content)
    message = run.finish()
    assert f"checkpoint 8 is damaged ({arrays.relative_to(run.checkpoints / '8')} is not what was written)" in message
    assert run.leftovers() == ["8.corrupt"]
    assert run.result() == clean.result()


def test_what_is_refused_is_refused_before_anything_is_compiled(
    clean: Run, small_folder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(json.dumps(clean.values | {"output_dir": str(clean.folder)}))

    def refused(*arguments: str, mode: str = "ct") -> str:
        assert cli.main(["tune", mode, str(config), *arguments, "--mesh", "data=1"]) == 2
        return capsys.readouterr().err

    cases = [
        (["learning_rate=1e-4"], "learning_rate: 0.001 -> 0.0001"),
        (["prompt_length=3"], "prompt_length: 2 -> 3"),
        (["batch_size=1"], "batch_size: 2 -> 1"),
        (["per_class=4"], "data: 9 pictures, "),
        (["batch_size=1", "--allow-change", "batch_size"], "allow-change is batch_size, expected one of betas"),
        (["height=30"], "height is 30, expected a multiple of 4"),
        (["data=nowhere"], "data is nowhere, but nothing is there"),
        ([f"output_dir={config}/run"], "cannot write there"),
    ]
    for arguments, message in cases:
        found = refused(*arguments)
        assert message in found, found
    assert "mode is 'ct', expected ft" not in refused(mode="ft")
    bad = tmp_path / "bad"
    shutil.copytree(data, bad)
    for name in ("cat/001.png", "dog/003.png"):
        (bad / name).write_bytes(b"<svg/>")
    found = refused(f"data={bad}", f"output_dir={tmp_path / 'new'}")
    assert "2 of 9 pictures cannot be used" in found
    assert "cat/001.png" in found
    assert "dog/003.png" in found
    assert cli.main(["tune", "ct", str(config), "batch_size=3", f"output_dir={tmp_path / 'new'}"]) == 2
    assert "a batch has 3 pictures and the mesh 2 devices" in capsys.readouterr().err
    other = write_small_checkpoint(tmp_path / "other", seed=1)
    assert "checkpoint: " in refused(f"model={other}")


@pytest.fixture
def no_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every loss is NaN, and nothing is compiled."""

    def train(mesh: Any, *, many: bool, turns: int) -> Any:
        return lambda parts, rest, batch: (parts, {"loss": np.float32("nan"), "gradient_norm": np.float32(1)})

    monkeypatch.setattr("sdipc_jax.tuning.loop.train_step", train)


def test_a_loss_that_is_not_finite_stops_the_run(
    clean: Run, no_programs: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(clean.folder, folder)
    shutil.rmtree(folder / "checkpoints/8")
    config = tmp_path / "run.yaml"
    config.write_text(json.dumps(clean.values | {"output_dir": str(folder)}))
    assert cli.main(["tune", "ct", str(config), "--mesh", "data=1"]) == 2
    pictures = ", ".join(map(str, clean.metrics()[6]["pictures"]))
    assert f"loss is nan in update 7, on pictures {pictures} of pictures.jsonl" in capsys.readouterr().err
    run = Run(folder, "ct", clean.cache, clean.values)
    assert (run.steps(), run.lines()) == ([6], 6)


def test_every_class_a_concept_of_its_own(values: dict[str, Any], cache: Path, tmp_path: Path) -> None:
    values = values | {"variant": "kv", "steps": 2, "accumulate": 1, "batch_size": 2, "random_flip": True}
    many = Run(tmp_path / "many", "ct", cache, values | {"each_class": True})
    many.finish()
    (line, *_) = many.metrics()
    alone = Run(tmp_path / "alone", "ct", cache, values | {"classes": ["dog"]})
    alone.finish()
    expected = alone.metrics()[0]
    np.testing.assert_allclose(line["loss"][1], expected["loss"], rtol=1e-5)
    assert [number - 4 for number in line["pictures"][1]] == expected["pictures"]
    assert sorted(path.name for path in many.folder.glob("*.safetensors")) == ["cat.safetensors", "dog.safetensors"]
    files = many.folder / "dog.safetensors", alone.folder / "tuned.safetensors"
    found, exact = (tuning.load_delta(file).tensors for file in files)
    assert found.keys() == exact.keys()
    assert all(relative_error(found[key], exact[key]) <= 1e-5 for key in exact)


# The program.


@pytest.fixture(scope="module")
def chosen(values: dict[str, Any]) -> RunSettings:
    return RunSettings(**values | {"mode": "ct", "output_dir": "out", "optimizer": "sgd", "ema": 0, "accumulate": 1})


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return parallel.make_mesh("data=2")


def test_two_devices_give_the_steps_of_one_and_exchange_gradients_alone(
    small: Bundle, chosen: RunSettings, mesh: Mesh
) -> None:
    pictures = [each.read() for each in find_examples(chosen)]
    batch = tuning.make_cache(small, chosen.tuning, pictures).batch([0, 5])
    start = tuning.init(small, chosen.tuning)
    key = jax.random.key(chosen.seed, impl="threefry2x32")
    expected, measured = tuning.step(start, batch, jax.random.fold_in(key, 0))
    before = jax.tree.map(np.array, start.params)
    parts, rest = parallel.replicate(mesh, (moving(start), still(start)))
    placed, program = parallel.place(mesh, batch), train_step(mesh)
    exchanged = _exchanged_bytes(program.lower(parts, rest, placed).compile().as_text())
    trained = sum(leaf.nbytes for leaf in jax.tree.leaves(start.params))
    # Of the metrics the loss, which in mode ct is all that there is.
    assert exchanged == {"all-reduce": trained + 4}
    parts, found = program(parts, rest, placed)
    np.testing.assert_allclose(found["loss"], measured["loss"], rtol=1e-5)
    after = with_moving(rest, parts)
    for leaf, exact, first in zip(*map(jax.tree.leaves, (after.params, expected.params, before)), strict=True):
        assert relative_error(np.asarray(leaf) - first, np.asarray(exact) - first) <= 1e-4
    # What comes out is of the kind that goes in: one program for all steps.
    program(parts, rest, placed)
    assert program._cache_size() == 1


def _exchanged_bytes(text: str) -> dict[str, int]:
    """Of each kind of collective in a compiled program, the bytes that a device puts in."""
    sizes = {"f32": 4, "bf16": 2, "s32": 4, "u32": 4, "pred": 1}
    found: dict[str, int] = {}
    kinds = "all-reduce|all-gather|all-to-all|collective-permute|collective-broadcast|reduce-scatter"
    for line in text.splitlines():
        match = re.search(rf" = (.*?) ({kinds})(-start)?\(", line)
        for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", match[1]) if match else ():
            size = sizes[dtype] * math.prod(map(int, filter(None, shape.split(","))))
            found[match[2]] = found.get(match[2], 0) + size
    return found


def test_augmented_pictures_are_encoded_as_they_come(small: Bundle, chosen: RunSettings, mesh: Mesh) -> None:
    augmented = chosen.model_copy(update={"random_flip": True, "variant": "kv", "text_weight": 1.0})
    examples = find_examples(augmented)
    draws = [Draw(0, 0, 0.5, True), Draw(1, 6, 0.5, False)]
    # The first as a picture that was mirrored beforehand; the second has another target.
    pictures = [examples[0].read()[:, ::-1], examples[1].read(), examples[6].read()]
    captions = [examples[number].caption for number in (0, 1, 6)]
    expected = tuning.make_cache(small, augmented.tuning, pictures, captions).batch([0, 1], [0, 2])
    # On two devices, and on one that takes as many at once.
    for where, turns in ((mesh, 1), (parallel.make_mesh("data=1"), 2)):
        feed = Feed(small, augmented, examples, 32, 32, where, turns)
        batch = feed.encode(parallel.place(where, feed.make(draws) | {"rows": np.arange(2)}))
        assert batch.keys() == expected.keys() | {"rows"}
        for name, value in expected.items():
            np.testing.assert_allclose(batch[name], value, rtol=1e-4, atol=1e-5)

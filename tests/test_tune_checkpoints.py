"""Checkpoints of a run under the faults that disks and people bring about."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdipc_jax.errors import InputError
from sdipc_jax.tuning import checkpoints as module
from sdipc_jax.tuning.checkpoints import MANIFEST, Checkpoints, minor_changes, versions
from tests.processes import finish, free_port, start


def tree(step: int) -> Any:
    generator = np.random.default_rng(step)
    return {
        "step": jnp.asarray(step),
        "params": {"a": {"kernel": jnp.asarray(generator.standard_normal((40, 30)), jnp.float32)}},
        "optimizer": (jnp.asarray(generator.standard_normal(7), jnp.bfloat16), None),
    }


def save(folder: Path, *steps: int, keep: int = 9) -> list[str]:
    said: list[str] = []
    with Checkpoints(folder, keep, said.append) as checkpoints:
        for step in steps:
            checkpoints.save(step, tree(step), {"data": step})
    return said


def newest(folder: Path) -> tuple[int, list[str]]:
    """The step of the newest whole checkpoint, after reading it, and what was said."""
    said: list[str] = []
    with Checkpoints(folder, 9, said.append) as checkpoints:
        saved = checkpoints.newest()
    assert saved is not None
    assert saved.values == {"data": saved.step}
    restored = saved.restore(tree(0))
    assert jax.tree.structure(restored) == jax.tree.structure(tree(0))
    jax.tree.map(np.testing.assert_array_equal, restored, tree(saved.step))
    return saved.step, said


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"


def test_what_is_saved_comes_back(folder: Path) -> None:
    assert save(folder, 3, 6, 9, 12, keep=2) == ["saved step 3", "saved step 6", "saved step 9", "saved step 12"]
    assert sorted(os.listdir(folder)) == ["12", "9"]
    assert newest(folder) == (12, [])
    manifest = json.loads((folder / "12" / MANIFEST).read_text())
    array = np.asarray(tree(12)["params"]["a"]["kernel"])
    assert manifest["arrays"]["params.a.kernel"] == {
        "shape": [40, 30],
        "dtype": "float32",
        "sha256": hashlib.sha256(array.tobytes()).hexdigest(),
    }
    assert manifest["versions"]["jax"] == jax.__version__


def test_the_arrays_may_change_as_soon_as_save_returns(folder: Path) -> None:
    values = np.arange(5.0)
    with Checkpoints(folder, 2, print) as checkpoints:
        checkpoints.save(1, {"x": values}, {})
        values[:] = -1
    with Checkpoints(folder, 2, print) as checkpoints:
        saved = checkpoints.newest()
    assert saved is not None
    np.testing.assert_array_equal(saved.restore({"x": values})["x"], np.arange(5.0))


def test_another_tree_is_refused(folder: Path) -> None:
    save(folder, 1)
    with Checkpoints(folder, 2, print) as checkpoints:
        saved = checkpoints.newest()
    assert saved is not None
    with pytest.raises(InputError, match=r"params\.a\.kernel is \(\[40, 30\], 'float32'\), expected \(\[40, 31\]"):
        saved.restore(tree(0) | {"params": {"a": {"kernel": np.zeros((40, 31), np.float32)}}})
    with pytest.raises(InputError, match="extra is missing"):
        saved.restore(tree(0) | {"extra": np.zeros(3)})


def test_each_flipped_bit_is_found(folder: Path) -> None:
    save(folder, 1, 2)
    generator = np.random.default_rng(0)
    files = sorted(path for path in (folder / "2").rglob("*") if path.is_file())
    sizes = np.array([path.stat().st_size for path in files], float)
    for turn in range(20):
        copy = folder.parent / str(turn)
        shutil.copytree(folder, copy)
        # Every kind of file once, then by size.
        index = turn if turn < len(files) else generator.choice(len(files), p=sizes / sizes.sum())
        damaged = copy / files[index].relative_to(folder)
        content = bytearray(damaged.read_bytes())
        content[generator.integers(len(content))] ^= 1 << int(generator.integers(8))
        damaged.write_bytes(content)
        step, said = newest(copy)
        assert step == 1
        assert said[0].startswith("warning: checkpoint 2 is damaged (")
        assert damaged.name in said[0]
        assert "2.corrupt" in said[0]
        assert sorted(os.listdir(copy)) == ["1", "2.corrupt"]
        shutil.rmtree(copy)


def _arrays(folder: Path) -> Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "truncated": lambda folder: os.truncate(_arrays(folder), 10),
    "deleted": lambda folder: _arrays(folder).unlink(),
    "zeroed": lambda folder: _arrays(folder).write_bytes(bytes(_arrays(folder).stat().st_size)),
    "no marker": lambda folder: (folder / "commit_success.txt").unlink(),
    "no manifest": lambda folder: (folder / MANIFEST).unlink(),
    "other manifest": lambda folder: shutil.copy(folder.parent / "1" / MANIFEST, folder),
    "empty": lambda folder: (shutil.rmtree(folder), folder.mkdir()),
    "a file": lambda folder: (shutil.rmtree(folder), folder.touch()),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_newest_is_set_aside(folder: Path, kind: str) -> None:
    save(folder, 1, 2)
    DAMAGE[kind](folder / "2")
    step, said = newest(folder)
    assert step == 1
    assert [line.startswith("warning: checkpoint 2 is damaged") for line in said] == [True]
    assert sorted(os.listdir(folder)) == ["1", "2.corrupt"]
    # And the next of that number has its place.
    assert save(folder, 2) == ["saved step 2"]
    assert newest(folder) == (2, [])
    DAMAGE[kind](folder / "2")
    assert newest(folder)[0] == 1
    assert sorted(os.listdir(folder)) == ["1", "2.corrupt", "2.corrupt-2"]


def test_what_others_have_left_stays(folder: Path) -> None:
    save(folder, 1)
    strange = ["best", "1.orbax-checkpoint-tmp-7", "07", "notes.txt", "1x"]
    for name in strange:
        (folder / name).mkdir()
    (folder / "5.partial" / "d").mkdir(parents=True)
    assert newest(folder) == (1, [])
    # Half of a checkpoint is this program's own, and useless.
    assert sorted(os.listdir(folder)) == sorted(["1", *strange])
    save(folder, 2, 3, keep=1)
    assert sorted(os.listdir(folder)) == sorted(["3", *strange])


def test_without_a_whole_checkpoint_it_stops(folder: Path) -> None:
    with Checkpoints(folder, 2, print) as checkpoints:
        assert checkpoints.newest() is None
        save(folder, 1, 2)
        for step in (1, 2):
            DAMAGE["truncated"](folder / str(step))
        for _ in range(2):
            # The second time there are only those set aside, and it does not start anew either.
            with pytest.raises(InputError, match="no checkpoint that is whole") as error:
                checkpoints.newest()
            assert "2" in str(error.value)
            assert "1" in str(error.value)
            assert "another output_dir" in str(error.value)
    assert sorted(os.listdir(folder)) == ["1.corrupt", "2.corrupt"]


def test_an_error_while_saving_comes_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(source: Path, target: Path) -> None:
        raise RuntimeError("the writer has fallen over")

    save(folder, 1)
    rename = module.rename
    monkeypatch.setattr(module, "rename", fail)
    said: list[str] = []
    with pytest.raises(InputError, match=r"checkpoints/2: the checkpoint of \d+ bytes .*fallen over"):
        save(folder, 2)
    with Checkpoints(folder, 9, said.append) as checkpoints:
        checkpoints.save(2, tree(2), {"data": 2})
        with pytest.raises(InputError, match="fallen over"):
            checkpoints.save(3, tree(3), {"data": 3})
        monkeypatch.setattr(module, "rename", rename)
        checkpoints.save(4, tree(4), {"data": 4})
    assert said == ["saved step 4"]
    assert sorted(os.listdir(folder)) == ["1", "4"]


def save_many(folder: Path, tree: Any) -> None:
    with Checkpoints(folder, 9, print) as checkpoints:
        for step in range(1, 9):
            checkpoints.save(step, tree, {"data": step})


@pytest.mark.parametrize("noticed", ["before", "meanwhile"])
def test_a_full_disk(small_disk: Path, noticed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = small_disk / "checkpoints"
    if noticed == "meanwhile":
        monkeypatch.setattr(module, "_SPARE_BYTES", -(2**30))
    large = {"x": np.random.default_rng(0).standard_normal(300_000).astype(np.float32)}
    with pytest.raises(InputError) as error:
        save_many(folder, large)
    last = max(int(name) for name in os.listdir(folder))
    assert f"checkpoints/{last + 1}: the checkpoint of 1200000 bytes" in str(error.value)
    assert "No space left on device" in str(error.value)
    assert sorted(os.listdir(folder)) == [str(step) for step in range(1, last + 1)]
    shutil.rmtree(folder / "1")
    with Checkpoints(folder, 9, print) as checkpoints:
        saved = checkpoints.newest()
        assert saved is not None
        assert saved.step == last
        np.testing.assert_array_equal(saved.restore(large)["x"], large["x"])
        checkpoints.save(last + 1, large, {})


@pytest.mark.parametrize("instead", [Path.touch, Path.exists])
def test_a_folder_that_goes_away(folder: Path, instead: Callable[[Path], Any]) -> None:
    with Checkpoints(folder, 9, print) as checkpoints:
        checkpoints.save(1, tree(1), {})
        checkpoints.wait()
        shutil.rmtree(folder)
        instead(folder)
        checkpoints.save(2, tree(2), {})
        with pytest.raises(InputError, match=r"could not be written.*the folder is gone"):
            checkpoints.wait()


def test_minor_versions_are_compared() -> None:
    now = versions()
    assert minor_changes(now) == []
    major, minor, patch = now["jax"].split(".")
    assert minor_changes(now | {"jax": f"{major}.{minor}.{int(patch) + 1}"}) == []
    other = f"{major}.{int(minor) + 1}.{patch}"
    assert minor_changes(now | {"jax": other}) == [f"jax {other} -> {now['jax']}"]
    del now["grain"]
    assert minor_changes(now)[0].startswith("grain unknown -> ")


SAVES = """
import sys
from pathlib import Path
import jax
import numpy as np
from jax.experimental import multihost_utils
from sdipc_jax.tuning.checkpoints import Checkpoints

address, number, folder = sys.argv[1:]
jax.distributed.initialize(address, 2, int(number))

def refuse(name):
    raise AssertionError(f"devices are kept waiting for {name}")

with Checkpoints(Path(folder), 2, print) as checkpoints:
    multihost_utils.sync_global_devices = refuse
    for step in (1, 2, 3):
        checkpoints.save(step, {"a": np.arange(5) + step}, {})
"""


def test_saving_leaves_devices_alone(tmp_path: Path) -> None:
    """It goes on beside the training, whose steps would meet its exchanges between devices in another order."""
    address = f"localhost:{free_port()}"
    processes = [start(["-c", SAVES, address, number, tmp_path / "saved"], devices=1) for number in range(2)]
    for code, output, errors in finish(processes, 120):
        assert code == 0, errors
        assert output.splitlines() == ["saved step 1", "saved step 2", "saved step 3"]
    with Checkpoints(tmp_path / "saved", 2, print) as checkpoints:
        newest = checkpoints.newest()
    assert newest is not None
    np.testing.assert_array_equal(newest.restore({"a": np.zeros(5, np.int64)})["a"], np.arange(5) + 3)

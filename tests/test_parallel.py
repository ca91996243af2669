"""The mesh, processes that find each other, and the watchdog."""

import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from sdipc_jax import Bundle, cli, generate_with_progress, parallel, save
from sdipc_jax.errors import InputError, MissingProcessError
from sdipc_jax.parallel import Watchdog, processes
from sdipc_jax.parallel.peers import Peers
from tests.eight_devices import COLLECTIVES, small_bundle
from tests.processes import finish, free_port, start


@pytest.fixture(scope="module")
def pair() -> jax.sharding.Mesh:
    return parallel.make_mesh("data=2")


@pytest.mark.parametrize("spec, count", [(None, 2), ("data=1", 1), ("data=2", 2)])
def test_mesh(spec: str | None, count: int) -> None:
    mesh = parallel.make_mesh(spec)
    assert dict(mesh.shape) == {"data": count}
    assert mesh.axis_types == (jax.sharding.AxisType.Auto,)
    assert list(mesh.devices) == jax.devices()[:count]


@pytest.mark.parametrize("spec", ["", "2", "data=", "data=0", "data=-1", "data=2.0", "model=2", "data=2,model=2"])
def test_bad_mesh(spec: str) -> None:
    with pytest.raises(InputError, match=rf"mesh is {spec!r}, expected data=N with N devices, such as data=2"):
        parallel.make_mesh(spec)


def test_mesh_of_more_devices_than_there_are() -> None:
    with pytest.raises(InputError, match="mesh is 'data=3', but there are 2 devices, expected at most data=2"):
        parallel.make_mesh("data=3")
    with pytest.raises(InputError, match="there are 1 devices"):
        parallel.make_mesh("data=2", jax.devices()[1:])


def test_weights_are_whole_on_every_device(pair: jax.sharding.Mesh) -> None:
    tree = {"a": jnp.arange(6.0).reshape(2, 3), "b": jnp.float32(4)}
    copies = parallel.replicate(pair, tree)
    for name, leaf in tree.items():
        assert [shard.device for shard in copies[name].addressable_shards] == jax.devices()
        assert all(np.array_equal(shard.data, leaf) for shard in copies[name].addressable_shards)
    again = parallel.replicate(pair, copies)
    assert all(again[name] is copies[name] for name in tree)


def test_batches_are_divided_by_rows(pair: jax.sharding.Mesh) -> None:
    keys = jax.vmap(jax.random.key)(jnp.arange(4))
    placed = parallel.place(pair, {"host": np.arange(8).reshape(4, 2), "keys": keys})
    assert [shard.data.tolist() for shard in placed["host"].addressable_shards] == [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]
    assert [shard.device for shard in placed["host"].addressable_shards] == jax.devices()
    np.testing.assert_array_equal(jax.random.key_data(placed["keys"]), jax.random.key_data(keys))


def test_padding_repeats_the_last_row() -> None:
    padded = parallel.pad({"a": np.arange(10).reshape(5, 2), "b": jnp.arange(4)}, 4)
    assert padded["a"].tolist() == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [8, 9], [8, 9], [8, 9]]
    assert padded["b"].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("localhost:80", 2, None), "found coordinator_address localhost:80, num_processes 2 and process_id None"),
        ((None, None, 0), "expected all three or none"),
        (("localhost", 2, 0), "coordinator_address is 'localhost', expected host:port"),
        (("localhost:x", 2, 0), "coordinator_address is 'localhost:x', expected host:port"),
        (("localhost:80000", 2, 0), "coordinator_address is 'localhost:80000', expected host:port"),
        (("localhost:80", 2, 2), "process_id is 2, expected 0 to 1"),
        (("localhost:80", 2, -1), "process_id is -1, expected 0 to 1"),
    ],
)
def test_bad_addresses(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        parallel.initialize(*arguments)


def answers(*calls: Callable[[], None]) -> list[str]:
    """What each of several processes is told, from threads in their place; "" where all is well."""
    told = [""] * len(calls)

    def run(place: int) -> None:
        try:
            calls[place]()
        except (InputError, MissingProcessError) as error:
            told[place] = f"{type(error).__name__}: {error}"

    threads = [threading.Thread(target=run, args=(place,)) for place in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return told


def call(port: int, count: int, process: int, seconds: float = 20) -> Callable[[], None]:
    return lambda: processes._roll_call(f"localhost:{port}", count, process, seconds)


def test_all_join() -> None:
    port = free_port()

    def late() -> None:
        time.sleep(0.5)
        call(port, 3, 0)()

    assert answers(call(port, 3, 2), late, call(port, 3, 1)) == ["", "", ""]
    # The port is free at once for what comes next.
    socket.create_server(("localhost", port)).close()


def test_one_never_starts() -> None:
    port = free_port()
    words = "MissingProcessError: 2 of 4 processes joined within 1 s, process 1, 3 did not"
    told = answers(call(port, 4, 0, 1), call(port, 4, 2, 1))
    assert all(each.startswith(words) for each in told)
    (alone,) = answers(call(port, 2, 1, 0.5))
    assert alone.startswith(f"MissingProcessError: process 1 of 2 found no process 0 at localhost:{port} within 0.5 s")


def test_processes_that_do_not_fit_are_refused() -> None:
    port = free_port()
    told = answers(call(port, 3, 0), call(port, 3, 1), call(port, 3, 1))
    assert all(each.startswith("InputError: process_id is 1 on two processes") for each in told)
    told = answers(call(port, 2, 0), call(port, 3, 1))
    assert all(each.startswith("InputError: num_processes is 3 on process 1 and 2 on process 0") for each in told)


def test_strangers_are_let_go() -> None:
    port = free_port()

    def stranger() -> None:
        for words in (b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 5000, b""):
            while True:
                try:
                    with socket.create_connection(("localhost", port), 5) as connection:
                        connection.sendall(words)
                    break
                except ConnectionError:
                    time.sleep(0.05)
        call(port, 2, 1)()

    assert answers(call(port, 2, 0), stranger) == ["", ""]


def test_the_port_is_taken() -> None:
    with socket.create_server(("", 0)) as server:
        (told,) = answers(call(server.getsockname()[1], 2, 0))
    assert "cannot be listened at (Address already in use): choose another" in told


def test_one_process_agrees_with_itself() -> None:
    assert parallel.gather("text") == ["text"]
    parallel.agree({"seed": 1})
    parallel.abandon(3)


AGREEING = """
import sys
from sdipc_jax import InputError, parallel
parallel.initialize(sys.argv[1], 2, int(sys.argv[2]), initialization_timeout=60, heartbeat_timeout=10)
print(parallel.gather("ä" * (1 + 40 * int(sys.argv[2]))))
parallel.agree({"seed": 1})
try:
    parallel.make_mesh("data=1")
except InputError as error:
    print(error)
parallel.agree({"same": [1, 2], "seed": int(sys.argv[2])})
"""


def test_two_processes() -> None:
    port = free_port()
    both = [start(["-c", AGREEING, f"localhost:{port}", i], devices=1) for i in range(2)]
    for code, out, err in finish(both, 90):
        assert code == 1
        lines = out.splitlines()
        assert str(["ä", "ä" * 41]) in lines
        assert any(line.startswith("mesh is 'data=1', but there are 2 devices in 2 processes") for line in lines)
        assert "InputError: seed is 1 on process 1 and 0 on process 0: start all processes with the same" in err


class Board:
    """The coordinator's keys and values, where process 1 counts up as long as it is there."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}
        self.there, self.count = True, 0
        self.answers = threading.Event()
        self.answers.set()

    def key_value_set(self, name: str, value: str, allow_overwrite: bool) -> None:
        self.answers.wait()
        self.values[name] = value

    def key_value_dir_get(self, name: str) -> list[tuple[str, str]]:
        self.answers.wait()
        self.count += self.there
        return [*self.values.items(), (f"{name}/1", str(self.count))]


@pytest.mark.parametrize("lost", ["the other", "the coordinator"])
def test_who_is_lost_is_named(lost: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    ended = threading.Event()
    monkeypatch.setattr("sdipc_jax.parallel.peers.os", SimpleNamespace(_exit=lambda code: code == 75 and ended.set()))
    board, process = Board(), 1 if lost == "the coordinator" else 0
    watched = Peers(["host-a", "host-b"], process, 0.6, board)
    watched.start()
    try:
        # As long as all is well nothing is said, however long it takes.
        assert not ended.wait(1.5)
        if lost == "the other":
            board.there = False
        else:
            board.answers.clear()
        assert ended.wait(5)
    finally:
        watched.stop()
        board.answers.set()
    error = capsys.readouterr().err
    named = "process 1 on host-b", "process 0 on host-a"
    me, other = named if process else reversed(named)
    assert error.startswith(f"sdipc: {me} has heard nothing of {other} for 0.4 s, and ends with exit code 75: see why")


def test_limit_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0, 9, 10, 11, 20, 22, 30, 60, 70, 71])
    monkeypatch.setattr("sdipc_jax.parallel.watchdog.time", SimpleNamespace(monotonic=lambda: next(clock)))
    limits = []
    with Watchdog(factor=3.0, least=4.0) as watchdog:
        assert watchdog.limit is None
        for _ in range(4):
            with watchdog.step():
                pass
            limits.append(watchdog.limit)
    # After 9 s, which may be compilation's, 1, 2 and 30.
    assert limits == [27, 4, 4.5, 6]
    with Watchdog() as watchdog, watchdog.step():
        pass
    assert watchdog.limit == 120


def test_a_step_that_raises_is_no_step() -> None:
    with Watchdog() as watchdog:
        with pytest.raises(KeyError), watchdog.step():
            raise KeyError
        assert watchdog.limit is None


HANGING = """
import threading, time
from sdipc_jax.parallel import Watchdog

def stuck_in_here():
    time.sleep(60)

with Watchdog(factor=3, least=0.5) as watchdog:
    for _ in range(3):
        with watchdog.step():
            time.sleep(0.01)
    time.sleep(1)  # Between steps there is no limit.
    threading.Thread(target=stuck_in_here, daemon=True).start()
    try:
        with watchdog.step():
            time.sleep(60)
    finally:
        print("cleanup")
"""


def test_a_step_that_hangs_ends_the_process() -> None:
    ((code, out, err),) = finish([start(["-c", HANGING], devices=1)], 40)
    assert code == 75
    assert out == ""
    assert "sdipc: a step has taken more than 0.5 s, the usual is 0.01" in err
    assert "in stuck_in_here" in err
    assert 'File "<string>", line 16 in <module>' in err


# tests/faults has 4 besides.
SIZES = ("1", "2", "8")


@pytest.fixture(scope="module")
def eight(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `tests.eight_devices` prints."""
    # Each program is compiled to be looked at, and again when it is called.
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.mktemp("compiled")))
    keep = {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3"}
    ((code, out, err),) = finish([start(["-m", "tests.eight_devices", *SIZES], devices=8, **keep)], 300)
    assert code == 0, err
    return json.loads(out)


def test_every_device_does_its_part_of_the_work_alone(eight: dict[str, Any]) -> None:
    assert eight["devices"] == 8
    alone = np.array(eight["programs"]["1"]["flops"])
    assert (alone > 1e6).all()
    for size in SIZES[1:]:
        program = eight["programs"][size]
        np.testing.assert_allclose(program["flops"], alone / int(size), rtol=5e-3)
        assert program["collectives"] == [0, 0]


def test_a_mesh_of_one_device_is_that_device(tmp_path: Path) -> None:
    bundle = small_bundle(tmp_path)
    context = jax.numpy.zeros((1, bundle.config.tokens.length, bundle.config.unet.cross_attention_dim))
    for device in jax.devices():
        mesh = parallel.make_mesh("data=1", [device])
        pictures, _ = parallel.generate(mesh, bundle, context, seeds=0, steps=1)
        assert pictures.devices() == {device}


@pytest.mark.parametrize("name", ["pictures", "cached"])
def test_pictures_do_not_depend_on_the_number_of_devices(eight: dict[str, Any], name: str) -> None:
    alone = np.array(eight[name]["1"])
    assert len({picture.tobytes() for picture in alone}) == 8
    for size in SIZES[1:]:
        found = np.array(eight[name][size])
        assert found.shape == (7, 8, 8, 3)
        np.testing.assert_allclose(found, alone[:7], atol=2 / 255)


def test_collectives_are_seen(pair: jax.sharding.Mesh) -> None:
    """What the test above looks for."""
    spec, whole = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()
    total = jax.jit(jax.shard_map(lambda x: jax.lax.psum(x, "data"), mesh=pair, in_specs=spec, out_specs=whole))
    assert re.search(COLLECTIVES, total.lower(parallel.place(pair, np.ones(4))).compile().as_text())


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return small_bundle(tmp_path_factory.mktemp("quick"))


def test_generate_over_a_mesh(quick: Bundle, pair: jax.sharding.Mesh) -> None:
    shape = (3, quick.config.tokens.length, quick.config.unet.cross_attention_dim)
    context = jnp.asarray(np.random.default_rng(0).standard_normal(shape, np.float32))
    settings: dict[str, Any] = {"seeds": 3, "indices": np.arange(3), "steps": 3, "sampler": "pndm"}
    # A prompt that guidance leads away from of its own for each shows that they stay together.
    settings["negative"] = jnp.flip(context, 0)
    settings["guidance_scale"] = np.array([2.0, 3.0, 7.5])
    reports: list[tuple[int, int]] = []
    pictures, flagged = parallel.generate(pair, quick, context, lambda *each: reports.append(each), **settings)
    expected, _ = generate_with_progress(quick, context, lambda *_: None, **settings)
    assert flagged.tolist() == [False] * 3
    np.testing.assert_allclose(pictures, expected, atol=2 / 255)
    assert reports[0] == (1, 4)
    assert reports[-1] == (4, 4)
    copied = parallel.replicate(pair, quick)
    again, _ = parallel.generate(pair, copied, parallel.replicate(pair, context), **settings)
    np.testing.assert_array_equal(again, pictures)
    alone = parallel.make_mesh("data=1")
    np.testing.assert_array_equal(parallel.generate(alone, quick, context, **settings)[0], expected)
    np.testing.assert_array_equal(parallel.generate(alone, copied, context, **settings)[0], expected)


def test_generate_refuses_what_the_sampler_refuses(quick: Bundle, pair: jax.sharding.Mesh) -> None:
    context = jnp.zeros((2, quick.config.tokens.length, quick.config.unet.cross_attention_dim))
    with pytest.raises(InputError, match="seeds is -1"):
        parallel.generate(pair, quick, context, seeds=-1)
    with pytest.raises(InputError, match="context has shape"):
        parallel.generate(pair, quick, context[:, 1:], seeds=1)


def job(count: int, devices: int, *arguments: object, **each: list[object]) -> list[tuple[int, str, str]]:
    """Runs `sdipc` as a job of several processes; `each` has options that differ between them."""
    port = free_port()
    running = []
    for process in range(count):
        own = [word for name, values in each.items() for word in (f"--{name.replace('_', '-')}", values[process])]
        together = ("--coordinator-address", f"localhost:{port}", "--num-processes", count, "--process-id", process)
        limits = ("--initialization-timeout", 60, "--heartbeat-timeout", 10)
        running.append(start(["-m", "sdipc_jax.cli", *arguments, *own, *together, *limits], devices))
    return finish(running, 240)


@pytest.fixture(scope="module")
def quick_folder(quick: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "checkpoint"
    save(quick, folder)
    return folder


def levels(folder: Path) -> dict[str, np.ndarray]:
    return {path.name: np.asarray(Image.open(path), np.int32) for path in sorted(folder.glob("*-0*.png"))}


@pytest.fixture(scope="module")
def alone(quick_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process makes."""
    folder = tmp_path_factory.mktemp("alone")
    arguments = ["text", "a", "b c", "--num-images", 3, "--steps", 2, "--batch-size", 2, "--mesh", "data=1"]
    arguments += ["--model", quick_folder, "--output-dir", folder]
    assert cli.main([str(word) for word in arguments]) == 0
    return folder


def test_two_processes_make_the_pictures_of_one(quick_folder: Path, alone: Path, tmp_path: Path) -> None:
    arguments = ["text", "a", "b c", "--num-images", 3, "--steps", 2, "--batch-size", 1, "--model", quick_folder]
    ended = job(2, 1, *arguments, "--json", output_dir=[tmp_path / "first", tmp_path / "second"])
    assert [code for code, _, _ in ended] == [0, 0], ended
    # The first writes and prints for both.
    assert not (tmp_path / "second").exists()
    assert ended[1][1] == ""
    summary = json.loads(ended[0][1])
    assert [record["settings"]["mesh"] for record in summary["records"]] == ["data=2"] * 6
    found, expected = levels(tmp_path / "first"), levels(alone)
    assert list(found) == list(expected)
    assert len(found) == 6
    for name, picture in found.items():
        assert np.abs(picture - expected[name]).max() <= 2


def test_processes_with_different_settings_are_refused(quick_folder: Path, tmp_path: Path) -> None:
    ended = job(2, 1, "text", "a", "--model", quick_folder, "--output-dir", tmp_path / "out", seed=[1, 2])
    for code, out, err in ended:
        assert code == 2
        assert out == ""
        assert "sdipc: seed is 2 on process 1 and 1 on process 0: start all processes with the same settings" in err
    assert not (tmp_path / "out").exists()


def test_all_end_when_one_refuses(quick_folder: Path, tmp_path: Path) -> None:
    # Nothing can be written below a file, but that is the first one's concern alone.
    (tmp_path / "file").touch()
    began = time.monotonic()
    (first, _, error), (second, _, _) = job(
        2, 1, "text", "a", "--model", quick_folder, "--output-dir", tmp_path / "file"
    )
    assert first == 2
    assert "cannot write there" in error
    assert second not in (0, 2)
    assert time.monotonic() - began < 60

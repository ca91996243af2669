"""Faults of `sdipc batch`, rows 22 to 31 of the project's list, with the numbers that stand there.

Run by `make faults-scale`. What needs a process of its own has one, with a checkpoint in miniature.
"""

import collections
import errno
import io
import json
import random
import signal
import struct
import subprocess
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import sdipc_jax as sdipc
from sdipc_jax.batch import storage
from sdipc_jax.batch.sampler import Sampler
from sdipc_jax.batch.settings import BatchSettings
from sdipc_jax.commands import batch as command
from sdipc_jax.pictures.preprocessing import preprocess
from sdipc_jax.pictures.reading import decode_picture
from tests.batch_jobs import Stub, draw, draw_all, manifest, records, write_job, write_rows
from tests.processes import finish, start


@pytest.fixture(scope="module")
def make_job(tiny_folder: Path) -> Callable[..., Path]:
    """Writes a job's file for the checkpoint in miniature."""

    def make(path: Path, **values: Any) -> Path:
        return write_job(path, **{"model": tiny_folder, "steps": 1, "scale": 5.0, **values})

    return make


@pytest.fixture(scope="module")
def sdipc_batch(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., subprocess.Popen[str]]:
    """Starts the command on one device; compiled programs are kept for the next start."""
    cache = str(tmp_path_factory.mktemp("compiled"))
    environment = {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}

    def begin(job: Path, *options: object) -> subprocess.Popen[str]:
        return start(["-m", "sdipc_jax.cli", "batch", job, "--json", *options], 1, **environment)

    return begin


def run(job: Path, device: Any = Sampler.make, **options: Any) -> Any:
    """The command in this process."""
    return command.batch(BatchSettings(job=job, **options), lambda done: None, device)


@pytest.fixture
def loaded(tiny: sdipc.Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loads nothing again that is in memory."""
    monkeypatch.setattr("sdipc_jax.prompts.converter.load_weights", lambda config, tuned: tiny)


def refuse(*_: Any) -> Any:
    raise AssertionError("no device is needed here")


def test_22_one_two_and_four_processes(
    make_job: Callable[..., Path], sdipc_batch: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    source = draw_all(tmp_path / "in", 37)
    found = []
    for count in (1, 2, 4):
        job = make_job(tmp_path / f"out-{count}.yaml", source=source, shard_size=5, batch_size=4)
        started = [sdipc_batch(job, "--process-index", n, "--process-count", count) for n in range(count)]
        for code, _, errors in finish(started, 300):
            assert code == 0, errors
        whole = manifest(tmp_path / f"out-{count}")
        found.append((whole["digest"], whole["pictures"], whole["done"]))
        assert len(records(tmp_path / f"out-{count}")) == 37
    assert found[0] == found[1] == found[2]
    assert found[0][2] == 37


@pytest.fixture(scope="module")
def clean(
    make_job: Callable[..., Path],
    sdipc_batch: Callable[..., subprocess.Popen[str]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The folder of a finished job of 500, its source and its file beside it."""
    folder = tmp_path_factory.mktemp("clean")
    source = draw_all(folder / "in", 500)
    job = make_job(folder / "out.yaml", source=source, shard_size=20, batch_size=10)
    [(code, _, errors)] = finish([sdipc_batch(job)], 600)
    assert code == 0, errors
    return folder / "out"


def test_23_twenty_kills(
    make_job: Callable[..., Path], sdipc_batch: Callable[..., subprocess.Popen[str]], clean: Path, tmp_path: Path
) -> None:
    job = make_job(tmp_path / "out.yaml", source=clean.parent / "in", shard_size=20, batch_size=10)
    out, luck = tmp_path / "out", random.Random(23)
    finished: dict[str, tuple[int, int]] = {}

    def shards() -> set[str]:
        return {path.name for path in out.glob("shard-*.jsonl")}

    for kill in range(20):
        before = shards()
        process = sdipc_batch(job)
        if kill % 4:
            # While it samples and writes: this way each start gets a shard further.
            while process.poll() is None and shards() == before:
                time.sleep(0.005)
            time.sleep(luck.uniform(0, 0.2))
        else:
            # While it starts.
            time.sleep(luck.uniform(0, 8))
        process.kill()
        process.communicate()
        for name in shards():
            data = (out / name).with_suffix(".tar").stat()
            # What was finished is never touched again: at most the shard at work is lost.
            assert finished.setdefault(name, (data.st_ino, data.st_mtime_ns)) == (data.st_ino, data.st_mtime_ns)
    [(code, output, errors)] = finish([sdipc_batch(job)], 600)
    assert code == 0, errors
    assert json.loads(output)["shards_skipped"] == len(finished)
    lines = records(out)
    assert collections.Counter(line["status"] for line in lines) == {"done": 500}
    assert [line["row"] for line in lines] == list(range(500))
    assert len({line["id"] for line in lines}) == 500
    names = []
    for path in sorted(out.glob("*.tar")):
        with tarfile.open(path) as archive:
            names += [name for name in archive.getnames() if name.endswith(".png")]
    assert sorted(names) == [f"{row:09d}.png" for row in range(500)]
    assert manifest(out) == manifest(clean)
    assert not list(out.glob(".*.tmp"))
    for path in out.glob("shard-*"):
        assert path.read_bytes() == (clean / path.name).read_bytes()


def test_23_kills_of_rows_that_ask_for_more(
    make_job: Callable[..., Path], sdipc_batch: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    """Mixes, pictures in places of their own, and starts: three programs that take turns in each shard."""
    for seed in range(2):
        draw(tmp_path / f"{seed}.png", seed, (32, 32))
    left = np.broadcast_to(np.where(np.arange(32) < 16, 255, 0).astype(np.uint8), (32, 32))
    for name, mask in (("left", left), ("right", 255 - left)):
        Image.fromarray(mask).save(tmp_path / f"{name}.png")
    both = ["0.png", "1.png"]
    kinds: list[dict[str, Any]] = [
        {"pictures": both, "weights": [2, 1], "without": "red", "negative_picture": "1.png"},
        {"pictures": both, "mask": ["left.png", "right.png"], "layers": "mid"},
        {"picture": "0.png", "init_image": "1.png", "mask_image": "right.png", "end": 0.5},
    ]
    source = write_rows(tmp_path / "rows.jsonl", [kinds[row % 3] | {"seed": row} for row in range(24)])
    jobs = [
        make_job(tmp_path / f"{name}.yaml", source=source, steps=2, shard_size=6, batch_size=2)
        for name in ("clean", "out")
    ]
    [(code, _, errors)] = finish([sdipc_batch(jobs[0])], 600)
    assert code == 0, errors
    out, luck = tmp_path / "out", random.Random(24)
    for _ in range(4):
        before = {path.name for path in out.glob("shard-*.jsonl")}
        process = sdipc_batch(jobs[1])
        while process.poll() is None and {path.name for path in out.glob("shard-*.jsonl")} == before:
            time.sleep(0.005)
        time.sleep(luck.uniform(0, 0.1))
        process.kill()
        process.communicate()
    [(code, _, errors)] = finish([sdipc_batch(jobs[1])], 600)
    assert code == 0, errors
    assert [line["row"] for line in records(out)] == list(range(24))
    assert manifest(out) == manifest(tmp_path / "clean")
    for path in out.glob("shard-*"):
        assert path.read_bytes() == (tmp_path / "clean" / path.name).read_bytes()


def test_24_nothing_to_do(sdipc_batch: Callable[..., subprocess.Popen[str]], clean: Path) -> None:
    [(code, output, errors)] = finish([sdipc_batch(clean.with_suffix(".yaml"))], 120)
    assert code == 0, errors
    found = json.loads(output)
    assert (found["batches"], found["done"], found["shards_skipped"]) == (0, 0, 25)
    assert run(clean.with_suffix(".yaml"), refuse).manifest is not None


def test_26_one_damaged_shard(sdipc_batch: Callable[..., subprocess.Popen[str]], clean: Path, loaded: None) -> None:
    whole, content = manifest(clean), (clean / "shard-00007.tar").read_bytes()
    (clean / "shard-00007.tar").unlink()
    assert run_again(sdipc_batch, clean) == (1, 24)
    for place in (0, len(content) // 2, len(content) - 1):
        damaged = bytearray(content)
        damaged[place] ^= 4
        (clean / "shard-00007.tar").write_bytes(damaged)
        assert run_again(sdipc_batch, clean, "--verify") == (1, 24)
        assert (clean / "shard-00007.tar").read_bytes() == content
    assert manifest(clean) == whole


def run_again(begin: Callable[..., subprocess.Popen[str]], folder: Path, *options: str) -> tuple[int, int]:
    """How many shards were written and how many skipped."""
    [(code, output, errors)] = finish([begin(folder.with_suffix(".yaml"), *options)], 120)
    assert code == 0, errors
    found = json.loads(output)
    return found["shards_done"], found["shards_skipped"]


def bad_files(good: bytes) -> Iterator[bytes | None]:
    """Twenty-five contents that are no pictures that can be used; None is no file at all."""
    stream = io.BytesIO()
    Image.open(io.BytesIO(good)).save(stream, "JPEG")
    jpeg = stream.getvalue()
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 16
    header = b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sIIBBBBB", 13, b"IHDR", 60000, 60000, 8, 2, 0, 0, 0)
    tiff = io.BytesIO()
    Image.open(io.BytesIO(good)).save(tiff, "TIFF")
    small = io.BytesIO()
    Image.new("RGB", (1, 1)).save(small, "PNG")
    long = io.BytesIO()
    Image.new("RGB", (16, 20000)).save(long, "PNG")
    yield from (None, b"", b"not a picture", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"<!doctype html><p>gone")
    yield from (jpeg[: len(jpeg) // 2], jpeg[:20], good[: len(good) // 2], good[:-12], bytes(flipped))
    yield from (header, header + bytes(4), tiff.getvalue(), small.getvalue(), long.getvalue())
    yield from (b"II*\0" + bytes(99), b"MM\0*" + bytes(99), b"8BPS" + bytes(99), b"%!PS-Adobe-3.0", b"%PDF-1.7")
    yield from (b"SIMPLE  =", b"\0\0\0\x0cjP  \r\n\x87\n", b"BM" + bytes(99), b"RIFF\4\0\0\0WEBP", bytes(1000))


def test_25_one_in_twenty_is_bad(make_job: Callable[..., Path], tmp_path: Path, loaded: None) -> None:
    source = draw_all(tmp_path / "in", 500)
    good = {path: path.read_bytes() for path in sorted(source.iterdir())}
    listed = write_rows(tmp_path / "in.jsonl", [{"picture": f"in/{path.name}"} for path in good])
    clean = run(make_job(tmp_path / "clean.yaml", source=listed, shard_size=30), Stub()).manifest
    broken = random.Random(25).sample(sorted(good), 25)
    for path, content in zip(broken, bad_files(good[broken[0]]), strict=True):
        path.unlink()
        if content is not None:
            path.write_bytes(content)
    job = make_job(tmp_path / "out.yaml", source=listed, shard_size=30)
    stopped = run(make_job(tmp_path / "stopped.yaml", source=listed, shard_size=30), Stub(), max_failures=10)
    assert stopped.stopped is not None
    assert 10 < stopped.failed < 25
    outcome = run(job, Stub())
    assert (outcome.progress.done, outcome.failed) == (475, 25)
    failed = {line["inputs"][0]: line["error"] for line in records(tmp_path / "out") if line["status"] == "failed"}
    assert failed.keys() == {f"in/{path.name}" for path in broken}
    assert all(error.isprintable() and "expected" in error for error in failed.values())
    for path in broken[:20]:
        path.write_bytes(good[path])
    outcome = run(job, Stub(), retry_failed=True)
    assert (outcome.progress.done, outcome.failed) == (20, 5)
    for path in broken:
        path.write_bytes(good[path])
    stub = Stub()
    outcome = run(job, stub, retry_failed=True)
    assert (outcome.progress.done, outcome.failed) == (5, 0)
    assert sum(len(batch.items) for batch in stub.batches) == 5
    assert outcome.manifest == clean
    assert run(job, refuse, verify=True).failed == 0


def test_27_names_and_duplicates(make_job: Callable[..., Path], tmp_path: Path, loaded: None) -> None:
    odd = ("same", "ünï\u0301cødé", "new\nline", "\ttab", "x" * 251, "'\"`$(x)", "-rf", "*", "..", "日本語", " ")
    names = [f"{folder}/{name}.png" for folder in ("a", "b", "c" * 255) for name in odd]
    for name in names:
        draw(tmp_path / "in" / name, 1)
    draw(tmp_path / "beside.png", 1)
    rows = [{"picture": f"in/{name}"} for name in names] * 3 + [{"picture": "in/a/../../beside.png"}] * 3
    job = make_job(tmp_path / "out.yaml", source=write_rows(tmp_path / "in.jsonl", rows), shard_size=1000)
    before = set(tmp_path.rglob("*"))
    for container in ("tar", "folder"):
        job = make_job(tmp_path / f"{container}.yaml", source=tmp_path / "in.jsonl", shard_size=99, container=container)
        outcome = run(job, Stub())
        assert (outcome.progress.done, outcome.failed) == (102, 0)
        lines = records(tmp_path / container)
        # All the pictures are the same; in a shard each has an id, a number and so a picture of its own.
        assert len({line["id"] for line in lines if line["row"] < 99}) == 99
        assert len({line["index"] for line in lines if line["row"] < 99}) == 99
        assert [line["inputs"] for line in lines] == [[row["picture"]] for row in rows]
        new = set(tmp_path.rglob("*")) - before
        before |= new
        assert all(path.is_relative_to(tmp_path / container) or path.suffix == ".yaml" for path in new)
        results = [path for path in new if path.suffix in (".png", ".tar") and path.parent != tmp_path / "folder"]
        assert len(results) == (2 if container == "tar" else 102)


def test_28_files_that_change_meanwhile(
    make_job: Callable[..., Path], tmp_path: Path, tiny: sdipc.Bundle, loaded: None
) -> None:
    source = draw_all(tmp_path / "in", 300)
    versions = [draw_all(tmp_path / "old", 300)]
    versions.append(tmp_path / "new")
    for number in range(300):
        draw(versions[1] / f"{number:05d}.png", 1000 + number, (40, 30))
    expected: dict[str, Any] = {}
    for folder in versions:
        for path in folder.iterdir():
            picture = decode_picture(path.read_bytes(), path)
            pixels = preprocess(picture.pixels, tiny.config.vision_side.preprocessing)
            expected[picture.sha256] = pixels.mean((0, 1))
    done, luck = threading.Event(), random.Random(28)

    def change() -> None:
        """Some in one go, some in two, as a copy that is under way looks."""
        while not done.is_set():
            name = f"{luck.randrange(300):05d}.png"
            data = (versions[luck.randrange(2)] / name).read_bytes()
            with (source / name).open("r+b") as stream:
                half = len(data) // 2 if luck.random() < 0.5 else len(data)
                stream.write(data[:half])
                stream.flush()
                stream.write(data[half:])
                stream.truncate()

    changing = threading.Thread(target=change)
    changing.start()
    made: dict[str, np.ndarray] = {}

    class Kept(Stub):
        def vectors(self, items: Any) -> np.ndarray:
            vectors = super().vectors(items)
            made.update({item.record["input_sha256"][0]: vector for item, vector in zip(items, vectors, strict=True)})
            return vectors

    try:
        outcome = run(make_job(tmp_path / "out.yaml", source=source, vectors=True, shard_size=50), Kept())
    finally:
        done.set()
        changing.join()
    lines = records(tmp_path / "out")
    assert outcome.progress.done + outcome.failed == 300
    for line in lines:
        digest = line["input_sha256"][0]
        if line["status"] == "done":
            # One version or the other, and the digest says which.
            np.testing.assert_array_equal(made[digest], expected[digest])
        else:
            assert digest not in expected
    assert sum(line["status"] == "done" for line in lines) > 200


def pictures_of(folder: Path) -> dict[str, np.ndarray]:
    """Each row's picture by its id."""
    found = {}
    for line in records(folder):
        with tarfile.open(folder / f"shard-{line['row'] // shard_size_of(folder):05d}.tar") as archive:
            stream = archive.extractfile(line["file"])
            assert stream is not None
            found[line["id"]] = np.asarray(Image.open(stream)).astype(int)
    return found


def shard_size_of(folder: Path) -> int:
    return json.loads((folder / "job.json").read_text())["shard_size"]


def test_29_order_shards_and_batches(make_job: Callable[..., Path], tmp_path: Path) -> None:
    draw_all(tmp_path, 40)
    names = [f"{number:05d}.png" for number in range(40)]
    shuffled = random.Random(29).sample(names, 40)
    variants = [(names, 7, 8), (shuffled, 64, 8), (shuffled, 7, 1), (names, 64, 1)]
    vectors, pictures = [], []
    for number, (order, shard_size, batch_size) in enumerate(variants):
        source = write_rows(tmp_path / f"{number}.jsonl", [{"picture": name} for name in order])
        common = {"source": source, "shard_size": shard_size, "batch_size": batch_size}
        for kind in ("vectors", "pictures"):
            settings = BatchSettings(
                job=make_job(tmp_path / f"{kind}-{number}.yaml", vectors=kind == "vectors", **common)
            )
            assert command.batch(settings, lambda done: None).progress.done == 40
        vectors.append({line["id"]: line["sha256"] for line in records(tmp_path / f"vectors-{number}")})
        pictures.append(pictures_of(tmp_path / f"pictures-{number}"))
    assert len(vectors[0]) == 40
    assert vectors[0] == vectors[1] == vectors[2] == vectors[3]
    assert pictures[0].keys() == pictures[1].keys() == pictures[2].keys() == pictures[3].keys()
    for item_id, picture in pictures[0].items():
        # The same compiled batch: the same bits, whatever the place in it.
        np.testing.assert_array_equal(picture, pictures[1][item_id])
        np.testing.assert_array_equal(pictures[2][item_id], pictures[3][item_id])
        assert np.abs(picture - pictures[2][item_id]).max() <= 2


def test_30_flaky_storage(
    make_job: Callable[..., Path], tmp_path: Path, loaded: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, luck = draw_all(tmp_path / "in", 60), random.Random(30)
    clean = run(make_job(tmp_path / "clean.yaml", source=source, shard_size=20), Stub()).manifest
    kept = {name: getattr(storage, name) for name in ("put", "sync", "rename")}
    failed: collections.Counter[str] = collections.Counter()

    def flaky(name: str) -> Callable[..., None]:
        again = False

        def attempt(*arguments: Any) -> None:
            nonlocal again
            # One in five fails after two seconds, and succeeds when tried again.
            if not again and luck.random() < 0.2:
                again = True
                time.sleep(2)
                failed[name] += 1
                raise OSError(errno.ETIMEDOUT, "Connection timed out")
            again = False
            kept[name](*arguments)

        return attempt

    for name in kept:
        monkeypatch.setattr(storage, name, flaky(name))
    assert run(make_job(tmp_path / "out.yaml", source=source, shard_size=20), Stub()).manifest == clean
    assert failed["put"] > 5

    def broken(stream: Any, data: Any) -> None:
        if b"000000033" in bytes(data[:100]):
            raise OSError(errno.EIO, "Input/output error")
        kept["put"](stream, data)

    for name in kept:
        monkeypatch.setattr(storage, name, kept[name])
    monkeypatch.setattr(storage, "put", broken)
    job = make_job(tmp_path / "broken.yaml", source=source, shard_size=20)
    outcome = run(job, Stub())
    assert (outcome.progress.done, outcome.failed) == (59, 1)
    assert outcome.failures[0]["error"] == "cannot be written: Input/output error"
    monkeypatch.setattr(storage, "put", kept["put"])
    assert run(job, Stub(), retry_failed=True).manifest == clean


def test_31_a_million_lines(make_job: Callable[..., Path], tmp_path: Path) -> None:
    draw(tmp_path / "a.png", 1)
    with (tmp_path / "in.jsonl").open("w") as stream:
        stream.writelines(f'{{"picture": "a.png", "text": "number {number}"}}\n' for number in range(1_000_000))
    job = make_job(tmp_path / "out.yaml", source=tmp_path / "in.jsonl", shard_size=100, truncate=True)
    began = time.monotonic()
    process = start(["-m", "tests.batch_jobs", 0, "batch", job], 1)
    try:
        while not list((tmp_path / "out").glob("shard-*.jsonl")):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() - began < 30
            time.sleep(0.05)
        seconds = time.monotonic() - began
        time.sleep(20)
        peak = int(Path(f"/proc/{process.pid}/status").read_text().split("VmHWM:")[1].split()[0]) / 1e6
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 75
    finally:
        process.kill()
        process.communicate()
    rows = len(records(tmp_path / "out"))
    print(f"first shard after {seconds:.1f} s, {rows} rows in 20 s more, at most {peak:.2f} GB")
    assert rows > 1000
    assert peak < 1
    assert not list((tmp_path / "out").glob(".*.tmp"))

"""`sdipc batch` on a checkpoint in miniature: what it writes, what it does again, what it refuses.

What does not depend on the pictures runs on a stub of the device; tests/faults has the numbers that take long.
"""

import errno
import io
import json
import os
import signal
import tarfile
import time
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from etils import epath
from PIL import Image

import sdipc_jax as sdipc
from sdipc_jax import cli
from sdipc_jax.batch import storage
from sdipc_jax.batch.settings import BatchSettings
from sdipc_jax.batch.shards import VectorShard
from sdipc_jax.batch.threads import Ahead, Behind, map_ahead
from sdipc_jax.commands import batch as command
from sdipc_jax.datasets.rows import Wanted
from sdipc_jax.datasets.sources import open_source
from sdipc_jax.errors import InputError
from sdipc_jax.interruption import Interruption
from sdipc_jax.prompts import algebra
from sdipc_jax.sampling.decoding import to_uint8
from tests.batch_jobs import Stub, draw, draw_all, manifest, records, write_job, write_rows

Make = Callable[..., Path]


@pytest.fixture
def job(tiny_folder: Path, tmp_path: Path) -> Make:
    """Writes a job's file."""

    def make(name: str = "out", **values: Any) -> Path:
        return write_job(
            tmp_path / f"{name}.yaml",
            **{"model": tiny_folder, "steps": 1, "scale": 5.0, "batch_size": 2, "shard_size": 4, **values},
        )

    return make


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of ten."""
    return draw_all(tmp_path / "in", 10)


@pytest.fixture(autouse=True)
def loaded(tiny: sdipc.Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loads nothing again that is in memory."""
    monkeypatch.setattr("sdipc_jax.prompts.converter.load_weights", lambda config, tuned: tiny)


def run(job: Path, device: Any = None, **options: Any) -> Any:
    settings = BatchSettings(job=job, **options)
    return command.batch(settings, lambda done: None, *(() if device is None else (device,)))


def digests(folder: Path) -> tuple[str, str]:
    return manifest(folder)["digest"], manifest(folder)["pictures"]


def refuse(*_: Any) -> Any:
    raise AssertionError("no device is needed here")


# What is written.


def sample(tiny: sdipc.Bundle, contexts: Any, **settings: Any) -> np.ndarray:
    """What `generate` makes of at most four prompts; a batch of its own, and so another program than the job's."""
    context = np.concatenate([*contexts, *[contexts[-1]] * (4 - len(contexts))])
    return to_uint8(sdipc.generate(tiny, context, steps=1, **settings)).astype(int)


def test_processes_share_a_job_and_make_the_same(job: Make, tmp_path: Path, tiny: sdipc.Bundle) -> None:
    source = draw_all(tmp_path / "in", 37)
    for count in (1, 2, 4):
        path = job(f"out-{count}", source=source, shard_size=6)
        for index in range(count):
            outcome = run(path, process_index=index, process_count=count)
            # Who comes last sums up.
            assert (outcome.manifest is not None) == (index == count - 1)
            assert outcome.mine == len(range(index, 7, count))
    found = [digests(tmp_path / f"out-{count}") for count in (1, 2, 4)]
    assert found[0] == found[1] == found[2]
    lines = records(tmp_path / "out-1")
    assert [line["row"] for line in lines] == list(range(37))
    assert [line["inputs"] for line in lines] == [[f"{row:05d}.png"] for row in range(37)]
    assert len({line["id"] for line in lines}) == 37
    # A row without a seed is the variation that its id numbers, of the job's seed.
    line = lines[3]
    assert (line["seed"], line["index"]) == (0, int(line["id"][:8], 16))
    with tarfile.open(tmp_path / "out-1" / "shard-00000.tar") as archive:
        assert archive.getnames() == [f"{row:09d}.{kind}" for row in range(6) for kind in ("png", "json")]
        assert json.loads(archive.extractfile("000000003.json").read()) == line
        made = np.asarray(Image.open(archive.extractfile("000000003.png")))
    pixels = sdipc.read_pictures(tiny, [source / "00003.png"])
    vectors = sdipc.convert(sdipc.closed_form(tiny, scale=5.0), sdipc.encode_images(tiny, pixels))
    expected = sample(tiny, [sdipc.image_prompt(tiny, vectors)], seeds=0, indices=np.array([line["index"]]))[0]
    assert np.abs(made - expected).max() <= 2


def test_rows_say_how_they_are_made(job: Make, tmp_path: Path, tiny: sdipc.Bundle) -> None:
    paths = [draw(tmp_path / f"{n}.png", n) for n in range(2)]
    rows = [
        {"picture": "0.png", "seed": 7},
        {"picture": "0.png", "seed": 7, "text": "at night", "alpha": 0.5},
        {"pictures": ["0.png", str(paths[1])], "weights": [3, 1], "seed": 7, "negative_prompt": "rain"},
        {"picture": "1.png", "height": 32, "width": 40, "seed": 7},
        {"picture": "1.png", "height": 40, "width": 40},
    ]
    path = job(source=write_rows(tmp_path / "rows.jsonl", rows), sizes=[[32, 40]], shard_size=8)
    outcome = run(path)
    assert (outcome.progress.done, outcome.failed) == (4, 1)
    lines = records(tmp_path / "out")
    assert lines[4]["error"].startswith("height x width is 40x40, expected one of the job's sizes, 32x32, 32x40")
    made = {}
    with tarfile.open(tmp_path / "out" / "shard-00000.tar") as archive:
        for line in lines[:4]:
            assert (line["seed"], line["index"]) == (7, 0)
            made[line["row"]] = np.asarray(Image.open(archive.extractfile(line["file"]))).astype(int)
    pixels = sdipc.read_pictures(tiny, paths)
    a, b = sdipc.convert(sdipc.closed_form(tiny, scale=5.0), sdipc.encode_images(tiny, pixels))
    night, rain, none = (sdipc.tokenize(tiny, [text]) for text in ("at night", "rain", ""))
    contexts = [
        sdipc.image_prompt(tiny, a[None]),
        sdipc.edit_prompt(tiny, a[None], night, 0.5),
        sdipc.image_prompt(tiny, algebra.mean_direction(np.stack([a, b]), [3, 1], 5.0)),
    ]
    negative = sdipc.text_prompt(tiny, np.concatenate([none, none, rain, none]))
    expected = sample(tiny, contexts, negative=negative, seeds=7)
    for row in range(3):
        assert np.abs(made[row] - expected[row]).max() <= 2, row
    assert made[3].shape == (32, 40, 3)
    assert np.abs(made[0] - made[1]).max() > 2
    assert np.abs(made[0] - made[2]).max() > 2


def test_vectors_are_the_same_whatever_stands_beside_them(job: Make, tmp_path: Path, tiny: sdipc.Bundle) -> None:
    draw_all(tmp_path, 9)
    names = [f"{row:05d}.png" for row in range(9)]
    orders = (names, names[::-1], [*names[4:], *names[:4]])
    found = []
    for n, order in enumerate(orders):
        source = write_rows(tmp_path / f"{n}.jsonl", [{"picture": name} for name in order])
        path = job(f"out-{n}", source=source, vectors=True, shard_size=(3, 7, 64)[n], batch_size=(1, 8, 2)[n])
        assert run(path).progress.done == 9
        found.append(vectors_of(tmp_path / f"out-{n}"))
    assert found[0] == found[1] == found[2]
    assert len(found[0]) == 9
    pixels = sdipc.read_pictures(tiny, [tmp_path / name for name in names[:1]])
    vector = sdipc.convert(sdipc.closed_form(tiny, scale=5.0), sdipc.encode_images(tiny, pixels))[0]
    made = np.frombuffer(found[0][names[0]], ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_allclose(made, vector, rtol=2**-8)
    # The shard's metadata names its rows, and 24 numbers of two bytes are all that there is of each.
    assert made.shape == (24,)


def vectors_of(folder: Path) -> dict[str, bytes]:
    found = {}
    for path in sorted(folder.glob("shard-*.jsonl")):
        lines = [json.loads(line) for line in path.read_text().splitlines()[1:]]
        for line, data in VectorShard.read(epath.Path(folder), int(path.stem[-5:]), lines):
            found[line["inputs"][0]] = data
    return found


@pytest.mark.parametrize("container", ["tar", "folder"])
@pytest.mark.parametrize("kind", ["png", "webp"])
def test_containers_and_formats(job: Make, pictures: Path, tmp_path: Path, container: str, kind: str) -> None:
    stub = Stub()
    run(job(source=pictures, container=container, format=kind, quality=100), stub)
    line = records(tmp_path / "out")[5]
    if container == "folder":
        data = (tmp_path / "out" / "shard-00001" / f"000000005.{kind}").read_bytes()
    else:
        with tarfile.open(tmp_path / "out" / "shard-00001.tar") as archive:
            data = archive.extractfile(f"000000005.{kind}").read()
    assert sha256(data).hexdigest() == line["sha256"]
    with Image.open(io.BytesIO(data)) as image:
        assert image.format == kind.upper()
        assert np.asarray(image)[0, 0].tolist() == [*bytes.fromhex(line["id"][:6])]
        told = (
            f"Steps: 1, Sampler: DDIM, CFG scale: 7.5, Seed: 0, Size: 32x32, Index: {line['index']}, Version: sdipc_jax"
        )
        assert image.info.get("parameters") == (f"\nNegative prompt:\n{told}" if kind == "png" else None)
    assert not list((tmp_path / "out").glob(".shard*"))
    assert run(job(source=pictures, container=container, format=kind, quality=100), refuse, verify=True).skipped == 3


# Sources.


def test_every_kind_of_source(job: Make, pictures: Path, tmp_path: Path) -> None:
    data = [path.read_bytes() for path in sorted(pictures.iterdir())]
    for part, rows in enumerate((range(4), range(4, 10))):
        with tarfile.open(tmp_path / f"in-{part}.tar", "w") as archive:
            for row in rows:
                for name, content in ((f"{row}.png", data[row]), (f"{row}.json", b'{"alpha": 0.5}')):
                    member = tarfile.TarInfo(f"a.b/{name}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
        table = {"image": [{"bytes": data[row], "path": f"{row}.png"} for row in rows], "caption": ["red"] * len(rows)}
        pq.write_table(pa.table(table), tmp_path / f"in-{part}.parquet", row_group_size=3)
    sources: dict[str, dict[str, Any]] = {
        "folder": {"source": pictures},
        "jsonl": {"source": write_rows(tmp_path / "in.jsonl", [{"picture": f"in/{n:05d}.png"} for n in range(10)])},
        "tar": {"source": str(tmp_path / "in-{0..1}.tar")},
        "parquet": {"source": str(tmp_path / "in-*.parquet"), "columns": {"picture": "image", "text": "caption"}},
    }
    for name, values in sources.items():
        for index in range(2):
            run(job(name, **values), Stub(), process_index=index, process_count=2)
        lines = records(tmp_path / name)
        assert [line["input_sha256"] for line in lines] == [[sha256(each).hexdigest()] for each in data]
        assert {line["text"] for line in lines} == {"red" if name == "parquet" else None}
    ids = [[line["id"] for line in records(tmp_path / name)] for name in ("folder", "jsonl", "tar")]
    assert ids[0] == ids[1] == ids[2]


def test_names_are_only_names(job: Make, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    names = ["a/same.png", "b/same.png", "ünï\u0301.png", "new\nline.png", "x" * 251 + ".png", "quote'\".png", " .png"]
    for name in names:
        draw(folder / name, 1)
    os.rename(draw(folder / "last.png", 1), os.fsencode(folder) + b"/\xff.png")
    draw(tmp_path / "outside.png", 1)
    run(job("listed", source=folder, shard_size=64), Stub())
    lines = records(tmp_path / "listed")
    assert {line["status"] for line in lines} == {"done"}
    assert {line["inputs"][0] for line in lines} == {*names, "\udcff.png"}
    # Equal pictures are told apart by how many came before.
    assert len({line["id"] for line in lines}) == len(names) + 1
    assert len({line["input_sha256"][0] for line in lines}) == 1
    rows = [{"picture": name} for name in ("../outside.png", "in/../../../../no/such.png", "/dev/zero", "in", "\0")]
    run(job("typed", source=write_rows(folder / "rows.jsonl", rows)), Stub())
    assert [line["status"] for line in records(tmp_path / "typed")] == ["done", *["failed"] * 4]
    # Results are called by number: nothing is written anywhere else.
    assert {path.name for path in tmp_path.iterdir()} == {
        *("in", "outside.png", "listed", "listed.yaml", "typed", "typed.yaml")
    }


def test_hostile_tar_members_are_not_unpacked(job: Make, pictures: Path, tmp_path: Path) -> None:
    data = (pictures / "00000.png").read_bytes()
    with tarfile.open(tmp_path / "in.tar", "w") as archive:
        for name in ("../../up.png", "/abs.png"):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
        bad = tarfile.TarInfo("text.json")
        bad.size = 3
        archive.addfile(bad, io.BytesIO(b"[1]"))
    run(job(source=tmp_path / "in.tar"), Stub())
    assert [line["status"] for line in records(tmp_path / "out")] == ["done", "done", "failed", "failed"]
    assert not (tmp_path.parent / "up.png").exists()


def test_lines_are_not_kept(tmp_path: Path) -> None:
    with (tmp_path / "in.jsonl").open("w") as stream:
        stream.writelines(f'{{"picture": "{number}.png"}}\n' for number in range(100_000))
    tracemalloc.start()
    try:
        source = open_source(str(tmp_path / "in.jsonl"))
        assert source.survey().rows == 100_000
        rows = source.rows(Wanted([range(first, first + 1) for first in range(0, 100_000, 1000)]))
        assert [row.values["picture"] for row in rows] == [f"{number}.png" for number in range(0, 100_000, 1000)]
        assert tracemalloc.get_traced_memory()[1] < 2e6
    finally:
        tracemalloc.stop()


# What is done again, and what is not.


def test_a_finished_job_asks_nothing_of_the_device(
    job: Make, pictures: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = job(source=pictures)
    run(path, Stub())
    monkeypatch.setattr("sdipc_jax.batch.job.Converter", refuse)
    assert cli.main(["batch", str(path)]) == 0
    assert "nothing to do: all 3 shards are finished" in capsys.readouterr().out


def test_failures_are_recorded_and_tried_again(job: Make, pictures: Path, tmp_path: Path) -> None:
    clean = run(job("clean", source=pictures), Stub())
    good = {}
    for row, content in ((2, b""), (3, b"text"), (8, None)):
        picture = pictures / f"{row:05d}.png"
        good[picture] = picture.read_bytes()
        # Broken in the middle of its pixels.
        picture.write_bytes(good[picture][: len(good[picture]) // 2] if content is None else content)
    path = job(source=pictures)
    outcome = run(path, Stub())
    assert (outcome.progress.done, outcome.failed) == (7, 3)
    lines = records(tmp_path / "out")
    assert [line["row"] for line in lines if line["status"] == "failed"] == [2, 3, 8]
    assert "empty file" in lines[2]["error"]
    assert "damaged PNG" in lines[8]["error"]
    assert len({line["id"] for line in lines}) == 10
    # They are told every time, and tried again only on request.
    again = run(path, refuse)
    assert [failure["row"] for failure in again.to_json()["failures"]] == [2, 3, 8]
    for picture, data in good.items():
        picture.write_bytes(data)
    stub = Stub()
    outcome = run(path, stub, retry_failed=True)
    assert (outcome.progress.done, outcome.failed) == (3, 0)
    assert sorted(item.row for batch in stub.batches for item in batch.items) == [2, 3, 8]
    assert digests(tmp_path / "out") == (clean.manifest["digest"], clean.manifest["pictures"])
    with tarfile.open(tmp_path / "out" / "shard-00000.tar") as archive:
        assert len(archive.getnames()) == 8
    assert run(path, refuse, verify=True).failed == 0


def test_too_many_failures_stop_the_job(job: Make, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "in.jsonl", [{"picture": "missing.png"}] * 100)
    path = job(source=rows)
    assert cli.main(["batch", str(path), "--max-failures", "10", "--quiet"]) == 3
    assert 10 < len(records(tmp_path / "out")) < 40
    assert not (tmp_path / "out" / "manifest.json").exists()


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("container", ["tar", "folder"])
def test_damaged_shards_alone_are_done_again(job: Make, pictures: Path, tmp_path: Path, container: str) -> None:
    path, out = job(source=pictures, container=container), tmp_path / "out"
    whole = run(path, Stub()).manifest
    damages: list[tuple[Callable[[Path], None], str, bool]] = [
        (flip, ".jsonl", True),
        (Path.unlink, ".jsonl", False),
        (lambda file: file.write_bytes(file.read_bytes()[:-1]), "data", False),
        (flip, "data", True),
        (Path.unlink, "data", False),
    ]
    for damage, what, only_thorough in damages:
        data = out / "shard-00001.tar" if container == "tar" else out / "shard-00001" / "000000005.png"
        damage(data if what == "data" else out / "shard-00001.jsonl")
        if only_thorough:
            run(path, refuse)
        stub = Stub()
        outcome = run(path, stub, verify=only_thorough)
        assert sorted(item.row for batch in stub.batches for item in batch.items) == [4, 5, 6, 7]
        assert (outcome.skipped, outcome.manifest) == (2, whole)
        assert run(path, refuse, verify=True).manifest == whole


def test_another_job_in_the_folder_is_refused(job: Make, pictures: Path) -> None:
    run(job(source=pictures), Stub())
    with pytest.raises(InputError, match=r"holds another job: steps is 1 there and 2 here: choose another output_dir"):
        run(job(source=pictures, steps=2), refuse)
    # How the work is divided is no part of the job.
    assert run(job(source=pictures, batch_size=3), refuse).skipped == 3
    draw(pictures / "more.png", 0)
    with pytest.raises(InputError, match=r"source.rows is 10 there and 11 here"):
        run(job(source=pictures), refuse)


def test_sigterm_finishes_the_step_and_commits(
    job: Make, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Interruption] = []

    class Seen(Interruption):
        def __enter__(self) -> Any:
            made.append(self)
            return super().__enter__()

    class Stopped(Stub):
        def pictures(self, batch: Any) -> Any:
            if len(self.batches) == 1:
                os.kill(os.getpid(), signal.SIGTERM)
                # It has arrived before the step is over.
                while not made[0].requested:
                    time.sleep(0.01)
            return super().pictures(batch)

    monkeypatch.setattr(command, "Interruption", Seen)
    path, stub = job(source=pictures, batch_size=1), Stopped()
    with monkeypatch.context() as patch:
        patch.setattr(command, "batch", partial(command.batch, make_device=stub))
        assert cli.main(["batch", str(path)]) == 75
    # Two batches of two, for there are two devices: the first shard, which is whole.
    assert len(stub.batches) == 2
    assert [line["row"] for line in records(tmp_path / "out")] == [0, 1, 2, 3]
    assert not list((tmp_path / "out").glob(".*.tmp"))
    rest = run(path, Stub())
    assert (rest.skipped, rest.progress.done) == (1, 6)
    assert run(path, refuse, verify=True).manifest == run(job("clean", source=pictures), Stub()).manifest


# Storage that is not what it should be.


def test_flaky_storage_is_tried_again(job: Make, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clean = run(job("clean", source=pictures), Stub()).manifest
    monkeypatch.setattr(storage, "_FIRST_PAUSE", 0.0)
    random = np.random.default_rng(0)
    failed = 0

    def flaky(work: Callable[..., None]) -> Callable[..., None]:
        def attempt(*arguments: Any) -> None:
            nonlocal failed
            if random.random() < 0.2:
                failed += 1
                raise OSError(errno.EIO, "Input/output error")
            work(*arguments)

        return attempt

    for name in ("put", "sync", "rename"):
        monkeypatch.setattr(storage, name, flaky(getattr(storage, name)))
    assert run(job(source=pictures), Stub()).manifest == clean
    assert failed > 3


@pytest.mark.parametrize("values", [{"container": "tar"}, {"container": "folder"}, {"vectors": True}])
def test_object_stores_have_no_renames(
    job: Make, pictures: Path, tmp_path: Path, values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    clean = run(job("clean", source=pictures, **values), Stub()).manifest

    def rename(source: Any, target: Any) -> None:
        raise AssertionError("what is put there appears under its name when it is complete")

    for name in ("is_local", "rename"):
        monkeypatch.setattr(storage, name, rename if name == "rename" else lambda path: False)
    order: list[str] = []
    written = type(epath.Path(".")).write_bytes

    def write_bytes(self: Any, data: bytes) -> int:
        order.append(self.name)
        return written(self, data)

    monkeypatch.setattr(type(epath.Path(".")), "write_bytes", write_bytes)
    path = job(source=pictures, **values)
    assert run(path, Stub()).manifest == clean
    # The manifest is the mark that a shard is complete: it comes after everything else.
    marks = [place for place, name in enumerate(order) if name.endswith(".jsonl")]
    assert [order[place] for place in marks] == [f"shard-{shard:05d}.jsonl" for shard in range(3)]
    if values.get("container") == "folder":
        assert [name for name in order if name.startswith("0")] == [f"{row:09d}.png" for row in range(10)]
        # Between them is the sheet that shows the shard.
        assert marks[0] == order.index("shard-00000.png") + 1 == order.index("000000003.png") + 2
    assert run(path, refuse, verify=True).skipped == 3
    flip(next((tmp_path / "out").glob("shard-00001.[ts]*"), tmp_path / "out" / "shard-00001" / "000000004.png"))
    assert run(path, Stub(), verify=True).progress.shards == 1
    assert run(path, refuse, verify=True).manifest == clean


def test_what_other_hosts_do_may_be_seen_late(
    job: Make, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with NFS: names are missing for seconds, listings are old, and locks are known to their own host alone."""
    monkeypatch.setattr(storage, "_FIRST_PAUSE", 0.0)
    path = job(source=pictures)
    expected = run(path, Stub()).manifest
    folder = tmp_path / "out"
    (folder / "manifest.json").unlink()
    kind = type(epath.Path(folder))
    iterdir, exists = kind.iterdir, kind.exists
    monkeypatch.setattr(
        kind, "iterdir", lambda self: (each for each in iterdir(self) if each.name != "shard-00001.jsonl")
    )
    asked = 0

    def late(self: Any) -> bool:
        nonlocal asked
        if self.name == "job.json" and asked < 3:
            asked += 1
            return False
        return exists(self)

    monkeypatch.setattr(kind, "exists", late)
    taken: list[str] = []

    def take(source: Any, target: Any) -> None:
        if Path(target).name == "manifest.json" and not taken:
            taken.append(os.fspath(target))
            os.unlink(source)
        os.replace(source, target)

    monkeypatch.setattr(storage, "rename", take)
    assert run(path, Stub()).manifest == expected
    assert (asked, len(taken)) == (3, 1)
    assert manifest(folder)["digest"] == (expected or {})["digest"]


@pytest.mark.parametrize("container", ["tar", "folder"])
def test_what_cannot_be_written_fails_alone(
    job: Make, pictures: Path, tmp_path: Path, container: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = job(source=pictures, container=container)
    monkeypatch.setattr(storage, "_FIRST_PAUSE", 0.0)
    rename, put = storage.rename, storage.put

    def full(source: Any, target: Any) -> None:
        if "shard-00001" in str(target) and not str(target).endswith(".jsonl"):
            raise OSError(errno.ENOSPC, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(storage, "rename", full)
    outcome = run(path, Stub())
    assert (outcome.progress.done, outcome.failed) == (6, 4)
    assert {line["error"] for line in records(tmp_path / "out")[4:8]} == {"cannot be written: No space left on device"}
    monkeypatch.setattr(storage, "rename", rename)

    def one(stream: Any, data: Any) -> None:
        if b"000000005" in bytes(data[:100]) or "000000005" in str(stream.name):
            raise OSError(errno.ENOSPC, "No space left on device")
        put(stream, data)

    monkeypatch.setattr(storage, "put", one)
    outcome = run(path, Stub(), retry_failed=True)
    assert (outcome.progress.done, outcome.failed) == (3, 1)
    monkeypatch.setattr(storage, "put", put)
    outcome = run(path, Stub(), retry_failed=True)
    assert (outcome.progress.done, outcome.failed) == (1, 0)
    assert outcome.manifest == run(job("clean", source=pictures, container=container), Stub()).manifest


# What is refused.


@pytest.mark.parametrize(
    "values, words",
    [
        ({"stepz": 3}, "stepz is not a setting"),
        ({"source": "no/such/place"}, "source is no/such/place, but nothing is there"),
        ({"steps": 0}, "steps is 0, expected greater than or equal to 1"),
        ({"sizes": [[33, 32]]}, "height is 33, expected a multiple of 4"),
        ({"text": "x" * 99}, "the prompt has 99 tokens"),
        ({"columns": {"pictur": "a"}}, "columns names 'pictur', expected one of a row's settings"),
        ({"output_dir": "in/out"}, "lies in the source"),
        ({"shard_size": 0}, "shard_size is 0"),
        ({"cutoff": 1e9}, "cutoff is"),
    ],
)
def test_jobs_that_are_refused(
    job: Make, pictures: Path, monkeypatch: pytest.MonkeyPatch, values: dict[str, Any], words: str
) -> None:
    monkeypatch.chdir(pictures.parent)
    path = job(**{"source": pictures, **values})
    with pytest.raises(InputError) as caught:
        run(path, refuse)
    assert words in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "row, words",
    [
        ({}, "found both or neither of picture and pictures"),
        ({"picture": "a.png", "seed": -1}, "seed is -1"),
        ({"picture": "a.png", "alpha": float("nan")}, "alpha is nan, expected a finite number"),
        ({"picture": "a.png", "weights": [1, 2]}, "found 2 weights for 1 pictures"),
        ({"pictures": ["a.png", "a.png"], "weights": [1, -1]}, "expected a sum that is not 0"),
        ({"picture": 3}, "picture is 3, expected a valid string"),
        ({"pictures": "a.png"}, "pictures is"),
        ({"picture": "a.png", "text": "x" * 99}, "the prompt has 99 tokens"),
        ([], "found a JSON list, expected an object"),
    ],
)
def test_rows_that_fail(job: Make, tmp_path: Path, row: Any, words: str) -> None:
    draw(tmp_path / "a.png", 0)
    path = job(source=write_rows(tmp_path / "in.jsonl", [{"picture": "a.png"}, row, {"picture": "a.png", "seed": 1}]))
    outcome = run(path, Stub())
    assert (outcome.progress.done, outcome.failed) == (2, 1)
    assert words in outcome.failures[0]["error"]
    assert outcome.failures[0]["row"] == 1


def test_columns_that_are_no_settings_are_refused(job: Make, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "in.jsonl", [{"picture": "a.png", "caption": "a cat"}])
    with pytest.raises(InputError, match="the first row has the column 'caption', which is no setting of a row"):
        run(job(source=rows), refuse)


@pytest.mark.parametrize(
    "environment, expected",
    [
        ({}, (0, 1)),
        ({"SDIPC_PROCESS_INDEX": "1", "SDIPC_PROCESS_COUNT": "3", "SLURM_PROCID": "0", "SLURM_NTASKS": "9"}, (1, 3)),
        ({"SLURM_PROCID": "2", "SLURM_NTASKS": "4"}, (2, 4)),
        ({"SDIPC_PROCESS_INDEX": "4", "SDIPC_PROCESS_COUNT": "4"}, None),
        ({"SDIPC_PROCESS_INDEX": "one", "SDIPC_PROCESS_COUNT": "4"}, None),
    ],
)
def test_launchers_say_which_process(
    environment: dict[str, str], expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    settings = BatchSettings(job=Path("job.yaml"))
    if expected is None:
        with pytest.raises(InputError, match="expected an index from 0 to count - 1"):
            settings.process()
    else:
        assert settings.process() == expected
    assert BatchSettings(job=Path("job.yaml"), process_index=1, process_count=2).process() == (1, 2)
    with pytest.raises(InputError, match="expected both"):
        BatchSettings(job=Path("job.yaml"), process_index=1)


# Plans.


def test_plans_from_given_numbers_run_nothing(
    job: Make, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sdipc_jax.batch.job.Converter", refuse)
    given = "--pictures 100000 --seconds 2 --bytes 1e6 --chips 8 --hosts 2 --price 10".split()
    path = job(source=pictures, shard_size=100)
    assert cli.main(["batch", str(path), "--plan", "--json", *given]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["seconds"], found["shards"], found["bytes"]) == (25_000, 1000, 10**11)
    assert found["cost"] == pytest.approx(25_000 / 3600 * 10)
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="found pictures without plan"):
        BatchSettings(job=path, pictures=3)


def test_plans_from_what_is_measured(job: Make, pictures: Path, tmp_path: Path) -> None:
    class Slow(Stub):
        def pictures(self, batch: Any) -> Any:
            # Compilation does not count.
            time.sleep(0.5 if not self.batches else 0.1)
            return super().pictures(batch)

    path = job(source=pictures, shard_size=5)
    outcome = run(path, Slow(), plan=True, chips=4)
    # Two devices took 0.1 s for a batch of four.
    assert 0.05 <= outcome.measured.sample < 0.1
    assert outcome.plan.pictures == 10
    # Compilation and loading come before them.
    assert outcome.measured.start > 0.3
    expected = outcome.measured.start + 10 * outcome.measured.sample / 4
    assert outcome.plan.seconds == pytest.approx(expected, rel=0.01)
    run(path, Stub())
    shards = [path.stat().st_size for path in (tmp_path / "out").glob("shard-*")]
    assert outcome.measured.bytes == pytest.approx(sum(shards) / 10, rel=0.3)
    with pytest.raises(InputError, match=r"none of the first 1 rows can be used: .*no\.png"):
        run(job("bad", source=write_rows(tmp_path / "in.jsonl", [{"picture": "no.png"}])), Stub(), plan=True)


# Threads.


def test_the_host_works_while_the_device_does(job: Make, tmp_path: Path) -> None:
    outcome = run(job(source=draw_all(tmp_path / "in", 64), shard_size=16), Stub(seconds=0.05))
    assert outcome.progress.waiting is not None
    assert outcome.progress.waiting < 0.3
    assert 0 < outcome.progress.busy < outcome.progress.seconds


def test_errors_in_other_threads_arrive() -> None:
    def broken() -> Any:
        yield 1
        raise KeyError("there")

    with Ahead(broken(), 1) as values:
        assert next(values) == 1
        with pytest.raises(KeyError, match="there"):
            next(values)

    class Consumer:
        closed = False

        def __call__(self, value: int) -> None:
            raise KeyError(value)

        def close(self) -> None:
            self.closed = True

    consumer = Consumer()
    with pytest.raises(KeyError, match="7"), Behind(consumer, 1) as behind:
        behind.put(7)
    assert consumer.closed


def test_reading_ahead_is_bounded_and_in_order() -> None:
    taken: list[int] = []

    def numbers() -> Any:
        for number in range(100):
            taken.append(number)
            yield number

    with ThreadPoolExecutor(3) as pool:
        found = map_ahead(pool, lambda number: number * 2, numbers(), ahead=5)
        assert [next(found) for _ in range(10)] == [2 * number for number in range(10)]
        assert len(taken) <= 16
        assert list(found) == [2 * number for number in range(10, 100)]

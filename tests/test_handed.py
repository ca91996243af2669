"""Data sets as people hand them over, through `sdipc batch` with a device that costs nothing."""

import io
import json
import shutil
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import sdipc_jax as sdipc
from sdipc_jax import cli
from sdipc_jax.batch.settings import BatchSettings
from sdipc_jax.checkpoints.load import read_config
from sdipc_jax.commands import batch as command
from sdipc_jax.errors import InputError
from tests.batch_jobs import Stub, draw, draw_all, manifest, records, write_job, write_rows
from tests.test_datasets import png, write_tar

Run = Callable[..., Any]


@pytest.fixture
def outcome_of(tiny: sdipc.Bundle, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a job and gives its outcome."""
    monkeypatch.setattr("sdipc_jax.prompts.converter.load_weights", lambda config, tuned: tiny)

    def run(name: str, **values: Any) -> Any:
        values = {"model": tiny_folder, "steps": 1, "scale": 5.0, "batch_size": 2, "shard_size": 4, **values}
        job = write_job(tmp_path / f"{name}.yaml", **values)
        return command.batch(BatchSettings(job=job), lambda done: None, Stub())

    return run


def job_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "job.json").read_text())


def test_one_data_set_in_four_forms(outcome_of: Run, tmp_path: Path) -> None:
    data = {f"{row}.png": png(row) for row in range(6)}
    texts = ["a cat", "", "a cat\u2028and a dog", "a dog", "ein Hund, größer", "a cat"]
    members = []
    (tmp_path / "in").mkdir()
    for (name, content), text in zip(data.items(), texts, strict=True):
        (tmp_path / "in" / name).write_bytes(content)
        (tmp_path / "in" / name).with_suffix(".txt").write_text(f"{text}\r\n", encoding="utf-8-sig")
        members += [(name, content), (f"{name[0]}.txt", f"{text}\n".encode())]
    write_tar(tmp_path / "in.tar", members)
    lines = [{"picture": f"in/{name}", "txt": text} for name, text in zip(data, texts, strict=True)]
    write_rows(tmp_path / "in.jsonl", lines)
    pq.write_table(pa.table({"picture": [*data.values()], "txt": texts}), tmp_path / "in.parquet", row_group_size=4)
    found = []
    for name in ("in", "in.tar", "in.jsonl", "in.parquet"):
        outcome = outcome_of(f"out-{name}", source=tmp_path / name, columns={"picture": "picture", "text": "txt"})
        assert (outcome.progress.done, outcome.failed) == (6, 0)
        lines = records(tmp_path / f"out-{name}")
        found.append([(line["id"], line["text"], line["input_sha256"], line["sha256"]) for line in lines])
        assert manifest(tmp_path / f"out-{name}")["pictures"] == manifest(tmp_path / "out-in")["pictures"]
    assert found[0] == found[1] == found[2] == found[3]
    assert [text for _, text, *_ in found[0]] == [text or None for text in texts]


@pytest.mark.parametrize("text", ["", "  ", "\n"])
def test_an_empty_text_is_no_edit(outcome_of: Run, tmp_path: Path, text: str) -> None:
    draw(tmp_path / "a.png", 0)
    rows = [{"picture": "a.png", "text": text}, {"picture": "a.png"}, {"picture": "a.png", "text": "red"}]
    source = write_rows(tmp_path / "in.jsonl", rows)
    for name, job_text, expected in (
        ("plain", None, [None, None, "red"]),
        ("night", "at night", [None, "at night", "red"]),
    ):
        outcome_of(name, source=source, text=job_text)
        lines = records(tmp_path / name)
        assert [line["text"] for line in lines] == expected
        assert [line["alpha"] for line in lines] == [None if each is None else 0.9 for each in expected]


def test_addresses_fail_alone(outcome_of: Run, tmp_path: Path) -> None:
    draw(tmp_path / "a b.png", 0)
    names = ["https://example.invalid/y.jpg", "foo://x/y.jpg", "gs://bucket/x.jpg", "s3://bucket/x.jpg", "ftp://a/b",
             "file:///no/such.png", f"file://{tmp_path}/a%20b.png", "a b.png"]  # fmt: skip
    outcome = outcome_of("out", source=write_rows(tmp_path / "in.jsonl", [{"picture": name} for name in names]))
    assert (outcome.progress.done, outcome.failed) == (2, 6)
    lines = records(tmp_path / "out")
    for number, words in enumerate(["https://", "foo://", "gcsfs", "s3fs", "ftp://", "/no/such.png"]):
        assert words in lines[number]["error"]
        assert lines[number]["place"] == f"in.jsonl, line {number + 1}"
    assert "pip install 'etils[epath-gcs]'" in lines[0]["error"]


def test_every_failure_says_where_and_is_short(
    outcome_of: Run,
    tmp_path: Path,
    tiny_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    draw(tmp_path / "a.png", 0)
    good = {"picture": "a.png"}
    bad: list[Any] = [
        {"picture": "x" * 100_000},
        {"picture": {"bytes": 3, "path": None}},
        {"picture": [[0] * 100_000]},
        {"picture": "a.png", "text": "word " * 10_000},
        {"picture": "a.png", "seed": 10**400},
        {"picture": "a.png", "height": 40, "width": 40},
        {"picture": "no.png"},
        {"picture": "a.png", "c" * 100_000: 1},
    ]
    source = write_rows(tmp_path / "in.jsonl", [good, *bad, good])
    values = {"model": tiny_folder, "steps": 1, "scale": 5.0, "source": source}
    with monkeypatch.context() as patch:
        patch.setattr(command, "batch", partial(command.batch, make_device=Stub()))
        assert cli.main(["batch", str(write_job(tmp_path / "out.yaml", **values))]) == 3
    told = capsys.readouterr().err.splitlines()
    lines = records(tmp_path / "out")
    assert [line["status"] for line in lines] == ["done", *["failed"] * len(bad), "done"]
    for number, line in enumerate(lines[1:-1], 1):
        assert line["place"] == f"in.jsonl, line {number + 1}"
        assert len(line["error"]) <= 300
        assert f"sdipc: row {number} (in.jsonl, line {number + 1}): {line['error']}" in told
    assert max(map(len, told)) < 1200
    # What can be known before pictures are read was told first, of all rows.
    assert told[0] == "sdipc: rows: 10, shards: 1"
    assert told[1].startswith("sdipc: 6 of 10 rows will fail: row 2 (in.jsonl, line 3): ")
    assert told[1].endswith("; and 3 more")


def test_a_damaged_shard_and_whole_ones(outcome_of: Run, tmp_path: Path) -> None:
    for part in range(3):
        write_tar(tmp_path / f"in-{part}.tar", [(f"{part}{row}.png", png(10 * part + row)) for row in range(3)])
    data = (tmp_path / "in-1.tar").read_bytes()
    with tarfile.open(tmp_path / "in-1.tar") as archive:
        end = archive.getmembers()[2].offset
    (tmp_path / "in-1.tar").write_bytes(data[:end])
    outcome = outcome_of("out", source=str(tmp_path / "in-{0..2}.tar"))
    # Of the damaged one the first row is whole, and what the second stands for is lost.
    assert (outcome.progress.done, outcome.failed) == (7, 1)
    lines = records(tmp_path / "out")
    assert [line["status"] for line in lines] == ["done"] * 4 + ["failed"] + ["done"] * 3
    assert lines[4]["place"] == "in-1.tar, 11"
    assert "no end mark" in lines[4]["error"]
    # How many rows there should be is not known, and not said.
    job = job_of(tmp_path / "out")
    assert "rows" not in job["source"]
    assert job["source"]["damaged"][0].startswith("in-1.tar: found ")
    assert job["notes"] == manifest(tmp_path / "out")["notes"] == job["source"]["damaged"]
    assert list(outcome.notes[:1]) == job["notes"]
    # Mended, it is another job.
    (tmp_path / "in-1.tar").write_bytes(data)
    with pytest.raises(InputError, match=r"holds another job: source\.damaged is"):
        outcome_of("out", source=str(tmp_path / "in-{0..2}.tar"))
    assert outcome_of("again", source=str(tmp_path / "in-{0..2}.tar")).progress.done == 9
    assert job_of(tmp_path / "again")["source"]["rows"] == 9


def test_what_was_passed_over_does_not_make_another_job(outcome_of: Run, tmp_path: Path) -> None:
    draw_all(tmp_path / "in", 3)
    assert outcome_of("out", source=tmp_path / "in").notes == ()
    (tmp_path / "in" / ".DS_Store").touch()
    (tmp_path / "in" / "list.csv").touch()
    outcome = outcome_of("out", source=tmp_path / "in")
    assert outcome.skipped == 1
    assert outcome.notes == ("2 files not taken: 1 .csv, 1 name that begins with a dot",)
    assert manifest(tmp_path / "out")["notes"] == [*outcome.notes]


def test_a_sheet_for_each_shard_in_folders(outcome_of: Run, tmp_path: Path) -> None:
    outcome_of("out", source=draw_all(tmp_path / "in", 10), container="folder", shard_size=9)
    lines = records(tmp_path / "out")
    with Image.open(tmp_path / "out" / "shard-00000.png") as sheet:
        pixels = np.asarray(sheet)
    colours = {tuple(bytes.fromhex(line["id"][:6])) for line in lines[:9]}
    shown = set(map(tuple, pixels.reshape(-1, 3)))
    assert colours <= shown
    assert (tmp_path / "out" / "shard-00001.png").exists()
    # The shard is whole without it.
    (tmp_path / "out" / "shard-00000.png").unlink()
    assert outcome_of("out", source=tmp_path / "in", container="folder", shard_size=9).skipped == 2


def test_a_source_that_holds_nothing_says_what_it_found(outcome_of: Run, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.tar").write_bytes(bytes(1024))
    with pytest.raises(InputError, match=r"there are no pictures; 1 file not taken: 1 \.tar, expected one"):
        outcome_of("out", source=tmp_path / "in")
    stream = io.BytesIO()
    pq.write_table(pa.table({"picture": pa.array([], pa.binary())}), stream)
    (tmp_path / "in.parquet").write_bytes(stream.getvalue())
    with pytest.raises(InputError, match=r"there are no pictures; in\.parquet has no rows"):
        outcome_of("out", source=tmp_path / "in.parquet")


@pytest.mark.parametrize("ending", ["npy", "mask.png", "mp3"])
def test_columns_that_are_no_settings_are_refused_with_what_there_is(
    outcome_of: Run, tmp_path: Path, ending: str
) -> None:
    write_tar(tmp_path / "in.tar", [("0.png", png(0)), (f"0.{ending}", b"\xff\xfb")])
    with pytest.raises(InputError, match=f"has the column '{ending}'.* which of picture, {ending} are to be read"):
        outcome_of("out", source=tmp_path / "in.tar")
    assert outcome_of("out", source=tmp_path / "in.tar", columns={"picture": "picture"}).progress.done == 1


@pytest.mark.parametrize(
    "name", ["model_index.json", "unet/config.json", "vae/config.json", "scheduler/scheduler_config.json"]
)
def test_a_checkpoints_files_may_begin_with_a_mark(tiny_folder: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(tiny_folder, tmp_path / "marked")
    path = tmp_path / "marked" / name
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    found, expected = read_config(str(tmp_path / "marked")), read_config(str(tiny_folder))
    assert (found.unet, found.vae, found.defaults) == (expected.unet, expected.vae, expected.defaults)

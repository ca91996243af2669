"""What of a job on a Ray cluster needs no Ray: the worker, how many there are, and rows of pipelines (`make ray-test`
has the rest)."""

import hashlib
import io
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

import sdipc_jax as sdipc
from sdipc_jax import cli
from sdipc_jax.batch import RowMapper
from sdipc_jax.batch.job import Job
from sdipc_jax.batch.settings import BatchSettings, read_job
from sdipc_jax.batch.workers import Need, Worker
from sdipc_jax.commands import batch as command
from sdipc_jax.errors import InputError
from sdipc_jax.parallel.software import software
from tests.batch_jobs import Stub, draw, draw_all, manifest, records, write_job
from tests.processes import free_port


@pytest.fixture(autouse=True)
def loaded(tiny: sdipc.Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loads nothing again that is in memory, and leaves the user's cache alone."""
    monkeypatch.setattr("sdipc_jax.prompts.converter.load_weights", lambda config, tuned: tiny)
    for module in ("workers", "mapping"):
        monkeypatch.setattr(f"sdipc_jax.batch.{module}.keep_compiled", lambda: None)
        monkeypatch.setattr(f"sdipc_jax.batch.{module}.use_eigen", lambda: None)


@pytest.fixture
def job(tiny_folder: Path, tmp_path: Path) -> Path:
    source = draw_all(tmp_path / "in", 10)
    return write_job(tmp_path / "out.yaml", model=tiny_folder, source=source, steps=1, scale=5.0, shard_size=4)


def worker(job: Path, tmp_path: Path, **versions: str) -> Worker:
    return Worker(read_job(job), str(tmp_path), False, software() | versions, Stub())


NODES = [{"CPU": 2.0, "memory": 1e9}, {"CPU": 8.0, "GPU": 4.0}, {"CPU": 16.0, "GPU": 8.0}, {"memory": 1e9}]
SLICE = [{"CPU": 8.0}, {"CPU": 112.0, "TPU": 4.0}, {"CPU": 112.0, "TPU": 4.0}]


@pytest.mark.parametrize(
    "asked, nodes, expected, room",
    [
        (None, NODES, Need("GPU", 1), 12),
        (None, SLICE, Need("TPU", 4), 2),
        (None, [{"CPU": 8.0}, {"CPU": 16.0}, {"CPU": 0.5}], Need("CPU", 8), 3),
        (None, [], Need("CPU", 1), 0),
        ("CPU=4", NODES, Need("CPU", 4), 6),
        ("GPU=2", NODES, Need("GPU", 2), 6),
        ("big-memory=1", NODES, Need("big-memory", 1), 0),
    ],
)
def test_what_a_worker_needs_and_for_how_many_there_is_room(
    asked: str | None, nodes: list[dict[str, float]], expected: Need, room: int
) -> None:
    assert Need.of(asked, nodes) == expected
    assert expected.room(nodes) == room


def test_needs_as_ray_takes_them() -> None:
    assert Need("CPU", 4).options() == {"num_cpus": 4}
    assert Need("GPU", 1).options() == {"num_cpus": 0, "num_gpus": 1}
    assert Need("TPU", 4).options() == {"num_cpus": 0, "resources": {"TPU": 4}}
    assert Need("CPU", 1).options({"b", "a"}) == {"num_cpus": 1, "label_selector": {"ray.io/node-id": "!in(a,b)"}}


def test_a_worker_does_what_a_process_does(job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    clean = write_job(
        tmp_path / "clean.yaml", **read_job(job).model_dump(include={"model", "source", "steps", "scale"}), shard_size=4
    )
    expected = command.batch(BatchSettings(job=clean), lambda done: None, Stub())
    driver = Job.make(read_job(job))
    driver.manifest.claim()
    own = worker(job, tmp_path)
    assert own.start() == ()
    left = driver.left(range(driver.shards))
    assert left.shards == [0, 1, 2]
    progress = [own.work(left.only(shards), None) for shards in ([2], [0, 1])]
    assert [(each.done, each.shards) for each in progress] == [(2, 1), (8, 2)]
    assert driver.manifest.sum_up(3) == expected.manifest  # type: ignore[union-attr]
    assert [line["row"] for line in records(tmp_path / "out")] == list(range(10))
    assert manifest(tmp_path / "out") == manifest(tmp_path / "clean")


def test_a_worker_stops_when_too_many_rows_have_failed(job: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    for row in range(6):
        (tmp_path / "in" / f"{row:05d}.png").write_bytes(b"no picture")
    driver = Job.make(read_job(job))
    driver.manifest.claim()
    own = worker(job, tmp_path)
    own.start()
    progress = own.work(driver.left(range(3)), 2)
    assert 2 < progress.failed < 7
    assert progress.shards < 3


def test_a_worker_on_another_node_than_it_should_be(job: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"^on \S+: jaxlib is \S+ there and 0\.0\.1 with the driver, expected"):
        worker(job, tmp_path, jaxlib="0.0.1").start()
    with pytest.raises(InputError, match=r"^on \S+: sdipc_jax is [0-9a-f]{16} there and another with the driver"):
        worker(job, tmp_path, sdipc_jax="another").start()
    # The folder is one of the driver's machine alone.
    with pytest.raises(InputError, match=r"^on \S+: .*job\.json: .*expected a folder to write to that all who share"):
        worker(job, tmp_path).start()
    assert not (tmp_path / "out").exists()
    # Other pictures are there under the same path.
    Job.make(read_job(job)).manifest.claim()
    draw(tmp_path / "in" / "more.png", 99)
    with pytest.raises(InputError, match=r"^on \S+: .*holds another job: source\.rows is 10 there and 11 here"):
        worker(job, tmp_path).start()


def test_ray_that_is_not_there(
    job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert cli.main(["batch", str(job), "--on", "ray"]) == 2
    assert "--on ray takes Ray, which is not installed: pip install 'sdipc-jax[ray]'" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("shard-*"))


def test_a_cluster_that_does_not_answer(
    job: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(
        sys.modules,
        "ray",
        SimpleNamespace(is_initialized=lambda: False, exceptions=SimpleNamespace(RayError=Exception)),
    )
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{free_port()}")
    assert cli.main(["batch", str(job), "--on", "ray"]) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert (
        "but that cluster cannot be joined ([Errno 111] Connection refused), expected one of this Ray and Python"
        in told
    )


@pytest.mark.parametrize(
    "options, message",
    [
        ({"workers": 2}, "found workers without on, expected both or neither: add --on ray"),
        ({"worker_needs": "CPU=2"}, "found worker-needs without on"),
        ({"on": "ray", "plan": True}, "found both on and plan, expected one of them"),
        ({"on": "ray", "process_index": 0, "process_count": 2}, "found both on and process-count"),
        ({"on": "ray", "worker_needs": "2"}, "worker_needs is '2', expected"),
        ({"on": "spark"}, "on is 'spark', expected 'ray'"),
    ],
)
def test_options_that_do_not_go_together(job: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        BatchSettings(job=job, **options)


def test_the_launchers_number_is_not_the_drivers(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_PROCID", "3")
    monkeypatch.setenv("SLURM_NTASKS", "8")
    assert BatchSettings(job=job).process() == (3, 8)
    assert BatchSettings(job=job, on="ray").process() == (0, 1)


# Rows of pipelines.


def png(seed: int, tmp_path: Path) -> bytes:
    return draw(tmp_path / f"{seed}.png", seed).read_bytes()


def test_rows_of_a_pipeline_become_pictures(tiny_folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    draw(tmp_path / "a.png", 1)
    stub = Stub()
    mapper = RowMapper(make_device=stub, model=str(tiny_folder), steps=1, scale=5.0, batch_size=2, text="night")
    rows = {
        "picture": np.array(["a.png", png(1, tmp_path), b"none", "a.png", "a.png", "a.png"], object),
        "text": np.array([None, None, None, "day", None, ""], object),
        "seed": np.array([7, np.nan, np.nan, 7, 7, 7]),
        "mine": np.arange(6),
    }
    found = mapper(rows)
    assert list(found) == ["text", "seed", "mine", "id", "generated", "error"]
    assert found["mine"].tolist() == list(range(6))
    # A path or its bytes are the same picture; another text or no seed make another row of it.
    assert len(set(found["id"].tolist())) == 5
    assert found["id"][0] == found["id"][4]
    assert found["generated"][0] == found["generated"][4] != found["generated"][1]
    assert found["generated"][2] is None
    assert "picture: found an unknown kind of file" in found["error"][2]
    assert [each for each in found["error"] if each] == [found["error"][2]]
    # The stub's colour is the beginning of the id.
    pixels = np.asarray(Image.open(io.BytesIO(found["generated"][3])))
    assert pixels.shape == (32, 32, 3)
    assert pixels[0, 0].tolist() == [*bytes.fromhex(found["id"][3][:6])]
    texts = {item.record["text"] for batch in stub.batches for item in batch.items}
    assert texts == {"night", "day", None}
    alone = mapper({name: column[3:4] for name, column in rows.items()})
    assert alone["generated"][0] == found["generated"][3]


def test_rows_of_a_pipeline_are_the_jobs_own(job: Path, tiny_folder: Path, tmp_path: Path) -> None:
    command.batch(BatchSettings(job=job), lambda done: None, Stub())
    files = [path.read_bytes() for path in sorted((tmp_path / "in").iterdir())]
    mapper = RowMapper(make_device=Stub(), model=str(tiny_folder), steps=1, scale=5.0)
    found = mapper({"picture": np.array(files, object)})
    lines = records(tmp_path / "out")
    assert found["id"].tolist() == [line["id"] for line in lines]
    assert [hashlib.sha256(each).hexdigest() for each in found["generated"]] == [line["sha256"] for line in lines]


def test_rows_of_a_pipeline_become_vectors(tiny_folder: Path, tmp_path: Path, tiny: sdipc.Bundle) -> None:
    mapper = RowMapper(model=str(tiny_folder), scale=5.0, vectors=True)
    found = mapper({"picture": np.array([png(1, tmp_path), b"", png(2, tmp_path)], object)})
    assert list(found) == ["id", "vector", "error"]
    pixels = sdipc.read_pictures(tiny, [tmp_path / "1.png", tmp_path / "2.png"])
    projection = sdipc.closed_form(tiny, scale=5.0)
    expected = sdipc.convert(projection, sdipc.encode_images(tiny, pixels))
    np.testing.assert_allclose(found["vector"][[0, 2]], expected, rtol=1e-4, atol=1e-5)
    assert np.isnan(found["vector"][1]).all()
    assert found["vector"].dtype == np.float32
    nothing = mapper({"picture": np.array([b""], object)})
    assert nothing["vector"].shape == (1, expected.shape[1])


def test_settings_that_rows_have_no_use_for(tiny_folder: Path) -> None:
    with pytest.raises(InputError, match="found shard_size, expected no setting of where rows come from"):
        RowMapper(model=str(tiny_folder), shard_size=4)
    with pytest.raises(InputError, match="stepps is not a setting"):
        RowMapper(model=str(tiny_folder), stepps=4)

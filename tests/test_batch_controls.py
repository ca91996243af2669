"""Rows of `sdipc batch` that say where, when and how much pictures count, what is started from and what is shown."""

import tarfile
from collections.abc import Callable
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

import sdipc_jax as sdipc
from sdipc_jax.batch import RowMapper
from sdipc_jax.batch.sampler import Sampler
from sdipc_jax.batch.settings import BatchSettings
from sdipc_jax.commands import batch as command
from sdipc_jax.prompts import algebra
from sdipc_jax.prompts.projection import end_states, mean_end_state
from sdipc_jax.sampling import Control, start_from, weights
from tests.batch_jobs import Stub, draw, records, write_job, write_rows
from tests.control_cases import picture, write_controlnet
from tests.tiny import SMALL_UNET, quick_unet, write_checkpoint

pytestmark = pytest.mark.usefixtures("compile_quickly")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, a ControlNet, two pictures, two masks and lines."""
    folder = tmp_path_factory.mktemp("controls")
    config = sdipc.load(write_checkpoint(folder / "model", unet=quick_unet(SMALL_UNET))).config
    write_controlnet(folder / "network", config)
    for seed in range(2):
        draw(folder / f"{seed}.png", seed, (32, 32))
        Image.fromarray(picture(seed)).save(folder / f"lines-{seed}.png")
    left = np.zeros((32, 32), np.uint8)
    left[:, :16] = 255
    for name, mask in (("left", left), ("right", 255 - left), ("black", 0 * left), ("wide", np.full((32, 48), 255))):
        Image.fromarray(mask.astype(np.uint8)).save(folder / f"{name}.png")
    return folder


@pytest.fixture(scope="module")
def bundle(folder: Path) -> sdipc.Bundle:
    return sdipc.add_controlnet(sdipc.load(folder / "model"), folder / "network")


@pytest.fixture
def run(folder: Path, tmp_path: Path) -> Callable[..., Any]:
    """Runs a job of rows."""

    def run(rows: list[dict[str, Any]], device: Any = None, name: str = "out", **values: Any) -> Any:
        source = write_rows(folder / f"{tmp_path.name}-{name}.jsonl", rows)
        values = {"model": folder / "model", "steps": 2, "scale": 5.0, "batch_size": 2, **values}
        job = write_job(tmp_path / f"{name}.yaml", source=source, **values)
        return command.batch(BatchSettings(job=job), lambda done: None, *(() if device is None else (device,)))

    return run


def test_rows_that_differ_in_everything_are_what_the_functions_make(
    folder: Path, bundle: sdipc.Bundle, run: Callable[..., Any], tmp_path: Path
) -> None:
    """Of one program: two pictures, each in its place, at some steps, on a picture, beside lines."""
    rows: list[dict[str, Any]] = [
        {
            "pictures": ["0.png", "1.png"], "mask": ["left.png", "right.png"], "weights": [1, 0.5], "end": 0.5,
            "text": "red", "negative_picture": "1.png", "init_image": "0.png", "strength": 0.9,
            "mask_image": "left.png", "control_image": "lines-0.png", "seed": 1,
        },
        {
            "pictures": ["1.png", "0.png"], "mask": ["right.png", "left.png"], "weights": [0.2, 0.7], "start": 0.5,
            "negative_picture": "0.png", "init_image": "1.png", "strength": 0.8, "mask_image": "right.png",
            "control_image": "lines-1.png", "control_scale": 0.5, "control_end": 0.5, "seed": 2,
        },
    ]  # fmt: skip
    settings = {"controlnet": [str(folder / "network")], "steps": 3}
    assert run(rows, **settings).progress.done == 2
    lines = records(tmp_path / "out")
    assert lines[1]["control_end"] == [0.5]
    assert lines[0]["mask"] == ["left.png", "right.png"]
    assert {"mask_sha256", "init_image_sha256", "control_image_sha256", "strength", "end"} <= lines[0].keys()
    with tarfile.open(tmp_path / "out/shard-00000.tar") as archive:
        members = [archive.extractfile(line["file"]) for line in lines]
        found = [np.asarray(Image.open(BytesIO(each.read()))).astype(int) for each in members if each is not None]

    pixels = sdipc.read_pictures(bundle, [folder / "0.png", folder / "1.png"])
    vectors = sdipc.convert(sdipc.closed_form(bundle, scale=5.0), sdipc.encode_images(bundle, pixels))
    shown = np.stack([np.asarray(Image.open(folder / f"{n}.png"), np.float32)[..., :3] / 255 for n in range(2)])
    left = np.zeros((8, 8), np.float32)
    left[:, :4] = 1
    masks = np.stack([np.stack([left, 1 - left]), np.stack([1 - left, left])])
    strengths = np.array([[1, 0.5], [0.2, 0.7]], np.float32)[..., None, None, None, None]
    # Of three steps two are left, with either strength.
    steps = np.concatenate([weights.over_steps(2, 0, 0.5), weights.over_steps(2, 0.5, 1)])
    rest = sdipc.text_prompt(bundle, sdipc.tokenize(bundle, ["red", ""]))
    contexts = [sdipc.image_prompt(bundle, vectors[order]) for order in (np.array([0, 1]), np.array([1, 0]))]
    redone = np.stack([np.kron(left, np.ones((4, 4))), np.kron(1 - left, np.ones((4, 4)))])
    controls = Control(np.stack([picture(0), picture(1)]) / np.float32(255), [1.0, 0.5], 0.0, [1.0, 0.5])
    expected = sdipc.generate(
        bundle,
        np.stack([np.concatenate([each, rest[n : n + 1]]) for n, each in enumerate(contexts)]),
        weights=weights.and_the_rest(steps * weights.over_places(masks) * strengths),
        negative=sdipc.image_prompt(bundle, algebra.with_length(vectors[np.array([1, 0])], 5.0)),
        seeds=[1, 2],
        steps=3,
        start=start_from(bundle, shown, 0.9, redone),
        controls=[controls],
    )
    for row in range(2):
        assert np.abs(found[row] - 255 * np.asarray(expected[row])).max() <= 2
    # A row is what it is whatever stands beside it, to the bit.
    assert run([rows[1], rows[1] | {"seed": 3}], name="other", **settings).progress.done == 2
    again = {line["id"]: line["sha256"] for line in records(tmp_path / "other")}
    assert again[lines[1]["id"]] == lines[1]["sha256"]


def test_vectors_of_what_is_projected_out(
    folder: Path, bundle: sdipc.Bundle, run: Callable[..., Any], tmp_path: Path
) -> None:
    rows = [
        {"pictures": ["0.png", "1.png"], "weights": [3, -1]},
        {"picture": "0.png", "without": "red", "without_picture": ["1.png"], "mean": "plain"},
    ]
    run(rows, vectors=True)
    stored = load_file(tmp_path / "out/shard-00000.safetensors")
    found = next(each for each in stored.values() if each.ndim == 2).astype(np.float32)
    pixels = sdipc.read_pictures(bundle, [folder / "0.png", folder / "1.png"])
    vectors = np.asarray(sdipc.convert(sdipc.closed_form(bundle, scale=5.0), sdipc.encode_images(bundle, pixels)))
    mean = algebra.mean_direction(vectors, [3, -1], 5.0)
    middle = np.asarray(mean_end_state(bundle))
    assert [line["mean"] for line in records(tmp_path / "out")] == ["direction", "plain"]
    unwanted = np.concatenate([end_states(bundle, sdipc.tokenize(bundle, ["red"])), vectors[1:]]) - middle
    left = middle + algebra.project_out(vectors[:1] - middle, unwanted)
    expected = np.concatenate([mean, left]).astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_allclose(found, expected, rtol=0.01, atol=0.02)
    assert len({line["id"] for line in records(tmp_path / "out")}) == 2


def test_rows_that_ask_for_more_go_on_after_a_kill_and_are_the_same_in_a_pipeline(
    folder: Path, run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job that ends in the middle leaves whole shards, and goes on to the digests of one that did not."""
    both = ["0.png", "1.png"]
    placed: dict[str, Any] = {"pictures": both, "mask": ["left.png", "right.png"], "init_image": "0.png"}
    placed |= {"strength": 0.6, "mask_image": "left.png"}
    mixed: dict[str, Any] = {"pictures": both, "weights": [2, 1], "without": "red", "negative_picture": "0.png"}
    rows = [placed | {"seed": 1}, mixed | {"seed": 2}, mixed | {"seed": 3}, placed | {"seed": 4, "weights": [1, 0.2]}]
    settings: dict[str, Any] = {"shard_size": 2, "batch_size": 1}
    clean = run(rows, name="clean", **settings).manifest
    whole, made = Sampler.pictures, list[int]()

    def killed(self: Sampler, batch: Any) -> Any:
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(1)
        return whole(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Sampler, "pictures", killed)
        with pytest.raises(KeyboardInterrupt):
            run(rows, name="again", **settings)
    assert [line["row"] for line in records(tmp_path / "again")] == [0, 1]
    again = run(rows, name="again", **settings)
    assert (again.skipped, again.progress.done, again.failed) == (1, 2, 0)
    assert again.manifest["digest"] == clean["digest"]
    assert again.manifest["pictures"] == clean["pictures"]

    monkeypatch.chdir(folder)
    mapper = RowMapper(model=str(folder / "model"), steps=2, scale=5.0, batch_size=1)
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: np.empty(len(rows), object) for name in names}
    for place, row in enumerate(rows):
        for name in names:
            columns[name][place] = row.get(name)
    found, lines = mapper(columns), records(tmp_path / "again")
    assert found["error"].tolist() == [None] * 4
    assert found["id"].tolist() == [line["id"] for line in lines]
    assert [sha256(each).hexdigest() for each in found["generated"]] == [line["sha256"] for line in lines]


@pytest.mark.parametrize(
    "row, words",
    [
        ({"layers": "down.7"}, "the layer 'down.7' does not exist"),
        ({"start": 0.5, "end": 0.5}, "start is 0.5 and end 0.5, expected start < end"),
        ({"strength": 0}, "strength is 0, expected greater than 0"),
        ({"strength": 0.1}, "which of 2 steps leaves none"),
        ({"init_image": "1.png"}, "found init_image without strength"),
        ({"mask": "black.png"}, "found a mask that is black, expected white where the picture counts"),
        ({"mask": "wide.png"}, "found a mask of 32x48, expected the shape of 32x32"),
        ({"mask": ["left.png", "right.png"]}, "found 2 masks for 1 pictures"),
        ({"mask_image": "black.png"}, "found a mask that is black, expected white where the picture is redone"),
        ({"mask_image": "left.png", "pad": True}, "found both mask_image and pad"),
        ({"pad": True}, "the picture has the shape of 32x32 already"),
        ({"control_image": "lines-0.png"}, "found 1 values of control_image for 0 ControlNets of the job"),
        ({"init_image": "none.png", "strength": 0.5}, "none.png"),
    ],
)
def test_rows_that_fail(run: Callable[..., Any], row: dict[str, Any], words: str) -> None:
    outcome = run([{"picture": "0.png", "seed": 1} | row, {"picture": "0.png"}], Stub())
    assert (outcome.progress.done, outcome.failed) == (1, 1)
    assert words in outcome.failures[0]["error"]


def test_a_row_without_what_the_network_is_to_be_shown_fails(folder: Path, run: Callable[..., Any]) -> None:
    rows = [{"picture": "0.png"}, {"picture": "0.png", "control_image": "lines-0.png", "control_scale": [1, 2]}]
    outcome = run(rows, Stub(), controlnet=[str(folder / "network")])
    assert [each["error"].split(",")[0] for each in outcome.failures] == [
        "found 0 values of control_image for 1 ControlNets of the job",
        "found 2 values of control_scale",
    ]


def test_what_a_row_says_is_part_of_its_key(run: Callable[..., Any], tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"picture": "0.png", "seed": 1}]
    rows += [rows[0] | each for each in ({"end": 0.5}, {"strength": 0.5}, {"mask": "left.png"}, {"mask": "right.png"})]
    rows += [rows[0] | {"negative_picture": "1.png"}, rows[0] | {"layers": "all", "start": 0}]
    ids = []
    for number, row in enumerate(rows):
        run([row], Stub(), str(number))
        ids += [line["id"] for line in records(tmp_path / str(number))]
    assert ids[-1] == ids[0]
    assert len(set(ids)) == len(rows) - 1
    stub = Stub()
    assert run([rows[0] | {"layers": "mid"}, {"picture": "1.png", "layers": "mid"}, rows[0]], stub, "more").failed == 0
    assert [len(batch.items) for batch in stub.batches] == [2, 1]

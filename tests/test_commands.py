"""The commands on a checkpoint in miniature: what they write, what they say, what they refuse."""

import hashlib
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import sdipc_jax as sdipc
from sdipc_jax import cli, parallel
from sdipc_jax.checkpoints.delta import make_delta
from sdipc_jax.commands import opening
from sdipc_jax.commands.job import SamplingJob
from sdipc_jax.commands.settings import TextSettings, VarySettings
from sdipc_jax.pictures.sheets import read_metadata
from sdipc_jax.prompts import converter
from sdipc_jax.settings import FAST, ParallelSettings

# Two pictures at once on one device, whatever the command: one compiled program for all of them.
PAIR = ("--num-images", "2", "--batch-size", "2", "--mesh", "data=1")


def run(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])


def manifest(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two pictures of one name, the second with private EXIF data and text."""
    folder = tmp_path_factory.mktemp("pictures")
    paths = [folder / "a" / "noise.png", folder / "b" / "noise.jpg"]
    exif = Image.Exif()
    exif[0x010F] = "PRIVATE-MAKER"
    exif.get_ifd(0x8825)[29] = "PRIVATE-DATE"
    for seed, path in enumerate(paths):
        path.parent.mkdir()
        coarse = np.random.default_rng(seed).integers(0, 256, (9, 7, 3), np.uint8)
        options = {"exif": exif, "comment": b"PRIVATE"} if seed else {}
        Image.fromarray(coarse).resize((70, 90)).save(path, **options)
    return paths


def replace_loading(monkeypatch: pytest.MonkeyPatch, load_weights: Any) -> None:
    """Wherever a command loads weights."""
    for module in (converter, opening):
        monkeypatch.setattr(module, "load_weights", load_weights)


class Sampler:
    """Stands in for `parallel.generate` where what it gives does not matter."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []
        self.flagged = False
        self.before_return: Callable[[], None] = lambda: None

    def __call__(
        self, mesh: Any, bundle: sdipc.Bundle, context: Any, report: Callable[[int, int], None], **settings: Any
    ) -> tuple[np.ndarray, np.ndarray]:
        self.calls.append({"context": np.asarray(context), **settings})
        report(1, 2)
        self.before_return()
        report(2, 2)
        levels = np.asarray(settings["indices"], np.float32)[:, None, None, None] / 255
        shape = (len(levels), settings["height"], settings["width"], 3)
        return np.broadcast_to(levels, shape), np.full(len(levels), self.flagged)


@pytest.fixture
def sampler(tiny: sdipc.Bundle, monkeypatch: pytest.MonkeyPatch) -> Sampler:
    """Neither samples nor loads again what is in memory."""
    made, load = Sampler(), converter.load_weights
    monkeypatch.setattr(parallel, "generate", made)

    def load_weights(config: sdipc.Config, tuned: Path | None) -> sdipc.Bundle:
        return load(config, tuned) if tuned or config != tiny.config else tiny

    replace_loading(monkeypatch, load_weights)
    return made


# What is written.


@pytest.fixture(scope="module")
def variations(tiny_folder: Path, pictures: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("variations") / "out"
    assert run("vary", *pictures, "--model", tiny_folder, *PAIR, "--seed", 3, "--output-dir", folder) == 0
    return folder


def test_vary_writes_pictures_a_sheet_and_a_manifest(
    variations: Path, tiny_folder: Path, pictures: list[Path], tiny: sdipc.Bundle
) -> None:
    names = ["noise-000.png", "noise-001.png", "noise-2-000.png", "noise-2-001.png"]
    assert sorted(os.listdir(variations)) == sorted([*names, "manifest.jsonl", "sheet.png"])
    lines = manifest(variations)
    assert [line["file"] for line in lines] == names
    assert [line["index"] for line in lines] == [0, 1, 0, 1]
    assert [line["input"] for line in lines] == [str(pictures[n]) for n in (0, 0, 1, 1)]
    for line, source in zip(lines, (0, 0, 1, 1), strict=True):
        assert line["input_sha256"] == hashlib.sha256(pictures[source].read_bytes()).hexdigest()
        assert line["seed"] == 3
        assert read_metadata(variations / line["file"]) == line
        assert pixels(variations / line["file"]).shape == (32, 32, 3)
    assert len({pixels(variations / name).tobytes() for name in names}) == 4
    # Every setting, those that were left out as they were decided.
    settings = lines[0]["settings"]
    assert settings.pop("scale") == pytest.approx(float(sdipc.closed_form(tiny).scale), rel=1e-5)
    decided = {
        "model": str(tiny_folder),
        **{"cutoff": 0.3, "num_images": 2, "steps": 4, "guidance_scale": 7.5, "sampler": "ddim", "height": 32},
        **{"width": 32, "batch_size": 2, "mesh": "data=1", "cache_interval": 1, "safety": "off"},
        "negative_prompt": "",
    }
    told = VarySettings(pictures=("a.png",)).model_dump(mode="json")
    # Where it ran and what it printed change no picture.
    for name in (
        "pictures",
        "seed",
        "output_dir",
        "json_",
        "quiet",
        "overwrite",
        "scale",
        *ParallelSettings.model_fields,
    ):
        del told[name]
    assert settings == told | decided


def test_fast_decides_what_is_left_open(tiny_folder: Path, pictures: list[Path], tmp_path: Path) -> None:
    arguments = ("vary", pictures[0], "--model", tiny_folder, *PAIR, "--fast", "--steps", 3)
    assert run(*arguments, "--guidance-interval", "0.1,0.9", "--output-dir", tmp_path / "out") == 0
    settings = manifest(tmp_path / "out")[0]["settings"]
    assert (settings["steps"], settings["guidance_interval"]) == (3, [0.1, 0.9])
    assert (settings["sampler"], settings["guidance_scale"]) == (FAST["sampler"], 7.5)
    # The two intervals exclude each other.
    assert settings["cache_interval"] == 1
    assert run(*arguments, "--output-dir", tmp_path / "kept") == 0
    settings = manifest(tmp_path / "kept")[0]["settings"]
    assert (settings["guidance_interval"], settings["cache_interval"]) == (None, FAST["cache_interval"])


def test_manifest_has_the_digest_of_every_file_that_counts(variations: Path, tiny_folder: Path) -> None:
    digests = manifest(variations)[0]["checkpoint"]
    for name, digest in digests.items():
        assert digest == hashlib.sha256((tiny_folder / name).read_bytes()).hexdigest()
    # The CLIP's weights and its preprocessing, the tokenizer, the scheduler: all that decides what is made.
    files = {str(path.relative_to(tiny_folder)) for path in tiny_folder.rglob("*") if path.is_file()}
    assert files - digests.keys() == {"model_index.json", "sdipc.json"}


def test_nothing_private_goes_out(variations: Path, pictures: list[Path]) -> None:
    assert b"PRIVATE" in pictures[1].read_bytes()
    for path in variations.iterdir():
        assert b"PRIVATE" not in path.read_bytes()
    for path in variations.glob("*.png"):
        with Image.open(path) as image:
            assert not image.getexif()
            assert image.info.keys() == ({"sdipc"} if path.name == "sheet.png" else {"sdipc", "parameters"})


def test_noise_and_latents(
    variations: Path, tiny_folder: Path, pictures: list[Path], tmp_path: Path, tiny: sdipc.Bundle
) -> None:
    """`--latents` with the noise that the contract promises gives the same pictures to the bit, whatever the seed."""
    key = jax.random.key(3, impl="threefry2x32")
    noise = [jax.random.normal(jax.random.fold_in(key, index), (4, 8, 8)) for index in range(2)]
    save_file({"latents": np.stack(noise)}, tmp_path / "noise.safetensors")
    arguments = ("--model", tiny_folder, *PAIR, "--latents", tmp_path / "noise.safetensors")
    assert run("vary", *pictures, *arguments, "--output-dir", tmp_path / "out") == 0
    for line in manifest(variations):
        np.testing.assert_array_equal(pixels(tmp_path / "out" / line["file"]), pixels(variations / line["file"]))


def test_edit_by_nothing_is_vary(variations: Path, tiny_folder: Path, pictures: list[Path], tmp_path: Path) -> None:
    arguments = ("edit", pictures[0], "", "--model", tiny_folder, *PAIR, "--seed", 3)
    assert run(*arguments, "--alpha", 0, "--output-dir", tmp_path / "same") == 0
    assert run(*arguments, "--alpha", 0.9, "--output-dir", tmp_path / "other") == 0
    for index in range(2):
        name = f"noise-00{index}.png"
        same, other, varied = (
            pixels(folder / name).astype(int) for folder in (tmp_path / "same", tmp_path / "other", variations)
        )
        # Two pictures at once and one are rounded alike only where processors divide them alike.
        assert np.abs(same - varied).max() <= 1
        assert np.abs(other - varied).max() > 1
    assert manifest(tmp_path / "other")[0]["settings"].items() >= {"alpha": 0.9, "text": ""}.items()


def test_text(tiny_folder: Path, tiny: sdipc.Bundle, tmp_path: Path, sampler: Sampler) -> None:
    texts = ["a cat", "a/cat", "a cat"]
    assert run("text", *texts, "--model", tiny_folder, *PAIR, "--negative-prompt", "dog", "--output-dir", tmp_path) == 0
    lines = manifest(tmp_path)
    assert [line["text"] for line in lines] == [text for text in texts for _ in range(2)]
    stems = ("a cat", "a_cat", "a cat-2")
    assert [line["file"] for line in lines] == [f"{stem}-00{index}.png" for stem in stems for index in range(2)]
    found = sampler.calls[1]
    expected = sdipc.text_prompt(tiny, sdipc.tokenize(tiny, ["a/cat"]))
    np.testing.assert_allclose(found["context"], np.repeat(expected, 2, 0), atol=1e-5)
    expected = sdipc.text_prompt(tiny, sdipc.tokenize(tiny, ["dog"]))
    np.testing.assert_allclose(found["negative"], expected, atol=1e-5)
    assert lines[0]["settings"]["negative_prompt"] == "dog"
    assert not {"cutoff", "scale", "mode", "alpha"} & lines[0]["settings"].keys()


def test_last_batch_is_filled_up(tiny_folder: Path, tmp_path: Path, sampler: Sampler) -> None:
    arguments = ("--num-images", 3, "--batch-size", 2, "--mesh", "data=1", "--output-dir", tmp_path)
    assert run("text", "a", "b", "c", "--model", tiny_folder, *arguments) == 0
    assert [call["indices"].tolist() for call in sampler.calls] == [[0, 1], [2, 0], [1, 2], [0, 1], [2, 2]]
    assert len(manifest(tmp_path)) == 9
    assert pixels(tmp_path / "c-002.png").max() == 2


def test_latents_are_used_again_for_each_prompt(tiny_folder: Path, tmp_path: Path, sampler: Sampler) -> None:
    latents = np.random.default_rng(0).standard_normal((3, 4, 8, 8), np.float32)
    save_file({"latents": latents}, tmp_path / "noise.safetensors")
    arguments = ("--num-images", 3, *PAIR[2:], "--latents", tmp_path / "noise.safetensors")
    assert run("text", "a", "b", "--model", tiny_folder, *arguments, "--output-dir", tmp_path / "out") == 0
    assert [call["indices"].tolist() for call in sampler.calls] == [[0, 1], [2, 0], [1, 2]]
    for call in sampler.calls:
        np.testing.assert_array_equal(call["latents"], latents[call["indices"]])


def test_flagged_pictures_are_marked(
    tiny_folder: Path, tmp_path: Path, sampler: Sampler, capsys: pytest.CaptureFixture[str]
) -> None:
    sampler.flagged = True
    assert run("text", "a", "--model", tiny_folder, *PAIR, "--output-dir", tmp_path) == 0
    assert all(line["flagged"] is True for line in manifest(tmp_path))
    assert "2 of them withheld by the safety checker" in capsys.readouterr().out


@pytest.mark.parametrize("text", [None, "at night"])
def test_prompt(
    tiny_folder: Path, tiny: sdipc.Bundle, pictures: list[Path], tmp_path: Path, text: str | None,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    file, missing = tmp_path / "new" / "prompt.safetensors", tmp_path / "missing.png"
    change = () if text is None else ("--text", text, "--alpha", 0.5)
    arguments = ("prompt", pictures[1], missing, pictures[0], "--model", tiny_folder, "--output", file, *change)
    assert run(*arguments, "--json") == 3
    printed = json.loads(capsys.readouterr().out)
    assert printed["files"] == [str(file)]
    assert [failure["input"] for failure in printed["failures"]] == [str(missing)]
    with safe_open(file, framework="numpy") as opened:
        found = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        metadata = opened.metadata()
    assert json.loads(metadata["files"]) == [str(pictures[1]), str(pictures[0])]
    assert json.loads(metadata["settings"])["text"] == text
    assert found.keys() == {"prompt_embeds", "image_vectors"}
    features = [sdipc.encode_images(tiny, sdipc.read_pictures(tiny, [path])) for path in (pictures[1], pictures[0])]
    projection = sdipc.closed_form(tiny)
    vectors = np.concatenate([sdipc.convert(projection, each) for each in features])
    assert found["image_vectors"].dtype == found["prompt_embeds"].dtype == np.float32
    np.testing.assert_allclose(found["image_vectors"], vectors, atol=1e-5)
    context = sdipc.image_prompt(tiny, vectors)
    if text is not None:
        context = sdipc.edit_prompt(tiny, vectors, sdipc.tokenize(tiny, [text]), 0.5)
    assert found["prompt_embeds"].shape == (2, 20, 24)
    np.testing.assert_allclose(found["prompt_embeds"], context, atol=1e-5)
    assert run(*arguments) == 2
    assert "is there already: choose another --output or --overwrite" in capsys.readouterr().err
    assert run(*arguments, "--overwrite", "--quiet") == 3
    assert capsys.readouterr().out == ""
    assert os.listdir(file.parent) == [file.name]


def test_spectrum(
    tiny_folder: Path, tiny: sdipc.Bundle, pictures: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("spectrum", "--model", tiny_folder, "--picture", pictures[0], "--output-dir", tmp_path)
    assert run(*arguments, "--cutoff", 0.5, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    matrix = np.asarray(tiny.params["clip"]["text_projection"]["kernel"], np.float64)
    _, values, vt = np.linalg.svd(matrix)
    np.testing.assert_allclose(found["singular_values"], values, rtol=1e-5)
    rank = int((values >= 0.5).sum())
    assert 0 < found["rank"] == rank < len(values)
    features = np.asarray(sdipc.encode_images(tiny, sdipc.read_pictures(tiny, [pictures[0]])), np.float64)[0]
    joint = features @ np.asarray(tiny.params["clip"]["visual_projection"]["kernel"], np.float64)
    seen = np.sum((vt[:rank] @ joint) ** 2) / np.sum(joint**2)
    assert found["energy_kept"] == pytest.approx(seen, rel=1e-4)
    assert found["round_trip_error"] == pytest.approx(np.sqrt(1 - seen), rel=1e-4)
    assert found["plot"] == str(tmp_path / "spectrum.png")
    assert os.listdir(tmp_path) == ["spectrum.png"]
    assert min(pixels(tmp_path / "spectrum.png").shape[:2]) > 300
    assert run(*arguments) == 2
    assert "spectrum.png is there already" in capsys.readouterr().err
    assert run(*arguments, "--overwrite") == 0
    printed = capsys.readouterr().out
    assert f"kept             {(values >= 0.3).sum()}," in printed
    assert "% of its energy kept, round-trip error" in printed


def test_a_measured_scale_is_told(
    tiny_folder: Path, pictures: list[Path], tmp_path: Path, sampler: Sampler, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("vary", pictures[0], "--model", tiny_folder, *PAIR, "--output-dir", tmp_path, "--overwrite")
    assert run(*arguments) == 0
    scale = manifest(tmp_path)[0]["settings"]["scale"]
    assert f"scale {scale:.4g}, measured over built-in captions\n" in capsys.readouterr().out
    assert run(*arguments, "--scale", 5) == 0
    assert manifest(tmp_path)[0]["settings"]["scale"] == 5
    assert "built-in captions" not in capsys.readouterr().out
    lengths = np.linalg.norm(sampler.calls[-1]["context"][:, 1:], axis=-1)
    np.testing.assert_allclose(lengths, 5, rtol=1e-5)


def test_odd_pictures_are_told_and_give_finite_vectors(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    black, long = tmp_path / "black.png", tmp_path / "long.png"
    Image.new("RGB", (64, 64)).save(black)
    Image.effect_noise((16, 400), 50).save(long)
    file = tmp_path / "prompt.safetensors"
    assert run("prompt", black, long, "--model", tiny_folder, "--output", file) == 0
    printed = capsys.readouterr().out
    assert f"{black}: all pixels have the same colour\n" in printed
    assert f"{long}: longer than 20:1" in printed
    found = load_file(file)
    assert np.isfinite(found["image_vectors"]).all()
    assert np.isfinite(found["prompt_embeds"]).all()


# What is decided by whom.


def copy(folder: Path, target: Path, **files: dict[str, Any] | None) -> Path:
    """The checkpoint with JSON files changed (keys replaced), or taken away (None)."""
    shutil.copytree(folder, target)
    for name, changes in files.items():
        path = target / f"{name.replace('__', '/')}.json"
        values = json.loads(path.read_text())
        path.unlink()
        if changes is not None:
            path.write_text(json.dumps(values | changes))
    return target


def test_option_then_checkpoint_then_contract(tiny_folder: Path, tmp_path: Path) -> None:
    bare = copy(tiny_folder, tmp_path / "bare", sdipc=None)
    full = {"steps": 7, "guidance_scale": 3.5, "sampler": "euler", "height": 24, "width": 40, "cutoff": 0.1, "scale": 2}
    full |= {"guidance_interval": (0.1, 0.6), "cache_interval": 1}
    told = copy(tiny_folder, tmp_path / "told", sdipc=full)
    typed = {"steps": 5, "guidance_scale": 1.5, "sampler": "pndm", "height": 16, "width": 20}

    def decided(folder: Path, **values: Any) -> dict[str, Any]:
        job = SamplingJob(TextSettings(texts=("a",), model=str(folder), **values))
        assert job._record().items() >= {name: getattr(job.values, name) for name in typed}.items()
        return job.values.model_dump()

    contract = {"steps": 50, "guidance_scale": 7.5, "sampler": "ddim", "cutoff": 0.3, "scale": None}
    contract |= {"guidance_interval": None, "cache_interval": 1}
    # sample_size 8 times f = 4.
    assert decided(bare) == {**contract, "height": 32, "width": 32}
    assert decided(told) == full
    assert decided(told, **typed) == full | typed
    # One of the two intervals that is asked for stands in the place of the checkpoint's other one.
    assert decided(told, cache_interval=3) == full | {"guidance_interval": None, "cache_interval": 3}
    assert decided(told, cache_interval=1) == full
    assert decided(bare, **typed) == contract | typed
    job = SamplingJob(VarySettings(pictures=("a.png",), model=str(told), cutoff=0.2))
    assert (job.values.cutoff, job.values.scale) == (0.2, 2)


# What is said.


def test_json_is_one_object_and_quiet_is_quiet(
    tiny_folder: Path, tmp_path: Path, sampler: Sampler, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("text", "a", "--model", tiny_folder, *PAIR, "--output-dir", tmp_path)
    assert run(*arguments, "--json") == 0
    out, err = capsys.readouterr()
    printed = json.loads(out)
    assert [each | {"checkpoint": printed["checkpoint"]} for each in printed["records"]] == manifest(tmp_path)
    assert printed["files"] == [str(tmp_path / name) for name in ("a-000.png", "a-001.png", "sheet.png")]
    assert printed["failures"] == []
    assert err == ""
    assert run(*arguments, "--json") == 2
    out, err = capsys.readouterr()
    assert "manifest.jsonl is there already" in json.loads(out)["error"]
    assert err == f"sdipc: {json.loads(out)['error']}\n"
    assert run(*arguments, "--overwrite", "--quiet") == 0
    assert capsys.readouterr() == ("", "")
    assert run(*arguments, "--overwrite") == 0
    assert capsys.readouterr().out == f"2 done, 0 failed; see {tmp_path / 'sheet.png'}\n"


def test_the_others_are_done_where_one_is_bad(
    tiny_folder: Path, pictures: list[Path], tmp_path: Path, sampler: Sampler, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"<html>")
    out = tmp_path / "out"
    arguments = ("vary", pictures[0], bad, tmp_path / "missing.png", pictures[1], "--model", tiny_folder, *PAIR)
    assert run(*arguments, "--output-dir", out) == 3
    lines = manifest(out)
    failures = [line for line in lines if "error" in line]
    assert [line["input"] for line in failures] == [str(bad), str(tmp_path / "missing.png")]
    assert "found an SVG, XML or HTML file" in failures[0]["error"]
    assert "No such file" in failures[1]["error"]
    assert [line["file"] for line in lines if "file" in line] == [
        *("noise-000.png", "noise-001.png", "noise-2-000.png", "noise-2-001.png")
    ]
    printed = capsys.readouterr()
    assert printed.err.splitlines() == [f"sdipc: {line['error']}" for line in failures]
    assert "4 done, 2 failed" in printed.out


@pytest.fixture
def interruptible() -> Iterator[None]:
    """As in a terminal: what runs in the background takes no notice of SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("batch", [1, 2])
def test_interrupt_leaves_whole_pictures(
    tiny_folder: Path, tmp_path: Path, sampler: Sampler, capsys: pytest.CaptureFixture[str], batch: int
) -> None:
    def interrupt() -> None:
        if len(sampler.calls) == batch:
            signal.raise_signal(signal.SIGINT)

    sampler.before_return = interrupt
    out = tmp_path / "out"
    assert run("text", "a", "b", "--model", tiny_folder, *PAIR, "--output-dir", out) == 130
    assert capsys.readouterr().err == "sdipc: interrupted; the pictures named in manifest.jsonl are whole\n"
    done = ["a-000.png", "a-001.png"] if batch == 2 else []
    assert sorted(path.name for path in out.glob("*.png")) == done
    assert [line["file"] for line in manifest(out)] == done if done else not (out / "manifest.jsonl").exists()
    assert all(pixels(out / name).shape == (32, 32, 3) for name in done)


@pytest.mark.usefixtures("interruptible")
def test_interrupt_while_a_picture_is_written(
    tiny_folder: Path, tmp_path: Path, sampler: Sampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = os.replace

    def interrupted(source: Path, target: Path) -> None:
        if target.name == "a-001.png":
            signal.raise_signal(signal.SIGINT)
        replace(source, target)

    monkeypatch.setattr(os, "replace", interrupted)
    assert run("text", "a", "--model", tiny_folder, *PAIR, "--output-dir", tmp_path) == 130
    assert sorted(os.listdir(tmp_path)) == ["a-000.png", "manifest.jsonl"]
    assert len(manifest(tmp_path)) == 1


def test_batches_are_of_so_many_on_each_device(tiny_folder: Path, tmp_path: Path, sampler: Sampler) -> None:
    arguments = ("--model", tiny_folder, "--batch-size", 2, "--output-dir", tmp_path)
    assert run("text", "a", "b", *arguments, "--num-images", 3) == 0
    # Of the two devices that there are; the second batch is filled up.
    assert [call["indices"].tolist() for call in sampler.calls] == [[0, 1, 2, 0], [1, 2, 2, 2]]
    assert len(list(tmp_path.glob("*-00?.png"))) == 6
    assert manifest(tmp_path)[0]["settings"]["mesh"] == "data=2"


def test_a_bug_is_no_refusal(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "generate", lambda *_, **__: 1 / 0)
    # Python prints the traceback and exits with 1.
    with pytest.raises(ZeroDivisionError):
        run("text", "a", "--model", tiny_folder, *PAIR, "--output-dir", tmp_path)


# What is refused.


@pytest.fixture
def untouched(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No weights are loaded and nothing is compiled."""

    def loaded(*_: object) -> None:
        raise AssertionError("weights were loaded")

    compiled: list[str] = []

    def listen(event: str, _: float, **__: object) -> None:
        if "compile" in event:
            compiled.append(event)

    replace_loading(monkeypatch, loaded)
    jax.monitoring.register_event_duration_secs_listener(listen)
    yield
    jax.monitoring.unregister_event_duration_listener(listen)
    assert compiled == []


def test_compilations_are_seen() -> None:
    """What the fixture above listens to."""
    events: list[str] = []

    def listen(event: str, _: float, **__: object) -> None:
        events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    jax.jit(lambda x: x * 3.5 + 1)(np.ones(5, np.float32))
    jax.monitoring.unregister_event_duration_listener(listen)
    assert any("backend_compile" in event for event in events)


def refuse(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line with which a command is refused."""
    assert run(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("sdipc: ")
    assert err.endswith("\n")
    assert err[:-1].isprintable()
    return err


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["vary", "missing.png"], "missing.png: No such file or directory, expected a file that can be read"),
        (["vary", "text.png"], "found an unknown kind of file, expected JPEG, PNG, WebP, GIF, BMP or AVIF content"),
        (["vary", "text.png", "missing.png"], "(and none of the other 1 can be used)"),
        (["edit", ".", "text"], "found a folder or a device, expected a file"),
        (["vary"], "found no pictures, expected at least one"),
        (["text"], "found no texts, expected at least one"),
        (["prompt", "--output", "x"], "found no pictures, expected at least one"),
        (["text", "a", "--num-images", 0], "num_images is 0"),
        (["text", "a", "--steps", 0], "steps is '0', expected greater than or equal to 1"),
        (["text", "a", "--steps", 1001], "steps is 1001, expected 1 to 1000"),
        (["edit", "p.png", "a", "--alpha", "nan"], "alpha is nan, expected a finite number"),
        (["text", "a", "--guidance-scale", "nan"], "guidance_scale is 'nan', expected a finite number"),
        (["vary", "p.png", "--cutoff", 1e3], "cutoff is 1000.0, expected 0 to 1."),
        (["vary", "p.png", "--cutoff", -1], "cutoff is '-1'"),
        (["prompt", "p.png", "--output", "x", "--cutoff", 1e3], "the largest singular value of the text projection"),
        (["spectrum", "--cutoff", 1e3], "the largest singular value of the text projection"),
        (["text", "a", "--height", 30], "height is 30, expected a multiple of 4: try 32"),
        (["text", "a", "--width", 2], "width is 2, expected a multiple of 4: try 4"),
        (["text", "a", "--mesh", "8"], "mesh is '8', expected data=N with N devices, such as data=2"),
        (["text", "a", "--mesh", "data=3"], "mesh is 'data=3', but there are 2 devices, expected at most data=2"),
        (["text", "a", "--process-id", 1], "num_processes None and process_id 1, expected all three or none"),
        (["text", "a", "--num-processes", 0], "num_processes is '0', expected greater than or equal to 1"),
        (["text", "a", "--sampler", "magic"], "sampler is 'magic', expected 'ddim', 'pndm', 'euler', 'euler-a', "),
        (["text", "a", "--magic", 3], "--magic"),
        (["text", "a", "--seed", -1], "seed is -1"),
        (["text", "a", "--seed", 2**32], "seed is 4294967296, expected less than or equal to 4294967295"),
        (["text", "a", "--output-dir", "text.png"], "text.png: cannot write there (File exists)"),
        (["text", "a", "--output-dir", "text.png/out"], "cannot write there (Not a directory), expected a folder"),
        (["prompt", "p.png", "--output", "text.png/out"], "cannot write there"),
        (["prompt", "p.png", "--output", "."], "found a folder, expected a file"),
        (["text", "a " * 30], "the prompt has 30 tokens, expected at most 18"),
        (["text", "a", "--negative-prompt", "a " * 30], "the prompt has 30 tokens, expected at most 18"),
        (["edit", "p.png", "a " * 30], "the prompt has 30 tokens, expected at most 18"),
        (
            ["text", "a", "--model", "sd15", "--offline"],
            "not in the cache, and the network must not be used: run `sdipc",
        ),
        (
            ["text", "a", "--model", "runwayml/sd", "--offline"],
            "run `sdipc models fetch runwayml/sd` where there is one",
        ),
        (["text", "a", "--model", "."], "not a checkpoint, expected a diffusers pipeline folder with unet/"),
        (["text", "a", "--model", "text.png"], "found no whole safetensors file"),
        (["vary", "p.png", "--clip", "openai/clip", "--offline"], "run `sdipc models fetch openai/clip` where there"),
        (["vary", "p.png", "--clip", "text.png"], "found no whole safetensors file"),
    ],
)
@pytest.mark.usefixtures("untouched")
def test_bad_input(
    arguments: list[object], words: str, tiny_folder: Path, pictures: list[Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    shutil.copy(pictures[0], "p.png")
    Path("text.png").write_text("text")
    model = [] if "--model" in arguments else ["--model", tiny_folder]
    assert words in refuse(capsys, *arguments, *model)
    assert sorted(os.listdir()) == ["p.png", "text.png"]


@pytest.mark.parametrize(
    "tensors, words",
    [
        (None, "noise: no readable safetensors file"),
        ({"noise": np.zeros((2, 4, 8, 8), np.float32)}, "found no tensor 'latents', expected 'latents' of float32"),
        ({"latents": np.zeros((3, 4, 8, 8), np.float32)}, "found latents of float32 (3, 4, 8, 8), expected"),
        ({"latents": np.zeros((2, 8, 8, 4), np.float32)}, "expected 'latents' of float32 (2, 4, 8, 8)"),
        ({"latents": np.zeros((2, 4, 8, 8), np.float16)}, "found latents of float16"),
        ({"latents": np.full((2, 4, 8, 8), np.nan, np.float32)}, "latents hold NaN or infinity"),
    ],
)
@pytest.mark.usefixtures("untouched")
def test_bad_latents(
    tensors: dict[str, np.ndarray] | None, words: str, tiny_folder: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    file, out = tmp_path / "noise", tmp_path / "out"
    if tensors is None:
        file.write_bytes(b"\x80\x04cos\nsystem\n")
    else:
        save_file(tensors, file)
    assert words in refuse(capsys, "text", "a", "--model", tiny_folder, *PAIR, "--latents", file, "--output-dir", out)
    assert not out.exists()


@pytest.mark.usefixtures("untouched")
def test_another_run_is_refused(
    tiny_folder: Path, variations: Path, pictures: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name: path.read_bytes() for path in variations.iterdir()}
    arguments = (pictures[0], "--model", tiny_folder, "--output-dir", variations)
    assert "manifest.jsonl is there already" in refuse(capsys, "vary", *arguments)
    chained = ("vary", variations / "noise-000.png", "--model", tiny_folder, "--output-dir", variations, "--overwrite")
    assert "found an input among the files to be replaced" in refuse(capsys, *chained)
    assert {path.name: path.read_bytes() for path in variations.iterdir()} == before


def test_text_tower_shorter_than_clips(
    tiny_folder: Path, pictures: list[Path], tmp_path: Path, sampler: Sampler, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in Stable Diffusion 2.x, whose text encoder leaves out the last layer."""
    config = json.loads((tiny_folder / "clip/config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 3
    folder = copy(tiny_folder, tmp_path / "short", clip__config=config)
    words = "the text encoder has 2 layers and the CLIP's text tower 3"
    out, inverse = ("--output-dir", tmp_path / "out", "--model", folder), ("--calibrate", "pinv")
    assert words in refuse(capsys, "vary", pictures[0], *out, *inverse)
    assert words in refuse(capsys, "edit", pictures[0], "a", *out, *inverse)
    assert words in refuse(capsys, "prompt", pictures[0], "--model", folder, "--output", tmp_path / "p", *inverse)
    assert os.listdir(tmp_path) == ["short"]
    assert run("text", "a", *PAIR, *out) == 0
    assert len(manifest(tmp_path / "out")) == 2


def test_a_clip_of_zeros(
    tiny_folder: Path, pictures: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy(tiny_folder, tmp_path / "zeros")
    with safe_open(folder / "clip/model.safetensors", framework="numpy") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    save_file(tensors | {"text_projection.weight": np.zeros((24, 24), np.float32)}, folder / "clip/model.safetensors")
    arguments = ("vary", pictures[0], "--model", folder, "--output-dir", tmp_path / "out")
    assert "cutoff is 0.3, expected 0 to 0" in refuse(capsys, *arguments)
    assert "the text projection is 0 everywhere" in refuse(capsys, *arguments, "--cutoff", 0)
    assert "the text projection is 0 everywhere" in refuse(capsys, *arguments, "--keep-fraction", 0.5)


def test_tuned_option(
    tiny_folder: Path, tiny: sdipc.Bundle, pictures: list[Path], tmp_path: Path, sampler: Sampler,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    shape = (tiny.config.vision_side.projection_dim, tiny.config.text.hidden_size)
    trained = {"clip": {"inverse": {"kernel": jnp.ones(shape)}}}
    file, other = tmp_path / "delta.safetensors", tmp_path / "other.safetensors"
    sdipc.tuning.save_delta(make_delta(trained, 3, "ft", sdipc.tuning.digest(tiny)), file)
    sdipc.tuning.save_delta(make_delta(trained, 3, "ft", "another"), other)
    arguments = ("prompt", pictures[0], "--model", tiny_folder)
    assert run(*arguments, "--output", tmp_path / "tuned.safetensors", "--tuned", file) == 0
    vectors = load_file(tmp_path / "tuned.safetensors")["image_vectors"]
    # An inverse of ones gives equal numbers.
    np.testing.assert_allclose(np.abs(vectors), np.abs(vectors[0, 0]), rtol=1e-5)
    assert (
        run("vary", pictures[0], "--model", tiny_folder, *PAIR, "--output-dir", tmp_path / "out", "--tuned", file) == 0
    )
    found = manifest(tmp_path / "out")[0]["checkpoint"]["tuned"]
    assert found == hashlib.sha256(file.read_bytes()).hexdigest()
    refused = (*arguments, "--output", tmp_path / "refused.safetensors", "--tuned")
    capsys.readouterr()
    assert "made for the checkpoint with digest another" in refuse(capsys, *refused, other)
    for command in (refused, ("vary", pictures[0], "--model", tiny_folder, "--tuned")):
        assert "no such file, expected a tuning's" in refuse(capsys, *command, tmp_path / "none.safetensors")
    assert not (tmp_path / "refused.safetensors").exists()


def test_clip_and_dtype_options(
    tiny_folder: Path, tiny: sdipc.Bundle, pictures: list[Path], tmp_path: Path, sampler: Sampler,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folder = copy(tiny_folder, tmp_path / "bare")
    (folder / "clip").rename(tmp_path / "elsewhere")
    arguments = ("vary", pictures[0], "--model", folder, "--output-dir", tmp_path / "out", *PAIR)
    assert "expected the CLIP that this checkpoint was trained with: pass --clip" in refuse(capsys, *arguments)
    configs = []

    def load_weights(config: sdipc.Config, tuned: Path | None) -> sdipc.Bundle:
        configs.append(config)
        return tiny

    replace_loading(monkeypatch, load_weights)
    assert run(*arguments, "--clip", tmp_path / "elsewhere", "--dtype", "bfloat16") == 0
    assert configs[0].compute_dtype == "bfloat16"
    assert configs[0].vision_side.folder == str(tmp_path / "elsewhere")
    settings = manifest(tmp_path / "out")[0]["settings"]
    assert settings.items() >= {"clip": str(tmp_path / "elsewhere"), "dtype": "bfloat16"}.items()

"""`sdipc evaluate TABLE CONFIG.yaml` on data sets in miniature, with answers that are known."""

import importlib.util
import json
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import yaml
from PIL import Image

from sdipc_jax import Bundle, cli
from sdipc_jax.batch.sampler import Batch
from sdipc_jax.commands.evaluate_table import Tables, evaluate_table, thinned
from sdipc_jax.errors import InputError, InterruptedRun
from sdipc_jax.evaluate import judges, metrics, paper, scores
from sdipc_jax.evaluate.encoding import encode_files
from sdipc_jax.evaluate.layouts import read_layout, read_prompts
from sdipc_jax.evaluate.retrieval import image_features
from sdipc_jax.evaluate.settings import EvaluateSettings
from sdipc_jax.evaluate.table_settings import DataSettings, read_table
from sdipc_jax.evaluate.tables import Estimate, Table
from tests.batch_jobs import Stub, draw

PROMPTS = """Classes

subject_name,class
cat2,cat
red_vase,vase

Prompts

Object Prompts

prompt_list = [
'a {0} {1} in the snow'.format(unique_token, class_token),
'a wet {0} {1}'.format(unique_token, class_token)
]

Live Subject Prompts

prompt_list = [
'a {0} {1} wearing a red hat'.format(unique_token, class_token)
]
"""


def write_coco(folder: Path, count: int = 6) -> dict[str, Any]:
    images, annotations = [], []
    for number in range(count):
        # The file's order is not that of the ids.
        images.insert(0, {"id": number, "file_name": f"{number:012d}.jpg"})
        draw(folder / "val2017" / f"{number:012d}.png", number).rename(folder / "val2017" / f"{number:012d}.jpg")
        annotations += [{"image_id": number, "caption": f"thing {number},\n seen {k}"} for k in range(2)]
    (folder / "captions.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    return {"kind": "coco", "images": str(folder / "val2017"), "captions": str(folder / "captions.json")}


def write_imagenet(folder: Path) -> dict[str, Any]:
    for place, name in enumerate(("n01", "n02")):
        for number in range(3):
            draw(folder / "val" / name / f"{number}.png", 10 * place + number)
    (folder / "names.txt").write_text("n01 tench, Tinca tigrina\nn02 great white shark\n")
    return {"kind": "imagenet", "images": str(folder / "val"), "classes": str(folder / "names.txt")}


def write_dreambooth(folder: Path) -> dict[str, Any]:
    for place, (name, count) in enumerate((("cat2", 2), ("red_vase", 3))):
        for number in range(count):
            draw(folder / "dataset" / name / f"{number:02d}.png", 10 * place + number)
    (folder / "dataset" / "prompts_and_classes.txt").write_text(PROMPTS)
    return {"kind": "dreambooth", "images": str(folder / "dataset")}


def test_coco_has_its_captions_in_the_order_of_the_ids(tmp_path: Path) -> None:
    samples = read_layout(DataSettings(**write_coco(tmp_path)))
    assert [each.path.name for each in samples] == [f"{n:012d}.jpg" for n in range(6)]
    assert samples[4].texts == ("thing 4, seen 0", "thing 4, seen 1")
    assert samples[4].caption("{}") == "thing 4, seen 0"
    (tmp_path / "val2017" / f"{3:012d}.jpg").unlink()
    with pytest.raises(InputError, match=r"000003.jpg: not there, as 1 of 6 pictures that .*captions.json names"):
        read_layout(DataSettings(**write_coco(tmp_path / "other") | {"images": str(tmp_path / "val2017")}))


def test_imagenet_says_what_its_folders_are(tmp_path: Path) -> None:
    data = write_imagenet(tmp_path)
    samples = read_layout(DataSettings(**data))
    assert [(each.label, each.name) for each in samples[::3]] == [("n01", "tench"), ("n02", "great white shark")]
    assert samples[0].caption("a photo of a {}.") == "a photo of a tench."
    (tmp_path / "index.json").write_text(json.dumps({"0": ["n01", "tench"], "1": ["n02", "great_white_shark"]}))
    assert read_layout(DataSettings(**data | {"classes": str(tmp_path / "index.json")})) == samples
    (tmp_path / "names.txt").write_text("n01 tench\n")
    with pytest.raises(InputError, match=r"found nothing of the class 'n02'"):
        read_layout(DataSettings(**data))


def test_places_and_faces(tmp_path: Path) -> None:
    for number in range(2):
        draw(tmp_path / "val_256" / f"Places365_val_{number}.png", number)
        draw(tmp_path / "faces" / f"{number}.png", number)
    (tmp_path / "val.txt").write_text("Places365_val_0.png 1\nPlaces365_val_1.png 0\n")
    (tmp_path / "categories.txt").write_text("/a/airfield 0\n/b/bazaar/indoor_market 1\n")
    places = {"images": tmp_path / "val_256", "captions": tmp_path / "val.txt", "classes": tmp_path / "categories.txt"}
    found = read_layout(DataSettings(kind="places365", **places))
    assert [each.name for each in found] == ["bazaar indoor market", "airfield"]
    faces = read_layout(DataSettings(kind="celeba-hq", images=tmp_path / "faces"))
    assert [(each.label, each.name) for each in faces] == [("0", "person"), ("1", "person")]
    with pytest.raises(InputError, match="classes is missing beside images"):
        read_layout(DataSettings(kind="places365", **places | {"classes": None}))


def test_the_benchmarks_prompts_are_without_their_token(tmp_path: Path) -> None:
    samples = read_layout(DataSettings(**write_dreambooth(tmp_path)))
    assert [each.label for each in samples] == ["cat2"] * 2 + ["red_vase"] * 3
    assert samples[0].edits == ("a cat wearing a red hat",)
    assert samples[-1].edits == ("a vase in the snow", "a wet vase")
    (tmp_path / "other.txt").write_text("nothing\n")
    with pytest.raises(InputError, match="found no classes and two lists of prompts"):
        read_prompts(tmp_path / "other.txt")


def test_pictures_are_taken_evenly() -> None:
    assert thinned([*range(10)], 4) == [0, 2, 5, 7]  # type: ignore[comparison-overlap, list-item]


def test_encoding_is_that_of_all_at_once_and_is_kept(tiny: Bundle, tmp_path: Path) -> None:
    paths = [draw(tmp_path / f"{n}.png", n) for n in range(5)]
    pictures = np.stack([np.asarray(Image.open(path)) for path in paths])
    found = encode_files(tiny, paths, keep=tmp_path / "kept", identity="a")
    np.testing.assert_allclose(found, image_features(tiny, pictures), atol=1e-5)
    (kept,) = (tmp_path / "kept").iterdir()
    np.save(kept, np.zeros_like(found))
    assert not encode_files(tiny, paths, keep=tmp_path / "kept", identity="a").any()
    assert encode_files(tiny, paths, keep=tmp_path / "kept", identity="b").any()
    with pytest.raises(InputError, match=r"none.png: "):
        encode_files(tiny, [tmp_path / "none.png"])


def test_right_pairs_are_found_and_shuffled_ones_as_often_as_by_chance() -> None:
    rng = np.random.default_rng(0)
    pictures = rng.normal(size=(200, 16))
    owner = np.repeat(np.arange(200), 2)
    captions = pictures[owner] + 0.01 * rng.normal(size=(400, 16))
    texts, images = scores.retrieved(pictures, captions, owner)
    assert all(values.all() for values in (*texts.values(), *images.values()))
    texts, images = scores.retrieved(pictures, captions, rng.permutation(owner))
    for name, values, chance in (("TR@5", texts, 10 / 400), ("IR@5", images, 5 / 200)):
        assert values[name].mean() == pytest.approx(chance, abs=3 * np.sqrt(chance / len(values[name])))
    classes, truth = rng.normal(size=(8, 16)), rng.integers(8, size=300)
    hits = scores.classified(classes[truth] + 0.01 * rng.normal(size=(300, 16)), classes, truth)
    assert hits["Acc@1"].all()
    hits = scores.classified(rng.normal(size=(300, 16)), classes, truth)
    assert hits["Acc@1"].mean() == pytest.approx(1 / 8, abs=0.06)
    assert hits["Acc@5"].mean() == pytest.approx(5 / 8, abs=0.09)


def test_the_frechet_distance_of_many_pictures_is_the_matrix_square_root() -> None:
    x, y = (np.random.default_rng(seed).normal(seed, 1 + seed, (200, 5)) for seed in (0, 1))
    covariances = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    expected = np.sum((x.mean(axis=0) - y.mean(axis=0)) ** 2) + np.trace(covariances[0] + covariances[1] - 2 * root)
    assert metrics.frechet_distance(x, y) == pytest.approx(expected, rel=1e-9)


def test_the_papers_numbers_stand_beside_ours() -> None:
    found = paper.beside(paper.EDIT, ("DINO", "CLIP-T"), {"SD-IPC": {"DINO": None, "CLIP-T": Estimate(20.0)}}, "50%")
    assert found.columns == ("DINO", "CLIP-T", "CLIP-T, paper")
    assert found["SD-IPC", "CLIP-T"].value == 20.0
    assert found["SD-IPC", "CLIP-T, paper"].value == 26.84
    assert [name for name, _ in found.rows] == ["SD-IPC", "SD-IPC-FT", "SD-R"]
    latex = found.to_latex().splitlines()
    assert latex[1] == r"\caption{Table 4: Editing. 50\%}"
    assert latex[2] == r"\begin{tabular}{lrrr}"
    assert latex[6] == r"SD-IPC & -- & 20.000 & 26.840 \\"
    assert (latex[3], latex[5], latex[9]) == (r"\toprule", r"\midrule", r"\bottomrule")
    table = Table("t", "T", "n", ("a_b",), (("r", (Estimate(1.0, (0.5, 1.5)),)),))
    assert r"r & 1.000 {\scriptsize [0.500, 1.500]} \\" in table.to_latex()


class Painter(Stub):
    """A device whose pictures are what `paint` makes of the file that was the prompt."""

    def __init__(self, paint: Callable[[str, int], np.ndarray], stop_after: int | None = None) -> None:
        super().__init__()
        self.paint, self.stop_after = paint, stop_after

    def __call__(self, *_: Any) -> "Painter":
        return self

    def pictures(self, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        if self.stop_after is not None and len(self.batches) >= self.stop_after:
            raise InterruptedRun("stopped")
        self.batches.append(batch)
        made = [self.paint(item.record["inputs"][0], item.record["seed"]) for item in batch.items]
        return np.stack(made), np.zeros(len(made), bool)


def again(path: str, seed: int) -> np.ndarray:
    return np.asarray(Image.open(path))


def noise(path: str, seed: int) -> np.ndarray:
    return np.random.default_rng(1000 + seed).integers(0, 256, (24, 20, 3), np.uint8)


def brightness(paths: Sequence[Path]) -> np.ndarray:
    """Stands for Inception and DINO: the pixels of a quarter of the picture."""
    return np.stack([np.asarray(Image.open(path), np.float64)[:6, :6].ravel() / 255 for path in paths])


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, str]:
    """Judges without PyTorch, and the settings that ask for them."""
    monkeypatch.setattr(judges, "check_weights", lambda **_: None)
    for name in ("dino", "inception"):
        monkeypatch.setattr(judges, name, lambda path: judges.Judge("a stand-in", brightness))
    return {"dino": "weights", "inception": "weights"}


def run(table: str, folder: Path, output: Path, device: Any = None, **values: Any) -> Tables:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    settings = EvaluateSettings(model=table, config=folder / "config.yaml", output_dir=output)
    return evaluate_table(settings, lambda done: None, *([] if device is None else [device]))


def test_references_are_alike_and_noise_is_not(tiny_folder: Path, tmp_path: Path, stand_ins: dict[str, str]) -> None:
    options: dict[str, Any] = {"model": str(tiny_folder), "data": write_coco(tmp_path / "coco"), "text_prompt": False}
    options |= stand_ins | {"steps": 1, "batch_size": 4, "shard_size": 4, "height": 24, "width": 20}
    same = run("variation", tmp_path / "a", tmp_path / "same", Painter(again), **options).tables[0]
    far = run("variation", tmp_path / "a", tmp_path / "far", Painter(noise), **options).tables[0]
    for column in ("CLIP-Score", "DINO"):
        assert same["SD-IPC", column].value == pytest.approx(100, abs=1e-3)
    assert same["SD-IPC", "FID"].value == pytest.approx(0, abs=1e-6)
    assert far["SD-IPC", "FID"].value > 1
    assert far["SD-IPC", "DINO"].value < 90
    assert same["SD-IPC", "FID, paper"].value == 24.78
    assert same["SD-R", "CLIP-Score, paper"].value == 82.59
    record = json.loads((tmp_path / "same" / "variation.json").read_text())
    assert record["settings"]["steps"] == 1
    assert record["checkpoint"]
    assert (tmp_path / "same" / "variation.tex").read_text().count(r"\end{table}") == 1
    with pytest.raises(InputError, match=r"variation.json is there already"):
        run("variation", tmp_path / "a", tmp_path / "same", Painter(again), **options)


def test_what_was_interrupted_goes_on_to_the_same_numbers(tiny_folder: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"model": str(tiny_folder), "data": write_dreambooth(tmp_path / "data"), "seeds": 2}
    options |= {"steps": 1, "batch_size": 2, "shard_size": 2, "height": 24, "width": 20}
    whole = run("ablation", tmp_path / "a", tmp_path / "whole", Painter(noise), **options)
    with pytest.raises(InterruptedRun):
        run("ablation", tmp_path / "a", tmp_path / "parts", Painter(noise, stop_after=3), **options)
    assert not (tmp_path / "parts" / "ablation.json").exists()
    device = Painter(noise)
    parts = run("ablation", tmp_path / "a", tmp_path / "parts", device, **options)
    assert [table.to_json() for table in parts.tables] == [table.to_json() for table in whole.tables]
    # Five pictures from two seeds, as they are and edited; three batches were there.
    assert sum(len(batch.items) for batch in device.batches) == 20 - 6
    assert [table.name for table in whole.tables] == ["table-5", "table-6"]
    assert "No DINO: `dino`" in whole.tables[0].note


def test_customising_asks_for_every_prompt_of_every_subject(tiny_folder: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"model": str(tiny_folder), "data": write_dreambooth(tmp_path / "data"), "seeds": 2}
    options |= {"steps": 1, "batch_size": 4, "height": 24, "width": 20}
    device = Painter(again)
    table = run("customise", tmp_path / "a", tmp_path / "out", device, **options).tables[0]
    items = [item for batch in device.batches for item in batch.items]
    asked = [(Path(item.record["inputs"][0]).parent.name, item.record["text"]) for item in items]
    assert sorted(set(asked)) == [
        ("cat2", "a cat wearing a red hat"),
        ("red_vase", "a vase in the snow"),
        ("red_vase", "a wet vase"),
    ]
    assert len(asked) == 6
    # Like one of a subject's pictures, and less like the others.
    assert 0 < table["SD-IPC", "CLIP-I"].value < 100
    with pytest.raises(InputError, match=r"ct-cat2.safetensors: not there, expected the delta of 'SD-IPC-CT'"):
        run("customise", tmp_path / "a", tmp_path / "b", **options | {"methods": {"SD-IPC-CT": "ct-{}.safetensors"}})


def test_spaces_without_a_picture_made(tiny_folder: Path, tmp_path: Path) -> None:
    data = {"data": write_imagenet(tmp_path / "imagenet"), "retrieval": write_coco(tmp_path / "coco")}
    found = run("spaces", tmp_path, tmp_path / "out", model=str(tiny_folder), cutoff=0.5, pool=4, **data)
    (table,) = found.tables
    assert [name for name, _ in table.rows] == ["C-space", "T-space", "T-space, raw inverse"]
    assert "among 4 pictures with 8 captions" in table.note
    assert table["C-space", "Acc@5"].value == 100
    assert table["T-space", "TR@5, paper"].value == 92.06
    assert len([*(tmp_path / "out" / "features").iterdir()]) == 2


def test_pictures_of_texts_are_made_once(tiny_folder: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"model": str(tiny_folder), "data": write_coco(tmp_path / "coco", 2), "steps": 1}
    table = run("variation", tmp_path, tmp_path / "out", Painter(again), **options).tables[0]
    assert table["SD w/ Text", "CLIP-Score"].value < table["SD-IPC", "CLIP-Score"].value
    files = sorted((tmp_path / "out" / "plain-text").iterdir())
    before = [path.stat().st_mtime_ns for path in files]
    assert len(files) == 2
    (tmp_path / "out" / "variation.json").unlink()
    again_table = run("variation", tmp_path, tmp_path / "out", Painter(again), **options).tables[0]
    assert again_table.to_json() == table.to_json()
    assert [path.stat().st_mtime_ns for path in files] == before


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["spaces"], "found the table spaces without its file, expected CONFIG.yaml behind it"),
        (["spices", "a.yaml"], "found 'spices' before a.yaml, expected one of spaces, variation, customise"),
        (["spaces", "a.yaml", "--steps", "3"], "found --steps beside a.yaml, expected it in the file"),
        (["spaces", "none.yaml"], "none.yaml: No such file or directory, expected a table's file"),
    ],
)
def test_slips_are_told(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: Any, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["evaluate", *arguments]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_file_that_holds_no_inception_is_told_before_pictures_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def network(*_: Any, **__: Any) -> None:
        raise RuntimeError("invalid load\nkey, 'n'.")

    for name in ("torch", "torchvision", "torch_fidelity", "torch_fidelity.feature_extractor_inceptionv3"):
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(sys.modules[name], "FeatureExtractorInceptionV3", network, raising=False)
    (tmp_path / "inception.pth").write_bytes(b"not weights")
    with pytest.raises(InputError, match=r"inception.pth, which torch-fidelity cannot use \(invalid load key, 'n'.\)"):
        judges.check_weights(clip=None, dino=None, inception=tmp_path / "inception.pth")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None if name == "torchvision" else name)
    with pytest.raises(InputError, match="inception is given, but torchvision is not installed"):
        judges.check_weights(clip=None, dino=None, inception=tmp_path / "inception.pth")


def test_weights_that_are_missing_are_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"dino is .*none, where there is nothing .* expected a folder with facebook"):
        judges.check_weights(clip=None, dino=tmp_path / "none", inception=None)
    with pytest.raises(InputError, match=r"inception is .* torch-fidelity's file pt_inception"):
        judges.check_weights(clip=None, dino=None, inception=tmp_path / "none.pth")
    (tmp_path / "config.yaml").write_text("data: {kind: coco}\n")
    with pytest.raises(InputError, match=r"config.yaml: data is .*, expected images is missing"):
        read_table(tmp_path / "config.yaml")

"""`RowMapper` in a pipeline of Ray Data."""

import io
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image

import sdipc_jax as sdipc
from sdipc_jax.batch import RowMapper
from tests.batch_jobs import draw
from tests.ray.conftest import Outcome
from tests.ray.nodes import ROOT, started


def test_a_pipeline_of_ray_data(tiny_folder: Path, tiny: sdipc.Bundle, tmp_path: Path, outcome: Outcome) -> None:
    pictures = [draw(tmp_path / f"{seed}.png", seed) for seed in range(6)]
    rows = [{"picture": path.read_bytes(), "name": path.stem} for path in pictures] + [{"picture": b"", "name": "bad"}]
    with started(tmp_path / "compiled") as nodes:
        import ray

        nodes.add(2)
        found = (
            ray.data.from_items(rows)
            .map_batches(
                RowMapper,
                fn_constructor_kwargs={"model": str(tiny_folder), "scale": 5.0, "vectors": True},
                batch_size=3,
                compute=ray.data.ActorPoolStrategy(size=1),
                num_cpus=1,
            )
            .take_all()
        )
    assert sorted(row["name"] for row in found) == ["0", "1", "2", "3", "4", "5", "bad"]
    by_name = {row["name"]: row for row in found}
    pixels = sdipc.read_pictures(tiny, pictures)
    expected = sdipc.convert(sdipc.closed_form(tiny, scale=5.0), sdipc.encode_images(tiny, pixels))
    for number, vector in enumerate(np.asarray(expected)):
        assert by_name[str(number)]["error"] is None
        assert by_name[str(number)]["vector"] == pytest.approx(vector, rel=1e-4, abs=1e-5)
    assert "expected" in by_name["bad"]["error"]
    assert np.isnan(by_name["bad"]["vector"]).all()
    outcome(
        "`RowMapper` in a pipeline, a row of seven no picture", "six vectors as `encode_images` makes them, one error"
    )


def test_the_pipeline_of_the_docs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, outcome: Outcome) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs/scale.md").read_text(), re.MULTILINE | re.DOTALL)
    [block] = [block for block in blocks if "RowMapper" in block]
    for theirs, here in (("size=8", "size=1"), ("num_gpus=1", "num_cpus=1"), ('"steps": 20', '"steps": 1')):
        assert theirs in block
        block = block.replace(theirs, here)
    (tmp_path / "photos").mkdir()
    for name in ("automobile.png", "owl.png"):
        shutil.copy(ROOT / "examples" / name, tmp_path / "photos")
    (tmp_path / "photos" / "note.png").write_text("no picture")
    monkeypatch.chdir(tmp_path)
    with started(tmp_path / "compiled") as nodes:
        nodes.add(2)
        exec(compile(block, "docs/scale.md", "exec"), {})
    table = pyarrow.parquet.read_table(tmp_path / "made")
    assert set(table.column_names) == {"path", "id", "generated", "error"}
    made = {Path(row["path"]).name: row for row in table.to_pylist()}
    assert set(made) == {"automobile.png", "owl.png", "note.png"}
    for name in ("automobile.png", "owl.png"):
        assert made[name]["error"] is None
        with Image.open(io.BytesIO(made[name]["generated"])) as picture:
            assert picture.size == (64, 64)
    assert made["note.png"]["generated"] is None
    assert "expected" in made["note.png"]["error"]
    outcome("the pipeline of this page, on two pictures and a text", "two pictures and an error in Parquet")

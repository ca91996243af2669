"""`RowMapper` in a pipeline of Ray Data."""

from pathlib import Path

import numpy as np
import pytest

import sdipc_jax as sdipc
from sdipc_jax.batch import RowMapper
from tests.batch_jobs import draw
from tests.ray.nodes import started


def test_a_pipeline_of_ray_data(tiny_folder: Path, tiny: sdipc.Bundle, tmp_path: Path) -> None:
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

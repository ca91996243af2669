"""Rows in, pictures or vectors out, for pipelines that read and write in a way of their own, such as Ray Data's."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from etils import epath
from jaxtyping import Float32, Shaped

from sdipc_jax.batch.items import Ids, Item, with_index
from sdipc_jax.batch.job import Recipe
from sdipc_jax.batch.pipeline import Device, run_batch
from sdipc_jax.batch.sampler import Batch, Sampler
from sdipc_jax.batch.settings import JobSettings
from sdipc_jax.batch.shards import encode_picture
from sdipc_jax.compilation import keep_compiled, use_eigen
from sdipc_jax.datasets.rows import OTHER_PICTURES, RawRow, Row
from sdipc_jax.errors import InputError

# What a job's file says that rows have no use for which come from elsewhere and go elsewhere.
_ELSEWHERE = ("source", "output_dir", "columns", "shard_size", "container")
_PICTURES = ("picture", "pictures", *OTHER_PICTURES)


class RowMapper:
    """A job's work on batches of rows, as `ray.data.Dataset.map_batches` calls it.

    A batch is a mapping of columns to arrays. Columns with the names of a row's settings (`picture`, a path or bytes,
    `text`, `alpha`, `seed` and so on) are read as `sdipc batch` reads them; null is as if it were not there. What comes
    back are all columns that are no picture, `id`, and

    - `generated`, the picture's file in the job's `format`, or with `vectors=True`
    - `vector`, the picture's vector (eq. 6) in float32, and
    - `error`, why a row has neither, else null; its vector is NaN.

    Equal rows have equal ids and so equal pictures, in whatever batches they come: give each its `seed` for several.

    dataset.map_batches(
        RowMapper,
        fn_constructor_kwargs={"model": "sd15", "steps": 20},
        batch_size=16,
        compute=ray.data.ActorPoolStrategy(size=8),
        num_gpus=1,
    )

    Args:
        make_device: makes what runs batches, from `Sampler.make`'s arguments.
        settings: those of a job's file but for source, output_dir, columns, shard_size and container. `batch_size` is
            a device's at once; batches of another size are cut and filled up.

    Raises:
        InputError: settings or a checkpoint that will not do.
    """

    def __init__(self, *, make_device: Callable[..., Device] = Sampler.make, **settings: Any) -> None:
        useless = next((name for name in _ELSEWHERE if name in settings), None)
        if useless is not None:
            raise InputError(f"found {useless}, expected no setting of where rows come from and go: leave it out")
        use_eigen()
        keep_compiled()
        self.job = JobSettings(source="rows", **settings)
        recipe = Recipe.make(self.job)
        self.reader, self.sampling = recipe.reader(), recipe.decisive
        self.device, self.notes = recipe.device(make_device)
        self.size = self.job.batch_size * jax.local_device_count()
        towers = (recipe.config.text, recipe.config.text_2)
        self.width = sum(tower.hidden_size for tower in towers if tower is not None)

    def __call__(self, rows: Mapping[str, Shaped[np.ndarray, "N ..."]]) -> dict[str, np.ndarray]:
        """The columns of a batch, with its results."""
        known = [name for name in rows if name in Row.model_fields]
        values = zip(*(map(_plain, rows[name]) for name in known), strict=True)
        raw = [
            RawRow(
                number, {name: each for name, each in zip(known, row, strict=True) if each is not None}, epath.Path(".")
            )
            for number, row in enumerate(values)
        ]
        with ThreadPoolExecutor() as pool:
            items = list(pool.map(self.reader, raw))
        ids = [Ids(set()).give(item.key) for item in items]
        results = dict[int, Any]()
        groups: dict[tuple[Any, ...], list[Item]] = {}
        for item in items:
            if item.error is None:
                groups.setdefault(item.program, []).append(item)
        for group in groups.values():
            for first in range(0, len(group), self.size):
                part = group[first : first + self.size]
                batch = Batch(part[0].size, part, [ids[item.row] for item in part])
                results |= zip([item.row for item in part], run_batch(self.job, self.device, batch)[1], strict=True)
        kept = {name: column for name, column in rows.items() if name not in _PICTURES}
        return kept | {
            "id": np.array(ids),
            **(
                {"vector": self._vectors(results, len(items))}
                if self.job.vectors
                else {"generated": _objects(list(map(self._file, items, ids, map(results.get, range(len(items))))))}
            ),
            "error": _objects([item.error for item in items]),
        }

    def _file(self, item: Item, item_id: str, pixels: np.ndarray | None) -> bytes | None:
        return None if pixels is None else encode_picture(pixels, with_index(item, item_id), self.job, self.sampling)

    def _vectors(self, results: Mapping[int, np.ndarray], count: int) -> Float32[np.ndarray, "N D"]:
        width = len(next(iter(results.values()))) if results else self.width
        vectors = np.full((count, width), np.nan, np.float32)
        for row, vector in results.items():
            vectors[row] = vector
        return vectors


def _plain(value: Any) -> Any:
    """A value as a data set's row has it; None for what is missing, which in columns of numbers is NaN."""
    value = value.tolist() if isinstance(value, np.ndarray | np.generic) else value
    return None if isinstance(value, float) and np.isnan(value) else value


def _objects(values: Sequence[Any]) -> np.ndarray:
    column = np.empty(len(values), object)
    column[:] = values
    return column

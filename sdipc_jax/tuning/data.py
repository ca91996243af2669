"""The pictures that a run learns from, and the order in which it sees them."""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import grain
import numpy as np
from jaxtyping import UInt8

from sdipc_jax.errors import InputError, printable
from sdipc_jax.pictures.reading import read_picture
from sdipc_jax.records import Record, digest_of
from sdipc_jax.tuning.cache import choose_targets
from sdipc_jax.tuning.config import RunSettings, class_name

# Files without such a name are taken for something else, and passed over.
_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".jp2"}
_MIDDLE = 0.5
_SHOWN = 20


@dataclass(frozen=True)
class Example:
    """A picture that was read once and found good.

    Attributes:
        size: (height, width).
        sha256: of its file.
    """

    path: Path
    label: str
    caption: str
    size: tuple[int, int]
    sha256: str

    def read(self) -> UInt8[np.ndarray, "H W 3"]:
        """Its pixels.

        Raises:
            InputError: the file is not what it was.
        """
        picture = read_picture(self.path)
        if picture.sha256 != self.sha256:
            raise InputError(
                f"{printable(self.path)}: found another picture than at the start of the run, expected the same: "
                "leave the data alone while it trains, and start again"
            )
        return picture.pixels

    def record(self) -> Record:
        """What pictures.jsonl says of it."""
        return {"picture": str(self.path), "class": self.label, "caption": self.caption, "sha256": self.sha256}


class Pictures(Sequence[np.ndarray]):
    """The pixels of examples, each read when it is asked for."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: Any) -> Any:
        return self._examples[index].read()


def find_examples(settings: RunSettings) -> list[Example]:
    """All pictures of the run, in the order of their classes and names.

    Raises:
        InputError: no data, no such class, or with every picture that cannot be used.
    """
    found = _from_lines(settings) if settings.data.suffix == ".jsonl" else _from_folder(settings)
    if settings.classes is not None:
        order = list(settings.classes)
        missing = [name for name in order if name not in {label for _, label, _ in found}]
        if missing:
            raise InputError(
                f"{printable(settings.data)}: found no pictures of {', '.join(missing)}, expected every class in "
                "`classes`: correct the names"
            )
        found = sorted((each for each in found if each[1] in order), key=lambda each: order.index(each[1]))
    if settings.per_class is not None:
        seen: Counter[str] = Counter()
        first = []
        for each in found:
            seen[each[1]] += 1
            if seen[each[1]] <= settings.per_class:
                first.append(each)
        found = first
    if not found:
        raise InputError(
            f"{printable(settings.data)}: found no pictures, expected a subfolder of JPEG, PNG or WebP files for each "
            "class: check the path"
        )
    # Decoding leaves Python to other threads.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        read = list(pool.map(lambda each: _read(settings, *each), found))
    bad = [each for each in read if isinstance(each, InputError)]
    if bad:
        more = f"; and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
        raise InputError(
            f"{len(bad)} of {len(read)} pictures cannot be used: {'; '.join(map(str, bad[:_SHOWN]))}{more}"
        )
    return [each for each in read if isinstance(each, Example)]


def data_digest(examples: Sequence[Example]) -> str:
    """Names the data: the same pictures with the same classes and captions in the same order."""
    return digest_of([[each.sha256, each.label, each.caption] for each in examples])


class Draw(NamedTuple):
    """What a place in a batch shows.

    Attributes:
        reference, target: numbers of pictures.
        place: of the cut along the side that is too long, 0 to 1.
        flip: whether both are mirrored.
    """

    reference: int
    target: int
    place: float
    flip: bool


class Batches(Iterator[tuple[list[list[Draw]], list[Any]]]):
    """An endless iterator over batches.

    Every picture is seen once before one is seen again, in an order that depends on the seed alone.

    Attributes:
        concepts: how many.

    Args:
        concepts: for each concept the numbers of its pictures.
        make: what to make of a batch's draws; called ahead of time, in other threads.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        settings: RunSettings,
        concepts: Sequence[Sequence[int]],
        make: Callable[[list[Draw]], Any],
    ) -> None:
        labels = [each.label for each in examples]

        def draw(number: Any, generator: np.random.Generator) -> Draw:
            reference = target = int(number)
            if settings.ab_training:
                target = int(choose_targets([reference], labels, generator)[0])
            place = generator.random() if settings.random_crop else _MIDDLE
            return Draw(reference, target, place, bool(settings.random_flip and generator.random() < 0.5))

        def made(draws: list[Draw]) -> tuple[list[Draw], Any]:
            return draws, make(draws)

        self.concepts = len(concepts)
        self._iterators = []
        for numbers in concepts:
            # Shuffled anew each time round.
            order = grain.MapDataset.source(np.asarray(numbers)).seed(settings.seed).shuffle().repeat(None)
            batches = order.random_map(draw).batch(settings.batch_size, batch_fn=list).map(made)
            threads = grain.ReadOptions(num_threads=4 if settings.augments else 0, prefetch_buffer_size=8)
            self._iterators.append(iter(batches.to_iter_dataset(threads)))

    def __next__(self) -> tuple[list[list[Draw]], list[Any]]:
        """The draws of each concept, and what was made of them."""
        found = [next(iterator) for iterator in self._iterators]
        return [draws for draws, _ in found], [made for _, made in found]

    def state(self) -> list[Any]:
        """The position, as JSON has it."""
        return [iterator.get_state() for iterator in self._iterators]

    def restore(self, state: Sequence[Any]) -> None:
        """Goes on after the batches that had been taken when `state` was."""
        for iterator, each in zip(self._iterators, state, strict=True):
            iterator.set_state(each)


def augment(
    picture: UInt8[np.ndarray, "H W 3"], height: int, width: int, draw: Draw, settings: RunSettings
) -> UInt8[np.ndarray, "_ _ 3"]:
    """A picture as the draw shows it: mirrored, and with `random_crop` cut to the shape of height and width."""
    if draw.flip:
        picture = picture[:, ::-1]
    if settings.random_crop:
        rows, columns = picture.shape[:2]
        wide = min(columns, max(1, round(rows * width / height)))
        high = min(rows, max(1, round(columns * height / width)))
        top, left = round(draw.place * (rows - high)), round(draw.place * (columns - wide))
        picture = picture[top : top + high, left : left + wide]
    return np.ascontiguousarray(picture)


def _read(settings: RunSettings, path: Path, label: str, caption: str | None) -> Example | InputError:
    try:
        picture = read_picture(path)
    except InputError as error:
        return error
    name = (settings.classes or {}).get(label, class_name(label))
    height, width = picture.pixels.shape[:2]
    return Example(path, label, caption or settings.caption.replace("{}", name), (height, width), picture.sha256)


def _from_folder(settings: RunSettings) -> list[tuple[Path, str, str | None]]:
    folder = settings.data
    try:
        subfolders = sorted(each for each in folder.iterdir() if each.is_dir() and not each.name.startswith("."))
        return [
            (path, each.name, None)
            for each in subfolders or [folder.resolve()]
            if settings.classes is None or each.name in settings.classes
            for path in sorted(each.iterdir())
            if path.suffix.lower() in _SUFFIXES and not path.name.startswith(".")
        ]
    except OSError as error:
        raise InputError(
            f"{printable(folder)}: {error.strerror}, expected a folder with one subfolder of pictures for each class, "
            "or a .jsonl file: check the path"
        ) from None


def _from_lines(settings: RunSettings) -> list[tuple[Path, str, str | None]]:
    file = settings.data
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{printable(file)}: {reason}, expected JSON lines in UTF-8: check the file") from None
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{printable(file)}, line {number}"
        try:
            row = json.loads(line)
        except ValueError:
            raise InputError(f"{where}: found no JSON, expected an object with picture, class and caption") from None
        if not isinstance(row, dict) or not row.keys() <= {"picture", "class", "caption"} or "picture" not in row:
            raise InputError(f"{where}: found {line[:80]}, expected an object with picture, class and caption")
        if not all(isinstance(value, str) for value in row.values()):
            raise InputError(f"{where}: found {line[:80]}, expected texts in picture, class and caption")
        if "class" not in row and "caption" not in row and settings.text_weight > 0:
            raise InputError(f"{where}: found no class and no caption, expected one of them for the text loss: add it")
        found.append((file.parent / row["picture"], row.get("class", ""), row.get("caption")))
    return found

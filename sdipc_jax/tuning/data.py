"""The order in which a run sees its pictures, and how it cuts and mirrors them."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np
from jaxtyping import UInt8

from sdipc_jax.datasets.examples import Example, find
from sdipc_jax.tuning.cache import choose_targets
from sdipc_jax.tuning.config import RunSettings

_MIDDLE = 0.5


def find_examples(settings: RunSettings, notes: list[str] | None = None) -> list[Example]:
    """All pictures of the run, in the order of their classes and names. See `datasets.examples.find`."""
    return find(
        settings.data,
        columns=settings.columns,
        classes=settings.classes,
        per_class=settings.per_class,
        caption=settings.caption,
        needs_words=settings.text_weight > 0,
        notes=[] if notes is None else notes,
    )


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

"""The loop of a run: batches in, updates, metrics, samples and checkpoints out."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from sdipc_jax.errors import InputError, InterruptedRun
from sdipc_jax.interruption import Interruption
from sdipc_jax.parallel import Watchdog, gather, place, replicate
from sdipc_jax.records import Record
from sdipc_jax.tuning.checkpoints import Checkpoints, Saved
from sdipc_jax.tuning.config import RunSettings
from sdipc_jax.tuning.data import Batches
from sdipc_jax.tuning.feed import Feed, Host
from sdipc_jax.tuning.metrics import MetricsLog
from sdipc_jax.tuning.program import still, train_step
from sdipc_jax.tuning.step import State, moving, with_moving

# Called after each update with its number, its loss, how many pictures it took, and how many seconds.
Report = Callable[[int, float, int, float], None]


@dataclass(frozen=True)
class Run:
    """A run that is ready to go.

    Attributes:
        settings: with `steps` worked out.
        state: before the first update, of one concept or of many.
        kept: what a checkpoint says beside the position in the data, such as what those who go on have to agree with.
        sample: called with the state and the number of updates where a sheet is due.
        turns: in which each device takes its part of a batch.
    """

    settings: RunSettings
    state: State
    mesh: Mesh
    feed: Feed
    batches: Batches
    checkpoints: Checkpoints
    kept: Record
    sample: Callable[[State, int], None]
    turns: int = 1

    def train(
        self, saved: Saved | None, metrics: MetricsLog | None, interruption: Interruption, report: Report
    ) -> State:
        """Goes on from a checkpoint, or from the start, to the last update, and saves.

        Args:
            metrics: on the first process.

        Raises:
            InputError: a loss that is not finite, or something that cannot be written.
            InterruptedRun: on request, with everything saved.
        """
        settings, mesh = self.settings, self.mesh
        steps, first, parts = settings.steps or 0, 0, moving(self.state)
        if saved is not None:
            parts, first = saved.restore(parts), saved.step
            self.batches.restore(saved.values["data"])
        parts, rest = replicate(mesh, parts), replicate(mesh, still(self.state))
        many = settings.each_class
        train = train_step(mesh, many=many, turns=self.turns)
        with Watchdog() as watchdog:
            for update in range(first + 1, steps + 1):
                started = time.perf_counter()
                with watchdog.step():
                    measured = []
                    pictures: list[list[int]] = [[] for _ in range(self.batches.concepts)]
                    for turn in range(settings.accumulate):
                        draws, made = next(self.batches)
                        for seen, concept in zip(pictures, draws, strict=True):
                            seen += [draw.reference for draw in concept]
                        batch = self.feed.encode(place(mesh, self._host(made, turn)))
                        parts, metrics_of_batch = train(parts, rest, batch)
                        measured.append(metrics_of_batch)
                    values = _mean(jax.device_get(measured))
                self._check_finite(update, values, pictures)
                if metrics is not None:
                    metrics.add({"step": update, **values, "pictures": pictures if many else pictures[0]})
                report(update, float(np.mean(values["loss"])), sum(map(len, pictures)), time.perf_counter() - started)
                stop = any(gather("stop" if interruption.requested else "")) and update < steps
                if update % settings.save_every == 0 or update == steps or stop:
                    self.checkpoints.save(update, parts, self.kept | {"data": self.batches.state()})
                if stop:
                    self.checkpoints.wait()
                    raise InterruptedRun(
                        f"interrupted; {update} of {steps} updates are saved: the same command goes on"
                    )
                if settings.sample_every and update % settings.sample_every == 0:
                    self.sample(with_moving(rest, parts), update)
        self.checkpoints.wait()
        return with_moving(rest, parts)

    def _host(self, made: Sequence[Host], turn: int) -> Host:
        """A batch's arrays, rows first, with the rows' numbers in their update."""
        rows = self.settings.batch_size * turn + np.arange(self.settings.batch_size)
        numbered = [each | {"rows": rows} for each in made]
        if not self.settings.each_class:
            return numbered[0]
        return jax.tree.map(lambda *leaves: np.stack(leaves, axis=1), *numbered)

    def _check_finite(self, update: int, values: Mapping[str, Any], pictures: Sequence[Sequence[int]]) -> None:
        for name in ("loss", "gradient_norm"):
            for numbers, value in zip(pictures, np.ravel(values[name]).tolist(), strict=True):
                if not math.isfinite(value):
                    raise InputError(
                        f"{name} is {value} in update {update}, on pictures {', '.join(map(str, numbers))} of "
                        "pictures.jsonl, expected a finite number; the checkpoints before are intact: look at these "
                        "pictures, or lower learning_rate in another output_dir"
                    )


def _mean(measured: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The metrics of an update from those of its batches; a list where there are several concepts."""
    return {name: np.mean([each[name] for each in measured], axis=0, dtype=np.float64).tolist() for name in measured[0]}

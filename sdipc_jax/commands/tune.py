"""The command `tune`: a run's folder, from its file to its results."""

import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Protocol

import jax
from jax.sharding import Mesh
from tqdm import tqdm

from sdipc_jax import parallel
from sdipc_jax.checkpoints.bundle import Bundle, with_fit
from sdipc_jax.checkpoints.delta import save_delta
from sdipc_jax.checkpoints.load import DEFAULT_CLIP, load_weights, read_config
from sdipc_jax.checkpoints.lora import with_loras
from sdipc_jax.checkpoints.save import save
from sdipc_jax.commands.settings import FtSettings, TunedSettings, TuneSettings
from sdipc_jax.commands.spectrum import encode_all
from sdipc_jax.datasets.examples import Pictures, data_digest
from sdipc_jax.errors import InputError, printable
from sdipc_jax.files import check_writable, remove_leftovers, write_atomically
from sdipc_jax.interruption import Interruption, locked
from sdipc_jax.pictures.outputs import unique_stems
from sdipc_jax.prompts.calibration import picture_vectors
from sdipc_jax.prompts.converter import fitted
from sdipc_jax.prompts.familiar import Familiar
from sdipc_jax.prompts.plan import plan_conversion
from sdipc_jax.prompts.projection import Projection
from sdipc_jax.records import Record
from sdipc_jax.settings import ProjectionSettings
from sdipc_jax.tuning.checkpoints import Checkpoints, Saved, minor_changes
from sdipc_jax.tuning.config import RunSettings, check_unchanged, read_run
from sdipc_jax.tuning.data import Batches, find_examples
from sdipc_jax.tuning.feed import Feed
from sdipc_jax.tuning.loop import Run
from sdipc_jax.tuning.many import init_many, select
from sdipc_jax.tuning.metrics import MetricsLog, check_tensorboard
from sdipc_jax.tuning.program import turns_of
from sdipc_jax.tuning.samples import Sheets
from sdipc_jax.tuning.step import delta, init
from sdipc_jax.tuning.trainable import check_variant

_SHOWN_DIGITS = 16
# As many pictures as tell whether a data set is one that the checkpoint knows.
_LOOKED_AT = 100


class Report(Protocol):
    """Told how much of a command's work is done, 0 to 1, and in words how it goes."""

    def __call__(self, done: float, text: str = "") -> None: ...


@dataclass(frozen=True)
class Tuned:
    """What a command of `tune` did.

    Attributes:
        files: the results.
        notes: what a person should know.
        steps: updates of the run in all.
        loss: of the last update, the mean of all concepts.
        pictures_per_second: without compilation, samples and checkpoints.
    """

    files: Sequence[Path]
    notes: Sequence[str] = ()
    steps: int | None = None
    loss: float | None = None
    pictures_per_second: float | None = None

    def to_json(self) -> Record:
        """What `--json` prints."""
        return asdict(self) | {"files": [str(file) for file in self.files]}

    def __str__(self) -> str:
        parts = [
            "done" if self.steps is None else f"{self.steps} updates done",
            "" if self.loss is None else f"loss {self.loss:.4f}",
            "" if self.pictures_per_second is None else f"{self.pictures_per_second:.3g} pictures/s",
        ]
        return f"{', '.join(filter(None, parts))}; see {printable(self.files[0])}"


def tune(settings: TuneSettings | TunedSettings, report: Report) -> Tuned:
    """Tunes, or writes a tuned checkpoint."""
    return export(settings, report) if isinstance(settings, TunedSettings) else train(settings, report)


def export(settings: TunedSettings, report: Report) -> Tuned:
    """A diffusers folder of what was tuned."""
    config = with_loras(read_config(settings.model, settings.clip or DEFAULT_CLIP), settings)
    check_writable(settings.output.parent)
    save(load_weights(config, settings.delta), settings.output, dtype=settings.dtype)
    report(1.0)
    return Tuned([settings.output])


def train(settings: TuneSettings, report: Report) -> Tuned:
    """A run, from its start or where it stopped, to its results.

    Raises:
        InputError: anything that is refused; whatever can be is refused before anything is compiled.
        InterruptedRun: on SIGTERM or SIGINT, with everything saved.
    """
    run = read_run(settings.config, "ft" if isinstance(settings, FtSettings) else "ct", settings.changes)
    mesh = parallel.start(settings)
    with Interruption() as interruption, locked(run.output_dir) if parallel.is_first() else nullcontext() as note:
        training = _Training(run, settings, mesh, interruption, report)
        training.notes += [note] if note else []
        return training.run()


class _Training:
    """A run in its folder. Making one checks everything that can be checked without the weights."""

    def __init__(
        self, run: RunSettings, settings: TuneSettings, mesh: Mesh, interruption: Interruption, report: Report
    ) -> None:
        self.mesh, self.interruption, self.report = mesh, interruption, report
        # Hosts may be lost for good, or come back: a job manager gives the same command to those that there are.
        elastic = ("devices", "processes") if settings.is_one_of_several else ()
        self.allowed, self.quiet = (*settings.allow_change, *elastic), settings.quiet
        if run.tensorboard:
            check_tensorboard()
        self.config = config = with_fit(with_loras(read_config(run.model, run.clip or DEFAULT_CLIP), run), run.fit)
        # A map is fitted as other commands do where nothing is said of it, so that they find what was tuned for it.
        self.plan = plan_conversion(config, ProjectionSettings())
        if self.plan.method == "ridge":
            check_variant(run)
        height, width = run.height or config.defaults.height, run.width or config.defaults.width
        config.latent_shape(height, width)
        self.examples = examples = find_examples(run, told := list[str]())
        labels = list(dict.fromkeys(each.label for each in examples)) if run.each_class else [""]
        self.concepts = [
            [number for number, each in enumerate(examples) if label in ("", each.label)] for label in labels
        ]
        batch_size = min(run.batch_size, *map(len, self.concepts))
        if batch_size % mesh.size:
            raise InputError(
                f"a batch has {batch_size} pictures and the mesh {mesh.size} devices, expected as many for each: "
                f"set batch_size to a multiple of {mesh.size}, or --mesh data=N to a divisor of {batch_size}, or start "
                "fewer processes"
            )
        resolved = {"batch_size": batch_size, "height": height, "width": width}
        self.settings = run.model_copy(update=resolved).for_pictures(max(map(len, self.concepts)))
        self.identity = self.settings.identity() | {
            "data": f"{len(examples)} pictures, {data_digest(examples)[:_SHOWN_DIGITS]}",
            "devices": mesh.size,
            "processes": jax.process_count(),
        }
        parallel.agree(self.identity)
        self.rows = batch_size // mesh.size
        stems = unique_stems(labels) if run.each_class else ["tuned"]
        self.results = [run.output_dir / f"{stem}.safetensors" for stem in stems]
        self.notes = [*config.notes, *told]
        small = sum(each.size[0] < height or each.size[1] < width for each in examples)
        if small:
            self.notes.append(
                f"{small} of {len(examples)} pictures are smaller than {width}x{height} and are scaled up"
            )

    def run(self) -> Tuned:
        settings, folder = self.settings, self.settings.output_dir
        with Checkpoints(folder / "checkpoints", settings.keep, self.log) as checkpoints:
            saved = checkpoints.newest()
            # The digest of the weights is not known yet.
            base = "" if saved is None else saved.values["identity"]["checkpoint"]
            self.check(saved, self.identity | {"checkpoint": base})
            if parallel.is_first():
                remove_leftovers(folder)
                lines = "".join(json.dumps(each.record()) + "\n" for each in self.examples)
                write_atomically(folder / "pictures.jsonl", lines.encode())
            self.interruption.check()
            bundle, projection = self.load()
            if saved is None:
                self.notes += self.unlike(bundle)
            many = settings.each_class
            state = (
                init_many(bundle, settings.tuning, len(self.concepts), projection)
                if many
                else init(bundle, settings.tuning, projection)
            )
            identity = self.identity | {"checkpoint": state.base}
            self.check(saved, identity)
            parallel.agree(identity)
            if saved is not None and saved.step >= (settings.steps or 0) and all(map(Path.exists, self.results)):
                self.log("nothing to do: the run is complete")
                return Tuned(self.results, self.notes, saved.step)
            self.interruption.check()
            start = 0 if saved is None else saved.step
            for note in self.notes if saved is None else ():
                self.log(note)
            at_once = self.rows if saved is None else self.at_once(saved)
            turns = turns_of(self.rows, at_once)
            if turns > 1:
                told = (
                    f"each device takes its {self.rows} pictures of a batch in {turns} turns, since it had {at_once} "
                    "at once when the run began: the batches are the same, and the results to rounding"
                )
                self.notes.append(told)
                self.log(told)
            size = settings.height or 0, settings.width or 0
            feed = Feed(bundle, settings, self.examples, *size, self.mesh, turns)
            batches = Batches(self.examples, settings, self.concepts, feed.make)
            self.interruption.check()
            sheets = Sheets(bundle, settings, self.examples, self.concepts, self.mesh)
            del bundle  # All that is still needed of it is in the others.
            progress = _Progress(start, settings.steps or 0, self.report)
            with (
                MetricsLog(folder, start, tensorboard=settings.tensorboard)
                if parallel.is_first()
                else nullcontext() as metrics
            ):
                if metrics is not None and not metrics.complete:
                    self.log("warning: metrics.jsonl lacks lines of earlier steps")
                self.log(f"goes on after step {start}" if saved else "starts at step 0")
                kept = {"identity": identity, "at_once": at_once}
                run = Run(settings, state, self.mesh, feed, batches, checkpoints, kept, sheets, turns)
                state = run.train(saved, metrics, self.interruption, progress)
        if parallel.is_first():
            for index, result in enumerate(self.results):
                save_delta(delta(select(state, index) if many else state), result)
        return Tuned(self.results, self.notes, settings.steps, progress.loss, progress.speed)

    def load(self) -> tuple[Bundle, Projection | None]:
        """The checkpoint, and the map if one is fitted."""
        if self.plan.method == "pinv":
            return load_weights(self.config), None
        bundle, calibration, notes = fitted(self.config, self.plan, partial(load_weights, self.config))
        self.notes += notes
        return bundle, calibration.projection(bundle)

    def unlike(self, bundle: Bundle) -> tuple[str, ...]:
        """A note on pictures that the checkpoint does not know, where it tells: a few updates do not teach it those."""
        familiar = Familiar.of(bundle.config)
        if familiar is None:
            return ()
        some = self.examples[:_LOOKED_AT]
        features = encode_all(bundle, Pictures(some))
        return familiar.notes([str(each.path) for each in some], picture_vectors(bundle, features))

    def check(self, saved: Saved | None, identity: Record) -> None:
        """Refuses another run's checkpoint, and notes what has changed."""
        before = identity if saved is None else saved.values["identity"]
        changes = [f"changed: {line}" for line in check_unchanged(before, identity, self.allowed)]
        changes += [
            f"warning: {line}: results may differ in the last bits from those of an uninterrupted run"
            for line in (minor_changes(saved.versions) if saved else ())
        ]
        for line in changes:
            if line not in self.notes:
                self.notes.append(line)
                self.log(line)

    def at_once(self, saved: Saved) -> int:
        """How many pictures of a batch a device had at once when the run began, which it has memory for."""
        return saved.values.get("at_once", self.rows * self.mesh.size // saved.values["identity"]["devices"])

    def log(self, message: str) -> None:
        """Says it, and writes it down with the time."""
        if not parallel.is_first():
            return
        if not self.quiet:
            tqdm.write(f"sdipc: {message}", file=sys.stderr)
        line = f"{datetime.now(UTC).isoformat(timespec='seconds')} {message}\n"
        # The log is for people: the run does not depend on it.
        with suppress(OSError), (self.settings.output_dir / "log.txt").open("a", encoding="utf-8") as stream:
            stream.write(line)


class _Progress:
    """Follows the updates from `first` to `last`."""

    def __init__(self, first: int, last: int, report: Report) -> None:
        self.loss: float | None = None
        self._first, self._last, self._report = first, last, report
        self._seconds, self._pictures = 0.0, 0

    @property
    def speed(self) -> float | None:
        """Pictures a second, the first update aside: it compiles."""
        return self._pictures / self._seconds if self._seconds else None

    def __call__(self, update: int, loss: float, pictures: int, seconds: float) -> None:
        self.loss = loss
        if update > self._first + 1:
            self._seconds += seconds
            self._pictures += pictures
        speed = "" if self.speed is None else f", {self.speed:.3g} pictures/s"
        done = (update - self._first) / (self._last - self._first)
        self._report(done, f"step {update}/{self._last}, loss {loss:.4f}{speed}")

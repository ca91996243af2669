"""The pictures of the paper's tables: made by each method through `batch`, and judged."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import yaml
from etils import epath

from sdipc_jax import parallel
from sdipc_jax.batch.manifest import Manifest
from sdipc_jax.batch.pipeline import Device
from sdipc_jax.batch.settings import BatchSettings, JobSettings
from sdipc_jax.batch.shards import shard_name
from sdipc_jax.batches import in_batches
from sdipc_jax.checkpoints.bundle import Config
from sdipc_jax.checkpoints.text_tower import load_text_tower
from sdipc_jax.commands.batch import BatchOutcome, batch
from sdipc_jax.errors import InputError, InterruptedRun, printable
from sdipc_jax.evaluate import judges, paper
from sdipc_jax.evaluate.layouts import Sample
from sdipc_jax.evaluate.scores import Cells, Seen, Subjects, distances, likeness
from sdipc_jax.evaluate.table_settings import TableName, TableSettings
from sdipc_jax.evaluate.tables import Table
from sdipc_jax.files import write_atomically
from sdipc_jax.pictures.sheets import save_png
from sdipc_jax.prompts.contexts import text_prompt
from sdipc_jax.prompts.converter import Converter
from sdipc_jax.prompts.tokens import tokenize
from sdipc_jax.records import Report
from sdipc_jax.sampling.decoding import to_uint8
from sdipc_jax.sampling.request import decide

TEXT = "SD w/ Text"
_LIKENESS = ("DINO", "CLIP-I", "CLIP-T")
# What each table is made of: kinds of pictures with the paper's numbers, and the columns.
_MADE: dict[TableName, list[tuple[str, paper.Published, tuple[str, ...]]]] = {
    "variation": [("plain", paper.VARIATION, ("FID", "KID x 1000", "CLIP-Score", "CLIP-T", "DINO"))],
    "customise": [("edited", paper.CUSTOMISE, _LIKENESS)],
    "edit": [("edited", paper.EDIT, _LIKENESS)],
    "ablation": [("plain", paper.PLAIN, _LIKENESS), ("edited", paper.EDITED, _LIKENESS)],
}
# What the job of a method has of the table's file.
_SHARED = set(JobSettings.model_fields) & set(TableSettings.model_fields) - {"tuned", "seed"}

MakeDevice = Callable[..., Device]


@dataclass(frozen=True)
class Prompt:
    """A picture to be made: of which one, with what change, from which noise."""

    sample: int
    text: str | None
    seed: int


class Generation:
    """Tables of generated pictures: those of each method through `batch`, which goes on where it stopped."""

    def __init__(
        self,
        config: Config,
        settings: TableSettings,
        samples: list[Sample],
        folder: Path,
        report: Report,
        make_device: MakeDevice,
    ) -> None:
        self.config, self.settings, self.samples, self.folder = config, settings, samples, folder
        self.report, self.make_device = report, make_device

    def tables(self, name: TableName) -> list[Table]:
        """The tables of that name."""
        makers = {"plain": self._plain, "edited": self._all_edits if name == "customise" else self._one_edit_each}
        prompts = {kind: makers[kind]() for kind, _, _ in _MADE[name]}
        # Everything is made before anything is judged: the sampler's memory is free by then.
        made = {kind: self._all_methods(kind, each) for kind, each in prompts.items()}
        if name == "variation" and self.settings.text_prompt:
            made["plain"] = {TEXT: self._from_texts(prompts["plain"])} | made["plain"]
        judge = self._judges()
        real = _seen(judge, [each.path for each in self.samples])
        return [
            paper.beside(
                table,
                columns,
                self._scored(judge, real, prompts[kind], made[kind], whole_subject=name == "customise"),
                self._note(prompts[kind], judge),
            )
            for kind, table, columns in _MADE[name]
        ]

    def _plain(self) -> list[Prompt]:
        """A variation of every picture from every seed, each from noise of its own."""
        count = self.settings.seeds
        return [Prompt(n, None, self._seed(n * count + k)) for n in range(len(self.samples)) for k in range(count)]

    def _all_edits(self) -> list[Prompt]:
        """Every text of every subject, on its first picture, from every seed: the benchmark's protocol."""
        found = []
        for subject in sorted({each.label for each in self.samples}):
            first = next(n for n, each in enumerate(self.samples) if each.label == subject)
            found += [(first, text) for text in self._edits(self.samples[first])]
        count = self.settings.seeds
        return [
            Prompt(n, text, self._seed(place * count + k))
            for place, (n, text) in enumerate(found)
            for k in range(count)
        ]

    def _one_edit_each(self) -> list[Prompt]:
        """One random text for every picture."""
        rng, count = np.random.default_rng(self.settings.seed), self.settings.seeds
        texts = [str(rng.choice(np.asarray(self._edits(each), object))) for each in self.samples]
        return [Prompt(n, text, self._seed(n * count + k)) for n, text in enumerate(texts) for k in range(count)]

    def _edits(self, sample: Sample) -> tuple[str, ...]:
        found = tuple(text.replace("{}", sample.name) for text in self.settings.edits) or sample.edits
        if not found:
            raise InputError("found no edits, expected texts to change pictures with: give some as `edits`")
        return found

    def _seed(self, place: int) -> int:
        return (self.settings.seed + place) % 2**32

    def _all_methods(self, kind: str, prompts: list[Prompt]) -> dict[str, list[Path]]:
        """The files of each method's pictures."""
        return {
            name: self._by_delta(f"{kind}-{_slug(name)}", delta, prompts)
            for name, delta in self.settings.methods.items()
        }

    def _by_delta(self, name: str, delta: Path | None, prompts: list[Prompt]) -> list[Path]:
        """A method's pictures, one job for each of its deltas."""
        deltas = [delta_of(delta, self.samples[each.sample]) for each in prompts]
        found: dict[int, Path] = {}
        different = list(dict.fromkeys(deltas))
        for number, each in enumerate(different):
            rows = [place for place, other in enumerate(deltas) if other == each]
            suffix = f"-{number:03d}" if len(different) > 1 else ""
            files = self._batch(self.folder / f"{name}{suffix}", each, [prompts[row] for row in rows])
            found |= dict(zip(rows, files, strict=True))
        return [found[place] for place in range(len(prompts))]

    def _batch(self, folder: Path, delta: Path | None, prompts: list[Prompt]) -> list[Path]:
        """One job: its rows, its file, and what is left of its pictures."""
        folder.mkdir(parents=True, exist_ok=True)
        settings = self.settings
        rows = [
            {"picture": str(self.samples[each.sample].path.resolve()), "seed": each.seed}
            | ({} if each.text is None else {"text": each.text, "alpha": settings.alpha})
            for each in prompts
        ]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        write_atomically(folder / "rows.jsonl", lines.encode())
        job = settings.model_dump(mode="json", include=_SHARED, exclude_none=True, exclude_defaults=True)
        job |= {"source": str(folder / "rows.jsonl"), "output_dir": str(folder / "pictures"), "container": "folder"}
        job |= {"batch_size": settings.batch_size, "shard_size": settings.shard_size, "model": settings.model}
        job |= {} if delta is None else {"tuned": str(delta)}
        write_atomically(folder / "job.yaml", yaml.safe_dump(job).encode())
        outcome = batch(
            BatchSettings(job=folder / "job.yaml", quiet=True, process_index=0, process_count=1),
            lambda done: self.report(0.9 * done),
            self.make_device,
        )
        assert isinstance(outcome, BatchOutcome)
        if outcome.interrupted:
            raise InterruptedRun(f"{printable(folder)}: stopped; what is done is kept: the same command goes on")
        if outcome.failed:
            raise InputError(
                f"{outcome.failed} of {len(prompts)} pictures failed, the first with {outcome.failures[0]['error']}: "
                f"mend or leave out what {printable(folder / 'pictures')} names, and start again"
            )
        manifest = Manifest(epath.Path(folder / "pictures"), {})
        records = [(shard, record) for shard in range(outcome.shards) for record in manifest.records(shard)]
        return [folder / "pictures" / shard_name(shard) / record["file"] for shard, record in records]

    def _from_texts(self, prompts: list[Prompt]) -> list[Path]:
        """Pictures of the captions alone, from the same noise; those that are there already stay."""
        folder = self.folder / "plain-text"
        folder.mkdir(parents=True, exist_ok=True)
        files = [folder / f"{place:09d}.png" for place in range(len(prompts))]
        left = np.array([place for place, path in enumerate(files) if not path.is_file()], int)
        if not len(left):
            return files
        bundle = Converter(self.config, self.settings).bundle
        mesh = parallel.make_mesh(None, jax.local_devices())
        names = ("steps", "guidance_scale", "sampler", "height", "width", "eta", "karras")
        options = {name: getattr(self.settings, name) for name in names}
        texts = [self.samples[each.sample].caption(self.settings.template) for each in prompts]
        tokens = tokenize(bundle, texts, truncate=True)
        seeds = np.array([each.seed for each in prompts], np.uint32)

        def sample(places: np.ndarray, tokens: np.ndarray, seeds: np.ndarray) -> np.ndarray:
            pictures, _ = parallel.generate(mesh, bundle, text_prompt(bundle, tokens), seeds=seeds, **options)
            for place, pixels in zip(places, to_uint8(pictures), strict=True):
                save_png(files[place], pixels, {"text": texts[place]})
            return places

        in_batches(sample, left, tokens[left], seeds[left], size=self.settings.batch_size * mesh.size)
        return files

    def _judges(self) -> judges.Judges:
        settings = self.settings
        if settings.clip_judge is None:
            bundle = Converter(self.config, settings.model_copy(update={"tuned": None})).bundle
            clip = judges.own_clip(bundle, None if self.config.inverse_reaches else load_text_tower(self.config))
        else:
            clip = judges.other_clip(settings.clip_judge)
        return judges.Judges(
            clip,
            None if settings.dino is None else judges.dino(settings.dino),
            None if settings.inception is None else judges.inception(settings.inception),
        )

    def _scored(
        self, judge: judges.Judges, real: Seen, prompts: list[Prompt], made: dict[str, list[Path]], whole_subject: bool
    ) -> dict[str, Cells]:
        labels = np.array([each.label for each in self.samples])
        owners = np.array([each.sample for each in prompts])
        references = [np.flatnonzero(labels == labels[n]) if whole_subject else np.array([n]) for n in owners]
        texts = [
            self.samples[each.sample].caption(self.settings.template) if each.text is None else each.text
            for each in prompts
        ]
        subjects = Subjects(references, texts, labels[owners] if whole_subject else owners)
        assert judge.clip.texts is not None
        features = judge.clip.texts(texts)
        rows = {}
        for name, paths in made.items():
            seen = _seen(judge, paths)
            rows[name] = likeness(real, seen, subjects, features) | distances(real, seen)
            rows[name]["CLIP-Score"] = rows[name]["CLIP-I"]
        return rows

    def _note(self, prompts: list[Prompt], judge: judges.Judges) -> str:
        values = decide(self.config, self.settings)
        return (
            f"{len(prompts)} pictures of {len({each.sample for each in prompts})} prompts, {values.sampler}, "
            f"{values.steps} steps, guidance {values.guidance_scale:g}, {values.height}x{values.width}. "
            f"{judge.note} Cosines in percent, 95% bootstrap intervals over prompts; CLIP-Score and CLIP-I compare "
            "with the picture that was the prompt, CLIP-T with the text."
        )


def delta_of(delta: Path | None, sample: Sample) -> Path | None:
    """A method's file for a picture, whose class may stand in the name."""
    return None if delta is None else Path(str(delta).replace("{}", sample.label))


def _seen(judge: judges.Judges, paths: Sequence[Path]) -> Seen:
    others = (None if each is None else each.pictures(paths) for each in (judge.dino, judge.inception))
    return Seen(judge.clip.pictures(paths), *others)


def _slug(name: str) -> str:
    """A method's name as a folder's.

    >>> _slug("FT (both)")
    'ft-both'
    """
    return "-".join("".join(letter if letter.isalnum() else " " for letter in name.lower()).split())

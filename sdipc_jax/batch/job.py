"""A job: its settings checked against its checkpoint and its data set, and what is left to do of it."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import jax
from etils import epath

from sdipc_jax.batch.checks import check_apart, check_columns
from sdipc_jax.batch.items import Reader
from sdipc_jax.batch.manifest import Header, Manifest
from sdipc_jax.batch.pipeline import Device, Progress, Run
from sdipc_jax.batch.settings import JobSettings
from sdipc_jax.checkpoints.bundle import Config
from sdipc_jax.checkpoints.controlnets import with_controlnets
from sdipc_jax.checkpoints.digests import digests
from sdipc_jax.checkpoints.load import configure
from sdipc_jax.datasets.controls import RowControls
from sdipc_jax.datasets.rows import Source, Survey, Wanted
from sdipc_jax.datasets.sources import open_source
from sdipc_jax.errors import InputError
from sdipc_jax.parallel import make_mesh
from sdipc_jax.prompts.converter import Converter
from sdipc_jax.prompts.plan import check_one_vector, plan_conversion
from sdipc_jax.prompts.prompt import sizes_told
from sdipc_jax.prompts.tokens import read_texts
from sdipc_jax.records import Record, digest_of
from sdipc_jax.sampling.advice import advice
from sdipc_jax.sampling.request import decide
from sdipc_jax.settings import Defaults, SizeSettings

# What decides every row's result; what a row may say itself is part of the row's key.
_DECISIVE = (
    "dtype",
    "lora_scale",
    "cutoff",
    "keep_fraction",
    "scale",
    "mode",
    "truncate",
    "long_text",
    "prompt_weights",
    "clip_skip",
)
_SAMPLING = ("steps", "guidance_scale", "guidance_interval", "cache_interval", "sampler", "eta", "karras")
_ROWS = ("text", "alpha", "negative_prompt", "seed", "height", "width", "sizes")
_RESULTS = ("vectors", "container", "format", "quality", "shard_size")


@dataclass(frozen=True)
class Recipe:
    """What is done to every row, without saying to which: settings, checked against their checkpoint.

    Attributes:
        typed: the settings as JSON has them, with what the checkpoint decided.
        decisive: what of them every row's result follows from, with the digests of the checkpoint's files.
    """

    settings: JobSettings
    config: Config
    values: Defaults
    typed: Record
    decisive: Record

    @classmethod
    def make(cls, settings: JobSettings) -> "Recipe":
        """Reads what is known without weights.

        Raises:
            InputError: the checkpoint cannot do what is asked for.
        """
        config = with_controlnets(configure(settings), settings.controlnet)
        if settings.vectors:
            check_one_vector(settings)
        plan = plan_conversion(config, settings)
        values = decide(config, settings)
        for height, width in ((values.height, values.width), *settings.sizes):
            config.latent_shape(height, width)
        sizes_told(config, values.height, values.width, settings)
        texts = [each for each in (settings.text, settings.negative_prompt) if each is not None]
        read_texts(config, texts, **settings.wording)
        typed = settings.model_dump(mode="json") | values.model_dump(mode="json", exclude_none=True)
        typed["negative_prompt"] = config.negative_text(settings.negative_prompt)
        # A scale that is measured follows from the checkpoint.
        names = _DECISIVE if settings.vectors else (*_DECISIVE, *_SAMPLING)
        decisive: Record = {name: typed[name] for name in names} | plan.record()
        decisive["checkpoint"] = digests(config, settings.tuned)
        if settings.fit != "crop":
            decisive["fit"] = settings.fit
        if settings.controlnet:
            decisive["control_detector"] = settings.control_detector
        return cls(settings, config, values, typed, decisive)

    def reader(self) -> Reader:
        """What reads rows."""
        return Reader(self.config, self.settings, self.values, digest_of(self.decisive))

    def device(self, make_device: Callable[..., Device]) -> tuple[Device, tuple[str, ...]]:
        """What runs batches on this process's devices, and what a person should know about it.

        Args:
            make_device: makes it, from `Sampler.make`'s arguments.
        """
        converter = Converter(self.config, self.settings)
        mesh = make_mesh(None, jax.local_devices())
        notes = (*self.config.notes, *advice(self.config, self.settings, self.values), *converter.notes)
        return make_device(converter.bundle, converter.projection, self.settings, self.values, mesh), notes


@dataclass(frozen=True)
class Job:
    """A recipe for the rows of a data set, and the folder for the results."""

    recipe: Recipe
    source: Source
    survey: Survey
    manifest: Manifest
    reader: Reader

    @classmethod
    def make(cls, settings: JobSettings) -> "Job":
        """Looks at the data set.

        Raises:
            InputError: the checkpoint or the data set will not do.
        """
        recipe = Recipe.make(settings)
        columns = settings.columns
        source = open_source(settings.source, None if columns is None else columns.values())
        check_apart(source, settings.output_dir)
        survey = source.survey()
        if survey.rows == 0:
            told = "".join(f"; {note}" for note in survey.notes)
            raise InputError(
                f"source is {settings.source!r}, but there are no pictures{told}, expected one: check the path"
            )
        check_columns(source, settings)
        sizes = {name: recipe.typed[name] for name in SizeSettings.model_fields if recipe.typed[name]}
        record = recipe.decisive | {name: recipe.typed[name] for name in (*_ROWS, *_RESULTS)} | sizes
        record |= settings.model_dump(mode="json", include=set(RowControls.model_fields), exclude_none=True)
        # How many rows a damaged file had is not known.
        rows = {"damaged": survey.damaged} if survey.damaged else {"rows": survey.rows}
        record["source"] = {"sha256": survey.sha256, **rows, "columns": columns}
        manifest = Manifest(epath.Path(settings.output_dir), record, (*survey.damaged, *survey.notes))
        return cls(recipe, source, survey, manifest, recipe.reader())

    @property
    def settings(self) -> JobSettings:
        return self.recipe.settings

    @property
    def rows(self) -> int:
        return self.survey.rows

    @property
    def shards(self) -> int:
        return -(-self.rows // self.settings.shard_size)

    def left(self, shards: Iterable[int], *, verify: bool = False, retry_failed: bool = False) -> "Work":
        """Looks at what is done of some shards.

        Args:
            verify: read every finished shard; otherwise sizes are compared.
            retry_failed: whether failed rows of finished shards are to be done again.
        """
        work, manifest = Work(), self.manifest
        for shard in shards:
            header = manifest.header(shard)
            if header is None:
                if manifest.path(shard).exists():
                    work.notes.append(f"{manifest.path(shard).name} is damaged: the shard is done again")
                work.whole.add(shard)
                continue
            if problem := manifest.problem(header, thorough=verify):
                work.notes.append(f"{problem}: the shard is done again")
                work.whole.add(shard)
            elif header.failed and retry_failed:
                work.partly[shard] = {record["row"] for record in self.failures(shard)}
            else:
                work.finished.append(header)
                continue
            work.former[shard] = header
        return work

    def finished(self, work: "Work", shard: int) -> Header | None:
        """A shard's header, if it was finished since it was found to be left; else None."""
        header = self.manifest.header(shard)
        return None if header == work.former.get(shard) else header

    def failures(self, shard: int) -> Iterator[Record]:
        """The records of a finished shard's rows that have failed."""
        return (record for record in self.manifest.records(shard) if record["status"] == "failed")

    def rows_of(self, work: "Work") -> int:
        """How many rows there are to do."""
        size = self.settings.shard_size
        whole = sum(min(size, self.rows - shard * size) for shard in work.whole)
        return whole + sum(map(len, work.partly.values()))

    def do(
        self,
        work: "Work",
        device: Device,
        stopping: Callable[[Progress], bool] = lambda progress: False,
        report: Callable[[int], None] = lambda done: None,
    ) -> Progress:
        """Does what is left.

        Args:
            stopping: asked between batches whether to stop.
            report: called with the number of rows that are done or failed.
        """
        run = Run(
            job=self.settings,
            manifest=self.manifest,
            device=device,
            batch_size=self.settings.batch_size * jax.local_device_count(),
            kept=lambda shard: self._kept(work, shard),
            finished=lambda shard: self.finished(work, shard) is not None,
            stopping=stopping,
            report=report,
        )
        return run(self.source.rows(work.rows(self.settings.shard_size)), self.reader)

    def _kept(self, work: "Work", shard: int) -> list[Record]:
        """The results that stay in a shard, others of which are tried again."""
        again = work.partly.get(shard)
        if again is None:
            return []
        # Others may have done those meanwhile.
        return [each for each in self.manifest.records(shard) if each["status"] == "done" and each["row"] not in again]


@dataclass
class Work:
    """What is left to do of some shards."""

    whole: set[int] = field(default_factory=set)
    partly: dict[int, set[int]] = field(default_factory=dict)
    """Shards in which some rows have failed, with the numbers of those rows."""
    former: dict[int, Header] = field(default_factory=dict)
    """What is said so far of those that are done again."""
    finished: list[Header] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.whole or self.partly)

    @property
    def shards(self) -> list[int]:
        """Those in which something is left, in order."""
        return sorted(self.whole | self.partly.keys())

    def rows(self, shard_size: int) -> Wanted:
        """Those that are left."""
        whole = (range(shard * shard_size, (shard + 1) * shard_size) for shard in self.whole)
        return Wanted([*whole, *(range(row, row + 1) for rows in self.partly.values() for row in rows)])

    def only(self, shards: Iterable[int]) -> "Work":
        """What is left of these."""
        chosen = set(shards)
        partly = {shard: rows for shard, rows in self.partly.items() if shard in chosen}
        former = {shard: header for shard, header in self.former.items() if shard in chosen}
        return Work(self.whole & chosen, partly, former=former)

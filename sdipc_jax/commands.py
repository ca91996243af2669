"""The commands: settings in, files out. What can be refused is refused before anything is compiled."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32
from safetensors import SafetensorError
from safetensors.numpy import load_file
from safetensors.numpy import save as to_safetensors

from sdipc_jax import parallel
from sdipc_jax.checkpoints.bundle import Bundle, Config
from sdipc_jax.checkpoints.keys import DEEP_PROMPTS_FILE, INVERSE_FILE
from sdipc_jax.checkpoints.load import load_weights, read_config
from sdipc_jax.checkpoints.tensors import load_tree, weight_files
from sdipc_jax.errors import InputError, printable
from sdipc_jax.files import write_atomically
from sdipc_jax.parallel import AXIS, Watchdog
from sdipc_jax.pictures.outputs import OutputFolder, Subject, check_output, check_writable
from sdipc_jax.pictures.preprocessing import preprocess
from sdipc_jax.pictures.reading import read_picture
from sdipc_jax.pictures.sheets import thumbnail
from sdipc_jax.prompts.contexts import edit_prompt, image_prompt, text_prompt
from sdipc_jax.prompts.projection import closed_form, convert, default_scale, truncated_pinv
from sdipc_jax.prompts.tokens import token_ids
from sdipc_jax.prompts.vision import encode_images
from sdipc_jax.records import Record
from sdipc_jax.samplers import SAMPLERS
from sdipc_jax.sampling.decoding import to_uint8
from sdipc_jax.sampling.request import choose_intervals
from sdipc_jax.settings import (
    FAST,
    Defaults,
    EditSettings,
    ParallelSettings,
    ProjectionSettings,
    PromptSettings,
    SamplerSettings,
    SamplingSettings,
    Settings,
    SpectrumSettings,
    TextSettings,
    VarySettings,
)
from sdipc_jax.spectrum import Spectrum, measure, plot

# Called with how much is done, from 0 to 1.
Report = Callable[[float], None]


@dataclass(frozen=True)
class Outcome:
    """What a command did.

    Attributes:
        records: one for each picture made.
        failures: one for each input that could not be used, with `input` and `error`.
        files: what was written, the one to look at last.
        notes: what a person should know besides.
    """

    records: list[Record]
    files: list[Path]
    failures: list[Record] = field(default_factory=list)
    notes: tuple[str, ...] = ()

    def to_json(self) -> Record:
        """What `--json` prints."""
        return {
            "records": self.records,
            "files": [str(path) for path in self.files],
            "failures": self.failures,
            "notes": self.notes,
        }

    def __str__(self) -> str:
        flagged = sum(record.get("flagged", False) for record in self.records)
        withheld = f", {flagged} of them withheld by the safety checker" if flagged else ""
        summary = f"{len(self.records)} done{withheld}, {len(self.failures)} failed; see {printable(self.files[-1])}"
        return "\n".join([*self.notes, summary])


def vary(settings: VarySettings, report: Report) -> Outcome:
    """Variations of each picture (eqs. 6 and 7)."""
    job = _SamplingJob(settings)
    inputs, failures = _read_all(job.config, settings.pictures)
    job.check([each.subject for each in inputs])
    converter = Converter(job.config, settings)
    context = image_prompt(converter.bundle, converter.vectors(inputs))
    return job.run(converter.bundle, context, [each.subject for each in inputs], report, failures, converter)


def edit(settings: EditSettings, report: Report) -> Outcome:
    """The picture with the text's change (eq. 8)."""
    job = _SamplingJob(settings)
    tokens = token_ids(job.config, [settings.text], truncate=settings.truncate)
    inputs, failures = _read_all(job.config, [settings.picture])
    job.check([each.subject for each in inputs])
    converter = Converter(job.config, settings)
    context = edit_prompt(converter.bundle, converter.vectors(inputs), tokens, settings.alpha)
    return job.run(converter.bundle, context, [each.subject for each in inputs], report, failures, converter)


def text(settings: TextSettings, report: Report) -> Outcome:
    """Plain text to image."""
    job = _SamplingJob(settings)
    tokens = token_ids(job.config, settings.texts, truncate=settings.truncate)
    subjects = [Subject(prompt, {"text": prompt}) for prompt in settings.texts]
    job.check(subjects)
    bundle = load_weights(job.config, settings.tuned)
    return job.run(bundle, text_prompt(bundle, tokens), subjects, report)


def prompt(settings: PromptSettings, report: Report) -> Outcome:
    """Pictures as prompts, in a safetensors file."""
    config = read_config(settings.model, settings.clip, dtype=settings.dtype)
    _ = config.vision_side
    check_writable(settings.output.parent)
    if settings.output.is_dir():
        raise InputError(f"{printable(settings.output)}: found a folder, expected a file: choose another --output")
    if settings.output.exists() and not settings.overwrite:
        raise InputError(f"{printable(settings.output)} is there already: choose another --output or --overwrite")
    tokens = None if settings.text is None else token_ids(config, [settings.text], truncate=settings.truncate)
    inputs, failures = _read_all(config, settings.pictures)
    converter = Converter(config, settings)
    vectors = converter.vectors(inputs)
    if tokens is None:
        context = image_prompt(converter.bundle, vectors)
    else:
        context = edit_prompt(converter.bundle, vectors, tokens, settings.alpha)
    arrays = {"prompt_embeds": np.asarray(context), "image_vectors": np.asarray(vectors)}
    metadata = {
        "files": json.dumps([each.subject.record["input"] for each in inputs]),
        "settings": json.dumps(_plain(settings, {"pictures", "output"}) | converter.values),
        "checkpoint": json.dumps(digests(config, settings.tuned)),
        "format": "pt",
    }
    settings.output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(settings.output, to_safetensors(arrays, metadata))
    report(1.0)
    records = [each.subject.record for each in inputs]
    return Outcome(records, [settings.output], failures, (*_notes(records), *converter.notes))


def spectrum(settings: SpectrumSettings, report: Report) -> Spectrum:
    """Measures the checkpoint's converter and plots its singular values."""
    config = read_config(settings.model, settings.clip, dtype=settings.dtype)
    _ = config.vision_side
    path = settings.output_dir / "spectrum.png"
    check_writable(settings.output_dir)
    if path.exists() and not settings.overwrite:
        raise InputError(f"{printable(path)} is there already: choose another --output-dir or --overwrite")
    inputs, _ = _read_all(config, [settings.picture] if settings.picture else [])
    converter = Converter(config, settings)
    features = encode_images(converter.bundle, inputs[0].pixels[None]) if inputs else None
    measured = replace(measure(converter.bundle, converter.projection, features), plot=str(path))
    settings.output_dir.mkdir(parents=True, exist_ok=True)
    plot(measured, path)
    report(1.0)
    return measured


class Converter:
    """The checkpoint and its closed form, with what the checkpoint decided.

    Attributes:
        values: the cut-off and the scale that are used.
        notes: says so where the scale had to be measured.
    """

    def __init__(self, config: Config, settings: ProjectionSettings) -> None:
        cutoff = config.defaults.cutoff if settings.cutoff is None else settings.cutoff
        _check_projection(config, 0.0 if settings.keep_fraction else cutoff)
        self.config = config
        self.bundle = load_weights(config, settings.tuned)
        self.projection = closed_form(
            self.bundle, cutoff, settings.scale, settings.mode, keep_fraction=settings.keep_fraction
        )
        scale = float(self.projection.scale)
        self.values = {"cutoff": None if settings.keep_fraction else cutoff, "scale": scale}
        self.notes: tuple[str, ...] = ()
        if settings.scale is None and default_scale(config) is None:
            self.notes = (f"scale {scale:.4g}, measured over built-in captions",)

    def vectors(self, inputs: Sequence["_Input"]) -> Float[Array, "N D_text"]:
        # One at a time: the same picture gives the same vector to the bit, whatever stands beside it.
        features = [encode_images(self.bundle, each.pixels[None]) for each in inputs]
        return convert(self.projection, jnp.concatenate(features))


def _check_projection(config: Config, cutoff: float) -> None:
    """Refuses a cut-off that leaves nothing, before gigabytes are loaded and anything is compiled."""
    shape = jax.ShapeDtypeStruct((config.text.hidden_size, config.vision_side.projection_dim), jnp.float32)
    others = ("text_model.", "vision_model.", "visual_projection.", "logit_scale")
    folder = Path(config.vision_side.folder)
    tree = load_tree(folder, "clip", {"text_projection": {"kernel": shape}}, unused_prefixes=others)
    truncated_pinv(np.asarray(tree["text_projection"]["kernel"]), cutoff)


def decide(config: Config, settings: SamplerSettings) -> Defaults:
    """What is typed, and where nothing is, what `fast` stands for and what the checkpoint asks for.

    Raises:
        InputError: the sampler does not take these steps, or both intervals are asked for.
    """
    chosen = {name: getattr(settings, name, None) for name in Defaults.model_fields}
    defaults = config.defaults.model_copy(update=FAST if settings.fast else {})
    values = defaults.model_copy(update={name: value for name, value in chosen.items() if value is not None})
    SAMPLERS[values.sampler].schedule(config.scheduler, values.steps, karras=settings.karras)
    guidance, cached = choose_intervals(defaults, settings.guidance_interval, settings.cache_interval)
    return values.model_copy(update={"guidance_interval": guidance, "cache_interval": cached})


class _SamplingJob:
    """What `vary`, `edit` and `text` share. Making one checks the settings against the checkpoint."""

    def __init__(self, settings: SamplingSettings) -> None:
        self.settings = settings
        self.mesh = parallel.start(settings)
        self.config = config = read_config(settings.model, settings.clip, dtype=settings.dtype)
        if isinstance(settings, ProjectionSettings):
            _ = config.vision_side
        self.values = decide(config, settings)
        shape = config.latent_shape(self.values.height, self.values.width)
        self.latents = None
        if settings.latents is not None:
            self.latents = _read_latents(settings.latents, (settings.num_images, *shape))
        self.negative = token_ids(config, [settings.negative_prompt], truncate=settings.truncate)

    def check(self, subjects: Sequence[Subject]) -> None:
        """Refuses an output folder that will not do, and processes that do not agree; the last moment to refuse."""
        settings = self.settings
        if parallel.is_first():
            check_output(settings.output_dir, subjects, settings.num_images, settings.overwrite)
        self.record: Record = {
            "seed": settings.seed,
            "settings": self._record(),
            "checkpoint": digests(self.config, settings.tuned),
        }
        parallel.agree(self.record | {"inputs": [subject.record for subject in subjects]})

    def run(
        self,
        bundle: Bundle,
        context: Float[Array, "P L D"],
        subjects: list[Subject],
        report: Report,
        failures: Sequence[Record] = (),
        converter: Converter | None = None,
    ) -> Outcome:
        """Samples `num_images` pictures of each subject; each is saved as soon as its batch is done.

        Of several processes each samples on its devices, and the first receives all pictures and saves them.
        """
        settings, several = self.settings, jax.process_count() > 1
        record = self.record | {"settings": self.record["settings"] | (converter.values if converter else {})}
        folder = OutputFolder(settings.output_dir, subjects) if parallel.is_first() else None
        if folder:
            for failure in failures:
                folder.add_record(failure)
        negative = text_prompt(bundle, self.negative)
        # One device runs the programs that `sdipc compile` has made, which know of no mesh.
        if self.mesh.size > 1:
            bundle = parallel.replicate(self.mesh, bundle)
        rows = [(subject, index) for subject in range(len(subjects)) for index in range(settings.num_images)]
        size = min(settings.batch_size * self.mesh.size, len(rows))
        with Watchdog() as watchdog:
            for first in range(0, len(rows), size):
                batch = rows[first : first + size]

                def batch_report(done: int, total: int, first: int = first, count: int = len(batch)) -> None:
                    report((first + count * done / total) / len(rows))

                # A last batch that is not full is filled up, so that it runs the program that is there.
                filled = batch + batch[-1:] * (size - len(batch))
                # Only with others is there something to wait for in vain.
                with watchdog.step() if several else nullcontext():
                    pictures, flagged = self._sample(bundle, context, negative, filled, batch_report)
                for (subject, index), picture, is_flagged in zip(batch, pictures, flagged, strict=False):
                    if folder:
                        folder.add(subject, index, picture, record | ({"flagged": True} if is_flagged else {}))
        notes = (*_notes(each.record for each in subjects), *(converter.notes if converter else ()))
        if folder is None:
            return Outcome([], [], list(failures), notes)
        records = [line for line in folder.records if "file" in line]
        files = [*(settings.output_dir / line["file"] for line in records), folder.finish()]
        return Outcome(records, files, list(failures), notes)

    def _sample(
        self,
        bundle: Bundle,
        context: Float[Array, "P L D"],
        negative: Float[Array, "1 L D"],
        rows: Sequence[tuple[int, int]],
        report: Callable[[int, int], None],
    ) -> tuple[np.ndarray, np.ndarray]:
        subjects = np.array([subject for subject, _ in rows])
        indices = np.array([index for _, index in rows])
        values, settings = self.values, self.settings
        pictures, flagged = parallel.generate(
            self.mesh,
            bundle,
            context[subjects],
            report,
            negative=negative,
            seeds=settings.seed,
            indices=indices,
            latents=None if self.latents is None else self.latents[indices],
            steps=values.steps,
            guidance_scale=values.guidance_scale,
            guidance_interval=values.guidance_interval,
            cache_interval=values.cache_interval,
            sampler=values.sampler,
            eta=settings.eta,
            height=values.height,
            width=values.width,
            karras=settings.karras,
        )
        return to_uint8(pictures), np.asarray(flagged)

    def _record(self) -> Record:
        """Every setting, those left out as the checkpoint has them."""
        left_out = {"pictures", "picture", "texts", "seed", "output_dir", *ParallelSettings.model_fields}
        settings = _plain(self.settings, left_out) | {"mesh": f"{AXIS}={self.mesh.size}"}
        return settings | self.values.model_dump(include=set(settings))


def digests(config: Config, tuned: Path | None) -> dict[str, str]:
    """The sha256 of each file that decides what is made: weights, configurations, tokenizer, a tuning's delta."""
    folders = {name: Path(config.folder, name) for name in ("unet", "vae", "text_encoder")}
    if config.safety is not None:
        folders["safety_checker"] = Path(config.folder, "safety_checker")
    if config.clip is not None:
        folders["clip"] = Path(config.clip.folder)
    files = {f"{name}/{file.name}": file for name, folder in folders.items() for file in weight_files(folder)}
    for name in (*folders, "tokenizer", "scheduler", "feature_extractor"):
        folder = folders.get(name, Path(config.folder, name))
        files |= {f"{name}/{file.name}": file for file in sorted([*folder.glob("*.json"), *folder.glob("*.txt")])}
    if config.clip is not None:
        trained = (Path(config.clip.folder, name) for name in (DEEP_PROMPTS_FILE, INVERSE_FILE))
        files |= {f"clip/{file.name}": file for file in trained if file.is_file()}
    if tuned is not None:
        files["tuned"] = tuned
    digest = {}
    for name, file in files.items():
        with file.open("rb") as stream:
            digest[name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return digest


@dataclass(frozen=True)
class _Input:
    """A picture as it is needed from here on: for the vision tower, for the sheet, for the manifest."""

    subject: Subject
    pixels: Float32[np.ndarray, "S S 3"]


def _read_all(config: Config, paths: Sequence[Path]) -> tuple[list[_Input], list[Record]]:
    """The pictures that can be read, and a record of each that cannot.

    Raises:
        InputError: none can be read.
    """
    inputs, failures = [], []
    for path in paths:
        try:
            picture = read_picture(path)
        except InputError as error:
            failures.append({"input": str(path), "error": str(error)})
            continue
        notes = {"notes": list(picture.notes)} if picture.notes else {}
        record = {"input": str(path), "input_sha256": picture.sha256} | notes
        subject = Subject(path.stem, record, thumbnail(picture.pixels))
        inputs.append(_Input(subject, preprocess(picture.pixels, config.vision_side.preprocessing)))
    if failures and not inputs:
        others = f" (and none of the other {len(failures) - 1} can be used)" if len(failures) > 1 else ""
        raise InputError(failures[0]["error"] + others)
    return inputs, failures


def _notes(records: Iterable[Record]) -> Iterator[str]:
    """What is odd about the inputs, a line each."""
    for record in records:
        if "notes" in record:
            yield f"{printable(record['input'])}: {'; '.join(record['notes'])}"


def _read_latents(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    name = printable(path)
    expected = f"expected 'latents' of float32 {shape}, one row a picture"
    try:
        found = load_file(path).get("latents")
    except (OSError, SafetensorError) as error:
        raise InputError(f"{name}: no readable safetensors file ({error}), {expected}: check the path") from None
    if found is None or found.dtype != np.float32 or found.shape != shape:
        what = "no tensor 'latents'" if found is None else f"latents of {found.dtype} {found.shape}"
        raise InputError(f"{name}: found {what}, {expected}: save them anew, or change --num-images or the size")
    if not np.isfinite(found).all():
        raise InputError(f"{name}: latents hold NaN or infinity, expected noise of unit variance: draw them anew")
    return found


def _plain(settings: Settings, left_out: set[str]) -> Record:
    return settings.model_dump(mode="json", exclude={"json_", "quiet", "overwrite"} | left_out)

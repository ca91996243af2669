"""The commands: settings in, files out. What can be refused is refused before anything is compiled."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32
from safetensors import SafetensorError
from safetensors.numpy import load_file
from safetensors.numpy import save as to_safetensors

from sdipc_jax.bundle import Bundle, Config
from sdipc_jax.checkpoints.load import load_weights, read_config
from sdipc_jax.checkpoints.tensors import weight_files
from sdipc_jax.errors import InputError
from sdipc_jax.generate import generate_with_progress, to_uint8
from sdipc_jax.images import preprocess, read_picture
from sdipc_jax.outputs import OutputFolder, Record, Subject, check_output, check_writable
from sdipc_jax.projection import Projection, closed_form, convert
from sdipc_jax.prompts import edit_prompt, image_prompt, text_prompt
from sdipc_jax.samplers import SAMPLERS
from sdipc_jax.settings import (
    Defaults,
    EditSettings,
    ProjectionSettings,
    PromptSettings,
    SamplingSettings,
    Settings,
    SpectrumSettings,
    TextSettings,
    VarySettings,
)
from sdipc_jax.sheets import thumbnail, write_atomically
from sdipc_jax.spectrum import Spectrum, measure, plot
from sdipc_jax.tokens import token_ids
from sdipc_jax.vision import encode_images

# Called with how much is done, from 0 to 1.
Report = Callable[[float], None]


@dataclass(frozen=True)
class Outcome:
    """What a command did.

    Attributes:
        records: one for each picture made.
        failures: one for each input that could not be used, with `input` and `error`.
        files: what was written, the one to look at last.
    """

    records: list[Record]
    files: list[Path]
    failures: list[Record] = field(default_factory=list)

    def to_json(self) -> Record:
        """What `--json` prints."""
        return {"records": self.records, "files": [str(path) for path in self.files], "failures": self.failures}

    def __str__(self) -> str:
        flagged = sum(record.get("flagged", False) for record in self.records)
        withheld = f", {flagged} of them withheld by the safety checker" if flagged else ""
        return f"{len(self.records)} done{withheld}, {len(self.failures)} failed; see {self.files[-1]}"


def vary(settings: VarySettings, report: Report) -> Outcome:
    """Variations of each picture (eqs. 6 and 7)."""
    job = _SamplingJob(settings)
    inputs, failures = _read_all(job.config, settings.pictures)
    bundle, projection = _load(job.config, settings)
    context = image_prompt(bundle, _vectors(bundle, projection, inputs))
    return job.run(bundle, context, [each.subject for each in inputs], failures, report)


def edit(settings: EditSettings, report: Report) -> Outcome:
    """The picture with the text's change (eq. 8)."""
    job = _SamplingJob(settings)
    tokens = token_ids(job.config, [settings.text], truncate=settings.truncate)
    inputs, failures = _read_all(job.config, [settings.picture])
    bundle, projection = _load(job.config, settings)
    context = edit_prompt(bundle, _vectors(bundle, projection, inputs), tokens, settings.alpha)
    return job.run(bundle, context, [each.subject for each in inputs], failures, report)


def text(settings: TextSettings, report: Report) -> Outcome:
    """Plain text to image."""
    job = _SamplingJob(settings)
    tokens = token_ids(job.config, settings.texts, truncate=settings.truncate)
    bundle = load_weights(job.config)
    subjects = [Subject(prompt, {"text": prompt}) for prompt in settings.texts]
    return job.run(bundle, text_prompt(bundle, tokens), subjects, [], report)


def prompt(settings: PromptSettings, report: Report) -> Outcome:
    """Pictures as prompts, in a safetensors file."""
    config = read_config(settings.model, settings.clip, dtype=settings.dtype)
    _ = config.vision_side
    check_writable(settings.output.parent)
    if settings.output.exists() and not settings.overwrite:
        raise InputError(f"{settings.output} is there already: choose another --output or --overwrite")
    tokens = None if settings.text is None else token_ids(config, [settings.text], truncate=settings.truncate)
    inputs, failures = _read_all(config, settings.pictures)
    bundle, projection = _load(config, settings)
    vectors = _vectors(bundle, projection, inputs)
    context = image_prompt(bundle, vectors)
    if tokens is not None:
        context = edit_prompt(bundle, vectors, tokens, settings.alpha)
    arrays = {"prompt_embeds": np.asarray(context), "image_vectors": np.asarray(vectors)}
    metadata = {
        "files": json.dumps([each.subject.record["input"] for each in inputs]),
        "settings": json.dumps(_plain(settings)),
        "format": "pt",
    }
    settings.output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(settings.output, to_safetensors(arrays, metadata))
    report(1.0)
    return Outcome([each.subject.record for each in inputs], [settings.output], failures)


def spectrum(settings: SpectrumSettings, report: Report) -> Spectrum:
    """Measures the checkpoint's converter and plots its singular values."""
    config = read_config(settings.model, settings.clip, dtype=settings.dtype)
    _ = config.vision_side
    path = settings.output_dir / "spectrum.png"
    check_writable(settings.output_dir)
    if path.exists() and not settings.overwrite:
        raise InputError(f"{path} is there already: choose another --output-dir or --overwrite")
    inputs, _ = _read_all(config, [settings.picture] if settings.picture else [])
    bundle, projection = _load(config, settings)
    features = encode_images(bundle, inputs[0].pixels[None]) if inputs else None
    measured = measure(bundle, projection, features)
    settings.output_dir.mkdir(parents=True, exist_ok=True)
    plot(measured, path)
    report(1.0)
    return measured


class _SamplingJob:
    """What `vary`, `edit` and `text` share. Making one checks the settings against the checkpoint."""

    def __init__(self, settings: SamplingSettings) -> None:
        self.settings = settings
        self.config = config = read_config(settings.model, settings.clip, dtype=settings.dtype)
        if isinstance(settings, ProjectionSettings):
            _ = config.vision_side
        chosen = {name: getattr(settings, name, None) for name in Defaults.model_fields}
        self.values = config.defaults.model_copy(update={k: v for k, v in chosen.items() if v is not None})
        shape = config.latent_shape(self.values.height, self.values.width)
        SAMPLERS[self.values.sampler].schedule(config.scheduler, self.values.steps, karras=settings.karras)
        self.latents = None
        if settings.latents is not None:
            self.latents = _read_latents(settings.latents, (settings.num_images, *shape))
        self.negative = token_ids(config, [settings.negative_prompt], truncate=settings.truncate)
        check_output(settings.output_dir, settings.overwrite)

    def run(
        self,
        bundle: Bundle,
        context: Float[Array, "P L D"],
        subjects: list[Subject],
        failures: list[Record],
        report: Report,
    ) -> Outcome:
        """Samples `num_images` pictures of each subject; each is saved as soon as its batch is done."""
        settings = self.settings
        record = {"seed": settings.seed, "settings": self._record(), "checkpoint": digests(self.config)}
        folder = OutputFolder(settings.output_dir, subjects)
        for failure in failures:
            folder.add_record(failure)
        rows = [(subject, index) for subject in range(len(subjects)) for index in range(settings.num_images)]
        size = min(settings.batch_size, len(rows))
        for first in range(0, len(rows), size):
            batch = rows[first : first + size]

            def batch_report(done: int, total: int, first: int = first, count: int = len(batch)) -> None:
                report((first + count * done / total) / len(rows))

            # A last batch that is not full is filled up, so that it runs the program that is there.
            pictures, flagged = self._sample(bundle, context, batch + batch[-1:] * (size - len(batch)), batch_report)
            for (subject, index), picture, is_flagged in zip(batch, pictures, flagged, strict=False):
                folder.add(subject, index, picture, record | ({"flagged": True} if is_flagged else {}))
        made = [settings.output_dir / line["file"] for line in folder.records if "file" in line]
        return Outcome([line for line in folder.records if "file" in line], [*made, folder.finish()], failures)

    def _sample(
        self,
        bundle: Bundle,
        context: Float[Array, "P L D"],
        rows: Sequence[tuple[int, int]],
        report: Callable[[int, int], None],
    ) -> tuple[np.ndarray, np.ndarray]:
        subjects = np.array([subject for subject, _ in rows])
        indices = np.array([index for _, index in rows])
        values, settings = self.values, self.settings
        pictures, flagged = generate_with_progress(
            bundle,
            context[subjects],
            report,
            negative=text_prompt(bundle, self.negative),
            seeds=settings.seed,
            indices=indices,
            latents=None if self.latents is None else self.latents[indices],
            steps=values.steps,
            guidance_scale=values.guidance_scale,
            sampler=values.sampler,
            eta=settings.eta,
            height=values.height,
            width=values.width,
            karras=settings.karras,
        )
        return to_uint8(pictures), np.asarray(flagged)

    def _record(self) -> Record:
        """Every setting, those left out as the checkpoint has them."""
        left_out = {"pictures", "picture", "texts", "seed", "json_", "quiet", "overwrite", "output_dir"}
        settings = {name: value for name, value in _plain(self.settings).items() if name not in left_out}
        return settings | self.values.model_dump(include=settings.keys() & self.values.model_fields_set)


def digests(config: Config) -> dict[str, str]:
    """The sha256 of each weight file that the configuration names."""
    folders = {name: Path(config.folder, name) for name in ("unet", "vae", "text_encoder")}
    if config.safety is not None:
        folders["safety_checker"] = Path(config.folder, "safety_checker")
    if config.clip is not None:
        folders["clip"] = Path(config.clip.folder)
    found = {}
    for name, folder in folders.items():
        for file in weight_files(folder):
            with file.open("rb") as stream:
                found[f"{name}/{file.name}"] = hashlib.file_digest(stream, "sha256").hexdigest()
    return found


def _load(config: Config, settings: ProjectionSettings) -> tuple[Bundle, Projection]:
    bundle = load_weights(config)
    projection = closed_form(
        bundle, settings.cutoff, settings.scale, settings.mode, keep_fraction=settings.keep_fraction
    )
    return bundle, projection


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
        raise InputError(failures[0]["error"])
    return inputs, failures


def _vectors(bundle: Bundle, projection: Projection, inputs: Sequence[_Input]) -> Float[Array, "N D_text"]:
    # One at a time: the same picture gives the same vector to the bit, whatever stands beside it.
    features = [encode_images(bundle, each.pixels[None]) for each in inputs]
    return convert(projection, jnp.concatenate(features))


def _read_latents(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    try:
        found = load_file(path).get("latents")
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: not a safetensors file ({error})") from None
    if found is None or found.dtype != np.float32 or found.shape != shape:
        what = "no tensor 'latents'" if found is None else f"latents of {found.dtype} {found.shape}"
        raise InputError(f"{path}: found {what}, expected 'latents' of float32 {shape}, one row a picture")
    if not np.isfinite(found).all():
        raise InputError(f"{path}: latents hold NaN or infinity, expected noise of unit variance")
    return found


def _plain(settings: Settings) -> Record:
    return settings.model_dump(mode="json", by_alias=False)

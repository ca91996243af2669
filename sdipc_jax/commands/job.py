"""What `vary`, `edit` and `text` share: checks before anything is compiled, then sampling, then files."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float

from sdipc_jax import parallel
from sdipc_jax.checkpoints.bundle import Bundle, for_sampling
from sdipc_jax.checkpoints.controlnets import with_controlnets
from sdipc_jax.commands.controlnets import read_controls
from sdipc_jax.commands.inputs import read_latents
from sdipc_jax.commands.opening import FILES, Opening
from sdipc_jax.commands.outcome import Outcome, notes_of, plain
from sdipc_jax.commands.settings import ControlNetSettings, StartSettings
from sdipc_jax.commands.starting import Starting
from sdipc_jax.commands.watching import Watching
from sdipc_jax.parallel import AXIS, Watchdog
from sdipc_jax.pictures.outputs import OutputFolder, Subject, check_output
from sdipc_jax.prompts.contexts import negative_prompt
from sdipc_jax.prompts.converter import Converter
from sdipc_jax.prompts.plan import plan_conversion
from sdipc_jax.prompts.prompt import AnyPrompt, Prompt, sizes_told
from sdipc_jax.prompts.tokens import Group, Texts, read_texts, with_chunks
from sdipc_jax.records import Record, Report
from sdipc_jax.sampling import Control, Start
from sdipc_jax.sampling.advice import advice
from sdipc_jax.sampling.decoding import check_finite, to_uint8
from sdipc_jax.sampling.request import decide
from sdipc_jax.settings import (
    ParallelSettings,
    ProjectionSettings,
    SamplingSettings,
)


class Prompts(NamedTuple):
    """What a command has sampled.

    Attributes:
        context: a prompt for each subject, or R of them (P, R, L, D).
        weights: of the R prompts, (P or 1, R, layers, evaluations, h, w).
        negative: what guidance leads away from, if not the negative prompt's text.
        groups: the tokens of each subject's prompt, where a command knows them.
    """

    context: AnyPrompt | Float[Array, "P R L D"]
    weights: np.ndarray | None = None
    negative: AnyPrompt | None = None
    groups: Sequence[Sequence[Group]] = ()


class SamplingJob:
    """What `vary`, `edit` and `text` share. Making one checks the settings against the checkpoint."""

    def __init__(self, settings: SamplingSettings, opening: Opening = FILES) -> None:
        self.settings, self.opening = settings, opening
        self.mesh = parallel.start(settings)
        self.config = config = opening.config(settings)
        if isinstance(settings, ControlNetSettings):
            self.config = config = with_controlnets(config, settings.controlnet)
        if isinstance(settings, ProjectionSettings):
            plan_conversion(config, settings)
        self.values = decide(config, settings)
        self.advice = tuple(advice(config, settings, self.values))
        self.sizes = sizes_told(config, self.values.height, self.values.width, settings)
        shape = config.latent_shape(self.values.height, self.values.width)
        self.latents = None
        if settings.latents is not None:
            self.latents = read_latents(settings.latents, (settings.num_images, *shape))
        self.negative_text = config.negative_text(settings.negative_prompt)
        self.negative = read_texts(config, [self.negative_text or ""], **settings.wording)
        self.starting: Starting | None = None
        self.controls: list[Control] = []
        self.control_record: Record = {}
        if isinstance(settings, ControlNetSettings):
            self.controls, self.control_record = read_controls(settings, self.values)
        self.watching = Watching(config, settings)

    def start_from(self, pictures: Sequence[Path] = ()) -> None:
        """Reads what sampling starts from, if that is asked for.

        Args:
            pictures: the subjects' own, which are it if no other is named.
        """
        if isinstance(self.settings, StartSettings):
            self.starting = Starting(self.config, self.settings, self.values, pictures)

    @property
    def first(self) -> int:
        """The evaluation that sampling begins with."""
        return self.starting.first if self.starting else 0

    def read(self, texts: Sequence[str]) -> Texts:
        """Prompts, with as many chunks as the negative prompt, or that with as many as they have."""
        found = read_texts(self.config, texts, **self.settings.wording)
        self.negative = with_chunks(self.config, self.negative, found.tokens.shape[-1])
        return with_chunks(self.config, found, self.negative.tokens.shape[-1])

    def check(self, subjects: Sequence[Subject]) -> None:
        """Refuses an output folder that will not do, and processes that do not agree; the last moment to refuse."""
        settings = self.settings
        if parallel.is_first():
            check_output(settings.folder, subjects, settings.num_images, settings.overwrite)
        self.record: Record = {
            "seed": settings.seed,
            "settings": self._record(),
            "checkpoint": self.opening.digests(self.config, settings.tuned),
        }
        self.record |= (self.starting.record if self.starting else {}) | self.control_record
        parallel.agree(self.record | {"inputs": [subject.record for subject in subjects]})

    def converter(self) -> Converter:
        """The checkpoint with its converter."""
        return self.opening.converter(self.config, self.settings)

    def negative_prompt(self, bundle: Bundle) -> AnyPrompt:
        """What guidance leads away from."""
        return negative_prompt(bundle) if self.negative_text is None else negative_prompt(bundle, *self.negative)

    def run(
        self,
        bundle: Bundle,
        prompts: Prompts | AnyPrompt,
        subjects: list[Subject],
        report: Report,
        failures: Sequence[Record] = (),
        converter: Converter | None = None,
    ) -> Outcome:
        """Samples `num_images` pictures of each subject; each is saved as soon as its batch is done.

        The text encoders and the CLIP are let go: callers should hold no bundle of their own. Of several processes each
        samples on its devices, and the first receives all pictures and saves them.
        """
        settings, several = self.settings, jax.process_count() > 1
        record = self.record | {"settings": self.record["settings"] | (converter.values if converter else {})}
        folder = OutputFolder(settings.folder, subjects) if parallel.is_first() else None
        if folder:
            for failure in failures:
                folder.add_record(failure)
        prompts = prompts if isinstance(prompts, Prompts) else Prompts(prompts)
        if isinstance(prompts.context, Prompt):
            prompts = prompts._replace(context=prompts.context.with_sizes(*self.sizes.values()))
        negative = self.negative_prompt(bundle) if prompts.negative is None else prompts.negative
        # The towers' memory is free from here on.
        bundle = for_sampling(bundle)
        if converter is not None:
            converter.release()
        start = self.starting.start(bundle, len(subjects)) if self.starting else None
        alone = bundle
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
                    pictures, flagged = self._sample(bundle, prompts, negative, start, filled, batch_report)
                for (subject, index), picture, is_flagged in zip(batch, pictures, flagged, strict=False):
                    if folder:
                        folder.add(subject, index, picture, record | ({"flagged": True} if is_flagged else {}))
        notes = (
            *self.config.notes,
            *self.advice,
            *notes_of(each.record for each in subjects),
            *(converter.notes if converter else ()),
        )
        if folder is None:
            return Outcome([], [], list(failures), notes)
        records = [line for line in folder.records if "file" in line]
        sheets = []
        if self.watching.draws:
            for place, (shown, groups) in enumerate(zip(subjects, prompts.groups, strict=True)):
                sheets.append(settings.folder / f"{shown.name}-attention.png")
                arguments, options = self._arguments(prompts, negative, start, [(place, 0)])
                self.watching.draw(sheets[-1], alone, arguments, groups, record | shown.record, **options)
        files = [*(settings.folder / line["file"] for line in records), *sheets, folder.finish()]
        return Outcome(records, files, list(failures), notes)

    def _sample(
        self,
        bundle: Bundle,
        prompts: Prompts,
        negative: AnyPrompt,
        start: Start | None,
        rows: Sequence[tuple[int, int]],
        report: Callable[[int, int], None],
    ) -> tuple[np.ndarray, np.ndarray]:
        context, options = self._arguments(prompts, negative, start, rows)
        pictures, flagged = parallel.generate(self.mesh, bundle, context, report, **options)
        check_finite(pictures, self.settings.dtype)
        return to_uint8(pictures), np.asarray(flagged)

    def _arguments(
        self, prompts: Prompts, negative: AnyPrompt, start: Start | None, rows: Sequence[tuple[int, int]]
    ) -> tuple[Any, dict[str, Any]]:
        """What `generate` takes for these subjects and indices: prompts, and all else by name."""
        subjects = np.array([subject for subject, _ in rows])
        indices = np.array([index for _, index in rows])
        values, settings = self.values, self.settings
        options = {
            "weights": prompts.weights
            if prompts.weights is None or len(prompts.weights) == 1
            else prompts.weights[subjects],
            "negative": negative,
            "seeds": settings.seed,
            "indices": indices,
            "start": _rows(start, subjects),
            "controls": self.controls,
            "latents": None if self.latents is None else self.latents[indices],
            "steps": values.steps,
            "guidance_scale": values.guidance_scale,
            "guidance_interval": values.guidance_interval,
            "cache_interval": values.cache_interval,
            "sampler": values.sampler,
            "eta": settings.eta,
            "height": values.height,
            "width": values.width,
            "karras": settings.karras,
        }
        kept = self.watching.kept(prompts.groups)
        return _rows(prompts.context, subjects), options | ({} if kept is None else {"kept": kept[subjects]})

    def _record(self) -> Record:
        """Every setting, those left out as the checkpoint has them."""
        left_out = {"pictures", "picture", "texts", "seed", "output_dir", *ParallelSettings.model_fields}
        decided = {"mesh": f"{AXIS}={self.mesh.size}", "safety": "off" if self.config.safety is None else "on"}
        settings = plain(self.settings, left_out) | decided | {"negative_prompt": self.negative_text}
        return settings | self.values.model_dump(include=set(settings)) | self.sizes


def _rows(tree: Any, places: np.ndarray) -> Any:
    """The rows of arrays at these places: taken on the host, which need not compile for it."""
    return jax.tree.map(lambda leaf: jax.device_put(np.asarray(leaf)[places]), tree)

"""What the closed form keeps: the spectrum of the text projection, a picture's energy, the length of text states."""

import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Array, Float, UInt8

from sdipc_jax.batches import in_batches
from sdipc_jax.checkpoints.bundle import Bundle
from sdipc_jax.checkpoints.load import configure
from sdipc_jax.checkpoints.text_tower import load_text_tower
from sdipc_jax.commands.inputs import read_inputs
from sdipc_jax.commands.settings import SpectrumSettings
from sdipc_jax.datasets.examples import Pictures, find
from sdipc_jax.errors import printable
from sdipc_jax.evaluate.conversions import compare
from sdipc_jax.evaluate.tables import Table
from sdipc_jax.files import check_result, write_atomically
from sdipc_jax.pictures.preprocessing import preprocess
from sdipc_jax.prompts.calibration import Calibration, picture_vectors
from sdipc_jax.prompts.captions import CAPTIONS
from sdipc_jax.prompts.contexts import plain
from sdipc_jax.prompts.converter import Converter
from sdipc_jax.prompts.plan import plan_conversion
from sdipc_jax.prompts.projection import Projection, end_states
from sdipc_jax.prompts.tokens import tokenize
from sdipc_jax.prompts.vision import encode_images
from sdipc_jax.records import Record, Report


@dataclass(frozen=True)
class Spectrum:
    """A converter, measured.

    Attributes:
        singular_values: of the text projection, largest first.
        rank: how many the cut-off keeps.
        scale: the length given to a picture's vector.
        end_norm: the mean length of the end token's state over built-in captions, which `scale` should be near.
        caption_cosine: mean cosine of an end state h and h W_t W_t^+, which is what the inverse gives back of it.
        energy_kept: the share of a picture's squared length in the joint space that the inverse reads, if one is given.
        round_trip_error: |v - v W_t^+ W_t| / |v| of that picture's joint vector v.
        plot: the file that it was drawn to.
    """

    singular_values: list[float]
    rank: int
    scale: float
    end_norm: float
    caption_cosine: float
    energy_kept: float | None = None
    round_trip_error: float | None = None
    plot: str | None = None

    def to_json(self) -> dict[str, Any]:
        """What `--json` prints."""
        return asdict(self)

    def __str__(self) -> str:
        values = self.singular_values
        lines = [
            f"singular values  {values[0]:.4g} to {values[-1]:.4g}, {len(values)} in all",
            f"kept             {self.rank}, of which the smallest is {values[self.rank - 1]:.4g}",
            f"scale            {self.scale:.4g} (mean norm of the end token's state: {self.end_norm:.4g})",
            f"captions         cosine {self.caption_cosine:.4f} between a text state and what the inverse gives back",
        ]
        if self.energy_kept is not None:
            lines.append(
                f"picture          {100 * self.energy_kept:.1f}% of its energy kept, "
                f"round-trip error {self.round_trip_error:.4f}"
            )
        if self.plot is not None:
            lines.append(f"plot             {printable(self.plot)}")
        return "\n".join(lines)


@dataclass(frozen=True)
class FittedSpectrum:
    """A fitted map, measured.

    Attributes:
        singular_values: the standard deviations of captions along their principal axes in the joint space, largest
            first.
        rank: along how many of them a deviation counts for more than half.
        r2: of captions that were not fitted, for each part of a state.
        lengths: given to a picture's vector, of each part.
        outside: the share of a picture's squared distance from the captions' mean that lies along axes that are not
            kept, if one is given.
        plot: the file that they were drawn to.
        calibration: what manifests say of it.
    """

    singular_values: list[float]
    rank: int
    r2: list[float]
    lengths: list[float]
    calibration: Record
    outside: float | None = None
    plot: str | None = None

    def to_json(self) -> dict[str, Any]:
        """What `--json` prints."""
        return asdict(self)

    def __str__(self) -> str:
        values, facts = self.singular_values, self.calibration
        lines = [
            f"fitted           to {facts['captions']} captions, ridge {facts['ridge']:g}",
            f"R^2              {', '.join(f'{each:.4f}' for each in self.r2)} of captions that were not fitted",
            f"captions vary    {values[0]:.4g} to {values[-1]:.4g}, along {len(values)} axes",
            f"kept             {self.rank}, of which the smallest is {values[self.rank - 1]:.4g}",
            f"lengths          {', '.join(f'{each:.4g}' for each in self.lengths)}",
        ]
        if self.outside is not None:
            lines.append(f"picture          {100 * self.outside:.1f}% of it lies outside of the captions' span")
        if self.plot is not None:
            lines.append(f"plot             {printable(self.plot)}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Compared:
    """A converter, measured, beside others.

    Attributes:
        file: where the table is, too.
    """

    own: Spectrum | FittedSpectrum
    table: Table
    file: str
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """What `--json` prints."""
        found = {"compared": self.table.to_json(), "compared_file": self.file, "notes": list(self.notes)}
        return self.own.to_json() | found

    def __str__(self) -> str:
        told = [str(self.own), "", self.table.to_markdown(), "", f"see {printable(self.file)}"]
        return "\n".join([*self.notes, *told])


def spectrum(settings: SpectrumSettings, report: Report) -> Spectrum | FittedSpectrum | Compared:
    """Measures the checkpoint's converter and plots its singular values."""
    config = configure(settings)
    plan = plan_conversion(config, settings)
    path, option = settings.result
    check_result(path, option, settings.overwrite)
    inputs, _ = read_inputs(config, [settings.picture] if settings.picture else [])
    notes: list[str] = []
    examples, file = [], settings.folder / "compare.json"
    if settings.compare is not None:
        check_result(file, option, settings.overwrite)
        examples = find(
            settings.compare, columns=None, classes=None, per_class=None, caption="{}", needs_words=True, notes=notes
        )
    converter = Converter(config, settings)
    features = encode_images(converter.bundle, inputs[0].pixels[None]) if inputs else None
    measured: Spectrum | FittedSpectrum
    if converter.calibration is None:
        measured = replace(measure(converter.bundle, converter.projection, features), plot=str(path))
    else:
        measured = replace(measure_map(converter.bundle, converter.calibration, features), plot=str(path))
    result: Spectrum | FittedSpectrum | Compared = measured
    settings.folder.mkdir(parents=True, exist_ok=True)
    if examples:
        cutoff = config.defaults.cutoff if settings.cutoff is None else settings.cutoff
        table = compare(
            converter.bundle,
            load_text_tower(config),
            encode_all(converter.bundle, Pictures(examples)),
            [each.caption for each in examples],
            plan.captions,
            cutoff=cutoff,
            ridge=settings.ridge,
        )
        write_atomically(file, (json.dumps(table.to_json(), indent=2) + "\n").encode())
        result = Compared(measured, table, str(file), tuple(notes))
    plot(measured, path)
    report(1.0)
    return result


def measure_map(
    bundle: Bundle, calibration: Calibration, features: Float[Array, "1 D_image"] | None = None
) -> FittedSpectrum:
    """Measures a fitted map, and what it leaves out of one picture's features."""
    fitted = calibration.map
    outside = None if features is None else float(fitted.outside(picture_vectors(bundle, np.asarray(features)))[0])
    return FittedSpectrum(
        singular_values=fitted.deviations.tolist(),
        rank=fitted.rank,
        r2=list(calibration.r2),
        lengths=fitted.length[0].tolist(),
        calibration=calibration.record(),
        outside=outside,
    )


def encode_all(bundle: Bundle, pictures: Sequence[UInt8[np.ndarray, "H W 3"]]) -> Float[np.ndarray, "N D_image"]:
    """The features of pictures of any size, a few in memory at a time."""
    preprocessing = bundle.config.vision_side.preprocessing

    def encode(numbers: np.ndarray) -> Array:
        return encode_images(bundle, np.stack([preprocess(pictures[number], preprocessing) for number in numbers]))

    return in_batches(encode, np.arange(len(pictures)))


def measure(bundle: Bundle, projection: Projection, features: Float[Array, "1 D_image"] | None = None) -> Spectrum:
    """Measures a converter, and what it keeps of one picture's features."""
    bundle = plain(bundle)
    tokens = tokenize(bundle, CAPTIONS, truncate=True)
    ends = np.asarray(end_states(bundle, tokens), np.float64)
    forward = np.asarray(bundle.params["clip"]["text_projection"]["kernel"], np.float64)
    inverse = np.asarray(projection.inverse, np.float64)
    returned = ends @ forward @ inverse
    norms = np.linalg.norm(ends, axis=1)
    kept = error = None
    if features is not None:
        joint = np.asarray(features, np.float64)[0] @ np.asarray(projection.visual, np.float64)
        # W_t^+ W_t projects on what the inverse reads, so the two numbers are cosine and sine of one angle.
        seen = joint @ inverse @ forward
        kept = float(np.sum(seen**2) / np.sum(joint**2))
        error = float(np.linalg.norm(joint - seen) / np.linalg.norm(joint))
    return Spectrum(
        singular_values=np.asarray(projection.singular_values).tolist(),
        rank=int(projection.rank),
        scale=float(projection.scale),
        end_norm=float(norms.mean()),
        caption_cosine=float(np.mean(np.sum(ends * returned, axis=1) / (norms * np.linalg.norm(returned, axis=1)))),
        energy_kept=kept,
        round_trip_error=error,
    )


def plot(spectrum: Spectrum | FittedSpectrum, path: Path) -> None:
    """Draws the singular values and where the cut-off falls, as a PNG."""
    # Slow to import, and only needed here.
    from matplotlib.figure import Figure

    values = np.asarray(spectrum.singular_values)
    places = np.arange(1, len(values) + 1)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.semilogy(
        places[: spectrum.rank], values[: spectrum.rank], ".", label=f"kept: {spectrum.rank} of {len(values)}"
    )
    axes.semilogy(places[spectrum.rank :], values[spectrum.rank :], ".", label="counted as 0")
    named = {"ylabel": "singular value", "title": "Singular values of the text projection"}
    if isinstance(spectrum, FittedSpectrum):
        named = {"ylabel": "standard deviation", "title": "Captions along their principal axes in the joint space"}
    axes.set(xlabel="index", **named)
    axes.legend()
    axes.grid(alpha=0.3)
    stream = io.BytesIO()
    figure.savefig(stream, dpi=120)
    write_atomically(path, stream.getvalue())

"""What the closed form keeps: the spectrum of the text projection, a picture's energy, the length of text states."""

import io
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sdipc_jax.checkpoints.bundle import Bundle
from sdipc_jax.checkpoints.load import configure
from sdipc_jax.commands.inputs import read_inputs
from sdipc_jax.commands.settings import SpectrumSettings
from sdipc_jax.errors import printable
from sdipc_jax.files import check_result, write_atomically
from sdipc_jax.prompts.captions import CAPTIONS
from sdipc_jax.prompts.contexts import end_positions, plain, text_prompt
from sdipc_jax.prompts.converter import Converter
from sdipc_jax.prompts.projection import Projection
from sdipc_jax.prompts.tokens import tokenize
from sdipc_jax.prompts.vision import encode_images
from sdipc_jax.records import Report


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


def spectrum(settings: SpectrumSettings, report: Report) -> Spectrum:
    """Measures the checkpoint's converter and plots its singular values."""
    config = configure(settings)
    _ = config.vision_side
    path, option = settings.result
    check_result(path, option, settings.overwrite)
    inputs, _ = read_inputs(config, [settings.picture] if settings.picture else [])
    converter = Converter(config, settings)
    features = encode_images(converter.bundle, inputs[0].pixels[None]) if inputs else None
    measured = replace(measure(converter.bundle, converter.projection, features), plot=str(path))
    settings.output_dir.mkdir(parents=True, exist_ok=True)
    plot(measured, path)
    report(1.0)
    return measured


def measure(bundle: Bundle, projection: Projection, features: Float[Array, "1 D_image"] | None = None) -> Spectrum:
    """Measures a converter, and what it keeps of one picture's features."""
    bundle = plain(bundle)
    tokens = tokenize(bundle, CAPTIONS, truncate=True)
    states = text_prompt(bundle, tokens)
    ends = np.asarray(states[jnp.arange(len(CAPTIONS)), end_positions(tokens, bundle.config.tokens.end)], np.float64)
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


def plot(spectrum: Spectrum, path: Path) -> None:
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
    axes.set(xlabel="index", ylabel="singular value", title="Singular values of the text projection")
    axes.legend()
    axes.grid(alpha=0.3)
    stream = io.BytesIO()
    figure.savefig(stream, dpi=120)
    write_atomically(path, stream.getvalue())

"""A single `.safetensors` file: which parts of a pipeline are in it, under which names, and what it must not hold."""

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from sdipc_jax.checkpoints.families import JUNK, OTHERS, V_PREDICTION_MARK, ZERO_SNR_MARK
from sdipc_jax.checkpoints.headers import Tensor, read_header, read_metadata
from sdipc_jax.checkpoints.keys import canonical_name
from sdipc_jax.checkpoints.names_ldm import (
    LINEAR_PROJECTION,
    OPEN_CLIP_PROJECTION,
    Piece,
    open_clip_names,
    same_names,
    unet_names,
    vae_names,
)
from sdipc_jax.errors import InputError, printable

# Several times what SDXL with its averages has; a name is a path of a dozen modules.
_MOST_TENSORS, _LONGEST_NAME = 20_000, 300
# No network is as deep: a file that says so is not one.
_DEEPEST = 100
_SHOWN = 5
_AVERAGE = "model_ema."


@dataclass(frozen=True)
class Place:
    """A part of the pipeline, where files have it.

    Attributes:
        part: its name in a pipeline's folder.
        prefix: of its tensors' names in the file.
        naming: `ldm`, `open_clip`, `diffusers` or `transformers`.
        probe: a tensor that is there if the part is, without the prefix.
    """

    part: str
    prefix: str
    naming: str
    probe: str


_OPEN_CLIP_PROBE, _TEXT_PROBE = "positional_embedding", "embeddings.token_embedding.weight"
# The first that fits counts; those without a prefix are files of one part.
PLACES = (
    Place("clip", "", "transformers", "vision_model.embeddings.class_embedding"),
    Place("unet", "model.diffusion_model.", "ldm", "input_blocks.0.0.weight"),
    Place("unet", "", "ldm", "input_blocks.0.0.weight"),
    Place("unet", "model.diffusion_model.", "diffusers", "down_blocks.0.resnets.0.conv1.weight"),
    Place("unet", "unet.", "diffusers", "down_blocks.0.resnets.0.conv1.weight"),
    Place("unet", "", "diffusers", "down_blocks.0.resnets.0.conv1.weight"),
    Place("vae", "first_stage_model.", "ldm", "encoder.down.0.block.0.conv1.weight"),
    Place("vae", "vae.", "ldm", "encoder.down.0.block.0.conv1.weight"),
    Place("vae", "", "ldm", "encoder.down.0.block.0.conv1.weight"),
    Place("vae", "first_stage_model.", "diffusers", "encoder.down_blocks.0.resnets.0.conv1.weight"),
    Place("vae", "vae.", "diffusers", "encoder.down_blocks.0.resnets.0.conv1.weight"),
    Place("vae", "", "diffusers", "encoder.down_blocks.0.resnets.0.conv1.weight"),
    *(
        Place("text_encoder", prefix, "transformers", f"{module}{_TEXT_PROBE}")
        for prefix in (
            "cond_stage_model.transformer.",
            "conditioner.embedders.0.transformer.",
            "text_encoder.",
            "",
        )
        for module in ("text_model.", "")
    ),
    *(
        Place("text_encoder", prefix, "open_clip", _OPEN_CLIP_PROBE)
        for prefix in ("cond_stage_model.model.", "conditioner.embedders.0.model.", "")
    ),
    Place("text_encoder_2", "conditioner.embedders.1.model.", "open_clip", _OPEN_CLIP_PROBE),
    *(
        Place("text_encoder_2", prefix, "transformers", f"{module}{_TEXT_PROBE}")
        for prefix in ("conditioner.embedders.1.transformer.", "text_encoder_2.")
        for module in ("text_model.", "")
    ),
)


class SingleFile:
    """A file's parts by their names in a pipeline's folder. Opening one reads its header alone.

    Raises:
        InputError: it is not whole, is something else than a Stable Diffusion checkpoint or a part of one, or holds
            tensors that are not known.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.tensors = {tensor.name: tensor for tensor in read_header(file)}
        self.metadata = read_metadata(file)
        self._check_names()
        self.places: dict[str, Place] = {}
        for place in PLACES:
            if place.part not in self.places and place.prefix + place.probe in self.tensors:
                self.places[place.part] = place
        self._parts = {part: self._stored(place) for part, place in self.places.items()}
        self._check_rest()

    def __contains__(self, part: str) -> bool:
        return part in self.places

    @property
    def name(self) -> str:
        """As messages show it."""
        return printable(self.file)

    @property
    def v_prediction(self) -> bool:
        """It is marked as a model that predicts v."""
        return V_PREDICTION_MARK in self.tensors

    @property
    def zero_snr(self) -> bool:
        """It is marked as trained down to no signal at all."""
        return ZERO_SNR_MARK in self.tensors

    def stored(self, part: str) -> Mapping[str, Tensor]:
        """A part's tensors under the file's names without the prefix, or transformers' and diffusers' own."""
        return self._parts.get(part, {})

    def shape(self, part: str, name: str) -> tuple[int, ...] | None:
        """The shape of the tensor that diffusers or transformers call so, or None if it is not there."""
        piece = self.names(part, [name])[name]
        tensor = self.stored(part).get(piece.name)
        return None if tensor is None else tensor.shape

    def side(self, part: str, name: str, axis: int) -> int:
        """The length of one axis of a tensor that must be there."""
        shape = self.shape(part, name)
        if shape is None or len(shape) <= axis:
            found = "no such tensor" if shape is None else f"shape {list(shape)}"
            raise InputError(
                f"{self.name}: {part} has {found} for {name}, expected the weights of a Stable Diffusion checkpoint: "
                "fetch it again"
            )
        return shape[axis]

    def count(self, part: str, pattern: str) -> int:
        """How many tensors of a numbered name there are, from 0 on."""
        numbers = range(_DEEPEST + 1)
        found = next((n for n in numbers if self.shape(part, pattern.format(n)) is None), _DEEPEST + 1)
        if found > _DEEPEST:
            raise InputError(
                f"{self.name}: {part} has over {_DEEPEST} of {pattern.format('*')}, expected a real network"
            )
        return found

    @functools.cached_property
    def unet_layers(self) -> int:
        """Residual blocks on each level of the UNet on the way down."""
        if self.places["unet"].naming != "ldm":
            return self.count("unet", "down_blocks.0.resnets.{}.conv1.weight")
        stored, numbers = self.stored("unet"), range(1, _DEEPEST)
        first = next((n for n in numbers if f"input_blocks.{n}.0.op.weight" in stored), None)
        after = (n for n in numbers if n == first or f"input_blocks.{n}.0.in_layers.0.weight" not in stored)
        end = next(after, _DEEPEST)
        return max(1, end - 1)

    @functools.cached_property
    def unet_attention(self) -> tuple[bool, ...]:
        """Which levels on the way up have attention, from the coarsest."""
        levels = self.count("unet", "down_blocks.{}.resnets.0.conv1.weight")
        return tuple(self.shape("unet", f"up_blocks.{b}.attentions.0.norm.weight") is not None for b in range(levels))

    def names(self, part: str, wanted: Iterable[str]) -> dict[str, Piece]:
        """Where the tensors that diffusers and transformers call so are in this file."""
        naming = self.places[part].naming
        if naming == "open_clip":
            return open_clip_names(wanted, linear_projection=LINEAR_PROJECTION in self.stored(part))
        if naming != "ldm":
            return same_names(wanted)
        if part == "vae":
            stored, numbers = self.stored("vae"), range(_DEEPEST)
            levels = next((n for n in numbers if f"decoder.up.{n}.block.0.conv1.weight" not in stored), _DEEPEST)
            return vae_names(wanted, levels)
        wanted = list(wanted)
        # Only the samplers on the way up stand elsewhere where there is attention: without them it need not be known.
        attention = self.unet_attention if any("upsamplers" in name for name in wanted) else ()
        return unet_names(wanted, self.unet_layers, attention)

    def read(self, part: str, wanted: Mapping[str, tuple[int, ...]], *, average: bool = False) -> dict[str, Tensor]:
        """A part's tensors by diffusers' and transformers' names.

        Args:
            wanted: names and shapes; tensors whose shapes differ in axes of length 1 alone are given with these.
            average: the UNet's moving average instead of its weights.

        Returns:
            those that are there, and those of the file that nobody wants, under the file's names.
        """
        place, stored, table = self.places[part], self.stored(part), self.names(part, wanted)
        found = {}
        for name, piece in table.items():
            tensor = self._average(place, piece.name) if average else stored.get(piece.name)
            if tensor is not None:
                tensor = tensor if piece.third is None else tensor.third(piece.third)
                tensor = tensor.transpose() if piece.transposed else tensor
                found[name] = tensor.reshaped(wanted[name])
        used = {piece.name for piece in table.values()}
        return found | {name: tensor for name, tensor in stored.items() if name not in used and not self._unread(name)}

    def _average(self, place: Place, name: str) -> Tensor | None:
        whole = f"{place.prefix}{name}".removeprefix("model.")
        return self.tensors.get(_AVERAGE + whole.replace(".", ""))

    @property
    def has_average(self) -> bool:
        """There is a moving average of the UNet's weights beside them."""
        return any(name.startswith(f"{_AVERAGE}diffusion_model") for name in self.tensors)

    def _unread(self, name: str) -> bool:
        # The last block and the projection of an OpenCLIP tower that is read below them.
        return name in (OPEN_CLIP_PROJECTION, LINEAR_PROJECTION) or name.startswith("transformer.resblocks.23.")

    def _stored(self, place: Place) -> dict[str, Tensor]:
        own = place.naming in ("diffusers", "transformers")
        part = "text_encoder" if place.part.startswith("text_encoder") else place.part
        others = tuple({other.prefix for other in self.places.values() if other.prefix} | {_AVERAGE})
        found = {}
        for name, tensor in self.tensors.items():
            if not name.startswith(place.prefix) or (not place.prefix and name.startswith(others)):
                continue
            if JUNK.fullmatch(name) or name in (V_PREDICTION_MARK, ZERO_SNR_MARK):
                continue
            inner = name.removeprefix(place.prefix)
            known = canonical_name(part, inner) if own else inner
            if known is not None:
                found[known] = tensor
        return found

    def _check_names(self) -> None:
        names = self.tensors
        if len(names) > _MOST_TENSORS or any(len(name) > _LONGEST_NAME for name in names):
            raise InputError(
                f"{self.name}: {len(names)} tensors, the longest name of {max(map(len, names))} letters, expected at "
                f"most {_MOST_TENSORS} and {_LONGEST_NAME}: not a Stable Diffusion checkpoint"
            )
        for pattern, what in OTHERS:
            if name := next((name for name in names if pattern.fullmatch(name)), None):
                raise InputError(
                    f"{self.name}: found {what} (it has {printable(name)}), expected a checkpoint of Stable Diffusion "
                    "1.x, 2.x or XL: use another file"
                )
        for name, tensor in names.items():
            if tensor.dtype.startswith("F8"):
                raise InputError(
                    f"{self.name}: {printable(name)} is stored as {tensor.dtype}, expected 16 or 32 bits: use the "
                    "fp16 file"
                )

    def _check_rest(self) -> None:
        known = {id(tensor) for part in self._parts.values() for tensor in part.values()}
        rest = [
            name
            for name, tensor in self.tensors.items()
            if id(tensor) not in known
            and not JUNK.fullmatch(name)
            and not name.startswith(_AVERAGE)
            and name not in (V_PREDICTION_MARK, ZERO_SNR_MARK)
        ]
        if rest or not self.places:
            shown = ", ".join(printable(name) for name in rest[:_SHOWN]) or "no tensors"
            more = f" and {len(rest) - _SHOWN} more" if len(rest) > _SHOWN else ""
            raise InputError(
                f"{self.name}: found {shown}{more}, expected a checkpoint of Stable Diffusion 1.x, 2.x or XL, or a "
                "part of one: use another file"
            )


def open_single(file: Path) -> SingleFile:
    """The file's parts; kept as long as the file stays what it is.

    Raises:
        InputError: see `SingleFile`.
    """
    state = file.stat()
    return _open(file, state.st_mtime_ns, state.st_size)


@functools.lru_cache(maxsize=8)
def _open(file: Path, modified: int, size: int) -> SingleFile:
    return SingleFile(file)

"""CLIP's preprocessing: what a vision tower sees of a picture, with transformers' numbers."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated, Any, Self

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image
from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass

from sdipc_jax.errors import InputError
from sdipc_jax.settings import Fit

# Keys that change no number. Pictures are RGB when they come here, whatever do_convert_rgb says.
_NO_NUMBERS = {
    *("data_format", "device", "disable_grouping", "do_convert_rgb", "input_data_format"),
    *("processor_class", "return_tensors"),
}
# Names of one class: of old, in PyTorch, in Pillow.
PROCESSORS = ("CLIPFeatureExtractor", "CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPImageProcessorPil")
# Options that are supported with these values alone.
_FIXED: dict[str, tuple[Any, ...]] = {
    "do_pad": (False,),
    "use_square_size": (False,),
    "default_to_square": (False,),
    "feature_extractor_type": PROCESSORS,
    "image_processor_type": PROCESSORS,
}
_Side = Annotated[int, Field(ge=1, le=4096)]
_Positive = Annotated[float, Field(gt=0)]


@pydantic_dataclass(frozen=True, config=ConfigDict(strict=True, allow_inf_nan=False))
class Preprocessing:
    """The options of transformers' CLIPImageProcessor, under its names and with its defaults.

    Attributes:
        size: what pictures are resized to: the shortest edge, or (height, width).
        crop_size: (height, width) of the centre crop; smaller pictures are padded with black.
        resample: Pillow's number of the resampling filter; 3 is bicubic.
        fit: what is done with a picture of another shape than the tower's: its middle is taken as those options say
            (`crop`), or all of it, with bars of the mean colour (`pad`) or out of proportion (`squash`). It is the
            user's choice, and in no file.
    """

    size: _Side | tuple[_Side, _Side] = 224
    crop_size: tuple[_Side, _Side] = (224, 224)
    resample: Annotated[int, Field(ge=0, le=5)] = 3
    do_resize: bool = True
    do_center_crop: bool = True
    do_rescale: bool = True
    rescale_factor: _Positive = 1 / 255
    do_normalize: bool = True
    image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[_Positive, _Positive, _Positive] = (0.26862954, 0.26130258, 0.27577711)
    fit: Fit = "crop"

    def __post_init__(self) -> None:
        if not self.do_center_crop and not (self.do_resize and isinstance(self.size, tuple)):
            raise ValueError("without do_center_crop, size must have a height and a width: pictures must get one size")

    @classmethod
    def from_json(cls, values: Mapping[str, Any], source: str) -> Self:
        """Reads a preprocessor_config.json of CLIPFeatureExtractor or CLIPImageProcessor.

        Args:
            values: the parsed JSON object; null stands for an option that is left out.
            source: what to call it in errors, such as `clip/preprocessor_config.json`.

        Raises:
            InputError: an option is unknown or has a value that is not supported.
        """
        found = {}
        for name, value in values.items():
            if value is None or name in _NO_NUMBERS or name.startswith("_"):
                continue
            if name in cls.__dataclass_fields__ and name != "fit":
                found[name] = _from_json_value(name, value)
            elif name not in _FIXED:
                raise InputError(
                    f"{source}: {name} is not an option of CLIPImageProcessor that is known here: "
                    "remove it if it changes nothing, else this checkpoint is not supported"
                )
            elif value not in _FIXED[name]:
                raise InputError(
                    f"{source}: {name} is {value!r}, expected {' or '.join(map(str, _FIXED[name]))}: "
                    "use the preprocessor of a CLIP"
                )
        try:
            return cls(**found)
        except ValidationError as error:
            first = error.errors()[0]
            message = first["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
            option = "".join(f"{name} is {values[str(name)]!r}, " for name in first["loc"][:1])
            raise InputError(f"{source}: {option}{message}: use the preprocessor of a CLIP") from None

    def to_json(self) -> dict[str, Any]:
        """The object that transformers writes to preprocessor_config.json."""
        size = {"shortest_edge": self.size} if isinstance(self.size, int) else _named(self.size)
        options = {name: value for name, value in asdict(self).items() if name != "fit"}
        return options | {
            "size": size,
            "crop_size": _named(self.crop_size),
            "image_mean": list(self.image_mean),
            "image_std": list(self.image_std),
            "do_convert_rgb": True,
            "image_processor_type": "CLIPImageProcessor",
        }

    @property
    def output_size(self) -> tuple[int, int]:
        """(height, width) of every preprocessed picture."""
        if self.do_center_crop or isinstance(self.size, int):
            return self.crop_size
        return self.size

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) that a picture of this height and width has before the crop."""
        if self.fit != "crop":
            return self.output_size
        if not self.do_resize:
            return height, width
        if isinstance(self.size, tuple):
            return self.size
        # The long side is rounded down, as transformers does it.
        if height < width:
            return self.size, int(self.size * width / height)
        return int(self.size * height / width), self.size


def seen(height: int, width: int, settings: Preprocessing) -> tuple[float, float]:
    """The shares of a picture's height and width that the tower sees, around its middle.

    >>> seen(100, 400, Preprocessing())
    (1.0, 0.25)
    """
    if settings.fit != "crop" or not settings.do_center_crop:
        return 1.0, 1.0
    sides = zip(settings.crop_size, settings.resized(height, width), strict=True)
    rows, columns = (min(1.0, wanted / side) for wanted, side in sides)
    return rows, columns


def preprocess(pixels: UInt8[np.ndarray, "H W 3"], settings: Preprocessing) -> Float32[np.ndarray, "S1 S2 3"]:
    """What a CLIP vision tower sees of a picture: resized, cropped, normalised.

    The numbers are those of transformers' CLIPImageProcessor (not of the `Fast` one, which resizes with torch and
    differs by a level here and there).

    Args:
        pixels: 8-bit sRGB.

    Returns:
        float32 of `settings.output_size`.
    """
    if settings.fit == "pad":
        pixels = _pad(pixels, settings)
    height, width = settings.resized(*pixels.shape[:2])
    image: np.ndarray = pixels
    if settings.do_resize or settings.fit != "crop":
        image = np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling(settings.resample)))
    if settings.do_center_crop:
        image = _center_crop(image, settings.crop_size)
    if settings.do_rescale:
        image = image.astype(np.float64) * settings.rescale_factor
    image = image.astype(np.float32)
    if settings.do_normalize:
        image = (image - np.array(settings.image_mean, np.float32)) / np.array(settings.image_std, np.float32)
    return image


def _pad(pixels: UInt8[np.ndarray, "H W 3"], settings: Preprocessing) -> UInt8[np.ndarray, "_ _ 3"]:
    """The picture in the middle of the shape that the tower sees, on the mean colour, which is 0 to the tower."""
    (height, width), (high, wide) = pixels.shape[:2], settings.output_size
    shape = max(height, round(width * high / wide)), max(width, round(height * wide / high))
    padded = np.empty((*shape, 3), np.uint8)
    padded[:] = np.clip(np.round(np.array(settings.image_mean) * 255), 0, 255)
    top, left = (shape[0] - height) // 2, (shape[1] - width) // 2
    padded[top : top + height, left : left + width] = pixels
    return padded


def _center_crop(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    missing = [max(0, wanted - side) for side, wanted in zip(image.shape, size, strict=False)]
    image = np.pad(image, [*((pad - pad // 2, pad // 2) for pad in missing), (0, 0)])
    top, left = ((side - wanted) // 2 for side, wanted in zip(image.shape, size, strict=False))
    return image[top : top + size[0], left : left + size[1]]


def _named(size: tuple[int, int]) -> dict[str, int]:
    return {"height": size[0], "width": size[1]}


def _from_json_value(name: str, value: Any) -> Any:
    """An option as its field has it, or as it is if it has no known form."""
    if isinstance(value, list):
        return tuple(value)
    if isinstance(value, Mapping) and value.keys() == {"height", "width"}:
        return value["height"], value["width"]
    if isinstance(value, Mapping) and value.keys() == {"shortest_edge"} and name == "size":
        return value["shortest_edge"]
    if name == "crop_size":
        return value, value
    if name in ("image_mean", "image_std"):
        return value, value, value
    return value

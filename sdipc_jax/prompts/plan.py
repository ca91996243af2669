"""Which converter settings ask for, decided and checked before any weights are read."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sdipc_jax.checkpoints.bundle import Config
from sdipc_jax.errors import InputError, printable
from sdipc_jax.files import read_lines
from sdipc_jax.prompts.calibration import (
    ENOUGH_PICTURES,
    FEWEST_PICTURES,
    check,
    default_ridge,
)
from sdipc_jax.prompts.everyday import everyday_captions
from sdipc_jax.prompts.projection import AfterEnd
from sdipc_jax.records import Record, digest_of
from sdipc_jax.settings import ProjectionSettings

_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


@dataclass(frozen=True)
class Plan:
    """A converter that is to be made.

    Attributes:
        method: the inverse (eq. 6), or a map that is fitted to captions.
        captions: to fit it to, and for the mean shift.
        pictures: for the mean shift; none without it.
    """

    method: Literal["pinv", "ridge"]
    captions: tuple[str, ...]
    ridge: float
    after_end: AfterEnd
    pictures: tuple[Path, ...]

    def map_record(self) -> Record:
        """What the map follows from, besides the checkpoints."""
        return {"ridge": self.ridge, "after_end": self.after_end, "captions_sha256": digest_of(list(self.captions))}

    def record(self) -> Record:
        """What vectors follow from besides the settings of the inverse: nothing, where that alone makes them."""
        record = self.map_record() if self.method == "ridge" else {}
        if self.pictures:
            record["shift"] = [[path.name, path.stat().st_size] for path in self.pictures]
        return record


def plan_conversion(config: Config, settings: ProjectionSettings) -> Plan:
    """Which converter settings ask for.

    Raises:
        InputError: the checkpoint has no CLIP, the converter that is asked for does not reach what its UNet reads, or
            there are no such captions or pictures, or too few.
    """
    side = config.vision_side
    fitted = settings.calibrate == "ridge" or (settings.calibrate == "auto" and config.reads_an_earlier_layer)
    if fitted and side.trained_inverse:
        raise InputError(
            "the checkpoint has a trained layer in the place of the inverse, expected none where a map is fitted: "
            "pass --calibrate pinv"
        )
    if not fitted:
        config.check_inverse()
    # The mean shift takes captions for either.
    shared = {"calibrate_captions"} if settings.calibrate_pictures else set()
    wrong = settings.of_inverse if fitted else [name for name in settings.of_map if name not in shared]
    if wrong:
        kind, other = ("a fitted map", "pinv") if fitted else ("the inverse", "ridge")
        instead = "" if fitted and not config.inverse_reaches else f", or pass --calibrate {other}"
        raise InputError(f"found --{wrong[0].replace('_', '-')} for {kind}, which has none: leave it out{instead}")
    file = settings.calibrate_captions
    captions = everyday_captions() if file is None else read_lines(file, "captions")
    ridge = default_ridge(config) if settings.ridge is None else settings.ridge
    check(config, captions, ridge, settings.after_end)
    pictures = _list_pictures(settings.calibrate_pictures)
    return Plan("ridge" if fitted else "pinv", captions, ridge, settings.after_end, pictures)


def check_one_vector(settings: ProjectionSettings) -> None:
    """Refuses a vector for each place, where pictures' vectors are stored.

    Raises:
        InputError: that is asked for.
    """
    if settings.after_end == "own":
        raise InputError(
            "after-end is 'own', which gives a picture a vector for each place, expected 'repeat' where vectors "
            "are stored: leave it out"
        )


def _list_pictures(folder: Path | None) -> tuple[Path, ...]:
    """The pictures in a folder, by their names' endings; none if there is no folder."""
    if folder is None:
        return ()
    try:
        found = sorted(path for path in folder.iterdir() if path.suffix.lower() in _SUFFIXES)
    except OSError as error:
        raise InputError(
            f"{printable(folder)}: {error.strerror}, expected a folder of at least {FEWEST_PICTURES} pictures: "
            "check the path"
        ) from None
    if len(found) < FEWEST_PICTURES:
        raise InputError(
            f"{printable(folder)}: found {len(found)} pictures, expected at least {FEWEST_PICTURES}, better "
            f"{ENOUGH_PICTURES} of many kinds: add some"
        )
    return tuple(found)

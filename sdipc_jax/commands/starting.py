"""Pictures to start from: options become a `Start`, read and checked before anything is loaded."""

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32

from sdipc_jax.checkpoints.bundle import Bundle, Config
from sdipc_jax.commands.settings import StartSettings
from sdipc_jax.errors import InputError, printable
from sdipc_jax.pictures.guiding import covering, padded, what_is_redone
from sdipc_jax.pictures.reading import read_picture
from sdipc_jax.records import Record
from sdipc_jax.sampling import Start, start_from
from sdipc_jax.sampling.start import first_evaluation
from sdipc_jax.settings import Defaults


class Starting:
    """What is started from, at the size of the results.

    Args:
        own: the pictures that are varied or edited, which are started from where no other is named.

    Attributes:
        first: the evaluation that sampling begins with.
        record: what the manifest says of the files.

    Raises:
        InputError: nothing to start from, a file that cannot be read, an empty mask, or a strength that leaves no step.
    """

    def __init__(self, config: Config, settings: StartSettings, values: Defaults, own: Sequence[Path]) -> None:
        size = values.height, values.width
        self.first, self.record = 0, Record()
        self.pictures: list[Float32[np.ndarray, "H W 3"]] = []
        self.masks: list[Float32[np.ndarray, "H W"]] = []
        asked = [name for name in ("strength", "mask_image", "pad") if getattr(settings, name)]
        paths = [settings.init_image] if settings.init_image else list(own) if asked else []
        if asked and not paths:
            raise InputError(f"found {asked[0]} and no picture to start from, expected one: name it with --init-image")
        if config.unet.repaints and not (settings.mask_image or settings.pad):
            raise InputError("this UNet was trained to repaint a part of a picture: give --mask-image")
        if not paths:
            return
        self.strength = settings.share_taken
        read = [read_picture(path) for path in paths]
        self.record["init_sha256"] = [picture.sha256 for picture in read]
        for picture in read:
            pixels, outside = padded(picture.pixels, size) if settings.pad else (covering(picture.pixels, size), None)
            self.pictures.append(pixels.astype(np.float32) / 255)
            if outside is not None:
                self.masks.append(outside)
        if settings.mask_image is not None:
            mask = read_picture(settings.mask_image)
            self.record["mask_sha256"] = mask.sha256
            name, shapes = printable(settings.mask_image), [picture.pixels.shape for picture in read]
            self.masks = [what_is_redone(mask.pixels, name, size, (shape[0], shape[1])) for shape in shapes]
        self.first = first_evaluation(self.strength, values.steps)

    def start(self, bundle: Bundle, count: int) -> Start | None:
        """One row for each of `count` subjects."""
        if not self.pictures:
            return None
        rows = [
            # One at a time, as results are decoded: large pictures take much memory.
            start_from(bundle, picture[None], self.strength, self.masks[place][None] if self.masks else None)
            for place, picture in enumerate(self.pictures)
        ]
        rows = rows * count if len(rows) == 1 else rows
        return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *rows)

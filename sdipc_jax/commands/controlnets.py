"""What ControlNets are shown: options become a `Control` for each, read and checked before anything is loaded."""

import numpy as np

from sdipc_jax.commands.settings import ControlNetSettings
from sdipc_jax.pictures.guiding import as_shown
from sdipc_jax.pictures.reading import read_picture
from sdipc_jax.records import Record
from sdipc_jax.sampling import Control
from sdipc_jax.settings import Defaults


def read_controls(settings: ControlNetSettings, values: Defaults) -> tuple[list[Control], Record]:
    """A control for each network, for all rows, and what the manifest says of their pictures.

    Raises:
        InputError: a picture that cannot be read, or a detector that is not installed.
    """
    controls, digests = [], []
    options = zip(*map(settings.each, ("control_scale", "control_start", "control_end")), strict=True)
    detectors = settings.each("control_detector")
    for path, detector, numbers in zip(settings.control_image, detectors, options, strict=True):
        picture = read_picture(path)
        digests.append(picture.sha256)
        shown = as_shown(picture.pixels, (values.height, values.width), detector).astype(np.float32) / 255
        controls.append(Control(shown[None], *numbers))
    return controls, {"control_sha256": digests} if digests else {}

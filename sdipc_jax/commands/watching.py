"""Where places of a picture look at the tokens of its prompt: options become maps on a sheet, and muted words."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, UInt8

from sdipc_jax.checkpoints.bundle import Bundle, Config
from sdipc_jax.commands.settings import AttentionSettings, WordlessSettings
from sdipc_jax.pictures.sheets import contact_sheet, save_png
from sdipc_jax.prompts.tokens import Group
from sdipc_jax.records import Record
from sdipc_jax.sampling.attention import attention_maps
from sdipc_jax.sampling.weights import over_layers

_CELL = 128


class Watching:
    """The options of a command, checked before anything is loaded.

    Raises:
        InputError: a layer that does not exist.
    """

    def __init__(self, config: Config, settings: Any) -> None:
        self.settings = settings if isinstance(settings, AttentionSettings) else None
        self.mutes = isinstance(settings, WordlessSettings) and settings.zero_words
        self.layers = None
        if self.settings is not None and self.settings.attention_layers != "all":
            self.layers = self.settings.attention_layers.split(",")
            over_layers(config.unet, self.layers)

    def kept(self, groups: Sequence[Sequence[Group]]) -> Float32[np.ndarray, "P L"] | None:
        """0 for the words of each subject, 1 for other tokens; None where all count."""
        if not self.mutes:
            return None
        kept = np.ones((len(groups), sum(len(group.places) for group in groups[0])), np.float32)
        for row, each in zip(kept, groups, strict=True):
            for group in each:
                if group.is_word:
                    row[list(group.places)] = 0
        return kept

    @property
    def draws(self) -> bool:
        """Whether maps are asked for."""
        return self.settings is not None and self.settings.attention_maps

    def draw(
        self, path: Path, bundle: Bundle, context: Any, groups: Sequence[Group], record: Record, **settings: Any
    ) -> None:
        """Samples one picture once more as far as needed, and writes its sheet: a row a token, a column a step.

        Args:
            context: one subject's prompt; of several of them the first is shown.
        """
        assert self.settings is not None
        shares = self.settings.attention_steps
        maps = attention_maps(bundle, context, shares=shares, layers=self.layers, **settings)[0, :, 0]
        length = sum(len(group.places) for group in groups)
        rows, labels = [], []
        for group in groups:
            # A prompt that is repeated, to be as long as another, is one prompt.
            places = np.isin(np.arange(maps.shape[1]) % length, group.places)
            found = maps[:, places].sum(axis=1)
            rows.append([_colored(each) for each in found])
            told = ", ".join(f"{each.mean():.3f}" for each in found)
            labels.append(f"{group.name}: {told}")
        save_png(path, np.asarray(contact_sheet(rows, labels, cell=_CELL)), record)


def _colored(weights: Float[np.ndarray, "h w"]) -> UInt8[np.ndarray, "h w 3"]:
    """A map in colors: dark where a token is looked at least, bright where most."""
    # Slow to import, and only needed here.
    import matplotlib

    spread = max(float(np.ptp(weights)), 1e-6)
    colors = matplotlib.colormaps["viridis"]((weights - weights.min()) / spread)
    return (255 * colors[..., :3]).round().astype(np.uint8)

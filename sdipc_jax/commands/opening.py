"""Where commands get a checkpoint from: its files; a program that stays may keep what it has read."""

from pathlib import Path
from typing import Any

from sdipc_jax.checkpoints.bundle import Bundle, Config
from sdipc_jax.checkpoints.digests import digests
from sdipc_jax.checkpoints.load import configure, load_weights
from sdipc_jax.prompts.converter import Converter
from sdipc_jax.settings import CheckpointSettings


class Opening:
    """Reads a checkpoint's files whenever it is asked for one."""

    def config(self, settings: CheckpointSettings) -> Config:
        """What is known without weights, which refuses what the checkpoint cannot do."""
        return configure(settings)

    def converter(self, config: Config, settings: Any) -> Converter:
        """The weights, and what takes pictures to vectors; whoever gets it may release its towers."""
        return Converter(config, settings)

    def weights(self, config: Config, tuned: Path | None) -> Bundle:
        """The weights alone."""
        return load_weights(config, tuned)

    def digests(self, config: Config, tuned: Path | None) -> dict[str, str]:
        """The sha256 of the files."""
        return digests(config, tuned)


FILES = Opening()

"""What several test modules share: one checkpoint in miniature, written and loaded once."""

from pathlib import Path

import pytest

from sdipc_jax import Bundle, load
from tests.tiny import write_checkpoint


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder with random weights; only read it."""
    return write_checkpoint(tmp_path_factory.mktemp("tiny") / "checkpoint")


@pytest.fixture(scope="session")
def tiny(tiny_folder: Path) -> Bundle:
    """The bundle that is in `tiny_folder`."""
    return load(str(tiny_folder))

"""What several test modules share: one checkpoint in miniature, written and loaded once."""

import dataclasses
import gc
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from sdipc_jax import Bundle, executables, load
from tests.tiny import write_checkpoint, write_tokenizer

# No test uses a network, but for the one on the loopback device.
os.environ["HF_HUB_OFFLINE"] = "1"
# What runs on several chips is tested on two devices of the CPU. No backend is there yet.
jax.config.update("jax_num_cpu_devices", 2)
# Tests count compilations, and leave the user's cache alone.
jax.config.update("jax_enable_compilation_cache", False)

# The modules that take longest, longest first. They begin before all others, so that no process is left with one of
# them when the others have nothing more to do.
LONGEST = (
    *("test_models", "test_tune_command", "test_winograd", "test_generate", "test_tuning", "test_single_files"),
    *("test_parallel", "test_train_embedded", "test_gradients", "test_sdxl_tuning", "test_attention_maps"),
    *("test_embedded", "test_sdxl_mixing", "test_sdxl", "test_documents", "test_batch_controls", "test_weights"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest first."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONGEST)))


def pytest_collection_finish() -> None:
    """What is there before the first test stays to the end, and need not be looked through for garbage."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder with random weights; only read it."""
    return write_checkpoint(tmp_path_factory.mktemp("tiny") / "checkpoint")


@pytest.fixture(scope="session")
def tiny(tiny_folder: Path) -> Bundle:
    """The bundle that is in `tiny_folder`."""
    return load(str(tiny_folder))


@pytest.fixture(scope="session")
def other_pad(tiny: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """`tiny` with a tokenizer that pads with "!", as Stable Diffusion 2 does, and not with the end token."""
    folder = tmp_path_factory.mktemp("other-pad")
    tokens = write_tokenizer(folder / "tokenizer", pad="!")
    return dataclasses.replace(tiny, config=dataclasses.replace(tiny.config, folder=str(folder), tokens=tokens))


@pytest.fixture(scope="module")
def compile_quickly() -> Iterator[None]:
    """Compiling is most of what these tests do, and how fast the programs are does not matter."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture
def kept_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of the user's own, where this process keeps its programs, as one with a single device would."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    monkeypatch.setattr(executables, "_WHOLE", threading.Event())
    executables.keep_whole()
    names = (
        *("jax_compilation_cache_dir", "jax_enable_compilation_cache"),
        "jax_persistent_cache_min_compile_time_secs",
    )
    before = {name: getattr(jax.config, name) for name in names}
    place = tmp_path / "kept"
    place.mkdir(mode=0o700)
    jax.config.update("jax_compilation_cache_dir", str(place))
    jax.config.update("jax_enable_compilation_cache", True)
    yield place
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", folder], capture_output=True).returncode:
        pytest.skip("mounting a small file system needs rights that are not there")
    yield folder
    subprocess.run(["umount", folder], check=True)

"""Compiled programs that outlive the process."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

from sdipc_jax import Bundle, InputError, compilation, tuning
from sdipc_jax.compilation import cache_folder, keep_compiled, use_eigen


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A user's cache folder, and JAX as that user has it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    names = (
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
        "jax_enable_compilation_cache",
    )
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update("jax_enable_compilation_cache", True)
    yield tmp_path / "cache"
    for name, value in before.items():
        jax.config.update(name, value)


def test_the_folder_is_the_users_alone(home: Path) -> None:
    folder = keep_compiled()
    assert folder == cache_folder() == home / "sdipc_jax/compiled"
    assert folder.stat().st_mode & 0o777 == folder.parent.stat().st_mode & 0o777 == 0o700
    assert jax.config.jax_compilation_cache_dir == str(folder)


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
def test_a_folder_of_others_is_refused(home: Path, mode: int) -> None:
    cache_folder().mkdir(parents=True)
    cache_folder().chmod(mode)
    with pytest.raises(InputError, match=r"others can write to, expected one of your own .* chmod 700"):
        keep_compiled()
    assert jax.config.jax_compilation_cache_dir is None


def test_what_jax_was_told_stands(home: Path) -> None:
    jax.config.update("jax_compilation_cache_dir", str(home / "mine"))
    assert keep_compiled() is None
    assert jax.config.jax_compilation_cache_dir == str(home / "mine")
    assert not cache_folder().exists()


def test_no_folder_no_cache(home: Path) -> None:
    home.write_text("a file where the folder would be")
    assert keep_compiled() is None


PROGRAM = """
import jax, jax.numpy as jnp, sys
from sdipc_jax.compilation import keep_compiled
keep_compiled()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
events = []
jax.monitoring.register_event_listener(lambda name, **_: events.append(name))
print(float(jax.jit(lambda x: jnp.sin(x) @ x.T)(jnp.ones((3, 3))).sum()), "/jax/compilation_cache/cache_hits" in events)
"""


def test_damaged_programs_are_compiled_again(tmp_path: Path) -> None:
    def run() -> list[str]:
        environment = {"XDG_CACHE_HOME": str(tmp_path), "PATH": "", "JAX_PLATFORMS": "cpu"}
        done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    value, first = run()
    assert first == "False"
    assert run() == [value, "True"]
    for entry in (tmp_path / "sdipc_jax/compiled").iterdir():
        entry.write_bytes(entry.read_bytes()[:40])
    assert run() == [value, "False"]


def test_what_is_compiled_ahead_is_what_runs(tiny: Bundle, tiny_folder: Path, tmp_path: Path) -> None:
    """After `sdipc compile` the first pictures find their programs; deep prompts count."""
    settings = tuning.TuningSettings(mode="ct", prompt_length=3)
    tuning.save_delta(tuning.delta(tuning.init(tiny, settings)), tmp_path / "tuned.safetensors")
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    (tmp_path / "compiled").mkdir(mode=0o700)
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
        "JAX_ENABLE_COMPILATION_CACHE": "true",
    }
    model = ("--model", str(tiny_folder), "--tuned", str(tmp_path / "tuned.safetensors"))
    model += ("--steps", "3", "--fast", "--json")

    def run(*arguments: str) -> tuple[Any, set[str]]:
        command = [sys.executable, "-m", "sdipc_jax.cli", *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout), {path.name for path in (tmp_path / "compiled").glob("program-*")}

    compiled, before = run("compile", *model, "--batch-size", "2")
    names = [each["name"] for each in compiled["programs"]]
    assert names == ["picture encoder", "text encoder", "kernels", "sampling", "decoding"]
    weights = (tiny_folder / "unet/diffusion_pytorch_model.safetensors").stat().st_size
    assert compiled["programs"][3]["arguments"] == pytest.approx(weights, rel=0.1)
    assert any("advance" in name for name in before)
    pictures = ("--num-images", "2", "--mesh", "data=1", "--output-dir", str(tmp_path / "out"))
    _, after = run("vary", str(tmp_path / "noise.png"), *model, *pictures, "--scale", "5")
    compiled_anew = {name.split("-")[1] for name in after - before}
    assert not compiled_anew & {"advance", "finish", "encode_images", "text_prompt"}


@pytest.mark.parametrize("module", ["sdipc_jax.tuning", "sdipc_jax.parallel", "benchmarks.jax_side"])
def test_products_are_eigens_after_importing(module: str) -> None:
    """XLA reads its flags once, when JAX starts it, which no import may do, and ends the process over unknown ones."""
    program = f"""
import os
import {module}
from sdipc_jax.compilation import use_eigen
use_eigen()
import jax
x = jax.numpy.ones((512, 512))
print(os.environ["XLA_FLAGS"])
print(jax.jit(lambda x: x @ x).lower(x).compile().as_text())
"""
    root = Path(__file__).parents[1]
    environment = os.environ | {
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "PYTHONPATH": os.pathsep.join([str(root), str(root / "scripts")]),
    }
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    flags, _, text = done.stdout.partition("\n")
    assert flags.split() == [
        "--xla_backend_optimization_level=0",
        "--xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_REDUCE",
    ]
    assert "dot(" in text
    assert "ynn" not in text


@pytest.mark.parametrize(
    ("version", "flags", "is_added"),
    [
        ("0.10.2", "", True),
        ("0.11.0", "--xla_cpu_multi_thread_eigen=true", True),
        ("0.10.2", "--xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_DOT", False),
        ("0.12.0", "", False),
    ],
)
def test_known_versions_and_flags_of_the_users_own(
    monkeypatch: pytest.MonkeyPatch, version: str, flags: str, is_added: bool
) -> None:
    monkeypatch.setenv("XLA_FLAGS", flags)
    monkeypatch.setattr(compilation, "version", lambda package: version)
    use_eigen()
    assert os.environ["XLA_FLAGS"].startswith(flags)
    assert (os.environ["XLA_FLAGS"] != flags) == is_added


FAULTS = """
import ctypes, resource, threading
from sdipc_jax.compilation import keep_memory
{keep}
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
size, new_pages = 100 * 2**20, []

def run():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    memory = libc.malloc(size)
    ctypes.memset(memory, 1, size)
    libc.free(memory)
    new_pages.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

for _ in range(2):
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
print(new_pages[1])
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another malloc than glibc's")
@pytest.mark.parametrize("keep", ["", "keep_memory()"])
def test_memory_that_is_kept_is_not_made_anew(keep: str) -> None:
    command = [sys.executable, "-c", FAULTS.replace("{keep}", keep)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    pages = int(done.stdout)
    assert pages < 100 if keep else pages > 10_000

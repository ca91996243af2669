"""Programs that are kept whole: a second process neither traces nor lowers them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdipc_jax import executables
from sdipc_jax.executables import Program, forget_programs, kept_program

# Runs a program of a pytree with a static argument, and says how often Python went through it.
PROGRAM = """
import json, sys, warnings
import jax, jax.numpy as jnp
from sdipc_jax.executables import keep_whole, kept_program
keep_whole()
traced = []
@kept_program(static_argnums=(1,))
def program(tree, factor, last=None):
    traced.append(1)
    return {"sum": jnp.sin(tree["x"]) @ tree["x"].T * factor + last, "pair": (tree["key"], None)}
x = jnp.arange(12.0).reshape(3, 4)
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    found = program({"x": x, "key": jax.random.key(3)}, 2, last=1)
    again = program({"x": x + 1, "key": jax.random.key(4)}, 2, last=2)
print(json.dumps({
    "bits": [float(number).hex() for number in found["sum"].ravel()],
    "key": jax.random.key_data(found["pair"][0]).tolist(),
    "other": float(again["sum"][0, 0]),
    "traced": len(traced),
    "told": [str(each.message) for each in told],
}))
"""


@pytest.fixture
def folder(kept_programs: Path) -> Path:
    return kept_programs


def run(folder: Path, **environment: str) -> Any:
    places = {"JAX_COMPILATION_CACHE_DIR": str(folder), "JAX_ENABLE_COMPILATION_CACHE": "true"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=os.environ | places | {"PYTHONPATH": str(Path(__file__).parents[1])} | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_second_process_traces_nothing_and_gives_the_same_bits(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    first, second = run(tmp_path), run(tmp_path)
    assert (first["traced"], second["traced"]) == (1, 0)
    assert first["bits"] == second["bits"]
    assert first["key"] == second["key"] == [0, 3]
    assert first["other"] == second["other"]
    # Half of a file, and one whose end differs by a bit: both are told, compiled anew and mended.
    (file,) = tmp_path.glob("program-program-*")
    whole = file.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:-1] + bytes([whole[-1] ^ 1])):
        file.write_bytes(damaged)
        mended = run(tmp_path)
        assert (mended["traced"], mended["bits"]) == (1, first["bits"])
        assert len(mended["told"]) == 1
        assert "found a damaged compiled program, it is compiled again" in mended["told"][0]
    assert run(tmp_path)["traced"] == 0
    # What the compiler or JAX is told otherwise is another program.
    for other in ({"XLA_FLAGS": "--xla_backend_optimization_level=1"}, {"JAX_DEFAULT_MATMUL_PRECISION": "highest"}):
        assert run(tmp_path, **other)["traced"] == 1
    # In a folder that others can write to, the file could be anyone's.
    tmp_path.chmod(0o777)
    assert run(tmp_path)["traced"] == 1


@kept_program(static_argnames=("factor",))
def scaled(x: jax.Array, *, factor: int = 1) -> jax.Array:
    """Has a file for each factor."""
    return x * factor


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("program-*")}


def test_what_makes_another_program(folder: Path) -> None:
    x = np.ones(3, np.float32)
    assert scaled(x, factor=2).tolist() == [2, 2, 2]
    assert len(files(folder)) == 1
    scaled(jnp.asarray(x) + 1, factor=2)
    assert len(files(folder)) == 1
    scaled(x, factor=3)
    scaled(np.ones(4, np.float32), factor=2)
    scaled(np.ones(3, np.int32), factor=2)
    scaled(2.0, factor=2)
    assert len(files(folder)) == 5
    assert scaled.ahead(jax.ShapeDtypeStruct((3,), jnp.float32), factor=2)(x).tolist() == [2, 2, 2]
    assert len(files(folder)) == 5


@pytest.mark.parametrize(("package", "value"), [("jaxlib", "0.0.1"), ("jax", "0.0.1")])
def test_other_versions_miss(folder: Path, monkeypatch: pytest.MonkeyPatch, package: str, value: str) -> None:
    Program(lambda x: x + 1)(np.ones(2))
    before, known = files(folder), executables.version
    monkeypatch.setattr(executables, "version", lambda name: value if name == package else known(name))
    executables._surroundings.cache_clear()
    Program(lambda x: x + 1)(np.ones(2))
    executables._surroundings.cache_clear()
    assert len(files(folder) - before) == 1


def test_within_other_programs_it_is_a_jitted_function(folder: Path) -> None:
    x = jnp.ones((2, 3))
    assert jax.jit(lambda x: scaled(x, factor=2))(x).tolist() == (2 * x).tolist()
    assert jax.vmap(lambda x: scaled(x, factor=2))(x).tolist() == (2 * x).tolist()
    assert jax.grad(lambda x: scaled(x, factor=2).sum())(x).tolist() == [[2, 2, 2]] * 2
    assert not files(folder)
    assert scaled.lower(x, factor=2).compile()(x).tolist() == (2 * x).tolist()


def test_nothing_is_kept_unless_the_process_may_and_compiled_programs_are(folder: Path) -> None:
    """A user's own program may have changed the package's functions, which no file tells."""
    executables._WHOLE.clear()
    assert scaled(np.ones(5, np.float32), factor=2).tolist() == [2.0] * 5
    executables.keep_whole()
    jax.config.update("jax_enable_compilation_cache", False)
    assert scaled(np.ones(5, np.float32), factor=2).tolist() == [2.0] * 5
    assert not files(folder)


def test_what_jax_has_kept_itself_is_compiled_anew(folder: Path) -> None:
    """An executable from JAX's own cache cannot be kept again: run in another process it would lack functions."""
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    hits: list[str] = []
    jax.monitoring.register_event_listener(lambda name, **_: hits.append(name))
    program = Program(lambda key: jax.random.fold_in(key, 3))
    program.lower(jax.random.key(1)).compile()
    program(jax.random.key(1))
    assert "/jax/compilation_cache/cache_hits" not in hits
    assert len(files(folder)) == 1
    assert jax.config.jax_enable_compilation_cache


def test_programs_that_are_forgotten_take_no_memory() -> None:
    program = kept_program()(lambda x: x + 1)
    program._ready["signature"] = jax.jit(lambda x: x).lower(1.0).compile()
    assert program(1) == 2
    forget_programs()
    assert program._ready == {}
    assert program(2) == 3

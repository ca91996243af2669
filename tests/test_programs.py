"""What is compiled is what it was: a change that is to change nothing shows it here."""

import json
from pathlib import Path

import jax
import pytest

from tests import programs

GOLDEN = Path(__file__).parent / "golden/programs.json"


def test_programs_are_what_they_were() -> None:
    golden = json.loads(GOLDEN.read_text())
    if jax.__version__ != golden["jax"]:
        pytest.skip(f"tests/golden/programs.json was written with JAX {golden['jax']}, this is {jax.__version__}")
    found = programs.digests()
    assert found.keys() == golden["programs"].keys()
    changed = [name for name, digest in found.items() if digest != golden["programs"][name]]
    assert not changed, (
        "if that was the purpose: scripts/compare_programs.py shows where they differ and writes them anew"
    )


def test_numbers_in_a_program_count_and_names_do_not() -> None:
    text = 'module @jit_f {\n  func.func public @main(%arg0: tensor<2xf32>) -> (tensor<2xf32> {jax.result_info = "r"})'
    renamed = text.replace("jit_f", "jit_g").replace('"r"', '"[0]"')
    assert programs.normalised(text) == programs.normalised(renamed)
    assert programs.normalised(text) != programs.normalised(text.replace("2xf32", "3xf32"))

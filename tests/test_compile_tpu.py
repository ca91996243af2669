"""Programs for TPUs, compiled without one, at a small size."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from benchmarks.sizes import sd15
from compile_tpu import Measured, collectives_of

from tests.processes import finish, start

COMPILING = """
import dataclasses, json, sys
sys.path.insert(0, "scripts")
from pathlib import Path
from compile_tpu import lower_generation, lower_tuning, measure, topology_mesh
from sdipc_jax.models import attention
from sdipc_jax.tuning import TuningSettings
from tests.eight_devices import small_bundle
config = small_bundle(Path(sys.argv[1])).config
# 256 tokens, of which attention is to think that they are many.
attention._CACHED_SCORES = 0
defaults = config.defaults.model_copy(update={"height": 16, "width": 16})
config = dataclasses.replace(config, dtype="bfloat16", defaults=defaults)
mesh = topology_mesh("v5e:2x4")
settings = TuningSettings(steps=10, dtype="bfloat16")
lowered = lower_generation(mesh, config, 2) | lower_tuning(mesh, config, 2, settings)
print(json.dumps({name: dataclasses.asdict(measure(each)) for name, each in lowered.items()}))
"""


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: make tpu-compile")
def test_programs_for_eight_chips(tmp_path: Path) -> None:
    ((code, out, err),) = finish([start(["-c", COMPILING, tmp_path], devices=1, TPU_SKIP_MDS_QUERY="1")], 300)
    assert code == 0, err
    found = {name: Measured(**values) for name, values in json.loads(out.splitlines()[-1]).items()}
    sampling, decoding, tuning = found["sampling, a step"], found["decoding"], found["tuning, a step"]
    assert sampling.collectives == decoding.collectives == {}
    assert tuning.collectives.keys() == {"all-reduce"}
    assert all(each.flops > 1e5 and each.arguments > 1e4 for each in found.values()), found
    assert sampling.temporaries > 0
    # Flash attention in the UNet's middle; nothing before it trains.
    assert sampling.kernels == tuning.kernels == 1


def test_collectives_and_their_bytes() -> None:
    text = """
      %all-reduce.1 = f32[768,320]{1,0:T(8,128)} all-reduce(%x), channel_id=1
      %start = (bf16[8]{0}, bf16[64]{0}) all-gather-start(%y), dimensions={0}
      %add = f32[4]{0} add(%all-reduce.1, %start)
      ROOT %r = pred[] all-reduce(%z)
    """
    assert list(collectives_of(text)) == [("all-reduce", 768 * 320 * 4), ("all-gather", 144), ("all-reduce", 1)]


def test_sizes_are_those_of_stable_diffusion() -> None:
    parts = sd15("bfloat16").abstract_params()
    counts = {name: sum(_sizes(part)) for name, part in parts.items()}
    # As counted in PyTorch's checkpoints.
    assert counts["unet"] == 859_520_964
    assert counts["vae"] == 83_653_863
    assert counts["text_encoder"] == 123_060_480


def _sizes(tree: Any) -> list[int]:
    return [size for each in tree.values() for size in (_sizes(each) if isinstance(each, dict) else [each.size])]

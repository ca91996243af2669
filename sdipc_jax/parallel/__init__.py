"""One device's program in, the same over every device of every host out: processes, mesh, what ends a run that hangs.

Imports sampling, prompts and checkpoints.
"""

from sdipc_jax.batches import pad
from sdipc_jax.parallel.mesh import AXIS, check_devices, make_mesh, on_each_device, place, replicate
from sdipc_jax.parallel.processes import abandon, agree, gather, initialize, is_first, start
from sdipc_jax.parallel.sampling import generate
from sdipc_jax.parallel.watchdog import Watchdog

__all__ = [
    "AXIS",
    "Watchdog",
    "abandon",
    "agree",
    "check_devices",
    "gather",
    "generate",
    "initialize",
    "is_first",
    "make_mesh",
    "on_each_device",
    "pad",
    "place",
    "replicate",
    "start",
]

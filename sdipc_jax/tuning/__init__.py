"""Pictures and a checkpoint in, a small file of new weights out (arXiv 2305.12716, section 4).

Pure functions for loops of one's own::

    settings = tuning.TuningSettings(mode="ct")
    cache = tuning.make_cache(bundle, settings, pictures)
    state = tuning.init(bundle, settings)
    for i in range(30):
        state, metrics = tuning.step(state, cache.batch(rows), jax.random.fold_in(key, i))
    tuned = tuning.apply(bundle, tuning.delta(state))

Imports parallel, sampling, prompts, checkpoints, datasets, samplers, pictures and models.
"""

from sdipc_jax.checkpoints.delta import Delta, digest, load_delta, save_delta
from sdipc_jax.checkpoints.delta import apply_delta as apply
from sdipc_jax.tuning.cache import Cache, choose_targets, make_cache
from sdipc_jax.tuning.losses import Batch, Draws, draw, loss
from sdipc_jax.tuning.many import init_many, select, step_many
from sdipc_jax.tuning.settings import TuningSettings
from sdipc_jax.tuning.step import Metrics, State, delta, init, make_optimizer, step
from sdipc_jax.tuning.trainable import Frozen

__all__ = [
    "Batch",
    "Cache",
    "Delta",
    "Draws",
    "Frozen",
    "Metrics",
    "State",
    "TuningSettings",
    "apply",
    "choose_targets",
    "delta",
    "digest",
    "draw",
    "init",
    "init_many",
    "load_delta",
    "loss",
    "make_cache",
    "make_optimizer",
    "save_delta",
    "select",
    "step",
    "step_many",
]

"""From draws to batches: out of a cache, or with pictures that differ each time, encoded as they come."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import jax
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from sdipc_jax.checkpoints.bundle import Bundle
from sdipc_jax.datasets.examples import Example, Pictures
from sdipc_jax.parallel import AXIS, on_each_device, replicate
from sdipc_jax.pictures.preprocessing import preprocess
from sdipc_jax.prompts.vision import encode_images
from sdipc_jax.tuning.cache import encode, encode_captions, fit, make_cache
from sdipc_jax.tuning.config import RunSettings
from sdipc_jax.tuning.data import Draw, augment
from sdipc_jax.tuning.losses import Batch
from sdipc_jax.tuning.step import in_turns

# Arrays of a batch on the host; where concepts are stacked along a second axis, (N, K, ...).
Host = dict[str, np.ndarray]


class Feed:
    """Makes the arrays of a batch.

    Making a feed encodes all that can be computed once: with neither crops nor flips that is everything.

    Args:
        height, width: of the targets in pixels.
        turns: in which each device encodes what differs each time.
    """

    def __init__(
        self,
        bundle: Bundle,
        settings: RunSettings,
        examples: Sequence[Example],
        height: int,
        width: int,
        mesh: Mesh,
        turns: int = 1,
    ) -> None:
        self._settings, self._examples, self._size = settings, examples, (height, width)
        captions = [each.caption for each in examples] if settings.text_weight > 0 else None
        self._encode: Callable[[Host], Batch] = lambda host: cast(Batch, host)
        if settings.augments:
            self._preprocessing = bundle.config.vision_side.preprocessing
            self._text = None if captions is None else encode_captions(bundle, captions, settings.batch_size)
            self._encode = _encoder(bundle, settings, mesh, turns)
        else:
            self._cache = make_cache(
                bundle,
                settings.tuning,
                Pictures(examples),
                captions,
                height=height,
                width=width,
                batch_size=settings.batch_size,
            )

    def make(self, draws: Sequence[Draw]) -> Host:
        """What the host does for a batch of one concept. Thread-safe."""
        references, targets = [draw.reference for draw in draws], [draw.target for draw in draws]
        if not self._settings.augments:
            return cast(Host, self._cache.batch(references, targets))
        shown = [self._show(draw) for draw in draws]
        host = {
            "pictures": np.stack([fit(target, *self._size) for _, target in shown]),
            "pixels": np.stack([preprocess(reference, self._preprocessing) for reference, _ in shown]),
        }
        return host if self._text is None else host | {"text": self._text[targets]}

    def encode(self, host: Host) -> Batch:
        """What the devices do for it.

        Args:
            host: what `make` gave, divided over the mesh.
        """
        return self._encode(host)

    def _show(self, draw: Draw) -> tuple[np.ndarray, np.ndarray]:
        settings = self._settings
        reference = target = augment(self._examples[draw.reference].read(), *self._size, draw, settings)
        if draw.target != draw.reference:
            target = augment(self._examples[draw.target].read(), *self._size, draw, settings)
        return reference, target


def _encoder(bundle: Bundle, settings: RunSettings, mesh: Mesh, turns: int) -> Callable[[Host], Batch]:
    def per_device(bundle: Bundle, host: Host) -> Batch:
        lead = host["pictures"].shape[:-3]

        def over_rows(function: Callable[[Any], Any], name: str) -> Any:
            rows = host[name].reshape(-1, *host[name].shape[-3:])
            found = in_turns(function, rows, turns, lambda leaf: leaf.reshape(-1, *leaf.shape[2:]))
            return jax.tree.map(lambda leaf: leaf.reshape(*lead, *leaf.shape[1:]), found)

        latents, deviation = over_rows(partial(encode, bundle), "pictures")
        batch = {"latents": latents, "deviation": deviation}
        batch |= {name: host[name] for name in ("text", "rows") if name in host}
        if settings.trains_prompts:
            batch["pixels"] = host["pixels"]
        else:
            batch["features"] = over_rows(partial(encode_images, bundle), "pixels")
        return cast(Batch, batch)

    program = jax.jit(on_each_device(per_device, mesh, (P(), P(AXIS)), P(AXIS)))
    return partial(program, replicate(mesh, bundle))

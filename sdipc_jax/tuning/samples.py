"""Sheets that show how a run is doing: some of its pictures, each beside its variation."""

from collections.abc import Sequence

import numpy as np
from jax.sharding import Mesh

from sdipc_jax import parallel
from sdipc_jax.checkpoints.bundle import Bundle
from sdipc_jax.checkpoints.delta import apply_delta
from sdipc_jax.datasets.examples import Example
from sdipc_jax.pictures.preprocessing import preprocess
from sdipc_jax.pictures.sheets import contact_sheet, save_png, thumbnail
from sdipc_jax.prompts.contexts import image_prompt
from sdipc_jax.prompts.projection import convert
from sdipc_jax.prompts.vision import encode_images
from sdipc_jax.sampling.decoding import to_uint8
from sdipc_jax.tuning.config import RunSettings
from sdipc_jax.tuning.many import select
from sdipc_jax.tuning.step import State, delta
from sdipc_jax.tuning.trainable import trained_projection


class Sheets:
    """Writes `samples/step-N.png`: pictures from each concept's whole range, the seed's first variation of each.

    Args:
        concepts: for each concept the numbers of its pictures.
    """

    def __init__(
        self,
        bundle: Bundle,
        settings: RunSettings,
        examples: Sequence[Example],
        concepts: Sequence[Sequence[int]],
        mesh: Mesh,
    ) -> None:
        self._settings, self._mesh = settings, mesh
        # Without sheets, the parts of the checkpoint that do not train need no memory.
        self._bundle = bundle if settings.sample_every else None
        count = settings.sample_pictures
        self._shown = [
            [
                examples[numbers[place]]
                for place in np.linspace(0, len(numbers) - 1, min(count, len(numbers))).astype(int)
            ]
            for numbers in concepts
        ]

    def __call__(self, state: State, update: int) -> None:
        """Samples with what a state has learnt. All processes must call it."""
        settings, rows, labels = self._settings, [], []
        if self._bundle is None:
            return
        for index, shown in enumerate(self._shown):
            one = select(state, index) if settings.each_class else state
            tuned = apply_delta(self._bundle, delta(one), check=False)
            pictures = [each.read() for each in shown]
            preprocessing = tuned.config.vision_side.preprocessing
            pixels = np.stack([preprocess(picture, preprocessing) for picture in pictures])
            projection = trained_projection(one.frozen.projection, tuned.params, settings)
            vectors = convert(projection, encode_images(tuned, pixels))
            sampled, _ = parallel.generate(
                self._mesh,
                tuned,
                image_prompt(tuned, vectors),
                seeds=settings.seed,
                height=settings.height,
                width=settings.width,
            )
            rows += [
                [thumbnail(picture), *row] for picture, row in zip(pictures, to_uint8(sampled)[:, None], strict=True)
            ]
            labels += [each.label or each.path.stem for each in shown]
        if parallel.is_first():
            folder = settings.output_dir / "samples"
            folder.mkdir(exist_ok=True)
            sheet = contact_sheet(rows, labels)
            save_png(folder / f"step-{update:06}.png", np.asarray(sheet), {"step": update})

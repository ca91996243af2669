"""How near a map fitted to captions comes to the layer before the last of the shipped checkpoint's text tower.

Prints the tables of docs/calibration.md: what `scripts/build_corpus.py` held out is given to the vision tower, and what
the map makes of it is compared with the end token's state of the drawing's caption. A minute or two on two cores.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from sdipc_jax.batches import in_batches
from sdipc_jax.checkpoints.load import load
from sdipc_jax.checkpoints.text_tower import TextTower, load_text_tower
from sdipc_jax.evaluate.corpus import load_corpus
from sdipc_jax.evaluate.metrics import cosines, ranks, unit
from sdipc_jax.evaluate.retrieval import image_features
from sdipc_jax.evaluate.tables import Estimate, Table
from sdipc_jax.prompts.calibration import picture_vectors
from sdipc_jax.prompts.contexts import end_positions
from sdipc_jax.prompts.everyday import everyday_captions
from sdipc_jax.prompts.ridge import Vectors, explained, fit
from sdipc_jax.prompts.tokens import token_ids

COUNTS = (100, 300, 1000, 3000)
RIDGES = (0.03, 0.1, 0.3, 1.0, 3.0)
CHOSEN = 0.3


def end_states(
    tower: TextTower, texts: Sequence[str]
) -> tuple[Float[np.ndarray, "N D_text"], Float[np.ndarray, "N D_text"]]:
    """The end token's state after the last layer and its norm, and before the last layer, without one."""
    tokens = token_ids(tower.config, texts, truncate=True)
    end = np.asarray(end_positions(tokens, tower.config.tokens.end))
    layer = str(tower.config.text.num_hidden_layers - 2)

    def both(tokens: np.ndarray, end: np.ndarray) -> tuple[jnp.ndarray, jnp.ndarray]:
        last, kept = tower.model.apply(
            {"params": tower.params}, tokens, capture_intermediates=True, mutable="intermediates"
        )
        layers = kept["intermediates"]["text_model"]["encoder"]["layers"]
        places = jnp.arange(len(end)), end
        return last[places], layers[layer]["__call__"][0][places]

    return in_batches(both, tokens[:, : end.max() + 1], end)


class Judge:
    """Held-out pictures, and the states of their captions."""

    def __init__(self, joint: Vectors, states: Vectors, truth: np.ndarray) -> None:
        self.joint, self.states, self.truth = joint, states, truth

    def __call__(self, found: Vectors, length: float) -> tuple[Estimate, Estimate, Estimate]:
        """Cosine, R^2 and R@1 of vectors that get this length."""
        found, targets = length * unit(found), self.states[self.truth]
        first = ranks(unit(found) @ unit(self.states).T, self.truth) < 1
        cosine, recall = (Estimate.of_mean(each[None]) for each in (cosines(found, targets), first * 1.0))
        return cosine, Estimate(explained(found, targets)), recall


def main() -> None:
    """Prints the tables."""
    bundle = load("embedded")
    tower, corpus = load_text_tower(bundle.config), load_corpus()
    held = corpus.where(corpus.split == "cells")
    known = np.unique(corpus.caption[corpus.split == "train"])
    known = known[np.random.default_rng(0).permutation(len(known))]
    names, truth = np.unique(held.caption, return_inverse=True)

    projection = tower.projection.astype(np.float64)
    last, before = end_states(tower, known.tolist())
    joint = last @ projection
    judge = Judge(
        picture_vectors(bundle, image_features(bundle, held.pictures)), end_states(tower, names.tolist())[1], truth
    )
    length = float(np.linalg.norm(before, axis=1).mean())

    naive = judge(judge.joint @ np.linalg.pinv(projection), length)
    rows: list[tuple[str, tuple[Estimate | None, ...]]] = [("inverse of the last layer", (*naive, None))]
    for count in COUNTS:
        fitted = fit(joint[:count], before[:count, None], CHOSEN)
        left = Estimate(explained(fitted(joint[max(COUNTS) :]), before[max(COUNTS) :]))
        rows.append((f"{count} captions", (*judge(fitted(judge.joint), fitted.length[0, 0]), left)))
    everyday = list(everyday_captions())
    own_last, own_before = end_states(tower, everyday)
    fitted = fit(own_last @ projection, own_before[:, None], CHOSEN)
    left = Estimate(explained(fitted(joint), before))
    rows.append((f"{len(everyday)} built-in captions", (*judge(fitted(judge.joint), fitted.length[0, 0]), left)))
    note = (
        f"{len(held)} held-out drawings, each against {len(names)} captions; ridge {CHOSEN:g}, captions of the "
        f"training drawings. The last column: {len(known) - max(COUNTS)} of those captions that no map was fitted to; "
        "in the last row all of them."
    )
    columns = ("cosine", "R^2", "R@1", "R^2 of other captions")
    print(Table("captions", "The layer before the last", note, columns, tuple(rows)).to_markdown())

    of_pictures: list[tuple[str, tuple[Estimate | None, ...]]] = []
    of_captions: list[tuple[str, tuple[Estimate | None, ...]]] = []
    for count in COUNTS:
        maps = [fit(joint[:count], before[:count, None], ridge) for ridge in RIDGES]
        name = f"{count} captions"
        of_pictures.append((name, tuple(judge(each(judge.joint), each.length[0, 0])[1] for each in maps)))
        without = [explained(each(joint[max(COUNTS) :]), before[max(COUNTS) :]) for each in maps]
        of_captions.append((name, tuple(Estimate(each) for each in without)))
    ridges = tuple(f"ridge {ridge:g}" for ridge in RIDGES)
    for title, note, found in (
        ("R^2 by ridge", "The same pictures.", of_pictures),
        ("R^2 of other captions by ridge", "Those of the last column above.", of_captions),
    ):
        print()
        print(Table("ridges", title, note, ridges, tuple(found)).to_markdown())


if __name__ == "__main__":
    main()

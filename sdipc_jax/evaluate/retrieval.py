"""Pictures and captions in the three spaces of CLIP, and which caption each picture finds (the paper's Table 1)."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float32, Int, Shaped, UInt8

from sdipc_jax.batches import in_batches
from sdipc_jax.checkpoints.bundle import Bundle
from sdipc_jax.checkpoints.text_tower import TextTower
from sdipc_jax.evaluate.corpus import Corpus
from sdipc_jax.evaluate.metrics import cosines, ranks, unit
from sdipc_jax.evaluate.tables import Estimate, Table
from sdipc_jax.pictures.preprocessing import preprocess
from sdipc_jax.prompts.calibration import caption_states, caption_vectors
from sdipc_jax.prompts.projection import Projection, convert, truncated_pinv
from sdipc_jax.prompts.vision import encode_images

Pictures = UInt8[np.ndarray, "N H W 3"]
Vectors = Float[np.ndarray, "N D"]


@dataclass(frozen=True)
class Captions:
    """Every caption that a picture may be taken for.

    Attributes:
        texts: sorted.
        base: the concept of each, without skin tone.
        states: of their end tokens, in T-space.
        joint: the same in C-space.
    """

    texts: Shaped[np.ndarray, " M"]
    base: Shaped[np.ndarray, " M"]
    states: Float32[np.ndarray, "M D_text"]
    joint: Float32[np.ndarray, "M D_joint"]

    def places(self, texts: Shaped[np.ndarray, " N"]) -> Int[np.ndarray, " N"]:
        """Where each text is in the list; it has to be there."""
        places = np.searchsorted(self.texts, texts)
        assert (self.texts[places] == texts).all()
        return places


def encode_captions(bundle: Bundle, corpus: Corpus, tower: TextTower | None = None) -> Captions:
    """The captions of a corpus, each once.

    Args:
        tower: the CLIP's own, where the states that the UNet reads do not lead to the joint space.
    """
    texts, first = np.unique(corpus.caption, return_index=True)
    states = end_states(bundle, texts.tolist())
    joint = states @ text_projection(bundle) if tower is None else joint_vectors(bundle, texts.tolist(), tower)
    return Captions(texts, corpus.base[first], states, joint)


def end_states(bundle: Bundle, texts: list[str]) -> Float32[np.ndarray, "N D_text"]:
    """The state of each text's end token, in T-space."""
    return caption_states(bundle, texts)[0][:, 0]


def joint_vectors(bundle: Bundle, texts: list[str], tower: TextTower | None) -> Float32[np.ndarray, "N D_joint"]:
    """Texts in C-space; see `encode_captions`."""
    if tower is None:
        return end_states(bundle, texts) @ text_projection(bundle)
    return caption_vectors(tower, texts).astype(np.float32)


def text_projection(bundle: Bundle) -> Float32[np.ndarray, "D_text D_joint"]:
    """W_t."""
    return np.asarray(bundle.params["clip"]["text_projection"]["kernel"])


def image_features(bundle: Bundle, pictures: Pictures) -> Float32[np.ndarray, "N D_image"]:
    """The class token of each picture."""
    settings = bundle.config.vision_side.preprocessing
    pixels = np.stack([preprocess(picture, settings) for picture in pictures])
    return in_batches(lambda pixels: encode_images(bundle, pixels), pixels)


def retrieval_columns(
    found: Vectors, captions: Vectors, truth: Int[np.ndarray, " N"], base: Shaped[np.ndarray, " M"]
) -> dict[str, Float[np.ndarray, " N"]]:
    """For each query whether its caption is nearest, among the 5 nearest, and whether the nearest is of its concept."""
    scores = unit(found) @ unit(captions).T
    rank = ranks(scores, truth)
    # The best-placed caption of the right concept, against all of other concepts.
    of_concept = base[None, :] == base[truth][:, None]
    right = np.where(of_concept, scores, -np.inf).max(axis=1)
    wrong = np.where(of_concept, -np.inf, scores).max(axis=1)
    return {"R@1": (rank < 1) * 1.0, "R@5": (rank < 5) * 1.0, "concept R@1": (right > wrong) * 1.0}


def retrieval_table(
    bundle: Bundle, projection: Projection, captions: Captions, held: Corpus, features: Vectors
) -> Table:
    """The paper's Table 1: is anything lost on the way from C-space to T-space?"""
    truth = captions.places(held.caption)
    joint = features @ np.asarray(projection.visual)
    spaces = {
        "C-space": (joint, captions.joint),
        "T-space": (np.asarray(convert(projection, jnp.asarray(features))), captions.states),
    }
    if bundle.config.inverse_reaches:
        raw = np.asarray(truncated_pinv(jnp.asarray(text_projection(bundle)), 0.0))
        spaces["T-space, raw inverse"] = joint @ raw, captions.states
    rows = []
    for name, (found, targets) in spaces.items():
        columns = retrieval_columns(found, targets, truth, captions.base) | {"cosine": cosines(found, targets[truth])}
        rows.append((name, tuple(Estimate.of_mean(values[None]) for values in columns.values())))
    values = np.asarray(projection.singular_values)
    rank = int(projection.rank)
    kept = (
        f"T-space keeps {rank} of {len(values)} singular values ({values[0]:.3g} to {values[rank - 1]:.3g}); the raw "
        "inverse keeps all."
        if projection.centre is None
        else f"T-space is reached by a map fitted to captions, along {rank} of {len(values)} axes."
    )
    note = (
        f"All {len(held)} held-out pictures, each against all {len(captions.texts)} captions. {kept} "
        "`concept` forgives a wrong skin tone. 95% bootstrap intervals over pictures."
    )
    return Table("retrieval", "Caption retrieval", note, ("R@1", "R@5", "concept R@1", "cosine"), tuple(rows))

"""Table 1's shape on drawings, and all else of spaces and conversions that needs no generated picture."""

from typing import Any

import numpy as np

from sdipc_jax.checkpoints.bundle import Bundle
from sdipc_jax.checkpoints.text_tower import load_text_tower
from sdipc_jax.evaluate.conversions import compare
from sdipc_jax.evaluate.corpus import Corpus
from sdipc_jax.evaluate.metrics import cosines, unit
from sdipc_jax.evaluate.retrieval import (
    Captions,
    encode_captions,
    image_features,
    retrieval_columns,
    retrieval_table,
    text_projection,
)
from sdipc_jax.evaluate.tables import Estimate, Table
from sdipc_jax.prompts.projection import closed_form, truncated_pinv

SHARES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
# What a map is fitted to.
_CAPTIONS = 3000
LITERAL = "T-space, cut-off 0.3"


def measure(bundle: Bundle, corpus: Corpus) -> tuple[list[Table], dict[str, Any]]:
    """All tables, and the gap."""
    known, held = corpus.known, corpus.held_out("cells")
    features = image_features(bundle, held.pictures)
    projection, captions = closed_form(bundle), encode_captions(bundle, known)
    train = np.unique(corpus.caption[corpus.split == "train"])
    fitted_to = train[np.random.default_rng(0).permutation(len(train))][:_CAPTIONS].tolist()
    cutoff = float(bundle.config.defaults.cutoff)
    tables = [
        retrieval_table(bundle, projection, captions, held, features),
        lost_table(bundle, captions, held.caption, features, cutoff),
        compare(bundle, load_text_tower(bundle.config), features, held.caption.tolist(), fitted_to, cutoff=cutoff),
        cutoffs_table(bundle, captions, held.caption, features),
    ]
    return tables, gap(bundle, captions, held.caption, features)


def gap(bundle: Bundle, captions: Captions, names: np.ndarray, features: np.ndarray) -> dict[str, float]:
    """How far pictures and their captions lie apart in the joint space, and how narrow each of their cones is."""
    u = unit(features @ np.asarray(bundle.params["clip"]["visual_projection"]["kernel"], np.float64))
    w = unit(captions.joint[captions.places(names)])
    return {
        "distance of the means": float(np.linalg.norm(u.mean(axis=0) - w.mean(axis=0))),
        "length of the pictures' mean": float(np.linalg.norm(u.mean(axis=0))),
        "length of the captions' mean": float(np.linalg.norm(w.mean(axis=0))),
        "cosine of a picture and its caption": float(np.mean(np.sum(u * w, axis=1))),
    }


def lost_table(bundle: Bundle, captions: Captions, names: np.ndarray, features: np.ndarray, cutoff: float) -> Table:
    """What T-space finds less than C-space, on the same pictures."""
    truth, joint = captions.places(names), features @ np.asarray(bundle.params["clip"]["visual_projection"]["kernel"])
    hits = {"C-space": retrieval_columns(joint, captions.joint, truth, captions.base)}
    for name, limit in (("T-space", cutoff), (LITERAL, 0.3), ("T-space, raw inverse", 0.0)):
        found = joint @ np.asarray(truncated_pinv(text_projection(bundle), limit))
        hits[name] = retrieval_columns(found, captions.states, truth, captions.base)
    columns = tuple(hits["C-space"])
    rows = []
    for name in list(hits)[1:]:
        differences = {column: hits[name][column] - hits["C-space"][column] for column in columns}
        rows.append((f"{name} - C-space", tuple(Estimate.of_mean(each[None]) for each in differences.values())))
    note = (
        f"The same {len(truth)} pictures in both spaces. T-space has the checkpoint's cut-off, {cutoff:.3g}, which was "
        "chosen on training pictures; 0.3 is the paper's number. 95% bootstrap intervals over pictures."
    )
    return Table("lost", "What is lost on the way to T-space", note, columns, tuple(rows))


def cutoffs_table(bundle: Bundle, captions: Captions, names: np.ndarray, features: np.ndarray) -> Table:
    """Retrieval and cosine by the cut-off, as a share of the largest singular value."""
    matrix, truth = text_projection(bundle), captions.places(names)
    joint = features @ np.asarray(bundle.params["clip"]["visual_projection"]["kernel"])
    values = np.linalg.svd(matrix, compute_uv=False)
    rows = []
    for share in SHARES:
        limit = share * float(values[0])
        found = joint @ np.asarray(truncated_pinv(matrix, limit))
        first = retrieval_columns(found, captions.states, truth, captions.base)["R@1"]
        near = cosines(found, captions.states[truth])
        kept = Estimate(float((values >= limit).sum()))
        rows.append((f"{share:g} ({limit:.3g})", (kept, Estimate.of_mean(first[None]), Estimate.of_mean(near[None]))))
    note = (
        "Singular values of the text projection below this share of the largest (in brackets: below this) count as 0."
    )
    return Table("cutoffs", "What the cut-off decides", note, ("kept", "R@1", "cosine"), tuple(rows))

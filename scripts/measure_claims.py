"""The paper's claims that need no generated picture, on one checkpoint or several: docs/results.

    python scripts/build_corpus.py
    python scripts/measure_claims.py spaces embedded build/plain     # a JSON a checkpoint, in docs/results
    python scripts/measure_claims.py pages                           # the pages, from the JSONs alone

`spaces` gives every held-out drawing to the vision tower: its caption among all captions in C-space and in T-space
(Table 1's shape), what takes vectors of pictures to states of captions (point by point the paper's inverse and its
relatives), the gap between the two, and what the cut-off decides. Minutes on two cores.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from sdipc_jax.checkpoints.bundle import Bundle
from sdipc_jax.checkpoints.digests import digests
from sdipc_jax.checkpoints.load import load
from sdipc_jax.checkpoints.text_tower import load_text_tower
from sdipc_jax.evaluate.conversions import compare
from sdipc_jax.evaluate.corpus import load_corpus
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
from sdipc_jax.files import write_atomically
from sdipc_jax.prompts.projection import closed_form, truncated_pinv

SHARES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
# What a map is fitted to.
_CAPTIONS = 3000
_LITERAL = "T-space, cut-off 0.3"
# Of Table 1's: it loses 0.019 by Acc@1 and 0.030 by TR@1.
_NEARLY = -0.05


@dataclass(frozen=True)
class Options:
    """Measures claims, or writes the pages about them."""

    what: Annotated[Literal["spaces", "pages"], tyro.conf.Positional]
    """Measure, or write the pages."""
    checkpoints: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """`embedded` and folders."""
    corpus: Path = Path("build/corpus.npz")
    """As scripts/build_corpus.py writes it."""
    output_dir: Path = Path("docs/results")
    """Where JSON and pages go."""


def measure(checkpoint: str, corpus_file: Path) -> dict[str, Any]:
    """Everything of one checkpoint, as JSON."""
    bundle, corpus = load(checkpoint), load_corpus(corpus_file)
    known = corpus.where(corpus.split != "style")
    held = corpus.where((corpus.split == "cells") & np.isin(corpus.caption, known.caption))
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
    return {
        "checkpoint": checkpoint,
        "digests": digests(bundle.config, None),
        "corpus": corpus.manifest.get("sha256"),
        "gap": gap(bundle, captions, held.caption, features),
        "tables": {table.name: table.to_json() | {"columns": list(table.columns)} for table in tables},
    }


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
    for name, limit in (("T-space", cutoff), (_LITERAL, 0.3), ("T-space, raw inverse", 0.0)):
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


def restored(found: Mapping[str, Any], name: str) -> Table:
    """A table from its JSON."""
    table = found["tables"][name]

    def estimate(cell: Any) -> Estimate | None:
        if cell is None:
            return None
        interval = cell.get("interval")
        return Estimate(cell["value"], None if interval is None else (interval[0], interval[1]))

    rows = [
        (row, tuple(estimate(cells.get(column)) for column in table["columns"])) for row, cells in table["rows"].items()
    ]
    return Table(name, table["title"], table["note"], tuple(table["columns"]), tuple(rows))


def verdict(lost: Estimate) -> str:
    """Whether no more is lost than `_NEARLY`."""
    assert lost.interval is not None
    low, high = lost.interval
    return "holds" if low > _NEARLY else "does not" if high < _NEARLY else "cannot be told"


def pages(folder: Path) -> None:
    """Writes a page a checkpoint and the summary."""
    measured = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    summary = [_SUMMARY]
    for name, found in measured.items():
        tables = [restored(found, each) for each in found["tables"]]
        gaps = "\n".join(f"| {what} | {value:.3f} |" for what, value in found["gap"].items())
        text = f"# Spaces and conversions: {name}\n\n{_PAGE}\n\n## The gap\n\n| | |\n|---|---|\n{gaps}\n\n"
        text += "\n\n".join(table.to_markdown().replace("### ", "## ", 1) for table in tables) + "\n"
        write_atomically(folder / f"{name}.md", text.encode())
        summary.append(summarised(name, found))
    summary.append(_OPEN)
    write_atomically(folder / "summary.md", ("\n\n".join(summary) + "\n").encode())


def summarised(name: str, found: Mapping[str, Any]) -> str:
    """A checkpoint's verdicts."""
    lost, conversions = restored(found, "lost"), restored(found, "conversions")
    rows = [row for row, _ in conversions.rows]
    inverse = next(row for row in rows if row.startswith("inverse, cut-off") and "shift" not in row)
    literal = lost[f"{_LITERAL} - C-space", "R@1"]
    drop, raw = lost["T-space - C-space", "R@1"], lost["T-space, raw inverse - C-space", "R@1"]
    lines = [
        f"## {name}",
        "",
        f"The means of pictures and captions lie {found['gap']['distance of the means']:.3f} apart. "
        f"[Tables]({name}.md)",
        "",
        "| claim | the paper | here | verdict |",
        "|---|---|---|---|",
        f"| T-space finds nearly what C-space finds (Table 1) | -0.019 by Acc@1, -0.030 by TR@1 | {drop} by R@1 | "
        f"{verdict(drop)} |",
        f"| the same with the paper's number for the cut-off, 0.3 | as above | {literal} by R@1 | {verdict(literal)} |",
        f"| the cut-off is needed: the raw inverse loses more | not measured | {raw} by R@1 | {needed(drop, raw)} |",
    ]
    for row in rows:
        if row in (inverse, "raw inverse"):
            continue
        for what, column in (("finds more captions", "R@1"), ("comes nearer to the captions", "cosine")):
            one, other = conversions[row, column], conversions[inverse, column]
            lines.append(
                f"| {row} {what} than the paper's inverse | not measured | {column} {one} for {other} | "
                f"{apart(one, other)} |"
            )
    return "\n".join(lines)


def needed(drop: Estimate, raw: Estimate) -> str:
    """Whether the raw inverse is worse by intervals that do not touch."""
    return apart(drop, raw)


def apart(one: Estimate, other: Estimate) -> str:
    """Whether the first is larger, by intervals that do not touch; touching ones leave it open."""
    assert one.interval is not None
    assert other.interval is not None
    if one.interval[0] > other.interval[1]:
        return "holds"
    return "does not" if one.interval[1] < other.interval[0] else "cannot be told"


_PAGE = """Written by `python scripts/measure_claims.py pages` from the JSON beside it, which
`python scripts/measure_claims.py spaces CHECKPOINT` measured. Nothing is generated here."""
_SUMMARY = """# What holds of the paper's claims

Written by `python scripts/measure_claims.py pages`. Holds: the interval lies on the claim's side; does not: on the
other; cannot be told: on both. `embedded` is the checkpoint that ships, which was trained so that the closed form
works, and `plain` ([its card](plain-card.md)) one whose training knows nothing of it."""
_OPEN = """## What is not measured

Table 2 (variations beside text prompts), Tables 3 to 6 (tuning) and pictures of the other conversions on the plain
checkpoint: its UNet's training has only begun. What tuning gains on the checkpoint that ships is in
[tuning](../tuning.md), what its variations are worth in [its card](../../sdipc_jax/embedded/README.md). The paper's own
checkpoints and data were not at hand: `sdipc evaluate TABLE CONFIG.yaml` ([evaluation](../evaluation.md)) and
`sdipc spectrum --compare FOLDER` are for those who have them."""


def main(options: Options) -> None:
    """Measures or writes."""
    options.output_dir.mkdir(parents=True, exist_ok=True)
    if options.what == "pages":
        pages(options.output_dir)
        return
    for checkpoint in options.checkpoints:
        found = measure(checkpoint, options.corpus)
        path = options.output_dir / f"{Path(checkpoint).name}.json"
        write_atomically(path, (json.dumps(found, indent=1) + "\n").encode())
        print(f"{path}: {found['gap']}")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))

"""The paper's claims on drawings, on one checkpoint or several: docs/results.

    python scripts/build_corpus.py
    python scripts/measure_claims.py spaces embedded build/plain       # a JSON a checkpoint, in docs/results
    python scripts/measure_claims.py variation embedded build/plain    # the same with pictures, and a sheet
    python scripts/measure_claims.py training build/train-plain        # what the plain checkpoint's card tells
    python scripts/measure_claims.py pages                             # the pages, from the JSONs alone

`spaces` gives every held-out drawing to the vision tower: its caption among all captions in C-space and in T-space
(Table 1's shape), what takes vectors of pictures to states of captions (point by point the paper's inverse and its
relatives), the gap between the two, and what the cut-off decides. `variation` draws held-out drawings anew by each
conversion, beside pictures of their captions (Table 2's shape). What tuning gains is measured by measure_tuning.py.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from claims import card, spaces, variations
from claims.figures import draw
from claims.pages import CHECKPOINTS, write_pages
from claims.results import RESULTS, save
from tqdm import tqdm

from sdipc_jax.checkpoints.load import load
from sdipc_jax.evaluate.backbone import load_backbone
from sdipc_jax.evaluate.corpus import load_corpus
from sdipc_jax.evaluate.pictures import Backbones
from sdipc_jax.files import write_atomically
from sdipc_jax.settings import SamplerName


@dataclass(frozen=True)
class Options:
    """Measures claims, or writes the pages about them."""

    what: Annotated[Literal["spaces", "variation", "training", "pages"], tyro.conf.Positional]
    """Measure, take what the plain card tells from a training's folder, or write the pages."""
    checkpoints: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """`embedded` and folders; of `training` the folder with metrics.jsonl."""
    corpus: Path = Path("build/corpus.npz")
    """As scripts/build_corpus.py writes it."""
    count: int = 128
    """Of `variation`: drawings."""
    seeds: int = 2
    """Of `variation`: how often each is drawn."""
    steps: int = 25
    """Of `variation`: sampling steps."""
    sampler: SamplerName = "ddim"
    """Of `variation`: the sampling method."""
    work: Path = Path("build/claims")
    """Where pictures are kept: a measurement that was stopped goes on."""
    output_dir: Path = RESULTS
    """Where JSON and pages go."""


def main(options: Options) -> None:
    """Measures or writes."""
    if options.what == "pages":
        draw(options.output_dir, CHECKPOINTS)
        write_pages(options.output_dir)
        return
    if options.what == "training":
        (folder,) = options.checkpoints
        found = card.condensed((Path(folder) / "metrics.jsonl").read_text().splitlines())
        write_atomically(options.output_dir / "training-plain.json", (json.dumps(found, indent=1) + "\n").encode())
        return
    for checkpoint in options.checkpoints:
        bundle, corpus = load(checkpoint), load_corpus(options.corpus)
        if options.what == "spaces":
            tables, gap = spaces.measure(bundle, corpus)
            path = save(options.output_dir, "spaces", checkpoint, bundle, corpus, tables, gap=gap)
        else:
            with tqdm(total=100, desc=checkpoint) as bar:

                def report(done: float, bar: Any = bar) -> None:
                    bar.update(round(100 * done) - bar.n)

                drawn = variations.measure(
                    bundle,
                    corpus,
                    Backbones(bundle, load_backbone()),
                    count=options.count,
                    seeds=range(options.seeds),
                    sampling={"steps": options.steps, "sampler": options.sampler},
                    work=options.work,
                    report=report,
                )
            path = save(
                options.output_dir,
                "variation",
                checkpoint,
                bundle,
                corpus,
                drawn.tables,
                drawn.sheet,
                kinds=drawn.kinds,
                shown="Ten of the drawings, each with its picture from the same noise.",
            )
        print(path)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))

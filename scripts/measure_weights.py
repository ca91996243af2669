"""What other weights of the UNet or another guidance change: for deciding which version of the checkpoint ships.

    python scripts/measure_weights.py embedded embedded@2 build/next embedded+build/next --output build/weights.md

A checkpoint is a folder, or several with a + between them for the mean of their UNets; after an @ comes the guidance.
All must share the first one's CLIP. Each draws the same held-out drawings, from variations' prompts and from the
captions, with the same noise. `sdipc evaluate --full` judges other drawings, so that a choice made by this table says
nothing about that one. EffNet-Lite0 judges if `pip install 'sdipc-jax[evaluate]'` has brought it.
"""

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Float
from tqdm import tqdm

import sdipc_jax as sdipc
from sdipc_jax.checkpoints.bundle import Bundle
from sdipc_jax.checkpoints.digests import digests
from sdipc_jax.errors import InputError
from sdipc_jax.evaluate.backbone import load_backbone
from sdipc_jax.evaluate.corpus import load_corpus
from sdipc_jax.evaluate.metrics import Vectors, cosines
from sdipc_jax.evaluate.pictures import (
    OWN,
    SD_IPC,
    STYLED,
    TEXT,
    Backbones,
    SetDistance,
    choose,
    prompts_of,
    ratio_of_means,
)
from sdipc_jax.evaluate.retrieval import encode_captions, retrieval_columns
from sdipc_jax.evaluate.sampling import Sampler
from sdipc_jax.evaluate.tables import Estimate, Table
from sdipc_jax.files import write_atomically
from sdipc_jax.prompts.projection import closed_form, convert

# As many as `sdipc evaluate --full` judges, which begin the same random order.
JUDGED_THERE = 256
_KINDS = (SD_IPC, TEXT, STYLED)
_FOUND = "R@1 where CLIP finds the drawing's caption"


@dataclass(frozen=True)
class Drawn:
    """What was found of one kind of prompt's pictures: by column, of each drawing; and of all as a set."""

    values: dict[str, Float[np.ndarray, " N"]]
    distance: SetDistance


def opened(told: str) -> tuple[Bundle, float | None]:
    """The checkpoint and the guidance that an argument stands for.

    Raises:
        InputError: no such checkpoint, or no number after the @.
    """
    names, _, guidance = told.partition("@")
    first, *others = (sdipc.load(name) for name in names.split("+"))
    for other in others:
        check_same_towers(first, other)
    unets = [bundle.params["unet"] for bundle in (first, *others)]
    mean = jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *unets)
    try:
        scale = float(guidance) if guidance else None
    except ValueError:
        raise InputError(f"{told}: {guidance!r} is no guidance; a number comes after the @, as in embedded@2") from None
    return replace(first, params={**first.params, "unet": mean}), scale


def check_same_towers(first: Bundle, other: Bundle) -> None:
    """Raises InputError unless all weights of two checkpoints but the UNet's are the same."""
    one, another = (digests(bundle.config, None, left_out=("unet/",)) for bundle in (first, other))
    different = sorted(
        name
        for name in one.keys() | another.keys()
        if name.endswith(".safetensors") and one.get(name) != another.get(name)
    )
    if different:
        raise InputError(
            f"{other.config.folder} differs from {first.config.folder} in {', '.join(different)}: only UNets may differ"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", help="the first is what the others are compared with")
    parser.add_argument("--corpus", type=Path, default="build/corpus.npz")
    parser.add_argument("--count", type=int, default=256, help="drawings")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--sampler", default="dpm++2m")
    parser.add_argument("--output", type=Path, help="a Markdown file; the table is printed besides")
    asked = parser.parse_args()
    several = [opened(told) for told in asked.checkpoints]
    base = several[0][0]
    for bundle, _ in several[1:]:
        check_same_towers(base, bundle)
    corpus = load_corpus(asked.corpus)
    cells = corpus.held_out("cells")
    if len(cells) < JUDGED_THERE + asked.count:
        raise InputError(f"--count {asked.count}: there are {len(cells) - JUDGED_THERE} drawings to choose by")
    rows = cells.where(choose(cells, JUDGED_THERE + asked.count)[JUDGED_THERE:])
    backbones, captions, projection = (
        Backbones(base, load_backbone()),
        encode_captions(base, corpus.known),
        closed_form(base),
    )
    real, own, judge = backbones(cells.pictures), backbones(rows.pictures), backbones.names[-1]
    truth, visual = captions.places(rows.caption), np.asarray(projection.visual)
    prompts = prompts_of(base, convert(projection, own[OWN]), rows, styled=True)

    def hits(features: Vectors, column: str) -> Float[np.ndarray, " N"]:
        return retrieval_columns(features @ visual, captions.joint, truth, captions.base)[column].astype(float)

    def draw(bundle: Bundle, guidance: float | None, kind: str) -> Drawn:
        settings = {"steps": asked.steps, "sampler": asked.sampler, "guidance_scale": guidance}
        sampler = Sampler(bundle, settings, 8, len(rows), lambda share: None)
        made = backbones(sampler(prompts[kind], 0, np.arange(len(rows))))
        values = {column: hits(made[OWN], column) for column in ("R@1", "R@5")}
        values[_FOUND] = values["R@1"][hits(own[OWN], "R@1") > 0]
        values |= {f"similarity, {name}": cosines(made[name], own[name]) for name in backbones.names}
        return Drawn(values, SetDistance.of([made[judge]], real[judge]))

    lines: list[tuple[str, tuple[Estimate | None, ...]]] = []
    gains: list[tuple[str, tuple[Estimate | None, ...]]] = []
    before: dict[str, Drawn] = {}
    for (bundle, guidance), told in zip(several, tqdm(asked.checkpoints), strict=True):
        drawn = {kind: draw(bundle, guidance, kind) for kind in _KINDS}
        for kind, each in drawn.items():
            means = (Estimate.of_mean(values[None]) for values in each.values.values())
            lines.append((f"{told}: {kind}", (*means, each.distance.estimate)))
        pairs = zip(drawn[SD_IPC].values.values(), drawn[TEXT].values.values(), strict=True)
        ratios = (ratio_of_means(one[None], other[None]) for one, other in pairs)
        lines.append((f"{told}: {SD_IPC} / {TEXT}", (*ratios, drawn[SD_IPC].distance.over(drawn[TEXT].distance))))
        for kind, each in drawn.items() if before else ():
            pairs = zip(each.values.values(), before[kind].values.values(), strict=True)
            differences = (Estimate.of_mean((one - other)[None]) for one, other in pairs)
            gains.append((f"{told} - {asked.checkpoints[0]}: {kind}", (*differences, None)))
        before = before or drawn
    note = (
        f"{len(rows)} held-out drawings that `sdipc evaluate --full` does not judge, one seed, {asked.steps} steps of "
        f"{asked.sampler}. Kernel distance: KID, unbiased, to all {len(cells)} held-out drawings, by {judge}. 95% "
        "bootstrap intervals over pictures."
    )
    columns = (*before[TEXT].values, "kernel distance")
    table = Table("weights", "What other weights and guidance change", note, columns, (*lines, *gains)).to_markdown()
    print(table)
    if asked.output is not None:
        write_atomically(asked.output, f"{table}\n".encode())


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        raise SystemExit(f"measure_weights: {error}") from None

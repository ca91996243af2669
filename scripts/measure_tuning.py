"""What tuning gains on the checkpoint that ships: the paper's Tables 5 and 6, on drawings of the corpus.

    python scripts/build_corpus.py
    python scripts/measure_tuning.py ft    # on 100 drawings of a style never seen; other drawings of it are judged
    python scripts/measure_tuning.py ct    # on four drawings of each of eight things never seen

Runs are those of `sdipc tune` with configs/tune-embedded-ft.yaml or -ct.yaml, and stay in the output's folder: the same
command goes on where it stopped. Judges are the checkpoint's own CLIP as it was before tuning, and EffNet-Lite0 if
`pip install 'sdipc-jax[evaluate]'` has brought it.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from jaxtyping import Float, Shaped, UInt8
from PIL import Image
from tqdm import tqdm

import sdipc_jax as sdipc
from sdipc_jax import tuning
from sdipc_jax.checkpoints.bundle import Bundle
from sdipc_jax.checkpoints.delta import Delta, digest, load_delta
from sdipc_jax.commands.settings import CtSettings, FtSettings
from sdipc_jax.commands.tune import train
from sdipc_jax.evaluate.backbone import load_backbone
from sdipc_jax.evaluate.corpus import Corpus, load_corpus
from sdipc_jax.evaluate.editing import EDITS
from sdipc_jax.evaluate.metrics import cosines
from sdipc_jax.evaluate.pictures import OWN, Backbones
from sdipc_jax.evaluate.retrieval import (
    Captions,
    encode_captions,
    end_states,
    image_features,
    retrieval_columns,
    text_projection,
)
from sdipc_jax.evaluate.sampling import Sampler
from sdipc_jax.evaluate.tables import Estimate, Table
from sdipc_jax.files import write_atomically
from sdipc_jax.pictures.sheets import contact_sheet, save_png
from sdipc_jax.prompts.projection import Projection

# The paper's names for what trains (Tables 5 and 6, Fig. 9), with those of this package.
Variant = Literal["FT (C)", "FT (U)", "FT", "FC", "FC (I)"]
VARIANTS: dict[Variant, str] = {"FT (C)": "prompts", "FT (U)": "kv", "FT": "both", "FC": "fc", "FC (I)": "fc_init"}
UNTUNED = "SD-IPC"
CONCEPTS, DRAWINGS = 8, 4
ALPHA = 0.9
SPOKEN = "text prompts recognised"
_NOTE = (
    "Similarity: cosine of features of the generated picture and the drawing that was the prompt. Agreement: cosine of "
    "picture and text in the own CLIP's joint space. The lower rows are gains on the same pictures, 95% bootstrap "
    "intervals over pictures."
)
CONFIGS = Path(__file__).resolve().parent.parent / "configs"

Pictures = UInt8[np.ndarray, "N H W 3"]
# By backbone.
Features = dict[str, Float[np.ndarray, "N D"]]
# By the measure's name: a value for each picture.
Values = dict[str, Float[np.ndarray, " N"]]


@dataclass(frozen=True)
class Options:
    """Tunes the checkpoint that ships in every way, and measures what was gained."""

    mode: Annotated[Literal["ft", "ct"], tyro.conf.Positional]
    """Fine-tuning on a domain, or customising on a few drawings of one thing."""
    corpus: Path = Path("build/corpus.npz")
    """As scripts/build_corpus.py writes it."""
    domain: Literal["style", "unseen"] = "style"
    """Of fine-tuning: a style never seen, or things never seen."""
    variants: tuple[Variant, ...] = tuple(VARIANTS)
    """Of fine-tuning: what trains."""
    count: int = 64
    """Pictures that are judged."""
    seeds: int = 2
    """Runs of each kind, each with its own seed for tuning and for sampling."""
    change: tuple[str, ...] = ()
    """KEY=VALUE for every run."""
    output_dir: Path = Path("build/tuning")
    """Where runs, tables and sheets go."""

    def runs(self, bundle: Bundle) -> Path:
        """The folder of the runs that start from a checkpoint."""
        return self.output_dir / "runs" / digest(bundle)[:8]


@dataclass(frozen=True)
class Results:
    """What was found, and some of the pictures."""

    tables: list[Table]
    sheet: Image.Image


@dataclass(frozen=True)
class Judge:
    """How generated pictures are judged: with features that no tuning has touched.

    Attributes:
        captions: all that a picture made from text may be taken for.
        sampled: told how many pictures have been made.
    """

    bundle: Bundle
    projection: Projection
    captions: Captions
    backbones: Backbones
    sampled: Callable[[int], object]

    def sample(self, bundle: Bundle, context: Any, seed: int) -> Pictures:
        """A picture of each prompt."""
        self.sampled(len(context))
        sampler = Sampler(bundle, {}, min(8, len(context)), len(context), lambda done: None)
        return sampler(context, seed, np.arange(len(context)))

    def agreement(self, made: Features, texts: Sequence[str]) -> Float[np.ndarray, " N"]:
        """Cosines of pictures and texts in C-space, by the own CLIP."""
        targets = end_states(self.bundle, list(texts)) @ text_projection(self.bundle)
        return cosines(made[OWN] @ np.asarray(self.projection.visual), targets)

    def recognised(self, made: Pictures, captions: Shaped[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
        """Whether the own CLIP finds a picture's caption among all."""
        found = image_features(self.bundle, made) @ np.asarray(self.projection.visual)
        columns = retrieval_columns(found, self.captions.joint, self.captions.places(captions), self.captions.base)
        return columns["R@1"]


def tuned_by(options: Options, folder: Path, *changes: str) -> list[Delta]:
    """The results of a run of `sdipc tune`, one for each concept; a run that is complete is not done again."""
    kind = FtSettings if options.mode == "ft" else CtSettings
    settings = kind(
        config=CONFIGS / f"tune-embedded-{options.mode}.yaml",
        changes=(*changes, f"output_dir={folder}", *options.change),
        quiet=True,
    )
    with tqdm(total=100, desc=f"tune {folder.name}", leave=False) as bar:

        def report(done: float, text: str = "") -> None:
            bar.set_postfix_str(text, refresh=False)
            bar.update(round(100 * done) - bar.n)

        return [load_delta(file) for file in train(settings, report).files]


def write_data(corpus: Corpus, folder: Path) -> Path:
    """Drawings and their captions as `sdipc tune` reads them, with the thing that is drawn as its class."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, picture in enumerate(corpus.pictures):
        Image.fromarray(picture).save(folder / f"{number:03}.png")
        caption, label = str(corpus.caption[number]), str(corpus.base[number])
        lines.append(json.dumps({"picture": f"{number:03}.png", "class": label, "caption": caption}))
    file = folder / "captions.jsonl"
    write_atomically(file, ("\n".join(lines) + "\n").encode())
    return file


def edits_for(shown: Corpus) -> list[str]:
    """For each picture a text that can change it, in turn where there are several."""
    applies = [edit.applies(shown) for edit in EDITS]
    texts = []
    for number in range(len(shown)):
        able = [edit.text for edit, each in zip(EDITS, applies, strict=True) if each[number]]
        texts.append(able[number % len(able)] if able else EDITS[-1].text)
    return texts


def likeness(made: Features, real: Features) -> Values:
    """Cosines of features, by backbone."""
    return {f"{name} similarity": cosines(made[name], real[name]) for name in made}


@dataclass(frozen=True)
class Measured:
    """Variations and edits of pictures, and how good they are.

    Attributes:
        features: of the variations.
        pictures: the variations, then the edits.
    """

    plain: Values
    edited: Values
    features: Features
    pictures: tuple[Pictures, Pictures]


def measure(
    judge: Judge,
    bundles: Sequence[Bundle],
    shown: Sequence[Corpus],
    real: Features,
    edits: Sequence[Sequence[str]],
    seed: int,
) -> Measured:
    """Has each checkpoint vary and edit its own part of the pictures, whose features are `real`."""
    made, changed = [], []
    for tuned, rows, texts in zip(bundles, shown, edits, strict=True):
        vectors = sdipc.convert(sdipc.closed_form(tuned), image_features(tuned, rows.pictures))
        made.append(judge.sample(tuned, sdipc.image_prompt(tuned, vectors), seed))
        tokens = sdipc.tokenize(tuned, list(texts))
        changed.append(judge.sample(tuned, sdipc.edit_prompt(tuned, vectors, tokens, ALPHA), seed))
    pictures = np.concatenate(made), np.concatenate(changed)
    plain, edited = map(judge.backbones, pictures)
    captions = [str(caption) for rows in shown for caption in rows.caption]
    texts = [text for each in edits for text in each]
    return Measured(
        likeness(plain, real) | {"agreement with the caption": judge.agreement(plain, captions)},
        likeness(edited, real) | {"agreement with the text": judge.agreement(edited, texts)},
        plain,
        pictures,
    )


def fine_tuning(options: Options, corpus: Corpus, judge: Judge) -> Results:
    """The ablation: things that no run has seen, drawn in the domain's way, as prompts to each variant."""
    order = np.random.default_rng(0).permutation
    domain = corpus.where((corpus.split == options.domain) & np.isin(corpus.caption, judge.captions.texts))
    halves = [domain.where(np.isin(domain.base, half)) for half in np.array_split(order(np.unique(domain.base)), 2)]
    trained, shown = (half.where(order(len(half))[:n]) for half, n in zip(halves, (100, options.count), strict=True))
    cells = corpus.where(corpus.split == "cells")
    spoken = cells.where(order(len(cells))[: options.count]).caption
    data = write_data(trained, options.output_dir / "data" / f"ft-{options.domain}")
    edits, real = edits_for(shown), judge.backbones(shown.pictures)
    plain: dict[str, list[Values]] = {}
    edited: dict[str, list[Values]] = {}
    first: dict[str, tuple[Pictures, Pictures]] = {}
    kinds: list[tuple[str, str | None]] = [(UNTUNED, None), *((name, VARIANTS[name]) for name in options.variants)]
    for name, variant in kinds:
        plain[name], edited[name] = [], []
        for seed in range(options.seeds):
            tuned, speaks_alike = judge.bundle, False
            if variant is not None:
                run = options.runs(judge.bundle) / f"ft-{options.domain}-{variant}-{seed}"
                (delta,) = tuned_by(options, run, f"data={data}", f"variant={variant}", f"seed={seed}")
                tuned = tuning.apply(judge.bundle, delta)
                speaks_alike = not any(tensor.startswith("unet.") for tensor in delta.tensors)
            found = measure(judge, [tuned], [shown], real, [edits], seed)
            if speaks_alike:
                # What text prompts go through has not been touched.
                recognised = plain[UNTUNED][seed][SPOKEN]
            else:
                tokens = sdipc.tokenize(tuned, spoken.tolist(), truncate=True)
                recognised = judge.recognised(judge.sample(tuned, sdipc.text_prompt(tuned, tokens), seed), spoken)
            plain[name].append(found.plain | {SPOKEN: recognised})
            edited[name].append(found.edited)
            first.setdefault(name, found.pictures)
    note = (
        f"{len(trained)} drawings of the split `{options.domain}` to tune on; {len(shown)} drawings of other things of "
        f"it as prompts, and {options.count} captions of known things as text prompts. {options.seeds} seeds, each for "
        f"a run and its samples. {_NOTE}"
    )
    tables = [
        table("variation", "Variations after fine-tuning", note, plain),
        table("edits", f"Edits after fine-tuning, alpha {ALPHA}", note, edited),
    ]
    return Results(tables, sheet([shown], [edits], first, each=8))


def customising(options: Options, corpus: Corpus, judge: Judge) -> Results:
    """Things never seen, each tuned on a few of its drawings: these and one drawing more are compared with."""
    order = np.random.default_rng(0).permutation
    plainly = corpus.where((corpus.split == "unseen") & (corpus.tone == 0))
    things, counts = np.unique(plainly.base, return_counts=True)
    chosen = order(things[counts > DRAWINGS])[:CONCEPTS]
    drawings = np.stack([order(np.flatnonzero(plainly.base == thing))[: DRAWINGS + 1] for thing in chosen])
    seen = plainly.where(drawings[:, :DRAWINGS].ravel())
    shown = [plainly.where(numbers) for numbers in drawings[:, :DRAWINGS]]
    others = judge.backbones(plainly.pictures[np.repeat(drawings[:, DRAWINGS], DRAWINGS)])
    data = write_data(seen, options.output_dir / "data" / "ct")
    edits, real = [edits_for(each) for each in shown], judge.backbones(seen.pictures)
    plain: dict[str, list[Values]] = {UNTUNED: [], "CT": []}
    edited: dict[str, list[Values]] = {UNTUNED: [], "CT": []}
    first: dict[str, tuple[Pictures, Pictures]] = {}
    for seed in range(options.seeds):
        run = options.runs(judge.bundle) / f"ct-{seed}"
        deltas = tuned_by(options, run, f"data={data}", "each_class=true", f"seed={seed}")
        tuned = [tuning.apply(judge.bundle, delta) for delta in deltas]
        for name, bundles in ((UNTUNED, [judge.bundle] * len(shown)), ("CT", tuned)):
            found = measure(judge, bundles, shown, real, edits, seed)
            unseen = likeness(found.features, others)
            plain[name].append(found.plain | {f"{column}, a drawing not tuned on": x for column, x in unseen.items()})
            edited[name].append(found.edited)
            first.setdefault(name, found.pictures)
    note = (
        f"{CONCEPTS} things never seen, {DRAWINGS} drawings of each by several artists to tune on and as prompts, and "
        f"one more to compare with. {options.seeds} seeds, each for a run and its samples. {_NOTE}"
    )
    tables = [
        table("variation", "Variations after customising", note, plain),
        table("edits", f"Edits after customising, alpha {ALPHA}", note, edited),
    ]
    return Results(tables, sheet(shown, edits, first, each=1))


def table(name: str, title: str, note: str, found: Mapping[str, Sequence[Values]]) -> Table:
    """A row for each kind: its mean, and what it gains over no tuning on the same pictures."""
    columns = list(found[UNTUNED][0])
    scores = {kind: {column: np.stack([each[column] for each in found[kind]]) for column in columns} for kind in found}
    rows: list[tuple[str, tuple[Estimate | None, ...]]] = [
        (kind, tuple(Estimate.of_mean(values[column]) for column in columns)) for kind, values in scores.items()
    ]
    for kind in list(found)[1:]:
        gains = (scores[kind][column] - scores[UNTUNED][column] for column in columns)
        rows.append((f"{kind} - {UNTUNED}", tuple(map(Estimate.of_mean, gains))))
    return Table(name, title, note, tuple(columns), tuple(rows))


def sheet(
    shown: Sequence[Corpus],
    edits: Sequence[Sequence[str]],
    made: Mapping[str, tuple[Pictures, Pictures]],
    each: int,
) -> Image.Image:
    """The first pictures of each part: the drawing, its variations of each kind, its edits of each kind."""
    rows, labels, start = [], [], 0
    for part, texts in zip(shown, edits, strict=True):
        for n in range(min(each, len(part))):
            rows.append([part.pictures[n], *(pair[kind][start + n] for kind in (0, 1) for pair in made.values())])
            labels.append(f"{part.caption[n]}; then with {texts[n]!r}")
        start += len(part)
    return contact_sheet(rows, labels, cell=96)


def main(options: Options) -> None:
    """Prints the tables, and writes them with the sheet."""
    corpus = load_corpus(options.corpus)
    bundle = sdipc.load("embedded")
    captions = encode_captions(bundle, corpus.where(corpus.split != "style"))
    backbones = Backbones(bundle, load_backbone())
    with tqdm(desc="pictures sampled") as bar:
        judge = Judge(bundle, sdipc.closed_form(bundle), captions, backbones, bar.update)
        results = (fine_tuning if options.mode == "ft" else customising)(options, corpus, judge)
    text = "\n\n".join(table.to_markdown() for table in results.tables) + "\n"
    name = f"{options.mode}-{options.domain}" if options.mode == "ft" else options.mode
    save_png(options.output_dir / f"{name}.png", np.asarray(results.sheet), {})
    write_atomically(options.output_dir / f"{name}.md", text.encode())
    found = {table.name: table.to_json() for table in results.tables}
    write_atomically(options.output_dir / f"{name}.json", (json.dumps(found, indent=2) + "\n").encode())
    print(text)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))

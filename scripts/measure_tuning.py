"""What tuning gains on a checkpoint: the paper's Tables 3 to 6 and FT's learning curve, on drawings of the corpus.

    python scripts/build_corpus.py
    python scripts/measure_tuning.py ft       # on 100 drawings of a style never seen; other drawings of it are judged
    python scripts/measure_tuning.py ct       # on four drawings of each of eight things never seen
    python scripts/measure_tuning.py prompts  # what these runs have learnt, on their own drawings and on others
    python scripts/measure_tuning.py curve    # FT on more and more drawings of what the checkpoint was trained on
    python scripts/measure_tuning.py all      # FT on all of them alone, for runs of more updates

Runs are those of `sdipc tune` with configs/tune-embedded-ft.yaml or -ct.yaml, and stay in the output's folder: the same
command goes on where it stopped. Judges are the checkpoint's own CLIP as it was before tuning, and EffNet-Lite0 if
`pip install 'sdipc-jax[evaluate]'` has brought it. Tables go to docs/results, whose pages measure_claims.py writes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro
from claims.learnt import errors, held, losses
from claims.results import RESULTS, save
from claims.tuned import (
    ALPHA,
    SPOKEN,
    UNTRAINED,
    UNTUNED,
    Judge,
    Measured,
    Pictures,
    Values,
    distances,
    edits,
    edits_for,
    likeness,
    sheet,
    table,
    variations,
    write_data,
)
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
from sdipc_jax.evaluate.metrics import cosines
from sdipc_jax.evaluate.pictures import Backbones
from sdipc_jax.evaluate.retrieval import encode_captions, image_features
from sdipc_jax.evaluate.tables import Estimate, Table
from sdipc_jax.settings import SamplerName
from sdipc_jax.tuning import TuningSettings

# Of this many things, in a random order.
Order = Callable[[int | np.ndarray], np.ndarray]
# The paper's names for what trains (Tables 5 and 6, Fig. 9), with those of this package.
Variant = Literal["FT (C)", "FT (U)", "FT", "FC", "FC (I)"]
VARIANTS: dict[Variant, str] = {"FT (C)": "prompts", "FT (U)": "kv", "FT": "both", "FC": "fc", "FC (I)": "fc_init"}
CONCEPTS, DRAWINGS = 8, 4
# What FT is tuned on, and what a rate is chosen by: other drawings of the things that are judged.
TRAINED, VALIDATION = 100, 24
NOTE = (
    "Similarity: cosine of features of the generated picture and the drawing that was the prompt. Agreement: cosine of "
    "picture and text in the own CLIP's joint space. The lower rows are gains on the same pictures, 95% bootstrap "
    "intervals over pictures."
)
# Prompts as configs/tune-embedded-*.yaml begin them.
START = TuningSettings(variant="prompts", prompt_length=4, steps=1)
CONFIGS = Path(__file__).resolve().parent.parent / "configs"


@dataclass(frozen=True)
class Options:
    """Tunes a checkpoint in every way, and measures what was gained."""

    mode: Annotated[Literal["ft", "ct", "curve", "all", "prompts"], tyro.conf.Positional]
    """Fine-tuning on a domain, customising on a few drawings of one thing, or fine-tuning on more and more or all of
    what the checkpoint was trained on; or what the runs that are there have learnt."""
    checkpoint: str = "embedded"
    """`embedded`, or the folder of another that was trained on the corpus."""
    corpus: Path = Path("build/corpus.npz")
    """As scripts/build_corpus.py writes it."""
    domain: Literal["style", "unseen"] = "style"
    """Of fine-tuning: a style never seen, or things never seen."""
    variants: tuple[Variant, ...] = tuple(VARIANTS)
    """Of fine-tuning: what trains."""
    rates: tuple[float, ...] = (1e-5, 1e-4)
    """Of fine-tuning: FT is run at each; all else at the one that validation drawings choose."""
    sizes: tuple[int | Literal["all"], ...] = (100, 1000, "all")
    """Of the curve: drawings to tune on."""
    count: int = 64
    """Pictures that are judged."""
    seeds: int = 2
    """Runs of each kind, each with its own seed for tuning and for sampling."""
    steps: int = 50
    """Sampling steps."""
    sampler: SamplerName = "ddim"
    """The sampling method."""
    change: tuple[str, ...] = ()
    """KEY=VALUE for every run."""
    output_dir: Path = Path("build/tuning")
    """Where runs and their drawings go."""
    results: Path = RESULTS
    """Where tables and sheets go."""

    def run(self, bundle: Bundle, name: str) -> Path:
        """The folder of a run: what was asked for stands in its name, so that no other run is taken for it."""
        changes = "-".join(each.replace("/", "_") for each in self.change)
        return self.output_dir / "runs" / digest(bundle)[:8] / "-".join(filter(None, (name, changes)))

    @property
    def drawn_again(self) -> str:
        """How many seeds, in words."""
        return "One seed," if self.seeds == 1 else f"{self.seeds} seeds, each"

    @property
    def told(self) -> str:
        """What the notes say of runs and pictures."""
        changed = f" with {', '.join(self.change)}" if self.change else ""
        return f"Runs of configs/tune-embedded-*.yaml{changed}; pictures of {self.steps} steps of {self.sampler}."


@dataclass(frozen=True)
class Results:
    """What was found, and some of the pictures."""

    tables: list[Table]
    sheet: Image.Image | None = None
    kinds: tuple[str, ...] = ()


def tuned_by(options: Options, folder: Path, *changes: str) -> list[Delta]:
    """The results of a run of `sdipc tune`, one for each concept; a run that is complete is not done again."""
    mode = "ct" if options.mode == "ct" else "ft"
    settings = (CtSettings if mode == "ct" else FtSettings)(
        config=CONFIGS / f"tune-embedded-{mode}.yaml",
        changes=(f"model={options.checkpoint}", *changes, f"output_dir={folder}", *options.change),
        quiet=True,
    )
    with tqdm(total=100, desc=f"tune {folder.name}", leave=False) as bar:

        def report(done: float, text: str = "") -> None:
            bar.set_postfix_str(text, refresh=False)
            bar.update(round(100 * done) - bar.n)

        return [load_delta(file) for file in train(settings, report).files]


def rate_of(options: Options, judge: Judge, validation: Corpus, data: Path) -> tuple[float, Table]:
    """The rate whose FT makes variations of the validation drawings liker, and how like they are at each."""
    real = judge.backbones(validation.pictures)
    judged = f"{judge.backbones.names[-1]} similarity"
    found = {UNTUNED: variations(judge, [judge.bundle], [validation], real, 0).values}
    for rate in options.rates:
        tuned = fine_tuned(options, judge.bundle, data, "FT", rate, 0)
        found[f"FT, rate {rate:g}"] = variations(judge, [tuned], [validation], real, 0).values
    columns = tuple(found[UNTUNED])
    rows = tuple(
        (name, tuple(Estimate.of_mean(values[column][None]) for column in columns)) for name, values in found.items()
    )
    note = (
        f"{len(validation)} drawings that are not judged later, one seed. The rate is chosen by {judged}. 95% "
        "bootstrap intervals over pictures."
    )
    best = max(options.rates, key=lambda rate: float(found[f"FT, rate {rate:g}"][judged].mean()))
    return best, Table("rates", "Rates on validation drawings", note, columns, rows)


def run_of(options: Options, bundle: Bundle, data: Path, variant: Variant, rate: float, seed: int) -> Path:
    """The folder of a run of FT."""
    return options.run(bundle, f"{data.parent.name}-{VARIANTS[variant]}-{rate:g}-{seed}")


def fine_tuned(options: Options, bundle: Bundle, data: Path, variant: Variant, rate: float, seed: int) -> Bundle:
    """The checkpoint after FT."""
    run = run_of(options, bundle, data, variant, rate, seed)
    changes = (f"data={data}", f"variant={VARIANTS[variant]}", f"seed={seed}", f"learning_rate={rate:.10f}")
    (delta,) = tuned_by(options, run, *changes)
    return tuning.apply(bundle, delta)


def untrained(bundle: Bundle, seed: int) -> Bundle:
    """The checkpoint with deep prompts as runs of this seed begin them: random tokens, and nothing else."""
    return tuning.apply(bundle, tuning.delta(tuning.init(bundle, START.model_copy(update={"seed": seed}))))


def parts_of(options: Options, corpus: Corpus, order: Order) -> tuple[Corpus, Corpus, Corpus]:
    """Drawings of the domain: to tune on, and of other things to judge and to choose a rate by."""
    domain = corpus.held_out(options.domain)
    halves = [domain.where(np.isin(domain.base, half)) for half in np.array_split(order(np.unique(domain.base)), 2)]
    trained, other = halves[0].where(order(len(halves[0]))[:TRAINED]), halves[1].where(order(len(halves[1])))
    shown, validation = slice(options.count), slice(options.count, options.count + VALIDATION)
    return trained, other.where(shown), other.where(validation)


def fine_tuning(options: Options, corpus: Corpus, judge: Judge) -> Results:
    """The ablation: things that no run has seen, drawn in the domain's way, as prompts to each variant."""
    order = np.random.default_rng(0).permutation
    trained, shown, validation = parts_of(options, corpus, order)
    cells = corpus.where(corpus.split == "cells")
    spoken = cells.where(order(len(cells))[: options.count]).caption
    data = write_data(trained, options.output_dir / "data" / f"ft-{options.domain}")
    rate, rates = rate_of(options, judge, validation, data)
    texts, real = edits_for(shown), judge.backbones(shown.pictures)
    runs: dict[str, tuple[Variant, float]] = {name: (name, rate) for name in options.variants}
    if "FT" in options.variants:
        runs |= {f"FT, rate {other:g}": ("FT", other) for other in options.rates if other != rate}
    prompted = [name for name, (variant, _) in runs.items() if variant in ("FT", "FT (C)")]
    # The others leave alone what text prompts go through.
    spoken_to = [UNTUNED, *(name for name, (variant, _) in runs.items() if variant in ("FT", "FT (U)"))]

    def bundle_of(name: str, seed: int) -> Bundle:
        if name in runs:
            return fine_tuned(options, judge.bundle, data, *runs[name], seed)
        return untrained(judge.bundle, seed) if name == UNTRAINED else judge.bundle

    varied: dict[str, list[Measured]] = {}
    edited: dict[str, list[Measured]] = {}
    for name in (UNTUNED, UNTRAINED, *runs):
        varied[name], edited[name] = [], []
        for seed in range(options.seeds):
            tuned = bundle_of(name, seed)
            found = variations(judge, [tuned], [shown], real, seed)
            found.values[SPOKEN] = (
                judge.spoken(tuned, spoken, seed) if name in spoken_to else varied[UNTUNED][seed].values[SPOKEN]
            )
            varied[name].append(found)
            edited[name].append(edits(judge, [tuned], [shown], real, [texts], seed))
    note = (
        f"{len(trained)} drawings of the split `{options.domain}` to tune on; {len(shown)} drawings of other things of "
        f"it as prompts, and {options.count} captions of known things as text prompts. {options.drawn_again} for "
        f"a run and its samples. Rate {rate:g}, chosen on validation drawings. {options.told} {NOTE}"
    )
    tables = [
        table("variation", "Variations after fine-tuning", note, values_of(varied), prompted),
        table("edits", f"Edits after fine-tuning, alpha {ALPHA}", note, values_of(edited), prompted),
        rates,
        losses({name: run_of(options, judge.bundle, data, *run, 0) for name, run in runs.items()}),
    ]
    return Results(tables, sheet([shown], [texts], firsts(varied, edited), each=6), tuple(varied))


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
    texts, real = [edits_for(each) for each in shown], judge.backbones(seen.pictures)
    varied: dict[str, list[Measured]] = {UNTUNED: [], UNTRAINED: [], "CT": []}
    edited: dict[str, list[Measured]] = {name: [] for name in varied}
    for seed in range(options.seeds):
        run = options.run(judge.bundle, f"ct-{seed}")
        deltas = tuned_by(options, run, f"data={data}", "each_class=true", f"seed={seed}")
        tuned = [tuning.apply(judge.bundle, delta) for delta in deltas]
        begun = [untrained(judge.bundle, seed)] * len(shown)
        for name, bundles in ((UNTUNED, [judge.bundle] * len(shown)), (UNTRAINED, begun), ("CT", tuned)):
            found = variations(judge, bundles, shown, real, seed)
            unseen = likeness(found.features, others)
            found.values.update({f"{column}, a drawing not tuned on": x for column, x in unseen.items()})
            varied[name].append(found)
            edited[name].append(edits(judge, bundles, shown, real, texts, seed))
    note = (
        f"{CONCEPTS} things never seen, {DRAWINGS} drawings of each by several artists to tune on and as prompts, and "
        f"one more to compare with. {options.drawn_again} for a run and its samples. {options.told} {NOTE}"
    )
    tables = [
        table("variation", "Variations after customising", note, values_of(varied), ["CT"]),
        table("edits", f"Edits after customising, alpha {ALPHA}", note, values_of(edited), ["CT"]),
    ]
    return Results(tables, sheet(shown, texts, firsts(varied, edited), each=1), tuple(varied))


def known_parts(corpus: Corpus) -> tuple[Corpus, Corpus]:
    """Drawings of the training split, and held-out ones of known things, in the order that the curve takes them in."""
    order = np.random.default_rng(0).permutation
    train, cells = corpus.where(corpus.split == "train"), corpus.where(corpus.split == "cells")
    return train.where(order(len(train))), cells.where(order(len(cells)))


def learning(options: Options, corpus: Corpus, judge: Judge) -> Results:
    """FT on more and more drawings of known things, with the same number of updates; held-out drawings are judged."""
    train, cells = known_parts(corpus)
    shown = cells.where(slice(options.count))
    every, rate = judge.backbones(cells.pictures), options.rates[-1]
    real = {name: features[: len(shown)] for name, features in every.items()}
    varied: dict[str, list[Measured]] = {UNTUNED: [], UNTRAINED: []}

    def vary(bundle: Bundle, spoken: Values, seed: int) -> Measured:
        found = variations(judge, [bundle], [shown], real, seed)
        found.values["variations recognised"] = judge.recognised(found.pictures, shown.caption)
        found.values.update(spoken)
        return found

    def speak(bundle: Bundle, seed: int) -> Values:
        return {SPOKEN: judge.spoken(bundle, shown.caption, seed)}

    for seed in range(options.seeds):
        spoken = speak(judge.bundle, seed)
        varied[UNTUNED].append(vary(judge.bundle, spoken, seed))
        varied[UNTRAINED].append(vary(untrained(judge.bundle, seed), spoken, seed))
    sizes = [len(train) if size == "all" else size for size in options.sizes]
    for size in sizes:
        data = write_data(train.where(slice(size)), options.output_dir / "data" / f"curve-{size}")
        varied[f"FT on {size}"] = []
        for seed in range(options.seeds):
            tuned = fine_tuned(options, judge.bundle, data, "FT", rate, seed)
            varied[f"FT on {size}"].append(vary(tuned, speak(tuned, seed), seed))
    note = (
        f"FT (prompts, keys and values) at rate {rate:g} on drawings of the training split ({len(train)} in all), the "
        f"same number of updates however many are used; {len(shown)} held-out drawings of known things as prompts, and "
        f"their captions as text prompts. {options.drawn_again} for a run and its samples. {options.told} {NOTE}"
    )
    prompted = [f"FT on {size}" for size in sizes]
    tables = [
        table("curve", "Variations by how many drawings FT saw", note, values_of(varied), prompted),
        distances(varied, every),
    ]
    return Results(tables)


def learning_all(options: Options, corpus: Corpus, judge: Judge) -> Results:
    """FT on all drawings of known things: the curve's last point, with as many updates as `change` says."""
    return learning(replace(options, sizes=("all",)), corpus, judge)


def prompting(options: Options, corpus: Corpus, judge: Judge) -> Results:
    """What runs have learnt: vectors beside those of the prompts that they began with, and losses on other drawings."""
    unseen = corpus.where(corpus.split == "unseen")
    pictures = unseen.pictures[np.random.default_rng(0).permutation(len(unseen))[: options.count]]
    trained, other, _ = parts_of(options, corpus, np.random.default_rng(0).permutation)
    train, cells = known_parts(corpus)

    def vectors(bundle: Bundle) -> np.ndarray:
        return np.asarray(sdipc.convert(sdipc.closed_form(bundle), image_features(bundle, pictures)))

    untuned = vectors(judge.bundle)
    moved: list[tuple[str, tuple[Estimate | None, ...]]] = []
    erred: dict[str, dict[str, list[Values]]] = {}
    for run in sorted((options.output_dir / "runs" / digest(judge.bundle)[:8]).glob("*")):
        words = list(takewhile(lambda word: "=" not in word, run.name.split("-")))
        # Of CT one of eight things.
        for file in sorted(run.glob("*.safetensors"))[:1]:
            tuned, begun = tuning.apply(judge.bundle, load_delta(file)), untrained(judge.bundle, int(words[-1]))
            found = vectors(tuned)
            values = cosines(untuned, found), cosines(vectors(begun), found)
            moved.append((run.name, tuple(Estimate.of_mean(each[None]) for each in values)))
            if words[0] == "ct":
                continue
            parts = (trained, other) if words[0] == "ft" else (train.where(slice(int(words[1]))), cells)
            shown = [each.where(slice(options.count)) for each in parts]
            rows = erred.setdefault("-".join(words[:2]), {})
            for name, bundle in ((UNTUNED, judge.bundle), (UNTRAINED, begun), (run.name, tuned)):
                rows[name] = rows.get(name) or [errors(bundle, each) for each in shown]
    note = (
        f"{len(pictures)} drawings of things never seen: cosines of their vectors after each run with those of the "
        "checkpoint as it is, and with those of the same prompts as they begin, random and not trained. Of CT the "
        "first thing's. 95% bootstrap intervals over pictures."
    )
    columns = ("to no tuning", "to prompts that are not trained")
    return Results([Table("prompts", "What deep prompts learnt", note, columns, tuple(moved)), held(erred)])


def values_of(found: Mapping[str, Sequence[Measured]]) -> dict[str, list[Values]]:
    """The numbers alone."""
    return {name: [each.values for each in seeds] for name, seeds in found.items()}


def firsts(
    varied: Mapping[str, Sequence[Measured]], edited: Mapping[str, Sequence[Measured]]
) -> dict[str, tuple[Pictures, Pictures]]:
    """Variations and edits of the first seed."""
    return {name: (varied[name][0].pictures, edited[name][0].pictures) for name in varied}


EXPERIMENTS: dict[str, tuple[str, Callable[[Options, Corpus, Judge], Results]]] = {
    "ft": ("ablation", fine_tuning),
    "ct": ("customise", customising),
    "curve": ("curve", learning),
    "all": ("all", learning_all),
    "prompts": ("prompts", prompting),
}


def main(options: Options) -> None:
    """Prints the tables, and writes them with the sheet."""
    corpus = load_corpus(options.corpus)
    bundle = sdipc.load(options.checkpoint)
    captions = encode_captions(bundle, corpus.known)
    backbones = Backbones(bundle, load_backbone())
    what, experiment = EXPERIMENTS[options.mode]
    sampling = {"steps": options.steps, "sampler": options.sampler}
    with tqdm(desc="pictures sampled") as bar:
        judge = Judge(
            bundle,
            sdipc.closed_form(bundle),
            captions,
            backbones,
            bar.update,
            sampling,
            options.output_dir / "pictures",
        )
        results = experiment(options, corpus, judge)
    path = save(
        options.results,
        what,
        options.checkpoint,
        bundle,
        corpus,
        results.tables,
        results.sheet,
        kinds=results.kinds,
        shown="A drawing, its variations and then its edits by each kind.",
    )
    print("\n\n".join(table.to_markdown() for table in results.tables) + f"\n\n{path}")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))

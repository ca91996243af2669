"""What cheaper ways to sample lose, on the checkpoint that ships: a table for docs/performance.md, and a plot.

    python scripts/measure_fast.py --output build/fast

Variations of held-out drawings, the same noise for every way. Work is counted in evaluations of the UNet on one
picture: two for a step with guidance, one for a step without, and where deep features are used again, their share
of the arithmetic. Distances are to what 200 steps of the same differential equation give; recognition is retrieval
of the picture's caption by the checkpoint's own CLIP.
"""

import argparse
import json
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from benchmarks.candidates import CANDIDATES
from benchmarks.flops import flops_of
from matplotlib.figure import Figure

import sdipc_jax as sdipc
from sdipc_jax.checkpoints.bundle import Bundle, apply
from sdipc_jax.evaluate import retrieval
from sdipc_jax.evaluate.corpus import load_corpus
from sdipc_jax.evaluate.metrics import bootstrap_interval, cosines, recall
from sdipc_jax.evaluate.pictures import choose
from sdipc_jax.evaluate.sampling import Pictures, Sampler
from sdipc_jax.files import write_atomically
from sdipc_jax.prompts.contexts import image_prompt
from sdipc_jax.sampling.request import begin
from sdipc_jax.settings import FAST

EXACT: dict[str, Any] = {"steps": 200, "sampler": "ddim"}


@dataclass(frozen=True)
class Way:
    """A way to sample: a sampler, its steps, where guidance acts, and how often the whole UNet runs."""

    sampler: str
    steps: int
    guidance_interval: tuple[float, float] | None = None
    cache_interval: int = 1

    @property
    def title(self) -> str:
        title = f"{self.sampler}, {self.steps}"
        if self.cache_interval > 1:
            title += f", whole at one of {self.cache_interval}"
        if self.guidance_interval is not None:
            title += ", guided from {:g} to {:g}".format(*self.guidance_interval)
        return title

    @property
    def kind(self) -> str:
        if self.cache_interval > 1:
            return f"{self.sampler}, deep features kept"
        return self.sampler + (", guided in part" if self.guidance_interval else "")


WAYS = (
    *(Way("ddim", steps) for steps in (50, 20, 10, 8)),
    *(Way("dpm++2m", steps) for steps in (20, 15, 10, 8, 6)),
    *(Way("dpm++2m", 20, interval) for interval in ((0.2, 0.8), (0.3, 1.0), (0.0, 0.7))),
    *(Way("dpm++2m", 10, interval) for interval in ((0.2, 0.8), (0.3, 1.0), (0.0, 0.7), (0.4, 0.8))),
    *(Way("dpm++2m", 8, interval) for interval in ((0.2, 0.8), (0.3, 1.0))),
    *(Way("ddim", 50, cache_interval=interval) for interval in (2, 3, 5)),
    Way("dpm++2m", 20, cache_interval=3),
    *(Way("dpm++2m", steps, cache_interval=2) for steps in (20, 15, 14, 12, 10)),
)

FASTEST = Way(**FAST)
# How the plot marks them.
KINDS = {
    "ddim": "o",
    "dpm++2m": "s",
    "dpm++2m, guided in part": "^",
    "ddim, deep features kept": "v",
    "dpm++2m, deep features kept": "d",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, default=Path("build/corpus.npz"))
    parser.add_argument("--count", type=int, default=128, help="pictures")
    parser.add_argument("--output", type=Path, default=Path("build/fast"), help="folder of table.md and fast.png")
    parser.add_argument("--candidate", choices=CANDIDATES, help="what stands in the UNet's place, of candidates.py")
    parser.add_argument("--only", help="the way of this title alone, without a plot")
    parser.add_argument("--json", type=Path, help="the numbers of each way")
    arguments = parser.parse_args()
    corpus = load_corpus(arguments.corpus)
    known = corpus.known
    held = known.where(known.split == "cells")
    held = held.where(choose(held, arguments.count))
    bundle = sdipc.load("embedded")
    captions = retrieval.encode_captions(bundle, known)
    truth = captions.places(held.caption)
    visual = np.asarray(bundle.params["clip"]["visual_projection"]["kernel"])
    features = retrieval.image_features(bundle, held.pictures)
    context = image_prompt(bundle, sdipc.convert(sdipc.closed_form(bundle), jnp.asarray(features)))

    def sample(settings: dict[str, Any]) -> Pictures:
        sampler = Sampler(bundle, settings, 16, len(held), lambda _: None)
        return sampler(context, 0, np.arange(len(held)))

    shallow = shallow_share(bundle)
    print(f"a run on deep features that are there is {shallow:.3f} of a whole one")
    exact = sample(EXACT).astype(np.float64)
    # The limit is that of the network as it is.
    if arguments.candidate:
        CANDIDATES[arguments.candidate]()
        jax.clear_caches()
    lines = [
        "| sampler, steps | evaluations of the UNet | distance, levels of 255 | likeness, own CLIP | recognised, R@1 |",
        "|---|---|---|---|---|",
    ]
    points, record = [], []
    for way in (way for way in WAYS if arguments.only in (None, way.title)):
        request, _ = begin(bundle, context[:1], seeds=0, **asdict(way))
        halves = 2 * np.ones(request.evaluations) if request.guided is None else 1.0 + np.asarray(request.guided)
        whole = np.arange(request.evaluations) % way.cache_interval == 0
        work = float(np.sum(halves * np.where(whole, 1, shallow)))
        pictures = sample(asdict(way))
        distance = float(np.sqrt(np.mean((pictures - exact) ** 2)))
        made = retrieval.image_features(bundle, pictures)
        alike = cosines(made, features)
        low, high = bootstrap_interval(alike)
        found = recall(made @ visual, captions.joint, truth, 1)
        name = f"**{way.title}** (`--fast`)" if way == FASTEST else way.title
        lines.append(
            f"| {name} | {work:.0f} | {distance:.1f} | {np.mean(alike):.3f} [{low:.3f}, {high:.3f}] | {found:.3f} |"
        )
        print(lines[-1], flush=True)
        points.append((work, float(np.mean(alike)), way))
        record.append({"way": way.title, "candidate": arguments.candidate, "evaluations": work, "distance": distance})
        record[-1] |= {"likeness": [float(np.mean(alike)), low, high], "recall": found}
    if arguments.json:
        write_atomically(arguments.json, (json.dumps({"ways": record}, indent=2) + "\n").encode())
    if arguments.only:
        return
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    plot(points, arguments.output / "fast.png")


def shallow_share(bundle: Bundle) -> float:
    """What the UNet does on deep features that it is given, as a share of all its arithmetic."""
    config, unet = bundle.config, bundle.params["unet"]
    channels, height, width = config.latent_shape(config.defaults.height, config.defaults.width)
    x = jnp.zeros((1, height, width, channels))
    context = jnp.zeros((1, config.tokens.length, config.unet.cross_attention_dim))
    deep = jnp.zeros((1, height, width, config.unet.block_out_channels[0]))
    run = partial(apply, config.unet_model)
    return flops_of(run, unet, x, jnp.zeros(1), context, deep) / flops_of(run, unet, x, jnp.zeros(1), context)


def plot(points: list[tuple[float, float, Way]], path: Path) -> None:
    """Likeness over work."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for label, marker in KINDS.items():
        chosen = [(work, alike) for work, alike, way in points if label == way.kind]
        axes.plot(*zip(*chosen, strict=True), marker, label=label)
    ((work, alike),) = ((work, alike) for work, alike, way in points if way == FASTEST)
    axes.annotate("--fast", (work, alike), textcoords="offset points", xytext=(-12, -18))
    axes.set(xlabel="evaluations of the UNet for a picture", ylabel="likeness to the picture, own CLIP", xscale="log")
    axes.legend()
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main()

"""Whether variations by a map fitted to captions, for a UNet that reads the layer before the last, are as good.

    python scripts/build_corpus.py
    python scripts/train_embedded.py configs/embedded-earlier.yaml --stage unet
    python scripts/train_embedded.py configs/embedded-earlier.yaml --stage export
    python scripts/measure_earlier_layer.py

A table for docs/calibration.md: variations of held-out drawings by the checkpoint that ships and by its variant, which
have CLIP and noise in common, and how often this CLIP finds the drawing's caption for them.
"""

import argparse
import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np

import sdipc_jax as sdipc
from sdipc_jax.evaluate import retrieval
from sdipc_jax.evaluate.corpus import load_corpus
from sdipc_jax.evaluate.metrics import cosines
from sdipc_jax.evaluate.pictures import choose, ratio_of_means
from sdipc_jax.evaluate.sampling import Sampler
from sdipc_jax.evaluate.tables import Estimate
from sdipc_jax.prompts.prompt import AnyPrompt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variant", nargs="?", default="build/earlier", help="the variant's folder")
    parser.add_argument("--count", type=int, default=128, help="drawings")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=25)
    arguments = parser.parse_args()
    corpus = load_corpus(Path("build/corpus.npz"))
    known = corpus.known
    held = known.where(known.split == "cells")
    held = held.where(choose(held, arguments.count))
    shipped, variant = sdipc.load("embedded"), sdipc.load(arguments.variant)
    captions = retrieval.encode_captions(shipped, known)
    truth = captions.places(held.caption)
    features = retrieval.image_features(shipped, held.pictures)
    visual = np.asarray(shipped.params["clip"]["visual_projection"]["kernel"])
    named = np.unique(known.caption[known.split == "train"]).tolist()

    def prompt(bundle: sdipc.Bundle, projection: sdipc.Projection) -> AnyPrompt:
        return sdipc.image_prompt(bundle, sdipc.convert(projection, jnp.asarray(features)))

    def text(bundle: sdipc.Bundle) -> AnyPrompt:
        return sdipc.text_prompt(bundle, sdipc.tokenize(bundle, held.caption.tolist()))

    inverse, fitted = sdipc.closed_form(shipped), sdipc.calibrate(variant, named)
    naive = dataclasses.replace(inverse, scale=fitted.scale)
    ways = {
        "shipped, the paper's inverse": (shipped, prompt(shipped, inverse)),
        f"variant, ridge 1, {len(named)} captions of the drawings": (variant, prompt(variant, fitted)),
        "variant, ridge 0.3, the same": (variant, prompt(variant, sdipc.calibrate(variant, named, ridge=0.3))),
        "variant, ridge 1, the built-in captions": (variant, prompt(variant, sdipc.calibrate(variant))),
        "variant, the inverse of the last layer": (variant, prompt(variant, naive)),
        "shipped, text prompt": (shipped, text(shipped)),
        "variant, text prompt": (variant, text(variant)),
        "shipped, ridge 0.3, captions of the drawings": (shipped, prompt(shipped, sdipc.calibrate(shipped, named))),
    }
    print(f"{len(held)} held-out drawings against {len(captions.texts)} captions, {arguments.seeds} seeds, "
          f"{arguments.steps} steps\n")  # fmt: skip
    print("| | R@1 | R@5 | likeness, own CLIP | R@1, beside the first row's |\n|---|---|---|---|---|")
    first = None
    for name, (bundle, context) in ways.items():
        sampler = Sampler(bundle, {"steps": arguments.steps}, 16, len(held), lambda _: None)
        found = [
            retrieval.image_features(shipped, sampler(context, seed, np.arange(len(held))))
            for seed in range(arguments.seeds)
        ]
        by_seed = [retrieval.retrieval_columns(each @ visual, captions.joint, truth, captions.base) for each in found]
        hits = {column: np.stack([each[column] for each in by_seed]) for column in ("R@1", "R@5")}
        first = hits["R@1"] if first is None else first
        likeness = Estimate.of_mean(np.stack([cosines(each, features) for each in found]))
        columns = [*map(Estimate.of_mean, hits.values()), likeness, ratio_of_means(hits["R@1"], first)]
        print(f"| {name} | {' | '.join(map(str, columns))} |", flush=True)


if __name__ == "__main__":
    main()

"""Trains the checkpoint that ships with the package, stage by stage: tokenizer, CLIP, VAE, UNet, export.

    python scripts/train_embedded.py configs/embedded.yaml                               everything
    python scripts/train_embedded.py configs/embedded.yaml --stage unet --minutes 60     one stage
    python scripts/train_embedded.py configs/plain.yaml        the plain checkpoint that the paper's claims are tried on

A stage that was stopped goes on where it was; a stage that has not begun starts from the weights in `start_from`.
CLIP's text tower is trained beside a convolutional network; several of these then learn its captions and teach the
vision tower (`embedded.tower`). The text tower and the encoder of the VAE must stand before the UNet is trained, since
it learns in their spaces.
`teacher` (and `vision` and `projection` after it), `decoder` and `unet` can be trained further at any time.
"""

import argparse
import itertools
import json
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import yaml
from embedded.data import train_tokenizer
from embedded.export import export, shipped
from embedded.plain import begin, train_plain
from embedded.stages import (
    clip_of,
    fit_projection,
    judge_clip,
    scaling_factor,
    train_teachers,
    train_text,
    train_unet,
    train_vae,
    train_vision,
    unet_of,
    vae_of,
)
from embedded.training import Tree, averaged, log, on_host

from sdipc_jax.checkpoints.keys import flatten, unflatten
from sdipc_jax.errors import InputError
from sdipc_jax.evaluate.corpus import Corpus, load_corpus

# The stages that train each part, the later ones over the earlier.
PARTS = {"clip": ("plain", "text", "teacher", "vision", "projection"), "vae": ("vae", "decoder"), "unet": ("unet",)}
STAGES = (*itertools.chain.from_iterable(PARTS.values()), "export")


def start(settings: dict[str, Any], folder: Path, stage: str) -> dict[str, Tree]:
    """Each part as far as it is before a stage: trained here, else shipped, else random."""
    shipping = Path(settings["start_from"]) if settings["start_from"] else None
    known = shipped(shipping) if shipping is not None and (shipping / "unet").is_dir() else {}
    plain = "plain" in settings
    makers: dict[str, Any] = {
        "clip": partial(begin, clip_of(settings), sharpness=settings["plain"]["sharpness"])
        if plain
        else clip_of(settings).init,
        "vae": vae_of(settings).init,
        "unet": unet_of(settings).init,
    }
    parts = {}
    for name, init in makers.items():
        # Of another CLIP nothing is of use to a plain one.
        part = {} if name == "clip" and plain else known.get(name, {})
        # Teachers do not ship: they begin with random weights.
        if not part or (name == "clip" and stage in ("text", "teacher")):
            part = init(key=jax.random.key(settings["seed"])) | part
        if name == "unet" and settings["unet"].get("begins_anew"):
            part = anew(part, init(key=jax.random.key(settings["seed"])), settings["unet"]["begins_anew"])
        for trained in PARTS[name]:
            part = part | (averaged(folder, trained) or {})
        parts[name] = part
    return parts


def anew(part: Tree, random: Tree, names: list[str]) -> Tree:
    """A part with random leaves where their dotted names have one of these in them."""
    leaves, fresh = flatten(part), flatten(random)
    return unflatten(
        {path: fresh[path] if any(name in ".".join(path) for name in names) else leaf for path, leaf in leaves.items()}
    )


def run(stage: str, settings: dict[str, Any], corpus: Corpus, folder: Path) -> None:
    with on_host():
        parts = start(settings, folder, stage)
    if stage == "plain":
        train_plain(settings, corpus, folder, parts["clip"])
    elif stage == "text":
        train_text(settings, corpus, folder, parts["clip"])
    elif stage == "teacher":
        train_teachers(settings, corpus, folder, parts["clip"])
    elif stage == "vision":
        train_vision(settings, corpus, folder, parts["clip"])
    elif stage == "projection":
        fit_projection(settings, corpus, folder, parts["clip"])
    elif stage in ("vae", "decoder"):
        train_vae(settings, corpus, folder, parts["vae"], decoder_only=stage == "decoder")
    elif stage == "unet":
        train_unet(settings, corpus, folder, parts["unet"], parts["vae"], parts["clip"])
    else:
        measured = judge_clip(clip_of(settings), parts["clip"], corpus, folder / "tokenizer", count=2048)
        log(folder, {"stage": "export"} | measured)
        (folder / "measured.json").write_text(json.dumps(measured, indent=2) + "\n")
        export(
            settings,
            Path(settings["export_to"]),
            **parts,
            measured=measured,
            scaling=scaling_factor(settings, corpus, parts["vae"]),
            packages=corpus.manifest["packages"],
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--stage", choices=STAGES, help="this one alone")
    parser.add_argument("--minutes", type=float, help="how long the stage runs in all")
    arguments = parser.parse_args()
    settings = yaml.safe_load(arguments.config.read_text())
    folder = Path(settings["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    corpus = load_corpus(settings["corpus"])
    corpus = corpus.known
    shipping = settings["start_from"] and Path(settings["start_from"], "tokenizer")
    if not (folder / "tokenizer").is_dir() and shipping and shipping.is_dir():
        # Weights to continue from know these tokens and no others.
        shutil.copytree(shipping, folder / "tokenizer")
    elif not (folder / "tokenizer").is_dir():
        texts = [*np.unique(corpus.caption), *(f"{style} style" for style in np.unique(corpus.style))]
        train_tokenizer(texts, folder / "tokenizer", settings["vocabulary"])
    settings["vocab_size"] = len(json.loads((folder / "tokenizer/vocab.json").read_text()))
    stages = settings.get("stages", [stage for stage in STAGES if stage != "plain"])
    for stage in stages if arguments.stage is None else [arguments.stage]:
        if arguments.minutes is not None and stage not in ("projection", "export"):
            settings["vae" if stage == "decoder" else stage]["budget"]["minutes"] = arguments.minutes
        run(stage, settings, corpus, folder)


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"train_embedded: {error}")

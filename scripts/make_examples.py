"""Writes the pictures of examples/: drawings that the embedded checkpoint has never seen.

    python scripts/make_examples.py           # reads build/corpus.npz, writes examples/*.png, captions.jsonl and
                                              # ATTRIBUTION.md

Each shows a known thing by a vendor whose drawing of that thing was held out from training (the split `cells`). All but
the owl are among those of which the checkpoint makes variations that show the thing.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from build_corpus import STYLES, slug
from PIL import Image

from sdipc_jax.errors import InputError
from sdipc_jax.evaluate.corpus import Corpus, load_corpus

# Caption and style of each.
EXAMPLES = (
    ("automobile", "noto"),
    ("eggplant", "emojione"),
    ("giraffe", "noto"),
    ("green apple", "noto"),
    ("lady beetle", "noto"),
    ("light bulb", "blob"),
    ("lion", "twemoji"),
    ("owl", "twemoji"),
    ("peach", "twemoji"),
    ("red heart", "3d"),
    ("tiger face", "flat"),
    ("top hat", "3d"),
)

_HEAD = """# Attribution

Drawings for trying things out, rendered at 64 px on white by `scripts/make_examples.py`. They were held out from the
training of the embedded checkpoint.

| file | shows | package | author and licence |
|---|---|---|---|
"""

_TAIL = """
CC-BY-4.0: https://creativecommons.org/licenses/by/4.0/ · Apache-2.0: https://www.apache.org/licenses/LICENSE-2.0
· MIT: https://opensource.org/license/mit
"""


def find(corpus: Corpus, caption: str, style: str) -> np.ndarray:
    """The one held-out drawing of a caption in a style.

    Raises:
        InputError: there is none.
    """
    rows = np.flatnonzero((corpus.caption == caption) & (corpus.style == style) & (corpus.split == "cells"))
    if len(rows) != 1:
        raise InputError(
            f"{len(rows)} held-out drawings of {caption!r} in {style}, expected one: choose another example"
        )
    return corpus.pictures[rows[0]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, default=Path("build/corpus.npz"))
    parser.add_argument("--output", type=Path, default=Path("examples"))
    arguments = parser.parse_args()
    packages = {style.word: style for style in STYLES}
    lines, captions = [], []
    try:
        corpus = load_corpus(arguments.corpus)
        arguments.output.mkdir(parents=True, exist_ok=True)
        for caption, word in EXAMPLES:
            name, style = f"{slug(caption)}.png", packages[word]
            Image.fromarray(find(corpus, caption, word)).save(arguments.output / name, optimize=True)
            captions.append(json.dumps({"picture": name, "class": caption, "caption": caption}) + "\n")
            lines.append(f"| {name} | {caption} | {style.package}@{style.version} | {style.licence} |\n")
    except InputError as error:
        print(f"make_examples: {error}", file=sys.stderr)
        return 2
    (arguments.output / "captions.jsonl").write_text("".join(captions), encoding="utf-8")
    (arguments.output / "ATTRIBUTION.md").write_text(_HEAD + "".join(lines) + _TAIL, encoding="utf-8")
    print(f"{len(lines)} pictures in {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

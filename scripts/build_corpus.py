"""Builds the corpus that the embedded checkpoint is trained on: emoji in several artists' styles, with captions.

    python scripts/build_corpus.py            # writes build/corpus.npz; a second run finds it and does nothing

Fetches the packages below with the npm client, renders every drawing at 64 px on white, leaves out flags and couples
of two skin tones, drops drawings that are equal to the pixel, and splits by hash, so that the same packages always
give the same file.
"""

import argparse
import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sdipc_jax.errors import InputError
from sdipc_jax.evaluate.corpus import COLUMNS, load_corpus

SIZE = 64
CAPTIONS = ("emojibase-data", "17.0.0", "MIT, from Unicode CLDR")
_FLAGS = 9


@dataclass(frozen=True)
class Style:
    """A set of drawings: the word for it, who drew it, and the package that has it."""

    word: str
    vendor: str
    package: str
    version: str
    licence: str


STYLES = (
    Style("noto", "google", "@iconify-json/noto", "1.2.9", "Apache-2.0, Google"),
    Style("twemoji", "twitter", "@iconify-json/twemoji", "1.2.5", "CC-BY-4.0, Twitter and contributors"),
    Style("3d", "fluent", "@lobehub/fluent-emoji-3d", "1.1.0", "MIT, Microsoft"),
    Style("flat", "fluent", "@iconify-json/fluent-emoji-flat", "1.2.6", "MIT, Microsoft"),
    Style("blob", "google-blob", "@iconify-json/noto-v1", "1.2.5", "Apache-2.0, Google"),
    Style("emojione", "emojione", "@iconify-json/emojione", "1.2.3", "CC-BY-4.0, EmojiOne"),
    # Never trained on: its licence asks for share-alike, and an unseen style is a test of its own.
    Style("openmoji", "openmoji", "@iconify-json/openmoji", "1.2.29", "CC-BY-SA-4.0, OpenMoji"),
)


@dataclass(frozen=True)
class Label:
    """What a code point sequence shows."""

    caption: str
    base: str
    tone: int


def key_of(hexcode: str) -> str:
    """Code points without the invisible ones, which packages write or leave out as they like.

    >>> key_of("1F468-200D-2695-FE0F")
    '1f468-2695'
    """
    return "-".join(part for part in hexcode.lower().split("-") if part not in ("fe0f", "200d"))


def split_of(base: str, key: str, style: Style) -> str:
    """Unseen things by the hash of the thing, held-out cells by that of thing and vendor."""

    def bucket(text: str) -> int:
        return int(hashlib.sha1(text.encode()).hexdigest()[:8], 16)

    if style.word == "openmoji":
        return "style"
    if bucket(base) % 20 == 0:
        return "unseen"
    return "cells" if bucket(key + style.vendor) % 12 == 0 else "train"


def labels_of(entries: list[dict[str, Any]]) -> dict[str, Label]:
    """The captions by key, without flags and couples of two skin tones."""
    labels = {}
    for entry in entries:
        if "group" not in entry or entry["group"] == _FLAGS:
            continue
        base = key_of(entry["hexcode"])
        labels[base] = Label(entry["label"], base, 0)
        for skin in entry.get("skins", ()):
            if isinstance(skin["tone"], int):
                labels[key_of(skin["hexcode"])] = Label(skin["label"], base, skin["tone"])
    return labels


def fetch(package: str, version: str, folder: Path) -> tuple[tarfile.TarFile, str]:
    """The package's archive, from the folder or else from npm, and the digest by which npm knows it."""
    name = f"{package.removeprefix('@').replace('/', '-')}-{version}.tgz"
    if not (folder / name).is_file():
        if shutil.which("npm") is None:
            raise InputError("npm is not installed, expected it to fetch the drawings: install Node.js")
        command = ["npm", "pack", "--silent", "--pack-destination", str(folder), f"{package}@{version}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode or not (folder / name).is_file():
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise InputError(f"npm pack {package}@{version} failed: {last}")
    digest = hashlib.sha512((folder / name).read_bytes()).hexdigest()
    return tarfile.open(folder / name), digest


def read_json(archive: tarfile.TarFile, name: str) -> Any:
    """A JSON file of a package."""
    member = archive.extractfile(f"package/{name}")
    assert member is not None
    return json.load(member)


def slug(caption: str) -> str:
    """The name that older packages give a drawing.

    >>> slug("waving hand: light skin tone")
    'waving-hand-light-skin-tone'
    """
    return re.sub("[^a-z0-9]+", "-", re.sub("[\u2019'.]", "", caption.lower())).strip("-")


def drawings(style: Style, archive: tarfile.TarFile, labels: dict[str, Label]) -> Iterator[tuple[str, np.ndarray]]:
    """The keys and 64 px pictures of a package, in the order of their keys."""
    if style.word == "3d":
        members = {key_of(Path(name).stem): name for name in archive.getnames() if name.endswith(".webp")}
        for key in sorted(members):
            member = archive.extractfile(members[key])
            assert member is not None
            yield key, on_white(Image.open(io.BytesIO(member.read())))
        return
    icons, names = read_json(archive, "icons.json"), read_json(archive, "chars.json")
    # Some packages list no code points: there a drawing is found by its caption.
    by_key = {key_of(hexcode): name for hexcode, name in names.items()} or {
        key: slug(label.caption) for key, label in labels.items()
    }
    for key, name in sorted(by_key.items()):
        svg = svg_of(icons, name)
        if svg is not None:
            yield key, on_white(Image.open(io.BytesIO(render(svg))))


def svg_of(icons: dict[str, Any], name: str) -> str | None:
    """The SVG of an icon; an alias may be its parent's mirror image."""
    alias = icons.get("aliases", {}).get(name, {})
    icon = icons["icons"].get(alias.get("parent", name))
    if icon is None:
        return None
    width, height = icon.get("width", icons.get("width", 16)), icon.get("height", icons.get("height", 16))
    body = icon["body"]
    if alias.get("hFlip"):
        body = f'<g transform="translate({width} 0) scale(-1 1)">{body}</g>'
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {names} viewBox="0 0 {width} {height}">{body}</svg>'


def render(svg: str) -> bytes:
    """A 64 px PNG of an SVG."""
    import resvg_py

    return bytes(resvg_py.svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE))


def on_white(image: Image.Image) -> np.ndarray:
    """A picture with its transparent parts white, 64 px."""
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    flat = Image.alpha_composite(white, image).convert("RGB")
    if flat.size != (SIZE, SIZE):
        flat = flat.resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    return np.asarray(flat)


def build(cache: Path) -> dict[str, np.ndarray]:
    """The columns of the corpus, and its manifest."""
    try:
        import resvg_py  # noqa: F401
    except ImportError:
        raise InputError("resvg-py is not installed: pip install 'sdipc-jax[corpus]'") from None
    cache.mkdir(parents=True, exist_ok=True)
    archive, digest = fetch(*CAPTIONS[:2], cache)
    labels = labels_of(read_json(archive, "en/data.json"))
    packages = {f"{CAPTIONS[0]}@{CAPTIONS[1]}": {"licence": CAPTIONS[2], "sha512": digest}}
    rows: list[tuple[Any, ...]] = []
    seen: set[bytes] = set()
    for style in STYLES:
        archive, digest = fetch(style.package, style.version, cache)
        packages[f"{style.package}@{style.version}"] = {"licence": style.licence, "sha512": digest}
        taken: set[str] = set()
        for key, picture in drawings(style, archive, labels):
            pixels = hashlib.sha256(picture.tobytes()).digest()
            if key not in labels or key in taken or pixels in seen:
                continue
            taken.add(key)
            seen.add(pixels)
            label = labels[key]
            split = split_of(label.base, key, style)
            rows.append((picture, label.caption, key, label.base, label.tone, style.word, style.vendor, split))
        print(f"{style.word}: {len(taken)} drawings", file=sys.stderr)
    columns = {name: np.array(column) for name, column in zip(COLUMNS, zip(*rows, strict=True), strict=True)}
    contents = hashlib.sha256(b"".join(np.ascontiguousarray(column).tobytes() for column in columns.values()))
    counts = Counter(zip(columns["split"].tolist(), columns["style"].tolist(), strict=True))
    manifest = {
        "packages": packages,
        "counts": {f"{split}/{style}": count for (split, style), count in sorted(counts.items())},
        "captions": len(set(columns["caption"].tolist())),
        "sha256": contents.hexdigest(),
    }
    return columns | {"manifest": np.array(json.dumps(manifest))}


def is_current(path: Path) -> bool:
    """Whether the file is whole and made from the packages named here."""
    if not path.is_file():
        return False
    try:
        corpus = load_corpus(path)
    except InputError:
        return False
    contents = hashlib.sha256(b"".join(np.ascontiguousarray(getattr(corpus, name)).tobytes() for name in COLUMNS))
    wanted = {f"{CAPTIONS[0]}@{CAPTIONS[1]}", *(f"{style.package}@{style.version}" for style in STYLES)}
    return corpus.manifest["packages"].keys() == wanted and contents.hexdigest() == corpus.manifest["sha256"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("build/corpus.npz"))
    parser.add_argument("--cache", type=Path, default=Path("build/npm"), help="where the packages are kept")
    arguments = parser.parse_args()
    if is_current(arguments.output):
        print(f"{arguments.output} is there and whole: nothing to do")
        return 0
    try:
        columns = build(arguments.cache)
    except InputError as error:
        print(f"build_corpus: {error}", file=sys.stderr)
        return 2
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    temporary = arguments.output.with_suffix(".part.npz")
    np.savez_compressed(temporary, allow_pickle=False, **columns)
    temporary.replace(arguments.output)
    manifest = json.loads(str(columns["manifest"]))
    arguments.output.with_suffix(".json").write_text(json.dumps(manifest, indent=2) + "\n")
    print(json.dumps({"pictures": len(columns["pictures"]), **manifest["counts"], "sha256": manifest["sha256"]}))
    return 0


if __name__ == "__main__":
    sys.exit(main())

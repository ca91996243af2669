"""The data sets of the paper as they are handed out: pictures, their classes, and what is said of them."""

import json
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdipc_jax.datasets.examples import class_name
from sdipc_jax.datasets.rules import ENDINGS
from sdipc_jax.errors import InputError, printable
from sdipc_jax.evaluate.table_settings import DataSettings
from sdipc_jax.files import read_lines

PERSON = "person"
# Classes of the DreamBooth benchmark that its prompts for living things are for.
_LIVE = ("cat", "dog")
_PROMPTS = "prompts_and_classes.txt"
_HEADINGS = {"Object Prompts": False, "Live Subject Prompts": True}
_PLACES_CLASS = re.compile(r"^/[a-z]/")


@dataclass(frozen=True)
class Sample:
    """A picture of a data set.

    Attributes:
        label: its class, subject or person; the file's name where the set has none.
        name: of what is on it, as captions call it.
        texts: its captions, where people wrote some.
        edits: texts to change it with, where the data set has some.
    """

    path: Path
    label: str
    name: str
    texts: tuple[str, ...] = ()
    edits: tuple[str, ...] = ()

    def caption(self, template: str) -> str:
        """Its first caption, else the template with its name."""
        return self.texts[0] if self.texts else template.replace("{}", self.name)


def read_layout(data: DataSettings) -> list[Sample]:
    """All pictures of a data set, in an order that does not depend on the file system.

    Raises:
        InputError: a file is missing, or is none of this layout.
    """
    if not data.images.is_dir():
        raise InputError(f"{printable(data.images)}: found no folder, expected the pictures of {data.kind}: check it")
    readers = {
        "coco": _coco,
        "imagenet": _classes,
        "places365": _places,
        "celeba-hq": _faces,
        "dreambooth": _dreambooth,
        "folder": _classes,
    }
    found = readers[data.kind](data)
    if not found:
        raise InputError(f"{printable(data.images)}: found no pictures of {data.kind}, expected some: check the path")
    return found


def _coco(data: DataSettings) -> list[Sample]:
    """COCO: `val2017/000000000139.jpg` and so on, and `captions_val2017.json` with several captions each."""
    content = _json(data, data.captions, "captions", "COCO's captions, such as captions_val2017.json")
    captions: dict[int, list[str]] = defaultdict(list)
    try:
        for each in content["annotations"]:
            captions[each["image_id"]].append(" ".join(each["caption"].split()))
        names = {each["id"]: str(each["file_name"]) for each in content["images"]}
    except (KeyError, TypeError, AttributeError):
        raise InputError(
            f"{printable(str(data.captions))}: found no `images` and `annotations` with `caption`, expected COCO's "
            "captions, such as captions_val2017.json: name that file"
        ) from None
    samples = [
        Sample(data.images / names[number], names[number], captions[number][0], tuple(captions[number]))
        for number in sorted(names)
        if number in captions
    ]
    return _all_there(samples, data)


def _classes(data: DataSettings) -> list[Sample]:
    """ImageNet and whatever looks like it: a folder a class; `classes` says what the folders' names mean."""
    names = {} if data.classes is None else _class_names(data.classes)
    found = []
    for path in _pictures(data.images):
        label = path.parent.name if path.parent != data.images else ""
        if not label:
            raise InputError(
                f"{printable(path)}: found a picture beside the classes' folders, expected a folder a class: sort the "
                "pictures into folders, as ImageNet's training pictures are"
            )
        if names and label not in names:
            raise InputError(
                f"{printable(str(data.classes))}: found nothing of the class {label!r}, expected every folder of "
                f"{printable(data.images)}: add it"
            )
        found.append(Sample(path, label, names.get(label, class_name(label))))
    return found


def _places(data: DataSettings) -> list[Sample]:
    """Places365: a folder a class; or pictures beside each other with `places365_val.txt` and the categories' names."""
    if data.captions is None:
        return [
            Sample(each.path, each.label, _PLACES_CLASS.sub("", each.name).replace("/", " ")) for each in _classes(data)
        ]
    categories = _pairs(_needed(data, data.classes, "classes", "categories_places365.txt"))
    names = {number: _PLACES_CLASS.sub("", name).replace("/", " ").replace("_", " ") for name, number in categories}
    samples = []
    for file, number in _pairs(data.captions):
        if number not in names:
            raise InputError(
                f"{printable(data.captions)}: found class {number} of {file}, which {printable(str(data.classes))} has "
                "not, expected both of one release: fetch them again"
            )
        samples.append(Sample(data.images / file, number, names[number]))
    return _all_there(samples, data)


def _faces(data: DataSettings) -> list[Sample]:
    """CelebA-HQ: portraits side by side, or in a folder a person."""
    return [
        Sample(path, path.stem if path.parent == data.images else path.parent.name, PERSON)
        for path in _pictures(data.images)
    ]


def _dreambooth(data: DataSettings) -> list[Sample]:
    """The DreamBooth benchmark: a folder a subject, and `prompts_and_classes.txt` beside them."""
    path = data.classes or data.images / _PROMPTS
    classes, prompts = read_prompts(path)
    samples = []
    for each in _classes(DataSettings(kind="folder", images=data.images)):
        if each.label not in classes:
            raise InputError(
                f"{printable(path)}: found no class of the subject {each.label!r}, expected a line `{each.label},CLASS`"
            )
        noun = classes[each.label]
        edits = tuple(text.replace("{}", noun) for text in prompts[noun in _LIVE])
        samples.append(Sample(each.path, each.label, noun, edits=edits))
    return samples


def read_prompts(path: Path) -> tuple[dict[str, str], dict[bool, list[str]]]:
    """The class of each subject of the DreamBooth benchmark, and its prompts for objects and for living things.

    A prompt's unique token is left out: the picture stands in its place.

    Raises:
        InputError: the file is not there, or is another.
    """
    classes: dict[str, str] = {}
    prompts: dict[bool, list[str]] = {False: [], True: []}
    live: bool | None = None
    for line in read_lines(path, "the benchmark's classes and prompts"):
        heading = next((value for name, value in _HEADINGS.items() if line.startswith(name)), None)
        live = live if heading is None else heading
        quoted = re.match(r"""['"](.+)['"]\.format""", line)
        if quoted and live is not None:
            prompts[live].append(quoted[1].replace("{0} ", "").replace("{1}", "{}"))
        elif live is None and re.fullmatch(r"[\w-]+,[\w -]+", line) and line != "subject_name,class":
            subject, _, noun = line.partition(",")
            classes[subject] = noun
    if not classes or not all(prompts.values()):
        raise InputError(f"{printable(path)}: found no classes and two lists of prompts, expected {_PROMPTS}: fetch it")
    return classes, prompts


def _class_names(path: Path) -> dict[str, str]:
    """Names of classes by folder: `n01440764 tench, Tinca tigrina` a line, or Keras' and torchvision's JSON."""
    if path.suffix == ".json":
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            pairs = [value if isinstance(value, list) else (key, value) for key, value in content.items()]
            return {str(folder): class_name(str(name)) for folder, name in pairs}
        except (OSError, ValueError, AttributeError) as error:
            raise InputError(f"{printable(path)}: {error}, expected the classes' names in JSON: check it") from None
    named = {}
    for line in read_lines(path, "a class's folder and its names"):
        folder, _, name = line.partition(" ")
        # Of the synonyms the first one is the usual word.
        named[folder] = name.split(",")[0].strip() or class_name(folder)
    return named


def _pictures(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in ENDINGS and path.is_file())


def _all_there(samples: list[Sample], data: DataSettings) -> list[Sample]:
    """The samples, if their files are there."""
    missing = [each.path for each in samples if not each.path.is_file()]
    if missing:
        raise InputError(
            f"{printable(missing[0])}: not there, as {len(missing)} of {len(samples)} pictures that "
            f"{printable(str(data.captions))} names, expected all: check `images`"
        )
    return samples


def _json(data: DataSettings, path: Path | None, key: str, what: str) -> Any:
    path = _needed(data, path, key, what)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{printable(path)}: {error.strerror}, expected {what}: check the path") from None
    except ValueError as error:
        raise InputError(f"{printable(path)}: found no JSON ({error}), expected {what}: fetch it again") from None


def _needed(data: DataSettings, path: Path | None, key: str, what: str) -> Path:
    if path is None:
        raise InputError(f"{key} is missing beside images: {printable(data.images)}, expected {what}: give its path")
    return path


def _pairs(path: Path) -> Iterable[tuple[str, str]]:
    """Lines of two words."""
    for line in read_lines(path, "a name and a number"):
        first, _, second = line.rpartition(" ")
        if not first or not second.isdecimal():
            raise InputError(f"{printable(path)}: found {line!r}, expected a name and a number: fetch it again")
        yield first, second

"""From a row of the data set to what the device needs, and to the id that names it for ever."""

import hashlib
import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np
from jaxtyping import Float32

from sdipc_jax.batch.asked import NOTHING, Asked, Size, asked, settings_of
from sdipc_jax.batch.settings import JobSettings
from sdipc_jax.batch.storage import read_input
from sdipc_jax.checkpoints.bundle import Config
from sdipc_jax.datasets.rows import Input, RawRow, Row
from sdipc_jax.errors import InputError, shortened
from sdipc_jax.pictures.preprocessing import preprocess
from sdipc_jax.pictures.reading import decode_picture
from sdipc_jax.prompts.prompt import sizes_told
from sdipc_jax.prompts.tokens import Texts, read_texts, with_chunks
from sdipc_jax.records import Record, digest_of
from sdipc_jax.settings import Defaults

# The tokenizer is not made for several threads at once.
_TOKENIZING = threading.Lock()


@dataclass(frozen=True)
class Item:
    """A row that was read, or that cannot be used.

    Attributes:
        row: its number in the job.
        key: sha256 of its inputs' bytes and all settings that count: equal rows have equal keys.
        record: what its JSON line says of it, without its id.
        error: why it cannot be used, in a line that can be shown; then the rest is empty.
        place: where the row stands in the data set.
        pixels: its pictures, preprocessed.
        tokens: its text's.
        negative: its negative prompt's tokens.
        unwanted: texts to project out.
        others: pictures to project out, and those that guidance leads away from, by their role.
        asked: all else that it asks for.
    """

    row: int
    key: str
    record: Record
    error: str | None = None
    pixels: tuple[Float32[np.ndarray, "S S 3"], ...] = ()
    tokens: Texts | None = None
    negative: Texts | None = None
    place: str = ""
    unwanted: tuple[Texts, ...] = ()
    others: Mapping[str, tuple[Float32[np.ndarray, "S S 3"], ...]] = field(default_factory=dict)
    asked: Asked = NOTHING

    @property
    def size(self) -> Size:
        """(height, width) of the picture to be made."""
        return self.record.get("height", 0), self.record.get("width", 0)

    @property
    def program(self) -> tuple[Any, ...]:
        """What items must have in common to be done together: size, how many tokens their prompts have, what else."""
        led_away = ("negative picture",) if self.others.get("negative_picture") else ()
        tokens = 0 if self.tokens is None else self.tokens.tokens.shape[-1]
        return self.size, tokens, *led_away, *self.asked.program


@dataclass(frozen=True)
class Reader:
    """Reads rows; called from several threads at once.

    Attributes:
        values: what the checkpoint decides where the job is silent.
        identity: digest of everything in the job and its checkpoint that counts for every row.
    """

    config: Config
    job: JobSettings
    values: Defaults
    identity: str

    @property
    def sizes(self) -> tuple[Size, ...]:
        """What rows may ask for; the first is the job's own."""
        return ((self.values.height, self.values.width), *self.job.sizes)

    def check(self, raw: RawRow) -> str | None:
        """What is wrong with a row, its pictures aside, if anything."""
        try:
            row, _ = raw.parse(self.job.columns)
            if not self.job.vectors:
                self._tokens(self._settings(row))
        except InputError as error:
            return shortened(str(error))
        return None

    def __call__(self, raw: RawRow) -> Item:
        try:
            row, inputs = raw.parse(self.job.columns)
        except InputError as error:
            return Item(raw.number, self._key({"values": raw.values}), {}, shortened(str(error)), place=raw.place)
        values = row.completed(self.job)
        read = dict[str, list[tuple[str, np.ndarray]]]()
        notes, contents, errors = list[str](), list[tuple[Input, str | None]](), list[str]()
        for each in inputs:
            digest = None
            try:
                data = each.where if isinstance(each.where, bytes) else read_input(each.where)
                # Of the very bytes that are decoded: a file that changes meanwhile is one version or the other.
                digest = hashlib.sha256(data).hexdigest()
                picture = decode_picture(data, each.name)
                read.setdefault(each.role, []).append((each.name, picture.pixels))
                notes += picture.notes
            except InputError as error:
                errors.append(str(error))
            contents.append((each, digest))
        own = [(each, digest) for each, digest in contents if each.role == "picture"]
        record: Record = {"inputs": [each.name for each, _ in own], "input_sha256": [digest for _, digest in own]}
        roles = list(dict.fromkeys(each.role for each, _ in contents if each.role != "picture"))
        for role in roles:
            record[role] = [each.name for each, _ in contents if each.role == role]
            record[f"{role}_sha256"] = [digest for each, digest in contents if each.role == role]
        if len(own) > 1:
            record["weights"] = list(row.weights or [1.0] * len(own))
        if self.job.vectors:
            seen = [role for role in roles if role == "without_picture"]
            of_vectors = settings_of(values, seen, len(own))
            record |= {name: value for name, value in of_vectors.items() if name in ("mean", "without")}
        else:
            try:
                record |= self._settings(row) | settings_of(values, roles, len(own))
            except InputError as error:
                errors.append(str(error))
        # By what pictures are, not by what they are called.
        named = {
            role: [digest or {"name": each.name} for each, digest in contents if each.role == role]
            for role in ("picture", *roles)
        }
        unnamed = {f"{role}_sha256": None for role in roles} | {role: named[role] for role in roles}
        key = self._key(record | unnamed | {"inputs": named["picture"], "input_sha256": None})
        if notes:
            record["notes"] = notes
        item = Item(raw.number, key, record, place=raw.place)
        try:
            return self._completed(item, values, read, row) if not errors else _failed(item, errors[0])
        except InputError as error:
            return _failed(item, str(error))

    def _completed(self, item: Item, values: dict[str, Any], read: dict[str, Any], row: Row) -> Item:
        """With what the device needs."""
        preprocessing = self.config.vision_side.preprocessing

        def seen(role: str) -> tuple[np.ndarray, ...]:
            return tuple(preprocess(pixels, preprocessing) for _, pixels in read.get(role, ()))

        wording = tuple(self.job.wording.items())
        unwanted = tuple(_texts_of(self.config, text, wording) for text in values["without"])
        others: dict[str, tuple[np.ndarray, ...]] = {
            role: seen(role) for role in ("without_picture", "negative_picture") if role in read
        }
        item = replace(item, pixels=seen("picture"), unwanted=unwanted, others=others)
        if self.job.vectors:
            return item
        tokens, negative = self._tokens(item.record)
        wanted = asked(
            self.config, self.job, self.values, values, item.size, read, row.weights or (1.0,) * len(row.names)
        )
        return replace(item, tokens=tokens, negative=negative, asked=wanted)

    def _settings(self, row: Row) -> Record:
        """How the row's picture is sampled; without a seed of its own, its id will give the index.

        Raises:
            InputError: it is told sizes that its checkpoint does not read.
        """
        job, (height, width) = self.job, self.sizes[0]
        text = job.text if row.text is None else row.text
        if text is not None and not text.strip():
            # An empty text changes nothing: it is no edit towards the empty prompt.
            text = None
        height, width = row.height or height, row.width or width
        return {
            "text": text,
            "alpha": None if text is None else job.alpha if row.alpha is None else row.alpha,
            "negative_prompt": self.config.negative_text(
                job.negative_prompt if row.negative_prompt is None else row.negative_prompt
            ),
            "seed": job.seed if row.seed is None else row.seed,
            "index": None if row.seed is None else 0,
            "height": height,
            "width": width,
            **sizes_told(self.config, height, width, row, job),
        }

    def _tokens(self, record: Record) -> list[Texts]:
        size = record["height"], record["width"]
        if size not in self.sizes:
            known = ", ".join(f"{height}x{width}" for height, width in self.sizes)
            raise InputError(f"height x width is {size[0]}x{size[1]}, expected one of the job's sizes, {known}: add it")
        texts = (record["text"] or "", record["negative_prompt"] or "")
        found = [_texts_of(self.config, text, tuple(self.job.wording.items())) for text in texts]
        longest = max(each.tokens.shape[-1] for each in found)
        return [with_chunks(self.config, each, longest) for each in found]

    def _key(self, content: Any) -> str:
        return digest_of([self.identity, content])


def _failed(item: Item, error: str) -> Item:
    return replace(item, error=shortened(error))


class Ids:
    """Gives each row of a shard its id: sha256 of its key and of k, the number of equal rows before it.

    Args:
        taken: ids in the shard that are given already.
    """

    def __init__(self, taken: set[str]) -> None:
        self._taken, self._next = taken, Counter[str]()

    def give(self, key: str) -> str:
        """The next id of a key."""
        while True:
            found = hashlib.sha256(f"{key} {self._next[key]}".encode()).hexdigest()
            self._next[key] += 1
            if found not in self._taken:
                self._taken.add(found)
                return found


def with_index(item: Item, item_id: str) -> Record:
    """What is told of a row; the number of the variation that it is without a seed is the first 32 bits of its id."""
    drawn = item.record.get("index", 0) is None
    return item.record | ({"index": int(item_id[:8], 16)} if drawn else {})


@lru_cache(maxsize=4096)
def _texts_of(config: Config, text: str, wording: tuple[tuple[str, Any], ...]) -> Texts:
    with _TOKENIZING:
        tokens, weights = read_texts(config, [text], **dict(wording))
    return Texts(tokens[0], None if weights is None else weights[0])

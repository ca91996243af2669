"""The command `words`: pictures in, words for them out."""

from collections.abc import Sequence

from sdipc_jax.commands.inputs import expand
from sdipc_jax.commands.joint import Encoded, encode_files, joint_space, table
from sdipc_jax.commands.outcome import Answer, notes_of
from sdipc_jax.commands.settings import WordsSettings
from sdipc_jax.errors import InputError, printable
from sdipc_jax.prompts.calibration import FEWEST_PICTURES
from sdipc_jax.prompts.word_bank import everyday_words, read_words
from sdipc_jax.prompts.words import Centre, difference, mixes_of, nearest
from sdipc_jax.records import Record, Report

_CENTRED_ALIKE = (
    "the mean of pictures is not known, the words' was taken from the picture: give --mean-pictures for sums of words "
    "that do not make up for the difference"
)


def words(settings: WordsSettings, report: Report) -> Answer:
    """The nearest words of each picture with their cosines, and a sum of words; or what sets it apart from another."""
    space = joint_space(settings)
    listed = everyday_words() if settings.bank is None else read_words(settings.bank)
    paths, notes = expand(settings.pictures)
    others, more = expand([settings.mean_pictures]) if settings.mean_pictures else ([], [])
    if settings.mean_pictures and len(others) < FEWEST_PICTURES:
        raise InputError(
            f"{printable(settings.mean_pictures)}: found {len(others)} pictures, expected at least {FEWEST_PICTURES} "
            "of many kinds: add some, or leave mean_pictures out"
        )
    first = None if settings.against is None else encode_files(space, [settings.against])
    encoded = encode_files(space, paths, report)
    bank = space.bank(listed)
    rows: list[Record] = []
    if first is not None:
        for vector in encoded.vectors:
            gained, lost = difference(bank, first.vectors[0], vector, settings.top)
            rows.append({"against": str(settings.against), "more": _pairs(gained), "less": _pairs(lost)})
    else:
        found = nearest(bank, encoded.vectors, settings.top)
        rows = [{"words": _pairs(each)} for each in found]
        if settings.mix:
            mean = _mean(encoded, encode_files(space, others) if others else None)
            more = [*more, *([_CENTRED_ALIKE] if mean is None else [])]
            centre = bank.centre
            mixes = mixes_of(
                bank,
                encoded.vectors,
                settings.mix,
                words_centre=centre,
                pictures_centre=centre if mean is None else mean,
            )
            for row, mix in zip(rows, mixes, strict=True):
                row |= {"mix": _pairs(mix.words, "weight"), "residual": round(mix.residual, 4)}
    records = [record | row for record, row in zip(encoded.records, rows, strict=True)]
    notes = [*space.config.notes, *notes, *more, *notes_of(encoded.records), *space.notes]
    return Answer(records, [line for each in records for line in _lines(each)], encoded.failures, tuple(notes))


def _mean(pictures: Encoded, others: Encoded | None) -> Centre | None:
    """The mean of many pictures: those that are named for it, or the pictures themselves if they are enough."""
    if others is not None:
        return others.vectors.mean(axis=0)
    return pictures.vectors.mean(axis=0) if len(pictures.vectors) >= FEWEST_PICTURES else None


def _pairs(found: Sequence[tuple[str, float]], name: str = "cosine") -> list[Record]:
    return [{"word": word, name: round(value, 4)} for word, value in found]


def _lines(record: Record) -> list[str]:
    """A picture for people."""
    lines = [printable(record["input"])]
    for title, key, name in (
        ("nearest", "words", "cosine"),
        ("sum", "mix", "weight"),
        ("more", "more", "cosine"),
        ("less", "less", "cosine"),
    ):
        if key in record:
            told = table([(each["word"], each[name]) for each in record[key]])
            left = f"; {record['residual']:.0%} of it are left" if key == "mix" else ""
            lines.append(f"  {title:8}{told}{left}")
    return lines

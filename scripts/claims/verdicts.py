"""The paper's claims as rows: what it found, what was found here, and whether that holds."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from claims.results import restored
from claims.spaces import LITERAL
from claims.tuned import SPOKEN, UNTRAINED
from sdipc_jax.evaluate import paper
from sdipc_jax.evaluate.pictures import INDEPENDENT, OWN, SD_IPC, TEXT
from sdipc_jax.evaluate.tables import Estimate, Table

# "Nearly": Table 1's spaces lose 0.019 by Acc@1 and 0.030 by TR@1; Table 2's FID grows 1.05 times.
_NEARLY, _NEARLY_TIMES = -0.05, 1.15
# Of text prompts that are recognised after tuning.
_HARMLESS = -0.05
_UNTOLD = "not measured"
# The paper's, and one that small networks take: FT is that which validation drawings choose, and the other beside it.
_RATES = ("1e-05", "0.0001")

Side = Literal["above", "below"]
Verdict = Literal["holds", "does not", "cannot be told"]


@dataclass(frozen=True)
class Claim:
    """One number that has to lie on one side of a limit.

    Attributes:
        text: what is claimed.
        paper: what the paper found.
        table, row, column: where the number is.
    """

    text: str
    paper: str
    table: str
    row: str
    column: str
    side: Side = "above"
    limit: float = 0.0


def judged(found: Estimate, side: Side, limit: float) -> Verdict:
    """Whether all of the interval lies on the side.

    >>> judged(Estimate(1.0, (0.5, 1.5)), "above", 0.0), judged(Estimate(0.0, (-1.0, 1.0)), "below", 0.0)
    ('holds', 'cannot be told')
    """
    low, high = found.interval or (found.value, found.value)
    above, below = low > limit, high < limit
    if side == "below":
        above, below = below, above
    return "holds" if above else "does not" if below else "cannot be told"


def apart(one: Estimate, other: Estimate) -> Verdict:
    """Whether the first is larger, by intervals that do not touch; touching ones leave it open."""
    assert one.interval is not None
    assert other.interval is not None
    if one.interval[0] > other.interval[1]:
        return "holds"
    return "does not" if one.interval[1] < other.interval[0] else "cannot be told"


def _gain(published: paper.Published, row: str, column: str, base: str = SD_IPC) -> str:
    """The paper's difference of two rows, as a share instead of percent."""
    return f"{(published.rows[row][column] - published.rows[base][column]) / 100:+.3f} by {column}"


def _similarity(judge: str) -> str:
    return f"{judge} similarity"


def _distance(judge: str) -> str:
    return f"kernel distance, {judge}"


_LIKER = "variations are liker to the picture than the caption's own"
VARIATION = (
    Claim(
        f"{_LIKER} (Table 2), by the independent network",
        _gain(paper.VARIATION, "SD-IPC", "CLIP-Score", "SD w/ Text"),
        "similarity",
        f"{SD_IPC} - {TEXT}",
        f"similarity, {INDEPENDENT}",
    ),
    Claim(
        f"{_LIKER}, by the own CLIP",
        "as above",
        "similarity",
        f"{SD_IPC} - {TEXT}",
        f"similarity, {OWN}",
    ),
    Claim(
        "as a set they are nearly as near to real pictures (Table 2): a distance at most 1.15 times as large",
        "FID 24.78 for 23.65, 1.05 times",
        "similarity",
        f"{SD_IPC} / {TEXT}",
        f"kernel distance, {INDEPENDENT}",
        "below",
        _NEARLY_TIMES,
    ),
)


def _ablation() -> Iterator[Claim]:
    kinds = (("FT", "FT (both)"), ("FT (C)", "FT (C)"), ("FT (U)", "FT (U)"))
    for name, published in kinds:
        for column, theirs in ((_similarity(INDEPENDENT), "DINO"), (_similarity(OWN), "CLIP-I")):
            gain = _gain(paper.PLAIN, published, theirs)
            side: Side = "below" if gain.startswith("-") else "above"
            how = "less like" if side == "below" else "liker to"
            text = f"{name} makes variations {how} the picture (Table 5), by {column.removesuffix(' similarity')}"
            yield Claim(text, gain, "variation", f"{name} - SD-IPC", column, side)
    for rate in _RATES:
        yield Claim(
            f"FT at rate {rate} makes variations liker to the picture, by {INDEPENDENT}",
            "as FT",
            "variation",
            f"FT, rate {rate} - SD-IPC",
            _similarity(INDEPENDENT),
        )
    for name in ("FT", "FT (C)", *(f"FT, rate {rate}" for rate in _RATES)):
        for judge in (INDEPENDENT, OWN):
            yield Claim(
                f"{name} gains by training, over the prompts that it begins with: variations are liker, by {judge}",
                _UNTOLD,
                "variation",
                f"{name} - {UNTRAINED}",
                _similarity(judge),
            )
    yield Claim(
        "a connected layer from a random start does not replace the inverse (Fig. 10)",
        "seen in pictures",
        "variation",
        "FC - SD-IPC",
        _similarity(INDEPENDENT),
        "below",
    )
    yield Claim(
        "after FT text prompts are recognised at most 0.05 less often",
        _UNTOLD,
        "variation",
        "FT - SD-IPC",
        "text prompts recognised",
        "above",
        _HARMLESS,
    )
    for name, published in kinds:
        for column, theirs in ((_similarity(INDEPENDENT), "DINO"), ("agreement with the text", "CLIP-T")):
            gain = _gain(paper.EDITED, published, theirs)
            side = "below" if gain.startswith("-") else "above"
            kept = {"above": "keep more of the picture", "below": "keep less of the picture"}[side]
            what = kept if theirs == "DINO" else "follow the text more"
            where = "Table 6" if theirs == "DINO" or name != "FT" else "Tables 4 and 6"
            yield Claim(f"after {name} edits {what} ({where})", gain, "edits", f"{name} - SD-IPC", column, side)
    column = "agreement with the text"
    text = "random prompts, not trained, alone make edits follow the text more"
    yield Claim(text, _UNTOLD, "edits", f"{UNTRAINED} - SD-IPC", column)
    for measure, what in ((_similarity(INDEPENDENT), "keep more of the picture"), (column, "follow the text more")):
        text = f"after FT edits {what} than with the prompts that it begins with"
        yield Claim(text, _UNTOLD, "edits", f"FT - {UNTRAINED}", measure)


ABLATION = tuple(_ablation())
CUSTOMISE = (
    Claim(
        "CT makes variations liker to the thing's pictures, by the independent network",
        "0.503 by DINO (Table 3), no row without",
        "variation",
        "CT - SD-IPC",
        _similarity(INDEPENDENT),
    ),
    Claim(
        "CT gains by training, over the prompts that it begins with: variations are liker, by the independent network",
        _UNTOLD,
        "variation",
        f"CT - {UNTRAINED}",
        _similarity(INDEPENDENT),
    ),
    Claim(
        "CT makes variations liker to a picture of the thing that was not tuned on, by the independent network",
        _UNTOLD,
        "variation",
        "CT - SD-IPC",
        f"{_similarity(INDEPENDENT)}, a drawing not tuned on",
    ),
    Claim(
        "after CT edits follow the text at most 0.05 less",
        "0.281 by CLIP-T (Table 3), no row without",
        "edits",
        "CT - SD-IPC",
        "agreement with the text",
        "above",
        _HARMLESS,
    ),
)


def rows(what: str, found: Mapping[str, Any]) -> list[str]:
    """The lines of a measurement in the summary's table."""
    return list(_WRITERS[what](found))


def _written(claims: Sequence[Claim], found: Mapping[str, Any]) -> Iterator[str]:
    """The claims whose numbers are there."""
    for claim in claims:
        table = restored(found, claim.table)
        if claim.row in dict(table.rows) and claim.column in table.columns:
            number = table[claim.row, claim.column]
            yield _line(claim.text, claim.paper, str(number), judged(number, claim.side, claim.limit))


def _line(claim: str, published: str, here: str, verdict: str) -> str:
    return f"| {claim} | {published} | {here} | {verdict} |"


def _spaces(found: Mapping[str, Any]) -> Iterator[str]:
    lost, conversions = restored(found, "lost"), restored(found, "conversions")
    drop, raw = lost["T-space - C-space", "R@1"], lost["T-space, raw inverse - C-space", "R@1"]
    literal = lost[f"{LITERAL} - C-space", "R@1"]
    theirs = "-0.019 by Acc@1, -0.030 by TR@1"
    text = "T-space finds nearly what C-space finds (Table 1): at most 0.05 less"
    yield _line(text, theirs, f"{drop} by R@1", judged(drop, "above", _NEARLY))
    text = "the same with the paper's number for the cut-off, 0.3"
    yield _line(text, "as above", f"{literal} by R@1", judged(literal, "above", _NEARLY))
    yield _line("the cut-off is needed: the raw inverse loses more", _UNTOLD, f"{raw} by R@1", apart(drop, raw))
    inverse = next(row for row, _ in conversions.rows if row.startswith("inverse, cut-off"))
    for row, _ in conversions.rows:
        if row in (inverse, "raw inverse"):
            continue
        for what, column in (("finds more captions", "R@1"), ("comes nearer to the captions", "cosine")):
            one, other = conversions[row, column], conversions[inverse, column]
            text = f"{row} {what} than the paper's inverse"
            yield _line(text, _UNTOLD, f"{column} {one} for {other}", apart(one, other))


def _variation(found: Mapping[str, Any]) -> Iterator[str]:
    yield from _written(VARIATION, found)
    drawn = restored(found, "conversions drawn")
    yield from _drawn(drawn, INDEPENDENT if f"similarity, {INDEPENDENT}" in drawn.columns else OWN)


def _drawn(drawn: Table, judge: str) -> Iterator[str]:
    for row, _ in drawn.rows:
        gain = drawn[row, f"similarity, {judge}"]
        name = row.removesuffix(f" - {SD_IPC}")
        raw = name == "raw inverse"
        text = (
            "without the cut-off variations are less like the picture"
            if raw
            else f"{name} makes variations liker to the picture than the paper's inverse"
        )
        yield _line(f"{text}, by {judge}", _UNTOLD, str(gain), judged(gain, "below" if raw else "above", 0.0))


def better_on_all(measured: Sequence[Mapping[str, Any]]) -> list[str]:
    """The conversions whose pictures are liker than the inverse's by the independent network on every checkpoint."""
    column, better = f"similarity, {INDEPENDENT}", []
    tables = [restored(found, "conversions drawn") for found in measured]
    for row, _ in tables[0].rows:
        gains = [table[row, column] for table in tables if row in dict(table.rows)]
        if len(gains) == len(tables) and all(judged(gain, "above", 0.0) == "holds" for gain in gains):
            better.append(row.removesuffix(f" - {SD_IPC}"))
    return better


def _curve(found: Mapping[str, Any], how: str = "") -> Iterator[str]:
    table = restored(found, "curve")
    column = next(each for each in (_similarity(INDEPENDENT), _similarity(OWN)) if each in table.columns)
    for row, _ in table.rows:
        if row.startswith("FT on ") and row.endswith(f" - {SD_IPC}"):
            gain, size = table[row, column], row.removesuffix(f" - {SD_IPC}").removeprefix("FT on ")
            text = f"FT on {size} drawings of known things{how} makes variations of held-out ones liker"
            yield _line(text, _UNTOLD, str(gain), judged(gain, "above", 0.0))
            harm = table[row, SPOKEN]
            text = "after it text prompts are recognised at most 0.05 less often"
            yield _line(text, _UNTOLD, str(harm), judged(harm, "above", _HARMLESS))
    sets = restored(found, "sets")
    column = next(each for each in (_distance(INDEPENDENT), _distance(OWN)) if each in sets.columns)
    for row, _ in sets.rows:
        if row.startswith("FT on ") and row.endswith(f" / {SD_IPC}"):
            size = row.removesuffix(f" / {SD_IPC}").removeprefix("FT on ")
            text = f"FT on {size} drawings{how} brings variations as a set nearer to held-out drawings, in times"
            yield _line(text, _UNTOLD, str(sets[row, column]), judged(sets[row, column], "below", 1.0))


_WRITERS: dict[str, Callable[[Mapping[str, Any]], Iterator[str]]] = {
    "spaces": _spaces,
    "variation": _variation,
    "customise": lambda found: _written(CUSTOMISE, found),
    "ablation": lambda found: _written(ABLATION, found),
    "curve": _curve,
    "all": lambda found: _curve(found, " with more updates"),
}

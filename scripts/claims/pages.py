"""The pages of docs/results, from the JSONs alone: one for each of the paper's tables, the plain card, the summary."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from claims import card, verdicts
from claims.results import read, restored
from sdipc_jax.evaluate.tables import Table
from sdipc_jax.files import write_atomically

CHECKPOINTS = ("embedded", "plain")


@dataclass(frozen=True)
class Page:
    """A page about one of the paper's tables.

    Attributes:
        name: of the file, as `sdipc evaluate` calls the table.
        what: the JSONs that it is written from.
        tables: those that it shows; all if none are named.
        head: what stands at its top.
        rows: which rows of the tables, all if None.
        runs: how the names of its runs begin, if what they have learnt stands there too.
    """

    name: str
    what: str
    title: str
    head: str
    tables: tuple[str, ...] = ()
    rows: Callable[[str], bool] | None = None
    runs: str = ""


PAGES = (
    Page(
        "spaces",
        "spaces",
        "Spaces and conversions (Table 1)",
        "Nothing is generated here.",
    ),
    Page(
        "variation",
        "variation",
        "Variations beside text prompts (Table 2)",
        "Held-out drawings of known things are drawn anew: from their captions, by the paper's inverse (SD-IPC), and "
        "by the other conversions.",
    ),
    Page(
        "customise",
        "customise",
        "Customising (Table 3)",
        "SD-IPC-CT on a few drawings of a thing that the checkpoint has never seen.",
        runs="ct-",
    ),
    Page(
        "edit",
        "ablation",
        "Edits with and without FT (Table 4)",
        "The rows of [the ablation](ablation.md) that Table 4 has: one text for each picture.",
        ("edits",),
        lambda row: not row.startswith(("FC", "FT (")),
    ),
    Page(
        "ablation",
        "ablation",
        "What is tuned (Tables 5 and 6)",
        "C are deep prompts in the vision tower, U keys and values of the UNet, FT both; FC is one layer in the place "
        "of the inverse, from a random start or (I) from the inverse. Prompts that are not trained are the same random "
        "tokens as FT and C begin with.",
        runs="ft-",
    ),
    Page(
        "curve",
        "curve",
        "FT by how many drawings it sees",
        "The paper tunes on 100 pictures. Here the drawings are of the kinds that the checkpoint was trained on. More "
        "updates on all of them: [all drawings](all.md).",
        runs="curve-",
    ),
    Page(
        "all",
        "all",
        "FT on all drawings that the checkpoint was trained on",
        "The last point of [the curve](curve.md) with more updates and more drawings to judge: whether such a tuning "
        "makes the checkpoint better.",
    ),
)


def write_pages(folder: Path) -> None:
    """Writes every page that there are JSONs for, and the summary."""
    for page in PAGES:
        found = {name: each for name in CHECKPOINTS if (each := read(folder, page.what, name)) is not None}
        if found:
            write_atomically(folder / f"{page.name}.md", written(page, found, folder).encode())
    training = read(folder, "training", "plain")
    spaces = read(folder, "spaces", "plain")
    if training is not None and spaces is not None:
        write_atomically(folder / "plain-card.md", card.written(training, spaces).encode())
    write_atomically(folder / "summary.md", summary(folder).encode())


def written(page: Page, found: Mapping[str, Mapping[str, Any]], folder: Path) -> str:
    """One page: for each checkpoint its tables and its sheet."""
    parts = [
        f"# {page.title}",
        f"{page.head} Written by `python scripts/measure_claims.py pages` from the JSONs beside it. `embedded` is the "
        "checkpoint that ships, `plain` [one that was not trained for the closed form](plain-card.md).",
    ]
    if (folder / f"{page.name}.png").is_file():
        parts.append(f"![{page.title}]({page.name}.png)")
    for name, each in found.items():
        parts += [f"## {name}", f"```sh\n{each['command']}\n```"]
        if "gap" in each:
            values = "\n".join(f"| {what} | {value:.3f} |" for what, value in each["gap"].items())
            parts.append(f"| the gap | |\n|---|---|\n{values}")
        sheet = folder / f"{page.what}-{name}.png"
        if sheet.is_file() and not page.rows:
            kinds = each.get("kinds")
            columns = f" From left to right: {'; '.join(kinds)}." if kinds else ""
            parts.append(f"![Drawings and what was made of them]({sheet.name})\n\n*{each['shown']}{columns}*")
        for table in page.tables or each["tables"]:
            parts.append(_chosen(restored(each, table), page.rows).to_markdown())
        learnt = read(folder, "prompts", name)
        if learnt is not None and page.runs:
            tables = (restored(learnt, table) for table in learnt["tables"])
            chosen = [_chosen(table, lambda row: row.startswith(page.runs)) for table in tables]
            parts += [*(each.to_markdown() for each in chosen if each.rows), f"```sh\n{learnt['command']}\n```"]
    return "\n\n".join(parts) + "\n"


def _chosen(table: Table, rows: Callable[[str], bool] | None) -> Table:
    if rows is None:
        return table
    return replace(table, rows=tuple(each for each in table.rows if rows(each[0])))


def summary(folder: Path) -> str:
    """The verdicts on each checkpoint."""
    there = (f"[{page.title}]({page.name}.md)" for page in PAGES if (folder / f"{page.name}.md").is_file())
    parts = [_SUMMARY.format(pages="\n".join(f"- {each}" for each in there))]
    for name in CHECKPOINTS:
        spaces = read(folder, "spaces", name)
        if spaces is None:
            continue
        distance = spaces["gap"]["distance of the means"]
        lines = [
            f"## {name}\n",
            f"The means of pictures and captions lie {distance:.3f} apart.\n",
            "| claim | the paper | here | verdict |",
            "|---|---|---|---|",
        ]
        for what in dict.fromkeys(page.what for page in PAGES):
            found = read(folder, what, name)
            lines += [] if found is None else verdicts.rows(what, found)
        parts.append("\n".join(lines))
    drawn = [each for name in CHECKPOINTS if (each := read(folder, "variation", name)) is not None]
    better = verdicts.better_on_all(drawn) if len(drawn) == len(CHECKPOINTS) else []
    parts.append(_BETTER.format(", ".join(better)) if better else _NONE_BETTER)
    return "\n\n".join([*parts, _OPEN]) + "\n"


_SUMMARY = """# What holds of the paper's claims

Written by `python scripts/measure_claims.py pages`. Holds: the interval lies on the claim's side; does not: on the
other; cannot be told: on both. `embedded` is the checkpoint that ships, which was trained so that the closed form
works, and `plain` ([its card](plain-card.md)) one whose CLIP knows nothing of it. The independent network is
EffNet-Lite0, in the place of DINO and Inception.

{pages}

## In short

(By hand, from the tables.)

- **Table 1 holds on both checkpoints**, with a cut-off that was chosen on training pictures. On the plain one the
  cut-off is what makes it hold: the raw inverse finds nothing, and draws red shapes whatever the picture is. The
  paper's number for it, 0.3, belongs to its CLIP; here it costs 0.06 of R@1.
- **Table 2's CLIP-Score is a judge in its own cause.** By the CLIP whose vectors they are made of, variations are
  liker to the picture than what is drawn from its caption, on both checkpoints. By a network that had no part in it
  that cannot be told on the one, and on the plain one they are less like.
- **Ridge and the mean shift come nearer to the captions' states** on the checkpoint with a gap (cosine 0.85 instead
  of 0.74), and hardly nearer in pictures.
- **Table 5, with 100 drawings of things never seen, cannot be told on the plain checkpoint after the paper's 10,000
  presentations**: at 1e-5, which validation drawings chose, FT makes variations liker by 0.005 [-0.010, 0.018] by the
  independent network (the paper 0.074 by DINO), prompts (C) by 0.002, keys and values (U) by 0.003. Over the same
  prompts as they begin FT gains 0.008 [-0.004, 0.020]. A layer in the place of the inverse that begins at random (FC)
  does not reach it, -0.085 [-0.103, -0.066]; one that begins as the inverse stays there.
- **Tables 4 and 6 hold by half**: after FT edits follow the text more, by 0.020 (the paper 0.019), but 0.015 of it is
  what the random prompts do before any training. And edits keep less of the picture, -0.015 [-0.026, -0.004], where
  the paper's keep more; that is keys and values' doing, -0.016 [-0.026, -0.007] by them alone.
- **FT does learn, and overfits while it does.** At 1e-5 the UNet's error under the pictures falls by 0.027 of 0.446 on
  the 100 drawings and by 0.007 [0.003, 0.011] of 0.430 on drawings of other things: less than a fiftieth, which no
  judge of pictures sees. Keys and values alone do all of it. Prompts have hardly moved: the vectors have a cosine of
  0.998 with those of the prompts as they begin, and the error is what it was without any. At 1e-4 it falls by 0.078 on
  the 100 drawings, by no more on others than at 1e-5, and under the captions of others it rises by 0.016
  [0.009, 0.023]; text prompts are recognised half as often ([losses](ablation.md)).
- **What would change it: more drawings, and not the error alone.** On the checkpoint that ships 2,400 presentations of
  100 drawings lower the error on them by 0.014, and on held-out ones they raise that under captions by 0.013 [0.008,
  0.018]; of all drawings they lower it as much on held-out ones as on those tuned on (0.002, 0.003), and 12,800
  presentations by 0.009 [0.004, 0.013] and 0.007 ([losses](curve.md)). But a lower
  error is not a liker picture: on things that it has never seen 100 updates lower the error for other such things by a
  tenth, 0.049 of 0.456, and variations are liker by 0.007 [-0.008, 0.022] by the independent network and less like by
  the own CLIP, -0.029 [-0.059, -0.001].
- **FT gains on the plain checkpoint where it sees more drawings, of things that it knows**: at 1e-4, after 2,000
  presentations, variations of held-out drawings are liker by the independent network by 0.027 [0.006, 0.052] with 100
  drawings of the training split, 0.039 [0.018, 0.064] with 1,000 and 0.036 [0.019, 0.055] with all, half of what the
  paper has; over prompts that are not trained by 0.017 [-0.005, 0.040], 0.028 [0.008, 0.049] and 0.026 [0.010, 0.043]
  ([curve](curve.md)). That is the paper's finding, on a UNet whose training was broken off, so that some of it may be
  training that it lacked.
- **FT on all 14,244 drawings that the shipped checkpoint was trained on does not ship**: 800 updates of 16 make
  variations of held-out drawings liker by 0.007 [-0.003, 0.017] by the independent network, bring them no nearer as a
  set (1.003 times the kernel distance), and text prompts are recognised 0.812 instead of 0.844 times, with 0 outside
  of the interval ([all drawings](all.md)). The run began as one of 2,000 updates and was shortened after 378, so that
  its rate fell faster from there.
- **CT does what the paper says, and it is training that does it**: on the plain checkpoint variations are liker to the
  drawings than with the same prompts not trained, by 0.027 [0.002, 0.051] by the independent network and by 0.041 by
  the own CLIP, and edits keep more of the picture, by 0.023 [0.003, 0.042]. On the one that ships by 0.031 [0.008,
  0.059] and by 0.025 [0.013, 0.037], but there edits follow the text less, -0.042 [-0.072, -0.018]."""
_BETTER = """## Other conversions

Better on both checkpoints by the independent network, with an interval that excludes 0: {}."""
_NONE_BETTER = """## Other conversions

None makes variations liker than the paper's inverse on both checkpoints by the independent network, with an interval
that excludes 0: the default stays the paper's. Those that are worth having are offered by name:
[calibration](../calibration.md)."""
_OPEN = """## What is not measured

The paper's own checkpoints and data were not at hand: `sdipc evaluate TABLE CONFIG.yaml`
([evaluation](../evaluation.md)) and `sdipc spectrum --compare FOLDER` are for those who have them. All runs of tuning
have one seed; on the plain checkpoint FT had the paper's 10,000 presentations and the curve 2,000 a point, on the one
that ships 400 and 2,400. Longer runs of FT on it, with two seeds, are in [tuning](../tuning.md), what its variations
are worth with more pictures in [its
card](../../sdipc_jax/embedded/README.md)."""

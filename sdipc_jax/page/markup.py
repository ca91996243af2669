"""What the page shows of requests, as HTML: pure functions of what the service tells."""

from collections.abc import Sequence
from html import escape
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import quote

from sdipc_jax.page.service import Ticket
from sdipc_jax.records import Record

# Small pictures are shown as their pixels are.
_SMALL = 128

STYLE = """
.gradio-container {max-width: 1200px !important; margin: 0 auto;}
.sdipc h1 {font-size: 1.5rem; font-weight: 600; margin: 0;}
.sdipc p {margin: .25rem 0;}
.sdipc .quiet {color: var(--body-text-color-subdued);}
.sdipc a {margin: 0; padding: 0;}
.sdipc .alert {border-left: 4px solid #b91c1c; padding: .5rem .75rem; background: var(--block-background-fill);}
.sdipc progress {width: 100%; height: .6rem; accent-color: var(--color-accent);}
.sdipc .row {display: grid; grid-template-columns: repeat(auto-fill, minmax(100px, 1fr)); gap: .75rem;
  margin: 0 0 1rem;}
.sdipc .pair {display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: .75rem;}
.sdipc figure {margin: 0;}
.sdipc figure img {width: 100%; aspect-ratio: var(--shape, 1); object-fit: contain; border-radius: 6px;
  background: var(--background-fill-secondary); display: block;}
.sdipc img.pixels {image-rendering: pixelated;}
.sdipc figcaption {font-size: .85rem; line-height: 1.35; overflow-wrap: anywhere; padding-top: .25rem;}
.sdipc .input figcaption {font-weight: 600;}
.sdipc code {font-size: .8rem; overflow-wrap: anywhere; white-space: pre-wrap;}
.sdipc .blank {border: 1px dashed var(--border-color-primary); border-radius: 6px; padding: 2.5rem 1rem;
  text-align: center;}
#pictures .grid-wrap {padding-top: 2rem;}
#pictures .grid-container {grid-template-columns: repeat(3, minmax(0, 1fr)) !important;}
footer {display: none !important;}
"""


def header(title: str, remarks: Sequence[str]) -> str:
    """The checkpoint, and what to know of it."""
    told = "".join(f'<p class="quiet">{escape(remark)}</p>' for remark in remarks)
    return _box(f"<h1>Pictures as prompts</h1><p>Checkpoint: <strong>{escape(title)}</strong></p>{told}")


def advice(text: str) -> str:
    """What a function needs."""
    return _box(f'<p class="quiet">{escape(text)}</p>')


def status(text: str) -> str:
    """How it stands."""
    return _box(f'<p role="status">{escape(text)}</p>')


def alert(text: str) -> str:
    """Why nothing was made."""
    return _box(f'<p class="alert" role="alert">{escape(text)}</p>')


def empty() -> str:
    """In the place of results."""
    return _box('<p class="blank quiet">Inputs stand here beside what is made of them, as it is finished.</p>')


def progress(told: Record) -> str:
    """How a request stands, what could not be used of it, and what to know of the rest."""
    state, count = told["state"], len(told["pictures"])
    if state == "waiting":
        ahead = told["ahead"]
        parts = [status(f"Waiting: {ahead} request{'' if ahead == 1 else 's'} first.")]
    elif state == "running":
        words = f"{count} finished so far." if count else "Working; the first time at these settings takes longer."
        bar = f'<progress max="1" value="{told["done"]:.3f}" aria-label="Done so far"></progress>'
        parts = [status(words), _box(bar)]
    elif state == "done":
        parts = [status(f"Done: {count} picture{'' if count == 1 else 's'}.")]
    elif state == "cancelled":
        parts = [status(f"Stopped: {told['error']}." if told["error"] != "cancelled" else "Stopped.")]
    else:
        parts = [alert(told["error"] or state)]
    parts += [alert(failure["error"]) for failure in told["failures"]]
    parts += [advice(note) for note in told["notes"]]
    return "".join(parts)


def results(ticket: Ticket, told: Record) -> str:
    """Inputs beside what was made of them: a row for each picture of `vary`, else one row."""
    rows = [[each] for each in ticket.inputs] if ticket.function == "vary" else [list(ticket.inputs)]
    shown = []
    for inputs in rows:
        figures = [_input(ticket, each) for each in inputs]
        figures += [_result(ticket, each) for each in told["pictures"] if len(rows) == 1 or _is_of(each, inputs[0])]
        shown.append(f'<div class="row">{"".join(figures)}</div>')
    return _box("".join(shown)) if told["pictures"] or ticket.inputs else empty()


def entries(ticket: Ticket, told: Record) -> list[Record]:
    """What of a request can be compared."""
    if not told["pictures"]:
        return []
    inputs = [
        {"label": f"{ticket.number}: input {PurePosixPath(each).name}", "url": _url(ticket, each), "command": ""}
        for each in ticket.inputs
    ]
    made = [
        {
            "label": f"{ticket.number}: {ticket.function} {each['record']['file']}",
            "url": each["url"],
            "command": ticket.command,
        }
        for each in told["pictures"]
    ]
    return [*inputs, *made]


def beside(first: Record | None, second: Record | None) -> str:
    """Two of them, side by side."""
    if first is None or second is None:
        return _box('<p class="quiet">Make some pictures; then choose two.</p>')
    figures = [
        _figure(each["url"], each["label"], f"{escape(each['label'])}<br><code>{escape(each['command'])}</code>")
        for each in (first, second)
    ]
    return _box(f'<div class="pair">{"".join(figures)}</div>')


def _input(ticket: Ticket, name: str) -> str:
    title = PurePosixPath(name).name
    return _figure(_url(ticket, name), f"Input: {title}", f"{escape(title)}", "input")


def _result(ticket: Ticket, picture: Record) -> str:
    record: dict[str, Any] = picture["record"]
    told = f"picture {record['index']}, seed {record['seed']}"
    withheld = ", withheld by the safety checker" if record.get("flagged") else ""
    link = f'<a href="{escape(picture["url"])}" download="{escape(record["file"])}">{escape(told)}</a>{withheld}'
    settings = record.get("settings", {})
    small = max(settings.get("height", 0), settings.get("width", 0)) <= _SMALL
    return _figure(picture["url"], f"{ticket.function}: {told}", link, "result", small=small)


def _figure(url: str, alt: str, caption: str, kind: str = "", *, small: bool = True) -> str:
    pixels = ' class="pixels"' if small else ""
    image = f'<img src="{escape(url)}" alt="{escape(alt)}"{pixels}>'
    return f'<figure class="{kind}">{image}<figcaption>{caption}</figcaption></figure>'


def _url(ticket: Ticket, file: str) -> str:
    return f"/api/requests/{ticket.name}/{quote(file)}"


def _is_of(picture: Record, name: str) -> bool:
    """Whether a picture was made of this input."""
    return PurePosixPath(str(picture["record"].get("input", ""))).name == PurePosixPath(name).name


def _box(content: str) -> str:
    return f'<div class="sdipc">{content}</div>'

"""The page itself: what a person sees and clicks, in Gradio's Blocks."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import gradio as gr

from sdipc_jax.errors import InputError
from sdipc_jax.page import markup
from sdipc_jax.page.folder import MAX_BYTES
from sdipc_jax.page.queue import Job, Refused
from sdipc_jax.page.requests import FUNCTIONS, MAX_IMAGES, MAX_PICTURES, MAX_STEPS
from sdipc_jax.page.service import Service, Ticket
from sdipc_jax.records import Record

_SECONDS_BETWEEN_LOOKS = 0.2
# Of a visit, for comparing.
_SEEN = 64
_CHOICES = {
    "vary": "Vary: variations of each picture",
    "edit": "Edit: a picture with a text's change",
    "mix": "Mix: several pictures as one",
    "text": "Text: no picture, words alone",
}
_HELP = {
    "vary": "Drop one or more pictures.",
    "edit": "Drop one picture, and say what to change.",
    "mix": "Drop two or more pictures; a text is optional.",
    "text": "Say what to draw.",
}
# Which functions show what.
_WITH = {
    "pictures": ("vary", "edit", "mix"),
    "text": ("edit", "mix", "text"),
    "alpha": ("edit", "mix"),
    "weights": ("mix",),
}

# What a run of a request changes on the page, and what it stands for.
Update = dict[Any, Any]


def make_blocks(service: Service) -> gr.Blocks:
    """The page of a service."""
    commands = service.commands
    sizes = ["x".join(map(str, each)) for each in commands.sizes]
    with gr.Blocks(title="sdipc", analytics_enabled=False, delete_cache=(600, 3600)) as blocks:
        gr.HTML(markup.header(commands.title, commands.remarks))
        current, seen = gr.State(None), gr.State([])
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                function = gr.Radio(
                    [(text, name) for name, text in _CHOICES.items()],
                    value="vary",
                    label="What to make",
                    info=_HELP["vary"],
                    elem_id="function",
                )
                pictures = gr.Gallery(
                    label=f"Pictures (at most {MAX_PICTURES}, {MAX_BYTES // 10**6} MB at once)",
                    type="filepath",
                    columns=3,
                    height=220,
                    object_fit="contain",
                    fit_columns=False,
                    interactive=True,
                    buttons=[],
                    elem_id="pictures",
                )
                _take_uploads_alone(pictures)
                weights = gr.Textbox(
                    label="Weights",
                    placeholder="1, 0.5",
                    info="One for each picture; equal if empty.",
                    visible=False,
                    elem_id="weights",
                )
                text = gr.Textbox(label="Text", placeholder="at night", visible=False, elem_id="text")
                alpha = gr.Slider(
                    0,
                    2,
                    value=0.9,
                    step=0.05,
                    label="Alpha",
                    info="How much the text counts.",
                    visible=False,
                    elem_id="alpha",
                )
                with gr.Row():
                    seed = gr.Number(0, label="Seed", precision=0, min_width=100, elem_id="seed")
                    num_images = gr.Slider(
                        1, MAX_IMAGES, value=4, step=1, label="Count", min_width=150, elem_id="num_images"
                    )
                with gr.Accordion("More settings", open=False, elem_id="more"):
                    negative = gr.Textbox(label="Negative text", info="What to lead away from.", elem_id="negative")
                    steps = gr.Slider(1, MAX_STEPS, value=commands.steps, step=1, label="Steps", elem_id="steps")
                    guidance = gr.Slider(
                        0,
                        20,
                        value=commands.guidance_scale,
                        step=0.5,
                        label="Guidance",
                        info="1 or less is none.",
                        elem_id="guidance",
                    )
                    size = gr.Dropdown(sizes, value=sizes[0], label="Size (height x width)", elem_id="size")
                with gr.Row():
                    go = gr.Button("Make pictures", variant="primary", elem_id="go")
                    stop = gr.Button("Stop", interactive=False, elem_id="stop")
            with gr.Column(scale=3, min_width=320):
                status = gr.HTML(markup.status("Nothing asked for yet."), elem_id="status")
                results = gr.HTML(markup.empty(), elem_id="results")
                command = gr.Textbox(
                    label="The same pictures on the command line",
                    lines=3,
                    interactive=False,
                    buttons=["copy"],
                    elem_id="command",
                )
                with gr.Accordion("Compare side by side", open=False, elem_id="compare"):
                    with gr.Row():
                        left = gr.Dropdown([], label="Left", elem_id="left", min_width=140)
                        right = gr.Dropdown([], label="Right", elem_id="right", min_width=140)
                    beside = gr.HTML(markup.beside(None, None), elem_id="beside")

        shown = {"pictures": pictures, "text": text, "alpha": alpha, "weights": weights}
        asked = {
            **{"function": function, "pictures": pictures, "weights": weights, "text": text, "alpha": alpha},
            **{"seed": seed, "num_images": num_images, "negative_prompt": negative, "steps": steps},
            **{"guidance_scale": guidance, "size": size, "seen": seen},
        }

        def choose(name: str) -> Update:
            return {function: gr.update(info=_HELP[name])} | {
                each: gr.update(visible=name in _WITH[field]) for field, each in shown.items()
            }

        visits: dict[str | None, Job] = {}

        async def make(found: Update, request: gr.Request) -> AsyncIterator[Update]:
            values = {name: found[component] for name, component in asked.items()}
            yield {status: markup.status("Reading the pictures …"), go: gr.update(interactive=False)}
            try:
                with service.queue.place() as put:
                    ticket = await asyncio.to_thread(_take, service, put, values)
            except (Refused, InputError) as error:
                yield {status: markup.alert(str(error)), go: gr.update(interactive=True)}
                return
            visits[request.session_hash] = ticket.job
            yield {current: ticket.name, command: ticket.command, stop: gr.update(interactive=True)}
            try:
                async for told in _follow(service, ticket):
                    yield {status: markup.progress(told), results: markup.results(ticket, told)}
                entries = [*markup.entries(ticket, told), *values["seen"]][:_SEEN]
                yield {
                    go: gr.update(interactive=True),
                    stop: gr.update(interactive=False),
                    seen: entries,
                    **_comparison(left, right, beside, entries, len(ticket.inputs)),
                }
            finally:
                visits.pop(request.session_hash, None)

        def leave(request: gr.Request) -> None:
            # Whoever closes the page waits for nothing any more.
            if (job := visits.pop(request.session_hash, None)) is not None:
                service.queue.cancel(job)

        def cancel(name: str | None) -> None:
            ticket = None if name is None else service.find(name)
            if ticket is not None:
                service.queue.cancel(ticket.job)

        def compare(entries: list[Record], first: str | None, second: str | None) -> str:
            by_label = {entry["label"]: entry for entry in entries}
            return markup.beside(by_label.get(first or ""), by_label.get(second or ""))

        hidden: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden", "concurrency_limit": None}
        function.change(choose, function, [function, *shown.values()], queue=False, **hidden)
        outputs = [status, results, command, current, seen, left, right, beside, go, stop]
        go.click(make, set(asked.values()), outputs, **hidden)
        stop.click(cancel, current, None, queue=False, **hidden)
        blocks.unload(leave)
        for each in (left, right):
            each.input(compare, [seen, left, right], beside, queue=False, **hidden)
    blocks.queue(api_open=False, max_size=None, default_concurrency_limit=None)
    return blocks


def _take_uploads_alone(gallery: Any) -> None:
    """Gradio would fetch what an address names, and in an application of ours copy any file that a request names."""
    keep = gallery.async_move_resource_to_block_cache

    async def only_uploads(name: str | Path | None) -> str | None:
        uploads = Path(gr.utils.get_upload_folder()).resolve()
        if name is None or "://" in str(name) or not Path(name).resolve().is_relative_to(uploads):
            raise gr.Error("found no upload, expected one: upload the picture itself")
        kept: str | None = await keep(name)
        return kept

    # Not a class of our own: for each, Gradio writes a file beside its source.
    gallery.async_move_resource_to_block_cache = only_uploads


def _take(service: Service, put: Any, values: Mapping[str, Any]) -> Ticket:
    """What is on the page, as a request; what is as it was is left out, and so left to the checkpoint."""
    function, commands = values["function"], service.commands
    files = [path for path, _ in values["pictures"] or []] if function in _WITH["pictures"] else []
    standard = {"steps": commands.steps, "guidance_scale": commands.guidance_scale, "negative_prompt": "", "text": ""}
    standard |= {"seed": 0, "num_images": 4, "alpha": 0.9}
    asked = {name: values[name] for name in FUNCTIONS[function].request.model_fields.keys() & values.keys()}
    asked = {name: value for name, value in asked.items() if value is not None and value != standard.get(name)}
    asked.pop("weights", None)
    if function in _WITH["weights"] and (values["weights"] or "").strip():
        asked["weights"] = [each.strip() for each in values["weights"].split(",")]
    height, width = map(int, values["size"].split("x"))
    if (height, width) != tuple(commands.sizes[0]):
        asked |= {"height": height, "width": width}
    return service.take(put, function, [(Path(path).name, Path(path).read_bytes()) for path in files], asked)


async def _follow(service: Service, ticket: Ticket) -> AsyncIterator[Record]:
    """What there is to tell of a request, whenever that changes, and at the end."""
    last: Record = {}
    while True:
        ended = ticket.job.ended
        told = await asyncio.to_thread(service.tell, ticket)
        if told != last:
            last = told
            yield told
        if ended:
            return
        await asyncio.sleep(_SECONDS_BETWEEN_LOOKS)


def _comparison(left: Any, right: Any, beside: Any, entries: list[Record], inputs: int) -> Update:
    """The two lists, with the newest request's first input and result chosen, or its first two results."""
    labels = [entry["label"] for entry in entries]
    chosen = [entries[place] if place < len(entries) else None for place in (0, inputs or 1)]
    first, second = (None if entry is None else entry["label"] for entry in chosen)
    return {
        left: gr.update(choices=labels, value=first),
        right: gr.update(choices=labels, value=second),
        beside: markup.beside(*chosen),
    }

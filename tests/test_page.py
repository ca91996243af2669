"""What stands behind the page, without its packages: the queue, requests, their folders, the guard, the commands."""

import asyncio
import importlib.util
import io
import json
import re
import shlex
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

from sdipc_jax import cli
from sdipc_jax.commands import page as page_command
from sdipc_jax.commands.page import Kept, Runner, commands_of, sizes_of
from sdipc_jax.commands.settings import EditSettings, MixSettings, TextSettings, VarySettings
from sdipc_jax.errors import InputError
from sdipc_jax.page import markup
from sdipc_jax.page.folder import Folder
from sdipc_jax.page.guard import Guard
from sdipc_jax.page.queue import Job, Queue, Refused
from sdipc_jax.page.requests import FUNCTIONS
from sdipc_jax.page.service import Commands, Service, Ticket
from sdipc_jax.page.settings import PageSettings
from sdipc_jax.page.typed import as_typed


def png(seed: int = 0, side: int = 40) -> bytes:
    stream = io.BytesIO()
    coarse = np.random.default_rng(seed).integers(0, 256, (7, 7, 3), np.uint8)
    Image.fromarray(coarse).resize((side, side)).save(stream, "PNG")
    return stream.getvalue()


# The queue.


@pytest.fixture
def queue() -> Iterator[Queue]:
    queue = Queue(places=2)
    worker = threading.Thread(target=queue.work, daemon=True)
    worker.start()
    yield queue
    queue.close()
    worker.join(10)
    assert queue.over.is_set()


def put(queue: Queue, work: Callable[[Any], Any] = lambda report: {}) -> Job:
    job = Job(work)
    with queue.place() as enter:
        enter(job)
    return job


def until(condition: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


class Slow:
    """Work that reports until it is let go."""

    def __init__(self) -> None:
        self.begun, self.go = threading.Event(), threading.Event()

    def __call__(self, report: Callable[[float], None]) -> dict[str, Any]:
        self.begun.set()
        while not self.go.wait(0.002):
            report(0.5)
        return {"notes": ["finished"]}


def test_one_is_worked_on_two_wait_and_the_fourth_is_refused(queue: Queue) -> None:
    slow = Slow()
    jobs = [put(queue, slow)]
    assert slow.begun.wait(10)
    jobs += [put(queue), put(queue)]
    assert [queue.ahead(job) for job in jobs] == [0, 1, 2]
    assert not queue.has_room
    with pytest.raises(
        Refused, match="busy: 2 requests wait already, expected fewer: try again in 1 seconds"
    ) as refused:
        put(queue)
    assert refused.value.seconds == 1
    slow.go.set()
    until(lambda: all(job.state == "done" for job in jobs))
    assert jobs[0].outcome == {"notes": ["finished"]}
    assert queue.has_room


def test_a_request_that_is_wrong_gives_its_place_back(queue: Queue) -> None:
    for _ in range(5):
        with pytest.raises(InputError), queue.place():
            raise InputError("wrong")
    assert queue.waiting == 0
    job = put(queue)
    until(lambda: job.state == "done")


def test_what_goes_wrong_is_one_jobs_alone(queue: Queue, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(error: Exception) -> Callable[[Any], Any]:
        def work(report: Any) -> Any:
            raise error

        return work

    errors = [InputError("seed is -1"), MemoryError("too large"), RuntimeError("a secret")]
    jobs = []
    for error in errors:
        jobs.append(put(queue, fail(error)))
        until(lambda: jobs[-1].ended)
    assert [(job.state, job.status) for job in jobs] == [("failed", 422), ("failed", 507), ("failed", 500)]
    assert (jobs[0].error, jobs[1].error) == ("seed is -1", "too large")
    assert "secret" not in str(jobs[2].error)
    assert "a secret" in capsys.readouterr().err
    last = put(queue)
    until(lambda: last.state == "done")


def test_cancelled_ones_stop_or_never_begin(queue: Queue) -> None:
    slow, begun = Slow(), threading.Event()
    running = put(queue, slow)
    assert slow.begun.wait(10)
    waiting = put(queue, lambda report: begun.set())
    queue.cancel(waiting)
    assert (waiting.state, waiting.status, waiting.error) == ("cancelled", 499, "cancelled")
    queue.cancel(running)
    until(lambda: running.ended)
    assert (running.state, running.outcome) == ("cancelled", {})
    last = put(queue)
    until(lambda: last.state == "done")
    assert not begun.is_set()
    # What has ended stays as it was.
    queue.cancel(last)
    assert last.state == "done"


def test_a_queue_that_closes_finishes_what_runs_and_tells_the_others(queue: Queue) -> None:
    slow = Slow()
    running = put(queue, slow)
    assert slow.begun.wait(10)
    waiting = [put(queue), put(queue)]
    queue.close()
    assert [(job.state, job.status) for job in waiting] == [("refused", 503)] * 2
    assert "ending" in str(waiting[0].error)
    assert not queue.over.is_set()
    with pytest.raises(Refused, match="the page is ending"):
        put(queue)
    slow.go.set()
    assert queue.over.wait(10)
    assert running.state == "done"


def test_a_request_that_is_still_read_when_the_queue_closes_is_told(queue: Queue) -> None:
    job = Job(lambda report: {})
    with queue.place() as enter:
        queue.close()
        enter(job)
    assert (job.state, job.status) == ("refused", 503)


# Requests.


class Fake:
    """Stands behind a page: notes what is run, and runs nothing."""

    def __init__(self) -> None:
        self.ran: list[tuple[str, Any]] = []

    def commands(self) -> Commands:
        def run(function: str, settings: Any, report: Any) -> dict[str, Any]:
            self.ran.append((function, settings))
            return {"notes": ["a note"], "failures": []}

        def check_size(height: int, width: int) -> None:
            if (height, width) != (64, 64):
                raise InputError(f"height and width are {height}x{width}, expected one of 64x64: choose one of them")

        kinds = {"vary": VarySettings, "edit": EditSettings, "mix": MixSettings, "text": TextSettings}
        return Commands(kinds, run, check_size, [(64, 64)], "fake", [], 50, 7.5)


@pytest.fixture
def fake(tmp_path: Path, queue: Queue) -> tuple[Service, Fake]:
    behind = Fake()
    settings = PageSettings(model="fake", lora=("a.safetensors",), sampler="euler", fit="pad")
    return Service(behind.commands(), settings, queue, Folder(tmp_path / "requests", kept=3)), behind


def take(service: Service, function: str, files: list[tuple[str, bytes]], **values: Any) -> Ticket:
    with service.queue.place() as enter:
        return service.take(enter, function, files, values)


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("edit", {"text": "a", "alpha": float("nan")}, "alpha is nan, expected a finite number"),
    ("edit", {"text": "a", "alpha": 1e9}, "alpha is 1000000000.0, expected less than or equal to 1000"),
    ("edit", {"text": "a", "alpha": -1e9}, "alpha is -1000000000.0, expected greater than or equal to -1000"),
    ("vary", {"steps": 0}, "steps is 0, expected greater than or equal to 1"),
    ("vary", {"steps": 10**6}, "steps is 1000000, expected less than or equal to 200"),
    ("vary", {"height": 0, "width": 64}, "height is 0, expected greater than or equal to 1"),
    ("vary", {"height": 513, "width": 64}, "height and width are 513x64, expected one of 64x64"),
    ("vary", {"height": 10**5, "width": 64}, "height is 100000, expected less than or equal to 8192"),
    ("vary", {"height": 64}, "found one of height and width, expected both or none"),
    ("vary", {"seed": -1}, "seed is -1, expected greater than or equal to 0"),
    ("vary", {"seed": 2**64}, "seed is 18446744073709551616, expected less than or equal to 4294967295"),
    ("vary", {"num_images": 1000}, "num_images is 1000, expected less than or equal to 16"),
    ("edit", {"text": "a" * 10**6}, "text is 'aaa"),
    ("edit", {"text": "a\x00b"}, "text is 'a\\x00b', expected no control characters, of which it has '\\x00'"),
    ("edit", {"text": ""}, "found no text, expected at least one"),
    ("edit", {}, "text is missing"),
    ("vary", {"colour": "red"}, "colour is not a setting"),
    ("vary", {"pictures": ["/etc/passwd"]}, "pictures is not a setting"),
    ("vary", {"output_dir": "/tmp"}, "output_dir is not a setting"),
    ("mix", {"weights": [1]}, "found 1 pictures, expected 2 to 8 for mix"),
]


@pytest.mark.parametrize("function, values, expected", WRONG)
def test_a_request_that_is_wrong_is_refused_by_name(
    fake: tuple[Service, Fake], function: str, values: dict[str, Any], expected: str
) -> None:
    service, behind = fake
    with pytest.raises(InputError) as refused:
        take(service, function, [("a.png", png())], **values)
    assert str(refused.value).startswith(expected)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 1000
    assert behind.ran == []
    assert service.queue.waiting == 0


@pytest.mark.parametrize(
    "arguments, function, values",
    [
        (["edit", "a.png", "a", "--alpha", "nan"], "edit", {"text": "a", "alpha": float("nan")}),
        (["edit", "a.png", "a", "--alpha", "1e9"], "edit", {"text": "a", "alpha": 1e9}),
        (["edit", "a.png", "a\x01"], "edit", {"text": "a\x01"}),
        (["vary", "a.png", "--seed", "-1"], "vary", {"seed": -1}),
        (["vary", "a.png", "--steps", "0"], "vary", {"steps": 0}),
        (["vary", "a.png", "--height", "100000", "--width", "64"], "vary", {"height": 100000, "width": 64}),
    ],
)
def test_the_command_line_says_the_same(
    fake: tuple[Service, Fake],
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    function: str,
    values: dict[str, Any],
) -> None:
    assert cli.main(arguments) == 2
    with pytest.raises(InputError) as refused:
        take(fake[0], function, [("a.png", png())], **values)
    # What is typed is text at first, and a dash may be a slip: the command line tells of that besides.
    said, expected = (re.sub(r"[\s']", "", text) for text in (capsys.readouterr().err, str(refused.value)))
    assert expected.removesuffix(":correctit") in said


def test_too_many_results_are_refused(fake: tuple[Service, Fake]) -> None:
    files = [(f"{number}.png", png(number)) for number in range(3)]
    with pytest.raises(InputError, match="num_images is 16 for 3 pictures, expected at most 32 results"):
        take(fake[0], "vary", files, num_images=16)
    take(fake[0], "mix", files, num_images=16)


def test_a_request_becomes_the_commands_settings(fake: tuple[Service, Fake]) -> None:
    service, behind = fake
    ticket = take(service, "mix", [("a.png", png(0)), ("b.png", png(1))], weights=[1, -0.5], text="at night", seed=7)
    until(lambda: ticket.job.ended)
    ((function, settings),) = behind.ran
    assert function == "mix"
    assert isinstance(settings, MixSettings)
    assert (settings.weights, settings.text, settings.seed, settings.alpha) == ((1.0, -0.5), "at night", 7, 0.9)
    # What the page was started with counts for every request.
    assert (settings.model, settings.lora, settings.sampler, settings.fit) == (
        "fake",
        ("a.safetensors",),
        "euler",
        "pad",
    )
    assert settings.output_dir == service.folder.place(ticket.name)
    told = service.tell(ticket)
    assert (told["state"], told["done"], told["notes"], told["pictures"]) == ("done", 1.0, ["a note"], [])
    assert json.loads(json.dumps(told)) == told


def test_a_bad_picture_among_many_is_told_and_the_others_go_on(fake: tuple[Service, Fake]) -> None:
    service, behind = fake
    files = [(f"{number}.png", png(number)) for number in range(7)]
    ticket = take(service, "vary", [*files[:3], ("bad.png", png()[:200]), *files[3:]], num_images=1)
    until(lambda: ticket.job.ended)
    assert [path.name for path in behind.ran[0][1].pictures] == [name for name, _ in files]
    (failure,) = service.tell(ticket)["failures"]
    assert failure["input"] == "bad.png"
    assert failure["error"].startswith("bad.png: found a damaged PNG file")
    for function, values in (("mix", {}), ("edit", {"text": "a"})):
        with pytest.raises(InputError, match=r"notes\.txt: found an unknown kind of file"):
            take(service, function, [*files[: function == "mix"], ("notes.txt", b"words")], **values)
    with pytest.raises(InputError, match="found an empty file"):
        take(service, "vary", [("a.png", b"")])


# Folders.


def test_names_of_uploads_stay_in_their_folder(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    name = folder.new()
    titles = [
        "../../evil.png",
        "/etc/passwd",
        "C:\\x\\page.html",
        "a.svg",
        "a.svg",
        "\x00",
        "x" * 300 + ".jpg",
        "é.png",
    ]
    paths, failures = folder.receive(name, [(title, png()) for title in titles])
    assert failures == []
    assert {path.parent for path in paths} == {tmp_path / name / "inputs"}
    # By content: what a browser would run is no picture's ending.
    assert {path.suffix for path in paths} == {".png"}
    assert [path.stem for path in paths][:5] == ["evil", "passwd", "page", "a", "a-2"]
    assert sorted((tmp_path / name / "inputs").iterdir()) == sorted(paths)


def test_files_of_other_places_are_not_found(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(b"secret")
    folder = Folder(tmp_path / "requests")
    name = folder.new()
    (path,), _ = folder.receive(name, [("a.png", png())])
    assert folder.find(name, "inputs/a.png") == path
    for file in (
        "../../secret.png",
        "inputs/../../../secret.png",
        str(tmp_path / "secret.png"),
        "",
        ".",
        "inputs",
        "b.png",
    ):
        assert folder.find(name, file) is None
    for other in ("..", "", "x", "../requests/" + name):
        assert folder.find(other, "inputs/a.png") is None


def test_the_oldest_requests_are_removed(fake: tuple[Service, Fake]) -> None:
    service, _ = fake
    tickets = []
    for seed in range(5):
        tickets.append(take(service, "vary", [("a.png", png(seed))]))
        until(lambda: tickets[-1].job.ended)
    assert [service.find(ticket.name) is not None for ticket in tickets] == [False, False, True, True, True]
    assert sorted(path.name for path in service.folder.root.iterdir()) == sorted(each.name for each in tickets[2:])
    assert service.picture(tickets[0].name, "inputs/a.png") is None
    assert [ticket.number for ticket in tickets] == [1, 2, 3, 4, 5]


def test_half_a_line_of_a_manifest_is_not_read(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    name = folder.new()
    assert folder.records(name) == []
    folder.place(name).mkdir()
    lines = ['{"error": "bad", "input": "b.png"}', '{"file": "a-000.png"}', '{"file": "a-0']
    (folder.place(name) / "manifest.jsonl").write_text("\n".join(lines))
    assert folder.records(name) == [{"file": "a-000.png"}]


# What is typed.


@pytest.mark.parametrize(
    "command, settings",
    [
        ("vary", VarySettings(pictures=("a b.png", "c.png"))),
        ("vary", VarySettings(pictures=("-a.png",), seed=7, steps=20, negative_prompt="-red", batch_size=1)),
        ("vary", VarySettings(pictures=("a.png",), lora=("x.safetensors", "y"), lora_scale=(0.5, -1.0), karras=True)),
        ("vary", VarySettings(pictures=("a.png",), guidance_interval=(0.2, 0.8), clip="folder", height=64, width=80)),
        ("edit", EditSettings(picture="it's.png", text='"quoted"\n$HOME `x`', alpha=-0.25, guidance_scale=0.0)),
        ("edit", EditSettings(picture="a.png", text="--alpha", alpha=1.0)),
        ("mix", MixSettings(pictures=("a.png", "b.png"), weights=(1.0, -0.5), text="-", negative_prompt="")),
        ("mix", MixSettings(pictures=("a.png", "b.png"), weights=(-1.0, 2.5))),
        ("text", TextSettings(texts=("a cat",), prompt_weights=True, safety="off")),
    ],
)
def test_the_command_means_the_same_settings(command: str, settings: Any) -> None:
    typed = shlex.split(as_typed(command, settings.model_copy(update={"output_dir": Path("x"), "quiet": True})))
    assert typed[0] == "sdipc"
    assert cli._parse(typed[1:]) == (command, settings)


def test_settings_that_are_as_they_were_are_not_typed() -> None:
    assert as_typed("vary", VarySettings(pictures=("a.png",), seed=0)) == "sdipc vary a.png"


# The guard.


def ask(
    guard: Guard, *, method: str = "POST", body: list[bytes] | None = None, pause: float = 0.0, **headers: str
) -> tuple[int, dict[bytes, bytes], bytes]:
    """One request through the guard."""
    sent: list[Any] = []
    parts = [b""] if body is None else list(body)

    async def receive() -> Any:
        await asyncio.sleep(pause)
        if not parts:
            return {"type": "http.disconnect"}
        part = parts.pop(0)
        return {"type": "http.request", "body": part, "more_body": bool(parts)}

    async def send(message: Any) -> None:
        sent.append(message)

    names = {"host": "localhost:7860"} | {name.replace("_", "-"): value for name, value in headers.items()}
    raw = [(name.encode(), value.encode()) for name, value in names.items()]
    asyncio.run(guard({"type": "http", "method": method, "path": "/", "headers": raw}, receive, send))
    return sent[0]["status"], dict(sent[0]["headers"]), b"".join(each.get("body", b"") for each in sent[1:])


async def application(scope: Any, receive: Any, send: Any) -> None:
    """Says how much it was given, and takes any trouble for a bug of its own."""
    size = 0
    try:
        while True:
            message = await receive()
            size += len(message["body"])
            if not message["more_body"]:
                break
    except Exception:
        await send({"type": "http.response.start", "status": 500, "headers": []})
        await send({"type": "http.response.body", "body": b"a bug"})
        raise
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": str(size).encode()})


GUARD = Guard(application, frozenset({"localhost", "127.0.0.1", "[::1]"}), max_body=100, seconds=0.2)


def test_the_guard_lets_through_what_may_come() -> None:
    status, headers, body = ask(
        GUARD, body=[b"a" * 60, b"b" * 40], content_length="100", origin="http://localhost:7860"
    )
    assert (status, body) == (200, b"100")
    assert headers[b"x-content-type-options"] == b"nosniff"
    assert b"default-src 'self'" in headers[b"content-security-policy"]
    assert b"http" not in headers[b"content-security-policy"]


@pytest.mark.parametrize(
    "expected, options",
    [
        (413, {"content_length": "1000000000"}),
        (413, {"content_length": "-1"}),
        (413, {"body": [b"a" * 60, b"b" * 60]}),
        (408, {"body": [b"a", b"b", b"c"], "pause": 0.15}),
        (415, {"content_encoding": "gzip"}),
        (421, {"host": "rebound.example"}),
        (403, {"origin": "https://elsewhere.example"}),
        (403, {"origin": "null"}),
    ],
)
def test_the_guard_refuses(expected: int, options: dict[str, Any]) -> None:
    status, headers, body = ask(GUARD, **options)
    assert status == expected
    assert headers[b"connection"] == b"close"
    assert json.loads(body)["error"].startswith("found ")


def test_anybody_may_ask_a_page_that_answers_everybody() -> None:
    anyone = Guard(application, None)
    assert ask(anyone, host="gpu-box.example:80")[0] == 200
    assert ask(anyone, host="gpu-box.example", origin="http://gpu-box.example")[0] == 200
    assert ask(anyone, host="gpu-box.example", origin="http://elsewhere.example")[0] == 403


# The commands.


def test_without_the_extra_the_page_says_what_it_needs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert cli.main(["page"]) == 2
    assert (
        capsys.readouterr().err == "sdipc: page needs the package gradio, found none: pip install 'sdipc-jax[page]'\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_memory_that_runs_out_is_tried_again_with_half(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[tuple[int, bool]] = []

    def vary(settings: VarySettings, report: Any, opening: Any) -> Any:
        tried.append((settings.batch_size, settings.overwrite))
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory" if settings.seed == 0 else "INTERNAL: x")

    monkeypatch.setitem(page_command._RUN, "vary", vary)
    run = Runner(Kept.__new__(Kept))
    with pytest.raises(MemoryError, match="the device has no memory left for that"):
        run("vary", VarySettings(pictures=("a.png",), batch_size=4), lambda done: None)
    assert tried == [(4, False), (2, True)]
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        run("vary", VarySettings(pictures=("a.png",), seed=1), lambda done: None)
    assert len(tried) == 3


def test_no_more_than_a_few_programs_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    cleared: list[int] = []
    ran: list[int] = []

    class Result:
        def to_json(self) -> dict[str, Any]:
            return {}

    def vary(settings: VarySettings, report: Any, opening: Any) -> Result:
        ran.append(settings.steps or 0)
        return Result()

    monkeypatch.setitem(page_command._RUN, "vary", vary)
    monkeypatch.setattr(page_command, "forget_programs", lambda: cleared.append(len(ran)))
    run = Runner(Kept.__new__(Kept))
    for steps in [*range(1, 7), 1, 6, *range(7, 20)]:
        run("vary", VarySettings(pictures=("a.png",), steps=steps), lambda done: None)
    assert cleared == [8, 14, 20]


def test_sizes_are_a_few_of_as_many_pixels(tiny: Any) -> None:
    sizes = sizes_of(tiny.config, 32, 32)
    assert sizes[0] == (32, 32)
    assert len(sizes) == len(set(sizes)) <= 6
    for height, width in sizes:
        tiny.config.latent_shape(height, width)
        assert 0.6 < height * width / 32**2 < 1.6


def test_the_copied_command_makes_the_same_pictures(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compile_quickly: None
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = PageSettings(model=str(tiny_folder), steps=2)
    opening = Kept(settings)
    opening.read()
    queue = Queue()
    service = Service(
        commands_of(opening, settings, {"mesh": "data=1"}), settings, queue, Folder(tmp_path / "requests")
    )
    files = [("a.png", png(0)), ("b.png", png(1))]
    tickets = [
        take(service, "vary", files, num_images=1, seed=3),
        take(service, "edit", files[:1], num_images=1, text="-at night", alpha=-0.5),
        take(service, "mix", files, num_images=1, weights=[1, -0.25], text="it's", negative_prompt="red"),
        take(service, "text", [], num_images=1, text="a cat"),
        take(service, "edit", files[:1], num_images=1, text="word " * 100),
    ]
    worker = threading.Thread(target=queue.work, daemon=True)
    worker.start()
    try:
        until(lambda: all(ticket.job.ended for ticket in tickets), 300)
    finally:
        queue.close()
        worker.join(300)
    assert [ticket.job.state for ticket in tickets] == ["done"] * 4 + ["failed"]
    # In the words of the command line, and without a word of where things are.
    assert str(tickets[4].job.error).startswith("the prompt has 400 tokens, expected at most 18")
    for ticket in tickets[:4]:
        command = shlex.split(ticket.command)
        output = tmp_path / ticket.function
        options = [*command[1:2], "--mesh", "data=1", "--quiet", "--output-dir", str(output), *command[2:]]
        assert cli.main(options) == 0
        made = [service.folder.place(ticket.name) / each["file"] for each in service.folder.records(ticket.name)]
        assert made
        for path in made:
            with Image.open(path) as ours, Image.open(output / path.name) as theirs:
                assert np.array_equal(np.asarray(ours), np.asarray(theirs))


# What is shown.


def test_names_are_text_on_the_page() -> None:
    record = {"file": "x.png", "index": 0, "seed": 0, "input": "<b>.png", "settings": {"height": 64, "width": 64}}
    ticket = Ticket("name", 1, "vary", "sdipc vary '<script>'", ("inputs/<script>.png",), (), Job(lambda report: {}))
    told = {
        "state": "failed",
        "error": "<script>",
        "pictures": [{"url": "/x", "record": record}],
        "notes": ["<script>"],
    }
    told |= {"failures": [{"error": "<script>"}], "done": 0.0, "ahead": 0}
    shown = [markup.progress(told), markup.results(ticket, told), markup.header("<script>", ["<script>"])]
    entries = markup.entries(ticket, told)
    shown += [markup.beside(entries[0], entries[1]), markup.alert("<script>")]
    assert all("<script" not in each for each in shown)
    assert "/api/requests/name/inputs/%3Cscript%3E.png" in shown[1]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_request_is_described(name: str) -> None:
    schema = FUNCTIONS[name].request.model_json_schema()
    assert schema["additionalProperties"] is False
    assert all(field.get("description") for field in schema["properties"].values())

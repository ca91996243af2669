"""What the page's server must withstand, with something quick behind it."""

import contextlib
import gzip
import io
import json
import shlex
import signal
import socket
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from sdipc_jax.page.web import server
from tests.page.processes import ROOT, Page, post, quick
from tests.test_documents import blocks

CURLS = [
    line for block in blocks(ROOT / "docs/page.md", "text") for line in block.splitlines() if line.startswith("curl")
]


def png(seed: int = 0) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 20, 3), np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """One whose requests take 0.2 seconds."""
    with quick(tmp_path_factory.mktemp("page")) as page:
        yield page
        page.process.send_signal(signal.SIGTERM)
        assert page.process.wait(30) == 0


def test_a_request_is_answered_with_pictures_and_their_command(page: Page) -> None:
    answer = page.post("vary", ("../giraffe.png", png()), num_images=2, seed=7).json()
    assert (answer["state"], answer["done"], answer["failures"]) == ("done", 1.0, [])
    assert answer["command"].endswith("/inputs/giraffe.png --seed 7 --num-images 2 --batch-size 1")
    assert [each["record"]["index"] for each in answer["pictures"]] == [0, 1]
    assert answer["notes"] == ["giraffe.png: seen"]
    picture = page.get(answer["pictures"][0]["url"])
    assert picture.headers["content-type"] == "image/png"
    assert Image.open(io.BytesIO(picture.content)).getpixel((0, 0)) == (7, 7, 7)
    assert page.get(f"/api/requests/{answer['id']}/inputs/giraffe.png").content == png()


@pytest.mark.parametrize("line", CURLS)
def test_requests_in_the_docs_are_answered(page: Page, tmp_path: Path, line: str) -> None:
    (tmp_path / "examples").mkdir()
    for name in ("examples/giraffe.png", "photo.jpg", "a.jpg", "b.jpg"):
        (tmp_path / name).write_bytes(png())
    words = shlex.split(line.replace("http://127.0.0.1:7860", page.url))
    answer = subprocess.run([*words, "--silent"], cwd=tmp_path, stdout=subprocess.PIPE, check=True)
    assert json.loads(answer.stdout)["state"] == "done"


def test_whoever_does_not_wait_looks_later_or_cancels(page: Page) -> None:
    first = httpx.post(f"{page.url}/api/text?wait=false", files={"settings": (None, '{"text": "a"}')})
    assert first.status_code == 202
    assert first.json()["state"] in ("waiting", "running")
    place = first.headers["location"]
    wait_until(lambda: page.get(place).json()["state"] == "done")
    second = httpx.post(
        f"{page.url}/api/text?wait=false", files={"settings": (None, '{"text": "a", "num_images": 16}')}
    )
    other = second.headers["location"]
    assert httpx.delete(page.url + other).status_code == 200
    wait_until(lambda: page.get(other).json()["state"] == "cancelled")
    assert httpx.delete(page.url + "/api/requests/nobody").status_code == 404


WRONG: list[tuple[str, str, str]] = [
    ("edit", '{"text": "a", "alpha": NaN}', "alpha is nan"),
    ("edit", '{"text": "a", "alpha": 1e9}', "alpha is 1000000000.0"),
    ("edit", '{"text": "a", "alpha": -1e9}', "alpha is -1000000000.0"),
    ("vary", '{"steps": 0}', "steps is 0"),
    ("vary", '{"steps": 1000000}', "steps is 1000000"),
    ("vary", '{"height": 0, "width": 64}', "height is 0"),
    ("vary", '{"height": 513, "width": 64}', "height and width are 513x64"),
    ("vary", '{"height": 100000, "width": 64}', "height is 100000"),
    ("vary", '{"seed": -1}', "seed is -1"),
    ("vary", '{"seed": 18446744073709551616}', "seed is 18446744073709551616"),
    ("vary", '{"num_images": 1000}', "num_images is 1000"),
    ("edit", json.dumps({"text": "a" * 10_000}), "text is 'aaa"),
    ("edit", json.dumps({"text": "a" * 10**6}), "found a form that will not do (Part exceeded maximum size"),
    ("edit", '{"text": "a\\u0000"}', "text is 'a\\x00', expected no control characters"),
    ("edit", '{"text": ""}', "found no text"),
    ("vary", '{"colour": "red"}', "colour is not a setting"),
    ("vary", '{"url": "http://169.254.169.254/"}', "url is not a setting"),
    ("vary", "[1]", "settings is no JSON object"),
    ("vary", "[" * 60_000, "settings is no JSON object"),
]


# Row 50.
@pytest.mark.parametrize("function, settings, expected", WRONG)
def test_a_request_that_is_wrong_is_refused_by_name(page: Page, function: str, settings: str, expected: str) -> None:
    files = {"pictures": ("a.png", png())}
    answer = httpx.post(f"{page.url}/api/{function}", files=files, data={"settings": settings})
    assert answer.status_code == 422
    assert answer.json()["error"].startswith(expected)


def test_bodies_that_are_no_form_are_refused(page: Page) -> None:
    for body, kind in (("{}", "application/json"), ("x", "multipart/form-data; boundary=b"), ("", "text/plain")):
        answer = httpx.post(f"{page.url}/api/vary", content=body, headers={"content-type": kind})
        assert answer.status_code == 422
        assert answer.json()["error"]
    answer = httpx.post(f"{page.url}/api/vary", files={"picture": ("a.png", png())})
    assert answer.json()["error"].startswith("found the field 'picture', expected the files pictures and settings")
    assert httpx.post(f"{page.url}/api/tune").status_code in (404, 405)


# Row 51.
def test_of_two_hundred_at_once_the_queue_is_served_and_the_rest_told_at_once(tmp_path: Path) -> None:
    with quick(tmp_path) as page, ThreadPoolExecutor(200) as pool:

        def ask(number: int) -> tuple[int, float, httpx.Response]:
            began = time.monotonic()
            answer = post(page.url, "text", text="a", seed=number, num_images=1)
            return number, time.monotonic() - began, answer

        answers = list(pool.map(ask, range(200)))
        served = [each for each in answers if each[2].status_code == 200]
        refused = [each for each in answers if each[2].status_code == 429]
        assert len(served) + len(refused) == 200
        assert 16 <= len(served) <= 40
        for number, _, answer in served:
            (picture,) = answer.json()["pictures"]
            assert picture["record"]["seed"] == number
        assert all(int(answer.headers["retry-after"]) >= 1 for _, _, answer in refused)
        assert all(answer.json()["error"].startswith("busy: ") for _, _, answer in refused)


# Row 51.
def test_a_full_queue_says_so_at_once(tmp_path: Path) -> None:
    with quick(tmp_path, 60.0) as page, ThreadPoolExecutor(17) as pool:
        waiting = [pool.submit(post, page.url, "text", text="a") for _ in range(17)]
        wait_until(lambda: page.get("/ready").json()["state"] == "busy")
        times = []
        for _ in range(20):
            began = time.monotonic()
            assert post(page.url, "text", text="a").status_code == 429
            times.append(time.monotonic() - began)
        assert statistics.median(times) < 0.1
        page.process.kill()
        for each in waiting:
            assert isinstance(each.exception(), httpx.HTTPError)


# Row 52.
def test_whoever_goes_away_costs_no_work(tmp_path: Path) -> None:
    with quick(tmp_path, 1.0) as page:
        form = b'--b\r\nContent-Disposition: form-data; name="settings"\r\n\r\n{"text": "a"}\r\n--b--\r\n'
        head = f"POST /api/text HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(form)}\r\n"
        head += "Content-Type: multipart/form-data; boundary=b\r\n\r\n"
        for _ in range(50):
            with socket.create_connection(("127.0.0.1", page.port)) as connection:
                connection.sendall(head.encode() + form)
                time.sleep(0.01)
        wait_until(lambda: not (told := page.get("/ready").json())["waiting"] and not told["running"])
        # Fifty of a second each would take longer; none that did not begin has left a picture.
        began = time.monotonic()
        assert post(page.url, "text", text="a", num_images=1).status_code == 200
        assert time.monotonic() - began < 5
        made = list((tmp_path / "requests").glob("*/manifest.jsonl"))
        assert len(made) < 10


# Row 52.
def test_slow_and_huge_bodies_do_not_keep_others_waiting(page: Page) -> None:
    def times() -> float:
        found = []
        for _ in range(20):
            began = time.monotonic()
            assert post(page.url, "text", text="a", num_images=1).status_code == 200
            found.append(time.monotonic() - began)
        return sorted(found)[18]

    alone = times()
    slow = [socket.create_connection(("127.0.0.1", page.port)) for _ in range(100)]
    for connection in slow:
        connection.sendall(b"POST /api/vary HTTP/1.1\r\nHost: 127")
    stop = threading.Event()

    def trickle() -> None:
        while not stop.wait(0.2):
            for connection in slow:
                try:
                    connection.sendall(b".")
                except OSError:
                    return

    thread = threading.Thread(target=trickle)
    thread.start()
    try:
        assert times() < 2 * alone
    finally:
        stop.set()
        thread.join()
        for connection in slow:
            connection.close()


def raw(page: Page, head: str, body: bytes = b"") -> str:
    """What the server answers, and that it closes the connection."""
    with socket.create_connection(("127.0.0.1", page.port), timeout=30) as connection:
        connection.sendall(head.replace("\n", "\r\n").encode() + body)
        return b"".join(iter(lambda: connection.recv(65536), b"")).decode()


# Row 52.
def test_bodies_beyond_the_limit_are_refused_before_they_come(page: Page) -> None:
    head = "POST /api/vary HTTP/1.1\nHost: 127.0.0.1\nContent-Type: multipart/form-data; boundary=b\n"
    answer = raw(page, head + "Content-Length: 1000000000\n\n")
    assert answer.startswith("HTTP/1.1 413")
    assert "found more than 20 MB" in answer
    # Without a length: as soon as it is too much, and for whatever takes a body.
    chunk = b"100000\r\n" + b"a" * 0x100000 + b"\r\n"
    for path in ("/api/vary", "/gradio_api/upload", "/gradio_api/queue/join"):
        head = f"POST {path} HTTP/1.1\nHost: 127.0.0.1\nContent-Type: multipart/form-data; boundary=b\n"
        start = b'--b\r\nContent-Disposition: form-data; name="pictures"; filename="a"\r\n\r\n'
        chunks = b"%x\r\n%s\r\n" % (len(start), start) + chunk * 20
        memory = page.memory
        answer = raw(page, head + "Transfer-Encoding: chunked\n\n", chunks)
        assert answer.startswith(("HTTP/1.1 413", "HTTP/1.1 415", "HTTP/1.1 422", "HTTP/1.1 400")), path
        assert page.memory < memory + 60_000_000


# Row 52.
def test_many_parts_and_packed_bodies_are_refused(page: Page) -> None:
    part = b'--b\r\nContent-Disposition: form-data; name="pictures"; filename="a.png"\r\n\r\nx\r\n'
    kind = {"content-type": "multipart/form-data; boundary=b"}
    answer = httpx.post(f"{page.url}/api/vary", content=part * 10_000 + b"--b--\r\n", headers=kind)
    assert answer.status_code == 422
    assert "Too many files" in answer.json()["error"]
    bomb = gzip.compress(bytes(100_000_000), 9)
    answer = httpx.post(f"{page.url}/api/vary", content=bomb, headers=kind | {"content-encoding": "gzip"})
    assert answer.status_code == 415


# Row 53.
def test_a_bad_picture_among_eight_is_told_and_the_others_are_made(page: Page) -> None:
    pictures = [(f"{number}.png", png(number)) for number in range(8)]
    pictures[3] = ("broken.png", png()[:100])
    answer = page.post("vary", *pictures, num_images=1)
    assert answer.status_code == 200
    (failure,) = answer.json()["failures"]
    assert failure["error"].startswith("broken.png: found a damaged PNG file")
    assert page.post("mix", *pictures).status_code == 422
    assert page.post("vary", *pictures, ("ninth.png", png())).status_code == 422


# Row 54.
def test_sizes_that_are_not_offered_are_refused(page: Page) -> None:
    answers = [page.post("text", text="a", height=8 * side, width=64) for side in range(1, 51)]
    assert [answer.status_code for answer in answers] == [200 if side == 8 else 422 for side in range(1, 51)]


@pytest.fixture
def canary() -> Iterator[tuple[str, list[bytes]]]:
    """An address on this machine, and what it was asked."""
    asked: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.2)
        stop = threading.Event()

        def listen() -> None:
            while not stop.is_set():
                with contextlib.suppress(TimeoutError):
                    connection, _ = listener.accept()
                    with connection:
                        asked.append(connection.recv(100))

        thread = threading.Thread(target=listen)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/a.png", asked
        finally:
            stop.set()
            thread.join()


# Row 55.
def test_addresses_are_not_fetched(page: Page, canary: tuple[str, list[bytes]]) -> None:
    local, asked = canary
    config = page.get("/config").json()
    gallery = next(each["id"] for each in config["components"] if each["props"].get("elem_id") == "pictures")
    make = next(each for each in config["dependencies"] if gallery in each["inputs"])
    values = {each["id"]: each["props"].get("value") for each in config["components"]}
    for number, address in enumerate((local, "http://169.254.169.254/latest", "file:///etc/passwd", "/etc/passwd")):
        for path in (address, "x.png"):
            picture = {"image": {"path": path, "url": address, "meta": {"_type": "gradio.FileData"}}, "caption": None}
            data = [[picture] if each == gallery else values[each] for each in make["inputs"]]
            session = f"{number}{path}"
            body = {"session_hash": session, "fn_index": make["id"], "data": data}
            assert httpx.post(f"{page.url}/gradio_api/queue/join", json=body).status_code == 200
            query = {"session_hash": session}
            with httpx.stream("GET", f"{page.url}/gradio_api/queue/data", params=query, timeout=30) as stream:
                line = next(line for line in stream.iter_lines() if "process_completed" in line)
            assert json.loads(line.removeprefix("data: "))["success"] is False, (address, path)
    for name in ("/etc/passwd", "file:///etc/passwd", local, f"{Path.cwd()}/pyproject.toml", "../../../etc/passwd"):
        assert page.get(f"/gradio_api/file={name}").status_code in (403, 404), name
        assert page.get(f"/gradio_api/proxy={name}").status_code in (400, 403, 404, 422), name
        assert page.get(f"/api/requests/x/{name}").status_code == 404
    assert asked == []


# Row 56.
def test_what_fails_on_the_device_leaves_the_server_healthy(page: Page) -> None:
    answer = page.post("text", text="memory")
    assert answer.status_code == 507
    assert answer.json()["error"].startswith("the device has no memory left for that")
    answer = page.post("text", text="bug")
    assert answer.status_code == 500
    assert "on purpose" not in answer.text
    assert "RuntimeError: a bug on purpose" in "".join(page.lines)
    assert (page.get("/health").status_code, page.get("/ready").json()["state"]) == (200, "ready")
    assert page.post("text", text="a", num_images=1).status_code == 200


# Row 56.
def test_a_page_that_loads_or_is_full_is_alive_and_not_ready(tmp_path: Path) -> None:
    with quick(tmp_path, 3.0) as page, ThreadPoolExecutor(20) as pool:
        answers = [pool.submit(post, page.url, "text", text="a", num_images=1) for _ in range(17)]
        wait_until(lambda: page.get("/ready").json()["state"] == "busy")
        assert page.get("/ready").status_code == 503
        assert page.get("/health").status_code == 200
        page.process.send_signal(signal.SIGTERM)
        assert sorted(answer.result().status_code for answer in answers) == [200] + [503] * 16
        assert page.process.wait(30) == 0


# Row 57.
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_what_runs_is_finished_and_what_waits_is_told(tmp_path: Path, number: int) -> None:
    with quick(tmp_path, 2.0) as page, ThreadPoolExecutor(20) as pool:
        answers = [pool.submit(post, page.url, "text", text="a", num_images=1) for _ in range(11)]
        wait_until(lambda: page.get("/ready").json()["waiting"] >= 10)
        page.process.send_signal(number)
        assert page.process.wait(30) == 0
        found = [answer.result() for answer in answers]
        assert sorted(answer.status_code for answer in found) == [200] + [503] * 10
        for answer in found:
            if answer.status_code == 503:
                assert answer.json()["error"].startswith("the page is ending")
                assert int(answer.headers["retry-after"]) >= 1
        assert "Traceback" not in "".join(page.lines)


# Row 57.
def test_what_hears_nothing_is_left_alone_in_time(tmp_path: Path) -> None:
    assert server.FINISH_SECONDS + server.STOP_SECONDS < 28
    with quick(tmp_path, finish="1") as page, ThreadPoolExecutor(2) as pool:
        answer = pool.submit(post, page.url, "text", text="deaf")
        wait_until(lambda: page.get("/ready").json()["running"])
        page.process.send_signal(signal.SIGTERM)
        assert page.process.wait(30) == 0
        assert answer.result().status_code == 503


def test_what_the_api_takes_is_described(page: Page) -> None:
    schema = page.get("/api/openapi.json").json()
    assert {"/api/vary", "/api/edit", "/api/mix", "/api/text", "/health", "/ready"} <= schema["paths"].keys()
    form = schema["paths"]["/api/mix"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert form["properties"]["settings"]["properties"].keys() == {
        *("num_images", "seed", "steps", "guidance_scale", "negative_prompt", "height", "width"),
        *("weights", "text", "alpha"),
    }
    # FastAPI's own pages would load scripts from elsewhere.
    assert page.get("/docs").status_code == page.get("/redoc").status_code == 404

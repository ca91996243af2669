"""Minutes of requests, good and bad, in any order: what grows, and what breaks."""

import json
import random
import signal
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx

from tests.page.processes import Page, post, quick
from tests.page.test_server import WRONG, png, wait_until

SECONDS = 180


# Row 51.
def test_memory_and_files_stay_as_they_are(tmp_path: Path) -> None:
    with quick(tmp_path, 0.0) as page, httpx.Client() as client:

        def ask(count: int) -> None:
            for number in range(count):
                files = {"pictures": ("a.png", png(number % 7))}
                settings = {"settings": json.dumps({"num_images": 1, "seed": number})}
                assert client.post(f"{page.url}/api/vary", files=files, data=settings).status_code == 200

        # As many as are kept come first.
        ask(250)
        memory, files = page.memory, page.files
        ask(1000)
        assert page.memory < 1.1 * memory
        assert page.files <= files + 2
        assert len(list((tmp_path / "requests").iterdir())) == 200


# Row 58.
def test_three_minutes_of_everything(tmp_path: Path) -> None:
    with quick(tmp_path, 0.02) as page:
        found, sizes = Counter[int](), list[tuple[int, int]]()
        began = time.monotonic()

        def visit(number: int) -> None:
            draw = random.Random(number)
            while time.monotonic() < began + SECONDS:
                found[one_of_many(page, draw)] += 1

        with ThreadPoolExecutor(5) as pool:
            visitors = [pool.submit(visit, number) for number in range(4)]
            # What is kept has come to its limits, and Python to the memory that it works with.
            for share in (0.4, 1.0):
                time.sleep(max(0.0, began + share * SECONDS - time.monotonic()))
                sizes.append((page.memory, page.files))
            for visitor in visitors:
                visitor.result()
        wait_until(lambda: page.get("/ready").json()["waiting"] == 0)
        (memory, files), (memory_after, _) = sizes
        print(f"{sum(found.values())} requests: {dict(found)}; {memory} then {memory_after} bytes, {files} files")
        assert memory_after < 1.05 * memory
        # When all have gone.
        time.sleep(6)
        assert page.files <= 1.05 * files
        assert found[200] > 100
        assert set(found) <= {0, 200, 404, 413, 415, 422, 429, 507}
        assert page.get("/health").status_code == 200
        assert "Traceback" not in "".join(page.lines)
        page.process.send_signal(signal.SIGTERM)
        assert page.process.wait(30) == 0


def one_of_many(page: Page, draw: random.Random) -> int:
    """One request of any kind; its status, or 0 for one that was not waited for."""
    kind = draw.randrange(8)
    try:
        if kind < 3:
            return post(
                page.url, "vary", ("a.png", png(draw.randrange(9))), num_images=draw.randrange(1, 4)
            ).status_code
        if kind == 3:
            function, settings, _ = draw.choice(WRONG)
            data = {"settings": settings}
            return httpx.post(f"{page.url}/api/{function}", files={"pictures": ("a", png())}, data=data).status_code
        if kind == 4:
            return post(page.url, "vary", ("a.png", draw.randbytes(draw.randrange(5000)))).status_code
        if kind == 5:
            return post(page.url, "text", text="memory").status_code
        if kind == 6:
            return httpx.get(page.url + draw.choice(("/", "/api/requests/x/y", "/config", "/health"))).status_code
        return httpx.post(f"{page.url}/api/text", files={"settings": (None, '{"text": "a"}')}, timeout=0.01).status_code
    except httpx.TimeoutException:
        return 0

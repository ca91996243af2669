"""The page's server as a process of its own, as a real one or with something quick behind it."""

import contextlib
import os
import queue
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx

ROOT = Path(__file__).parents[2]


class Page:
    """A server that runs.

    Attributes:
        url: where it is.
        lines: what it has said.
    """

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process, self.lines = process, list[str]()
        said: queue.Queue[str] = queue.Queue()

        def read() -> None:
            with contextlib.suppress(ValueError):  # Closed.
                for line in process.stderr or ():
                    self.lines.append(line)
                    said.put(line)

        threading.Thread(target=read, daemon=True).start()
        until = time.monotonic() + 120
        while (found := re.search(r"http://[\d.]+:\d+", said.get(timeout=until - time.monotonic()))) is None:
            pass
        self.url = found[0]
        self.port = int(self.url.rpartition(":")[2])

    def wait_until_ready(self) -> None:
        until = time.monotonic() + 120
        while self.get("/ready").status_code != 200:
            assert time.monotonic() < until
            time.sleep(0.1)

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, timeout=60)

    def post(self, function: str, *pictures: tuple[str, bytes], **settings: object) -> httpx.Response:
        """One request, waited for."""
        return post(self.url, function, *pictures, **settings)

    @property
    def memory(self) -> int:
        """Bytes in use."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.findall(r"VmRSS:\s+(\d+) kB", status)[0]) * 1024

    @property
    def files(self) -> int:
        """Open files and sockets."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))


def post(url: str, function: str, *pictures: tuple[str, bytes], **settings: object) -> httpx.Response:
    import json

    files: list[tuple[str, tuple[str, bytes]]] = [("pictures", picture) for picture in pictures]
    data = {"settings": json.dumps(settings)}
    # Also without pictures a form of several parts.
    parts = files or [("settings", (None, data.pop("settings").encode()))]  # type: ignore[list-item]
    return httpx.post(f"{url}/api/{function}", files=parts, data=data, timeout=120)


@contextlib.contextmanager
def running(*command: str) -> Iterator[Page]:
    """A server until the end of the block; what it says is on its stderr."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen([sys.executable, *command], stderr=subprocess.PIPE, text=True, env=environment, cwd=ROOT)
    try:
        yield Page(process)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        assert process.stderr is not None
        process.stderr.close()


@contextlib.contextmanager
def quick(folder: Path, seconds: float = 0.2, **options: str) -> Iterator[Page]:
    """A server with a model behind it that takes so many seconds for a request."""
    flags = [f"--{name}={value}" for name, value in options.items()]
    with running("-m", "tests.page.quick_server", str(folder), str(seconds), *flags) as page:
        page.wait_until_ready()
        yield page

"""The server on a thread of its own, beside the thread that owns the device, and how both end."""

import os
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from sdipc_jax.errors import InputError
from sdipc_jax.interruption import Interruption
from sdipc_jax.page.queue import ENDING, Queue
from sdipc_jax.page.service import Service

# Of the work that goes on when the page is asked to end: it may finish, then it is told to stop, then left alone.
FINISH_SECONDS = 20.0
STOP_SECONDS = 5.0
# In which whoever waits hears of it.
_GOODBYE_SECONDS = 0.5
_HEADER_SECONDS = 20.0
_MAX_CONNECTIONS = 500
_UPLOADS = "uploads"
# What this machine calls itself.
_HERE = {"127.0.0.1": "127.0.0.1", "localhost": "localhost", "::1": "[::1]"}


class _Impatient(H11Protocol):
    """Closes connections that do not come to a request."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.loop.call_later(_HEADER_SECONDS, self._close_if_nothing_came)

    def _close_if_nothing_came(self) -> None:
        if self.cycle is None:
            self.transport.close()


class Server:
    """Serves an ASGI application while the `with` block runs."""

    def __init__(self, application: Any, listener: socket.socket) -> None:
        self._listener = listener
        self._server = uvicorn.Server(
            uvicorn.Config(
                application,
                http=_Impatient,
                ws="none",
                log_level="error",
                access_log=False,
                server_header=False,
                proxy_headers=False,
                limit_concurrency=_MAX_CONNECTIONS,
                timeout_keep_alive=5,
                timeout_graceful_shutdown=2,
            )
        )
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [listener]}, name="server", daemon=True
        )

    def __enter__(self) -> "Server":
        self._thread.start()
        while not self._server.started and self._thread.is_alive():
            time.sleep(0.01)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(10)
        self._listener.close()


def serve(service: Service, listener: socket.socket, load: Callable[[], None]) -> None:
    """Answers requests until SIGTERM or SIGINT, with the device's work on this thread.

    Args:
        load: what has to be done before any work; the page is there meanwhile, and requests wait.
    """
    host = service.settings.host
    # Where others are answered, nobody knows what they call this machine.
    hosts = frozenset(_HERE.values()) if host in _HERE else None
    with _surroundings(service.folder.root.with_name(_UPLOADS)):
        # Gradio reads its surroundings when it is imported.
        from sdipc_jax.page.web.application import make_application

        _serve(Server(make_application(service, hosts), listener), service, load)


def _serve(server: Server, service: Service, load: Callable[[], None]) -> None:
    queue = service.queue
    with Interruption() as interruption, server:
        end_when(lambda: interruption.requested, queue)
        try:
            load()
            service.loaded = True
            queue.work()
        finally:
            queue.close()
            queue.over.set()
            time.sleep(_GOODBYE_SECONDS)


@contextmanager
def _surroundings(uploads: Path) -> Iterator[None]:
    """Where Gradio puts what is dropped on the page, until that is kept with its request; nothing of it stays."""
    shutil.rmtree(uploads, ignore_errors=True)
    # Nothing is told to anybody, and nothing asked for.
    os.environ |= {
        "GRADIO_TEMP_DIR": str(uploads.absolute()),
        "GRADIO_ANALYTICS_ENABLED": "False",
        "GRADIO_SHARE": "False",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    try:
        yield
    finally:
        shutil.rmtree(uploads, ignore_errors=True)


def bracketed(host: str) -> str:
    """An address as it stands in a URL."""
    return f"[{host}]" if ":" in host else host


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there.

    Raises:
        InputError: another program does, or there is no such address here.
    """
    try:
        kind, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(kind, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(1024)
        except OSError:
            listener.close()
            raise
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"cannot listen at {host} port {port}: {reason}, expected a free port of this machine: choose another "
            "--port, 0 for any, or another --host"
        ) from None
    return listener


def end_when(requested: Callable[[], bool], queue: Queue) -> None:
    """Ends the queue's work once that is requested, on a thread of its own.

    What is worked on may finish; then it is told to stop; and where something compiles or loads, and hears nothing, the
    process ends with exit status 0 all the same.
    """

    def watch() -> None:
        while not requested():
            if queue.over.wait(0.05):
                return
        queue.close()
        if queue.over.wait(FINISH_SECONDS):
            return
        running = queue.running
        if running is not None:
            queue.cancel(running, ENDING)
        if queue.over.wait(STOP_SECONDS):
            return
        if running is not None:
            running.end("cancelled", 503, ENDING)
        time.sleep(_GOODBYE_SECONDS)
        sys.stdout.flush()
        os._exit(0)

    threading.Thread(target=watch, name="end", daemon=True).start()

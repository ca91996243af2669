"""What stands before everything that a browser or a program can reach: limits of size and time, and of who asks."""

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

# Of a whole body: the largest upload, and what stands around it.
MAX_BODY = 20_000_000 + 100_000
BODY_SECONDS = 60.0
# Of what is too large, this much is read and thrown away: an answer to somebody who still sends gets lost.
_THROWN_AWAY = 5
_THROWING_SECONDS = 5.0
# Scripts and styles are Gradio's own, in its page; nothing comes from elsewhere, and nobody shows it in a frame.
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; media-src 'self' blob:; worker-src 'self' blob:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)
_HEADERS = [
    (b"content-security-policy", _POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
]


class _Ended(Exception):
    """The request goes no further: it is answered here."""


class Guard:
    """An ASGI application around another.

    Args:
        hosts: what requests may call this machine, so that no site reaches it under a name of its own; anything if
            None.
        seconds: in which a body has to come.
    """

    def __init__(
        self, app: App, hosts: frozenset[str] | None, max_body: int = MAX_BODY, seconds: float = BODY_SECONDS
    ) -> None:
        self.app, self.hosts, self.max_body, self.seconds = app, hosts, max_body, seconds

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            # Gradio's page needs no sockets.
            await send({"type": "websocket.close", "code": 1008})
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        refusal = self._refusal(scope["method"], headers)
        if refusal is not None:
            length = headers.get("content-length", "0")
            if length.isdecimal() and int(length) <= _THROWN_AWAY * self.max_body:
                await self._throw_away(receive)
            await _answer(send, *refusal)
            return
        await self._guarded(scope, receive, send)

    def _refusal(self, method: str, headers: dict[str, str]) -> tuple[int, str] | None:
        """What is wrong before anything of the body is read."""
        host = headers.get("host", "")
        if self.hosts is not None and _without_port(host) not in self.hosts:
            return 421, f"found the host {host!r}, expected {', '.join(sorted(self.hosts))}: start the page with --host"
        origin = headers.get("origin")
        if method not in ("GET", "HEAD") and origin is not None and origin.partition("://")[2] != host:
            return 403, f"found a request from {origin!r}, expected one of this page: open the page itself"
        if headers.get("content-encoding", "identity") != "identity":
            return 415, f"found a body in {headers['content-encoding']!r}, expected it as it is: do not compress it"
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > self.max_body:
            return 413, self._too_large
        return None

    @property
    def _too_large(self) -> str:
        return f"found more than {self.max_body // 10**6} MB, expected less at once: send fewer or smaller pictures"

    async def _guarded(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """The application, with what it receives counted and timed."""
        loop = asyncio.get_running_loop()
        until, received, whole, started = loop.time() + self.seconds, 0, False, False
        ended: list[tuple[int, str]] = []

        async def counted() -> Message:
            nonlocal received, whole
            if ended:
                return {"type": "http.disconnect"}
            if whole:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), max(0.0, until - loop.time()))
            except TimeoutError:
                ended.append((408, f"found no whole request after {self.seconds:g} seconds: send it again"))
                raise _Ended from None
            received += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if received > self.max_body:
                ended.append((413, self._too_large))
                raise _Ended
            return message

        async def with_headers(message: Message) -> None:
            nonlocal started
            if ended and not started:
                # Whatever the application makes of it, the answer is ours.
                return
            if message["type"] == "http.response.start":
                started = True
                message = {**message, "headers": [*message.get("headers", ()), *_HEADERS]}
            await send(message)

        try:
            await self.app(scope, counted, with_headers)
        except _Ended:
            pass
        except Exception:
            if not ended:
                raise
        if ended and not started:
            if ended[0][0] == 413:
                await self._throw_away(receive)
            await _answer(send, *ended[0])

    async def _throw_away(self, receive: Receive) -> None:
        """Reads the rest of a body, if it is not too much and comes in time."""
        size = 0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_THROWING_SECONDS):
                while size < _THROWN_AWAY * self.max_body:
                    message = await receive()
                    size += len(message.get("body", b""))
                    if not message.get("more_body", False):
                        return


async def _answer(send: Send, status: int, error: str) -> None:
    """An error, after which the connection is closed: more may be on its way."""
    body = json.dumps({"error": error}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(b"connection", b"close"), *_HEADERS]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _without_port(host: str) -> str:
    """A name or an address; one of IPv6 stays in its brackets.

    >>> _without_port("localhost:7860"), _without_port("[::1]:7860")
    ('localhost', '[::1]')
    """
    return host if host.endswith("]") else host.rpartition(":")[0] or host

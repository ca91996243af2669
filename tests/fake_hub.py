"""A hub on the loopback device, which answers as the real one does, or with one of its faults."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOSITORY = "org/name"


@dataclass
class FakeHub:
    """One repository at one commit.

    Attributes:
        files: contents by path.
        fault: what goes wrong, see `_Handler`.
        requests: what was asked for: method, path and the Range header.
    """

    files: dict[str, bytes]
    fault: str = ""
    url: str = ""
    requests: list[tuple[str, str, str]] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)

    def count(self, what: str) -> int:
        """How often this has happened before."""
        self.counts[what] = self.counts.get(what, 0) + 1
        return self.counts[what] - 1

    def fetched(self) -> set[str]:
        """Paths whose contents were sent."""
        marker = f"/{REPOSITORY}/resolve/{COMMIT}/"
        return {path.removeprefix(marker) for method, path, _ in self.requests if method == "GET" and marker in path}


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@contextmanager
def serve(hub: FakeHub) -> Iterator[FakeHub]:
    """Runs it on a port of its own."""
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer(self) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        hub.requests.append((self.command, path, self.headers.get("Range", "")))
        errors = {
            "missing": (404, "RepoNotFound"),
            "private": (401, "RepoNotFound"),
            "gated": (403, "GatedRepo"),
            "revision": (404, "RevisionNotFound"),
            "disabled": (403, "DisabledRepo"),
        }
        if hub.fault in errors and path != "/api/agent-harnesses":
            status, code = errors[hub.fault]
            message = "Access to this resource is disabled." if hub.fault == "disabled" else "no"
            return self._send(status, b"{}", {"X-Error-Code": code, "X-Error-Message": message})
        if hub.fault == "busy" or (
            hub.fault == "busy-once" and path.startswith("/api/models") and not hub.count("429")
        ):
            return self._send(429, b"{}", {"Retry-After": "0"})
        if hub.fault == "down" and path.startswith("/api/models"):
            return self._send(500, b"{}")
        if path in (f"/api/models/{REPOSITORY}", f"/api/models/{REPOSITORY}/revision/main"):
            return self._send_json({"id": REPOSITORY, "sha": COMMIT, "siblings": []})
        if path == f"/api/models/{REPOSITORY}/tree/{COMMIT}":
            return self._send_json([self._entry(name, data) for name, data in hub.files.items()])
        marker = f"/{REPOSITORY}/resolve/{COMMIT}/"
        if path.startswith(marker) and (name := path.removeprefix(marker)) in hub.files:
            return self._send_file(name, hub.files[name])
        if path.startswith("/elsewhere/"):
            return self._send_file(path.removeprefix("/elsewhere/"), hub.files[path.removeprefix("/elsewhere/")], True)
        return self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"})

    def _entry(self, name: str, data: bytes) -> dict[str, object]:
        entry: dict[str, object] = {"type": "file", "path": name, "size": len(data), "oid": digest(data)[:40]}
        if name.endswith((".safetensors", ".bin")):
            entry["lfs"] = {"oid": digest(data), "size": len(data), "pointerSize": 130}
        return entry

    def _send_file(self, name: str, data: bytes, redirected: bool = False) -> None:
        hub = self.hub
        large = name.endswith(".safetensors")
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{digest(data) if large else digest(data)[:40]}"'}
        if hub.fault == "no-commit":
            del headers["X-Repo-Commit"]
        if hub.fault == "redirect" and large and not redirected:
            headers |= {"X-Linked-Size": str(len(data)), "X-Linked-Etag": headers["ETag"]}
            return self._send(302, b"", headers | {"Location": f"{hub.url}/elsewhere/{name}"})
        body, status = data, 200
        if large and hub.fault == "checksum":
            body = bytes(len(data))
        if large and hub.fault == "size":
            body = data[:-1]
        wanted = self.headers.get("Range", "")
        if wanted.startswith("bytes=") and wanted.endswith("-"):
            first = int(wanted.removeprefix("bytes=").removesuffix("-"))
            headers["Content-Range"] = f"bytes {first}-{len(body) - 1}/{len(body)}"
            body, status = body[first:], 206
        if self.command == "GET" and large and hub.fault == "cut" and not hub.count(name):
            self.send_response(status)
            for key, value in (headers | {"Content-Length": str(len(body))}).items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            self.close_connection = True
            return None
        return self._send(status, body, headers)

    def _send_json(self, values: object) -> None:
        self._send(200, json.dumps(values).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

"""The HTTP API: the page's functions for programs. docs/page.md has it in words."""

import asyncio
import json
from importlib import metadata
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import FileResponse, JSONResponse
from starlette.formparsers import MultiPartException, MultiPartParser

from sdipc_jax.errors import InputError
from sdipc_jax.page.folder import MAX_BYTES
from sdipc_jax.page.queue import ENDING, Refused
from sdipc_jax.page.requests import FUNCTIONS, MAX_PICTURES, Function
from sdipc_jax.page.service import Service, Ticket

_FILES, _SETTINGS = "pictures", "settings"
_SECONDS_BETWEEN_LOOKS = 0.05
# Texts of settings: a prompt of the longest kind, twice, and numbers.
_MAX_SETTINGS = 64 * 1024
_RESULT = {
    "type": "object",
    "properties": {
        "id": {"type": "string"},
        "function": {"type": "string"},
        "state": {"enum": ["waiting", "running", "done", "failed", "cancelled", "refused"]},
        "ahead": {"type": "integer", "description": "Requests that come first, while it waits."},
        "done": {"type": "number", "description": "The share of the work, 0 to 1."},
        "error": {"type": ["string", "null"], "description": "Why there is nothing, in one line."},
        "command": {"type": "string", "description": "What makes the same pictures on the command line."},
        "pictures": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "url": {"type": "string"},
                    "record": {"type": "object", "description": "All that made it, as in manifest.jsonl."},
                },
            },
        },
        "failures": {"type": "array", "items": {"type": "object"}, "description": "Files that cannot be used."},
        "notes": {"type": "array", "items": {"type": "string"}},
    },
}
_ERROR = {"type": "object", "properties": {"error": {"type": "string"}}}
_REFUSALS = {
    413: "more than 20 MB at once",
    422: "a setting or a file that will not do: `error` begins with its name",
    429: "the queue is full; `Retry-After` has the seconds",
    503: "the page is ending, or did before the request began; `Retry-After` has the seconds",
}


def make_api(service: Service) -> FastAPI:
    """The application, without limits of size and time: `guard.Guard` has them."""
    # FastAPI's own pages load scripts from elsewhere.
    api = FastAPI(
        title="sdipc page",
        version=metadata.version("sdipc-jax"),
        docs_url=None,
        redoc_url=None,
        openapi_url="/api/openapi.json",
    )
    for function in FUNCTIONS.values():
        _add(api, service, function)

    @api.get(
        "/health",
        summary="Whether the page is alive: 200, also while the checkpoint is loaded or all places are taken.",
    )
    async def health() -> dict[str, str]:
        return {"state": "alive"}

    @api.get("/ready", summary="Whether a request would be taken and begun: 200 or 503.")
    async def ready() -> JSONResponse:
        queue = service.queue
        state = (
            "ending" if queue.closed else "loading" if not service.loaded else "busy" if not queue.has_room else "ready"
        )
        told = {"state": state, "waiting": queue.waiting, "running": queue.running is not None}
        return JSONResponse(told, 200 if state == "ready" else 503)

    @api.get("/api/requests/{name}", summary="A request, its progress and its pictures so far.")
    async def look(name: str) -> JSONResponse:
        ticket = service.find(name)
        return _missing(name) if ticket is None else JSONResponse(service.tell(ticket))

    @api.delete("/api/requests/{name}", summary="Nobody waits for it any more: it does not begin, or stops.")
    async def cancel(name: str) -> JSONResponse:
        ticket = service.find(name)
        if ticket is None:
            return _missing(name)
        service.queue.cancel(ticket.job)
        return JSONResponse(service.tell(ticket))

    @api.get("/api/requests/{name}/{file:path}", summary="A picture of a request: a result, an input, or sheet.png.")
    async def picture(name: str, file: str) -> Response:
        path = await asyncio.to_thread(service.picture, name, file)
        # Names that nobody guesses, and contents that never change.
        return (
            _missing(file) if path is None else FileResponse(path, headers={"cache-control": "private, max-age=3600"})
        )

    return api


def _add(api: FastAPI, service: Service, function: Function) -> None:
    """The route of one function."""

    async def ask(request: Request, wait: bool = True) -> JSONResponse:
        try:
            with service.queue.place() as put:
                files, values = await _read(request, function)
                ticket = await asyncio.to_thread(service.take, put, function.name, files, values)
        except Refused as refused:
            await _drain(request)
            status = 503 if service.queue.closed else 429
            return JSONResponse({"error": str(refused)}, status, headers={"retry-after": str(refused.seconds)})
        except InputError as error:
            return JSONResponse({"error": str(error)}, 422)
        if not wait:
            return JSONResponse(service.tell(ticket), 202, headers={"location": f"/api/requests/{ticket.name}"})
        return await _wait(service, ticket, request)

    summary = (function.request.__doc__ or "").splitlines()[0]
    schema = {
        "type": "object",
        "additionalProperties": False,
        "properties": {
            _FILES: {
                "type": "array",
                "minItems": function.pictures[0],
                "maxItems": function.pictures[1],
                "items": {"type": "string", "format": "binary"},
                "description": "JPEG, PNG, WebP, GIF, BMP or AVIF files, 20 MB in all.",
            },
            _SETTINGS: function.request.model_json_schema(),
        },
    }
    extra = {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}
    told = {"content": {"application/json": {"schema": _RESULT}}}
    refusals: dict[int | str, dict[str, Any]] = {
        status: {"description": text, "content": {"application/json": {"schema": _ERROR}}}
        for status, text in _REFUSALS.items()
    }
    responses: dict[int | str, dict[str, Any]] = {
        200: {"description": "the request when it is done", **told},
        202: {"description": "with `wait=false`: the request, to be asked for at `Location`", **told},
        **refusals,
    }
    route = api.post(f"/api/{function.name}", summary=summary, openapi_extra=extra, responses=responses)
    route(ask)


async def _read(request: Request, function: Function) -> tuple[list[tuple[str, bytes]], dict[str, Any]]:
    """The files and settings of a form.

    Raises:
        InputError: it is no such form, is damaged, or has too many parts.
    """
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise InputError(
            f"found a body of type {request.headers.get('content-type')!r}, expected multipart/form-data with the "
            f"files {_FILES} and the field {_SETTINGS}: see /api/openapi.json"
        )
    parser = MultiPartParser(
        request.headers, request.stream(), max_files=MAX_PICTURES, max_fields=1, max_part_size=_MAX_SETTINGS
    )
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise InputError(
            f"found a form that will not do ({error.message.rstrip('.')}), expected at most {MAX_PICTURES} files "
            f"{_FILES} and {_SETTINGS}: correct it"
        ) from None
    try:
        files: list[tuple[str, bytes]] = []
        values: Any = {}
        for name, value in form.multi_items():
            if name == _FILES and not isinstance(value, str):
                files.append((value.filename or "picture", await value.read(MAX_BYTES + 1)))
            elif name == _SETTINGS and isinstance(value, str):
                values = _parse(value)
            else:
                raise InputError(
                    f"found the field {name!r}, expected the files {_FILES} and {_SETTINGS}: check its spelling"
                )
        return files, values
    finally:
        await form.close()


def _parse(text: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise InputError(f'{_SETTINGS} is no JSON object, expected one such as {{"seed": 7}}: correct it')
    return values


async def _wait(service: Service, ticket: Ticket, request: Request) -> JSONResponse:
    """The answer when there is one; whoever goes away takes the request along."""
    while not ticket.job.ended:
        if await request.is_disconnected():
            service.queue.cancel(ticket.job, "cancelled: whoever asked has gone")
            break
        await asyncio.sleep(_SECONDS_BETWEEN_LOOKS)
    status = ticket.job.status
    headers = {"retry-after": str(service.queue.wait())} if ticket.job.error == ENDING else {}
    return JSONResponse(await asyncio.to_thread(service.tell, ticket), status, headers=headers)


async def _drain(request: Request) -> None:
    """Reads what is on its way, or else whoever sends it learns of a broken connection and not of the reason."""
    async for _ in request.stream():
        pass


def _missing(name: str) -> JSONResponse:
    return JSONResponse({"error": f"found nothing called {name!r}, expected one of the last requests: ask again"}, 404)

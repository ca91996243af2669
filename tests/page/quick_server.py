"""The page's server with something quick behind it: `python -m tests.page.quick_server FOLDER SECONDS`."""

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from sdipc_jax.commands.settings import EditSettings, MixSettings, TextSettings, VarySettings
from sdipc_jax.errors import InputError
from sdipc_jax.page.folder import Folder
from sdipc_jax.page.queue import Queue
from sdipc_jax.page.service import Commands, Service
from sdipc_jax.page.settings import PageSettings
from sdipc_jax.page.web import server
from sdipc_jax.pictures.outputs import OutputFolder, Subject
from sdipc_jax.pictures.reading import read_picture
from sdipc_jax.records import Record, Report

_KINDS = {"vary": VarySettings, "edit": EditSettings, "mix": MixSettings, "text": TextSettings}
_PIECES = 20


def commands(seconds: float) -> Commands:
    """What takes so many seconds, and makes pictures of one colour.

    A text of "memory" finds too little of it, of "bug" a bug, of "deaf" what hears nothing until it is done.
    """

    def run(function: str, settings: Any, report: Report) -> Record:
        text = str(getattr(settings, "text", None) or (getattr(settings, "texts", None) or ("",))[0])
        if text == "memory":
            raise MemoryError("the device has no memory left for that")
        if text == "bug":
            raise RuntimeError("a bug on purpose")
        if text == "deaf":
            time.sleep(120)
        for path in getattr(settings, "pictures", ()):
            read_picture(path)
        folder = OutputFolder(settings.output_dir, [Subject(function, {"text": text})])
        for index in range(settings.num_images):
            for piece in range(_PIECES):
                time.sleep(seconds / _PIECES / settings.num_images)
                report((index + piece / _PIECES) / settings.num_images)
            colour = np.full((64, 64, 3), settings.seed % 256, np.uint8)
            record: Record = {"seed": settings.seed, "settings": {"height": 64, "width": 64}}
            folder.add(0, index, colour, record)
        return {"notes": [f"{path}: seen" for path in getattr(settings, "pictures", ())], "failures": []}

    def check_size(height: int, width: int) -> None:
        if (height, width) != (64, 64):
            raise InputError(f"height and width are {height}x{width}, expected one of 64x64: choose one of them")

    return Commands(_KINDS, run, check_size, [(64, 64)], "quick", [], 50, 7.5)


def main(folder: str, seconds: str, *options: str) -> None:
    """Until SIGTERM; `--finish=1` in the place of the seconds in which what runs may finish."""
    for option in options:
        assert option.startswith("--finish=")
        server.FINISH_SECONDS = float(option.partition("=")[2])
    settings = PageSettings(output_dir=Path(folder), port=0)
    listener = server.listen(settings.host, 0)
    service = Service(commands(float(seconds)), settings, Queue(), Folder(Path(folder) / "requests"))
    print(f"http://127.0.0.1:{listener.getsockname()[1]}", file=sys.stderr)
    server.serve(service, listener, lambda: None)


if __name__ == "__main__":
    main(*sys.argv[1:])

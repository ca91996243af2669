"""The command `page`: a page in the browser, and an HTTP API, for `vary`, `edit`, `mix` and `text`."""

import copy
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax

from sdipc_jax.checkpoints.bundle import Bundle, Config
from sdipc_jax.checkpoints.digests import digests
from sdipc_jax.checkpoints.load import configure, load_weights
from sdipc_jax.commands import edit, mix, text, vary
from sdipc_jax.commands.opening import Opening
from sdipc_jax.commands.outcome import say
from sdipc_jax.commands.settings import EditSettings, MixSettings, TextSettings, VarySettings
from sdipc_jax.errors import InputError
from sdipc_jax.executables import forget_programs
from sdipc_jax.files import check_writable
from sdipc_jax.interruption import locked
from sdipc_jax.page.folder import Folder
from sdipc_jax.page.queue import Queue
from sdipc_jax.page.service import Commands, Service
from sdipc_jax.page.settings import PageSettings
from sdipc_jax.prompts.converter import Converter
from sdipc_jax.records import Record, Report
from sdipc_jax.sampling.request import decide
from sdipc_jax.settings import CheckpointSettings, SamplingSettings

_KINDS: dict[str, type[SamplingSettings]] = {
    "vary": VarySettings,
    "edit": EditSettings,
    "mix": MixSettings,
    "text": TextSettings,
}
_RUN: dict[str, Callable[..., Any]] = {"vary": vary.vary, "edit": edit.edit, "mix": mix.mix, "text": text.text}
# Height to width.
_SHAPES = ((1, 1), (3, 4), (4, 3), (9, 16), (16, 9))
# Compiled for sizes and numbers of steps, before all are forgotten.
PROGRAMS = 6
_EMBEDDED = "This small checkpoint knows drawings like emoji, not photographs; --model sd15 fetches one that does."


@dataclass
class Served:
    """What the page has to say when it has ended."""

    address: str
    requests: int

    def to_json(self) -> Record:
        """What `--json` prints."""
        return {"address": self.address, "requests": self.requests}

    def __str__(self) -> str:
        return f"{self.address} has ended after {self.requests} requests"


class Kept(Opening):
    """The page's checkpoint, read once; only the device's thread asks for weights."""

    def __init__(self, settings: PageSettings) -> None:
        self.settings = settings
        self._config = configure(settings)

    def config(self, settings: CheckpointSettings) -> Config:
        return self._config

    def converter(self, config: Config, settings: Any) -> Converter:
        # What a command lets go it lets go of its own.
        return copy.copy(self._converter)

    def weights(self, config: Config, tuned: Path | None) -> Bundle:
        return self._converter.bundle if self._config.clip is not None else self._weights

    def digests(self, config: Config, tuned: Path | None) -> dict[str, str]:
        return self._digests

    def read(self) -> None:
        """All that takes long."""
        self.weights(self._config, self.settings.tuned)
        self.digests(self._config, self.settings.tuned)

    @cached_property
    def _converter(self) -> Converter:
        return Converter(self._config, self.settings)

    @cached_property
    def _weights(self) -> Bundle:
        return load_weights(self._config, self.settings.tuned)

    @cached_property
    def _digests(self) -> dict[str, str]:
        return digests(self._config, self.settings.tuned)


class Runner:
    """Runs commands with the checkpoint that is kept, and no more programs than are worth their memory."""

    def __init__(self, opening: Opening) -> None:
        self.opening = opening
        self._programs: set[tuple[Any, ...]] = set()

    def __call__(self, function: str, settings: SamplingSettings, report: Report) -> Record:
        self._make_room(function, settings)
        try:
            return self._run(function, settings, report)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
        # Once more with half of what is sampled at once.
        fewer = settings.model_copy(update={"batch_size": max(1, settings.batch_size // 2), "overwrite": True})
        try:
            return self._run(function, fewer, report)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise MemoryError(
                "the device has no memory left for that, expected a smaller request: choose a smaller size, or start "
                "the page with a smaller --batch-size or --dtype bfloat16"
            ) from None

    def _run(self, function: str, settings: SamplingSettings, report: Report) -> Record:
        result: Record = _RUN[function](settings, report, self.opening).to_json()
        return result

    def _make_room(self, function: str, settings: SamplingSettings) -> None:
        guided = settings.guidance_scale is None or settings.guidance_scale > 1
        program = (
            settings.height,
            settings.width,
            settings.steps,
            guided,
            min(settings.num_images, settings.batch_size),
        )
        if program not in self._programs and len(self._programs) >= PROGRAMS:
            forget_programs()
            self._programs.clear()
        self._programs.add(program)


def page(settings: PageSettings, report: Report) -> Served:
    """A page in the browser, and an HTTP API."""
    if importlib.util.find_spec("gradio") is None:
        raise InputError("page needs the package gradio, found none: pip install 'sdipc-jax[page]'")
    assert settings.output_dir is not None  # The command line has chosen one.
    root = settings.output_dir
    check_writable(root)
    opening = Kept(settings)
    # One device draws; with several, weights would be copied to all of them for each request.
    one = {"mesh": "data=1"} if jax.device_count() > 1 else {}
    commands = commands_of(opening, settings, one)
    from sdipc_jax.page.web import server

    with server.listen(settings.host, settings.port) as listener, locked(root):
        service = Service(commands, settings, Queue(), Folder(root / "requests"))
        address = f"http://{server.bracketed(settings.host)}:{listener.getsockname()[1]}"
        say(settings, f"the page is at {address}, and stops with Ctrl-C; loading {settings.model}")

        def load() -> None:
            opening.read()
            say(settings, "ready")

        server.serve(service, listener, load)
    return Served(address, service.taken)


def commands_of(opening: Opening, settings: PageSettings, fixed: Record) -> Commands:
    """What stands behind the page, for a checkpoint.

    Args:
        fixed: settings of every command that nobody is asked for.
    """
    config = opening.config(settings)
    values = decide(config, settings)
    sizes = sizes_of(config, values.height, values.width)
    run = Runner(opening)

    def check_size(height: int, width: int) -> None:
        config.latent_shape(height, width)
        if (height, width) not in sizes:
            offered = ", ".join(f"{each[0]}x{each[1]}" for each in sizes)
            raise InputError(f"height and width are {height}x{width}, expected one of {offered}: choose one of them")

    remarks = [*config.notes, *([_EMBEDDED] if settings.model == "embedded" else [])]
    return Commands(
        kinds=_KINDS,
        run=lambda function, asked, report: run(function, asked.model_copy(update=fixed), report),
        check_size=check_size,
        sizes=sizes,
        title=settings.model,
        remarks=remarks,
        steps=values.steps,
        guidance_scale=values.guidance_scale,
    )


def sizes_of(config: Config, height: int, width: int) -> list[tuple[int, int]]:
    """The sizes that are offered: the checkpoint's own, and others of as many pixels, about, in usual shapes."""
    unit = config.vae.downscale * 2 ** (len(config.unet.block_out_channels) - 1)
    sizes = [(height, width)]
    for high, wide in _SHAPES:
        scale = (height * width / (high * wide)) ** 0.5
        found = tuple(max(unit, round(scale * side / unit) * unit) for side in (high, wide))
        if found not in sizes:
            sizes.append((found[0], found[1]))
    return sizes

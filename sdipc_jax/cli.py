"""The command `sdipc`: parses, calls the library, prints.

Exit codes: 0 done, 1 a bug, 2 refused input, 3 some items failed, 75 interrupted and
resumable, or another process is missing, 130 interrupted.
"""

import contextlib
import importlib
import io
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any

import tyro
from tqdm import tqdm

from sdipc_jax.batch.settings import BatchSettings
from sdipc_jax.errors import InputError, InterruptedRun, MissingProcessError
from sdipc_jax.evaluate.settings import EvaluateSettings
from sdipc_jax.settings import (
    CommandSettings,
    CompileSettings,
    CtSettings,
    EditSettings,
    ExportSettings,
    FtSettings,
    PromptSettings,
    SpectrumSettings,
    TextSettings,
    VarySettings,
)


def _tune(
    command: Annotated[
        Annotated[FtSettings, tyro.conf.subcommand("ft")]
        | Annotated[CtSettings, tyro.conf.subcommand("ct")]
        | Annotated[ExportSettings, tyro.conf.subcommand("export")],
        tyro.conf.OmitSubcommandPrefixes,
        tyro.conf.arg(name=""),
    ],
) -> CommandSettings:
    """Tuning on one's own pictures."""
    return command


_COMMANDS: dict[str, Callable[..., CommandSettings]] = {
    "vary": VarySettings,
    "edit": EditSettings,
    "text": TextSettings,
    "prompt": PromptSettings,
    "batch": BatchSettings,
    "tune": _tune,
    "compile": CompileSettings,
    "spectrum": SpectrumSettings,
    "evaluate": EvaluateSettings,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and gives its exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        return _run(_parse(arguments))
    except InputError as error:
        message, code = str(error), 2
    except (InterruptedRun, MissingProcessError) as error:
        message, code = str(error), 75
    except KeyboardInterrupt:
        message, code = "interrupted; the pictures named in manifest.jsonl are whole", 130
    except Exception:
        _abandon(1)
        raise
    print(f"sdipc: {message}", file=sys.stderr)
    if "--json" in arguments:
        print(json.dumps({"error": message}))
    _abandon(code)
    return code


def _abandon(code: int) -> None:
    """Other processes must not wait for one that has failed. Without JAX there are none."""
    if "jax" in sys.modules:
        from sdipc_jax import parallel

        parallel.abandon(code)


def _parse(arguments: Sequence[str]) -> CommandSettings:
    if arguments and not arguments[0].startswith("-") and arguments[0] not in _COMMANDS:
        raise InputError(
            f"found the command {arguments[0]!r}, expected one of {', '.join(_COMMANDS)}; see sdipc --help"
        )
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.extras.subcommand_cli_from_dict(
                _COMMANDS,
                prog="sdipc",
                description="Pictures as prompts for Stable Diffusion.",
                args=list(arguments),
                config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise InputError(_one_line(errors.getvalue())) from None


def _one_line(box: str) -> str:
    """The message of tyro's error box: its text down to the first rule."""
    lines = [line.strip("│ ") for line in box.splitlines() if not line.startswith(("╭", "╰"))]
    rule = next((place for place, line in enumerate(lines) if line.startswith("──")), len(lines))
    message = re.sub(r"^Error parsing ([A-Z]\w+: )?", "", " ".join(lines[:rule]))
    return message.rstrip(".") + "; see sdipc --help"


def _run(settings: CommandSettings) -> int:
    if settings.offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
    # Importing JAX takes seconds, which help and misspelt options need not wait for; nor need a command for another's
    # packages.
    from sdipc_jax import parallel
    from sdipc_jax.compilation import keep_compiled, use_eigen

    use_eigen()
    keep_compiled()
    name = next((name for name, kind in _COMMANDS.items() if type(settings) is kind), "tune")
    module = importlib.import_module(f"sdipc_jax.commands.{name}")
    with _progress(shown=not settings.quiet and not settings.json_) as report:
        result = getattr(module, name)(settings, report)
    summary = result.to_json()
    failures = summary.get("failures", [])
    # Several processes say the same.
    if parallel.is_first():
        if settings.json_:
            print(json.dumps(summary))
        elif not settings.quiet:
            print(result)
        for failure in failures:
            print(f"sdipc: {failure['error']}", file=sys.stderr)
    if summary.get("interrupted"):
        return 75
    return 3 if failures else 0


@contextlib.contextmanager
def _progress(shown: bool) -> Iterator[Any]:
    """A bar on stderr where that is a terminal."""
    bar_format = "{l_bar}{bar}| {elapsed} < {remaining}{postfix}"
    with tqdm(total=100.0, bar_format=bar_format, disable=None if shown else True, leave=False) as bar:

        def report(done: float, text: str = "") -> None:
            bar.set_postfix_str(text, refresh=False)
            bar.update(100.0 * done - bar.n)

        yield report


if __name__ == "__main__":
    sys.exit(main())

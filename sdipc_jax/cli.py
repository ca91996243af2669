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
from collections.abc import Iterator, Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Any

from sdipc_jax.errors import InputError, InterruptedRun, MissingProcessError, shortened
from sdipc_jax.records import name_row
from sdipc_jax.spelling import nearest, respelt, unknown

if TYPE_CHECKING:
    from sdipc_jax.settings import CommandSettings

# Where each command's settings are, and their first sentence: help for all of them imports none, a command its own.
COMMANDS = {
    "vary": ("sdipc_jax.commands.settings.VarySettings", "Variations of each picture."),
    "edit": ("sdipc_jax.commands.settings.EditSettings", "The picture with the text's change."),
    "mix": (
        "sdipc_jax.commands.settings.MixSettings",
        "Several pictures as one prompt: their mean, or each in its own place.",
    ),
    "interpolate": (
        "sdipc_jax.commands.settings.InterpolateSettings",
        "The way from one picture or text to another, as pictures, a strip and an animation.",
    ),
    "text": ("sdipc_jax.commands.settings.TextSettings", "Plain text to image, with the same samplers."),
    "prompt": (
        "sdipc_jax.commands.settings.PromptSettings",
        "Pictures as prompts, in a file: `prompt_embeds` for diffusers' argument of that name, and `image_vectors`.",
    ),
    "words": (
        "sdipc_jax.commands.settings.WordsSettings",
        "Words for each picture: the nearest ones, and a sum of a few that comes near to it.",
    ),
    "search": (
        "sdipc_jax.commands.settings.SearchSettings",
        "The pictures that are nearest to a picture or a text.",
    ),
    "batch": (
        "sdipc_jax.batch.settings.BatchSettings",
        "Resumable generation over a data set: run it again, and it goes on where it stopped.",
    ),
    "tune ft": (
        "sdipc_jax.commands.settings.FtSettings",
        "Fine-tuning on about a hundred pictures (SD-IPC-FT); run it again, and it goes on where it stopped.",
    ),
    "tune ct": (
        "sdipc_jax.commands.settings.CtSettings",
        "Customising on a handful of pictures (SD-IPC-CT); run it again, and it goes on where it stopped.",
    ),
    "tune export": (
        "sdipc_jax.commands.settings.TunedSettings",
        "A tuned checkpoint as a folder of its own, which diffusers opens, with its CLIP in clip/.",
    ),
    "models": (
        "sdipc_jax.commands.settings.ModelsSettings",
        "The checkpoints that have names here, their sizes and licences, and which are in the cache; or fetches some.",
    ),
    "export": (
        "sdipc_jax.commands.settings.ExportSettings",
        "A checkpoint as it was loaded, with LoRAs and tuning in its weights: a diffusers folder, or one file.",
    ),
    "compile": (
        "sdipc_jax.commands.settings.CompileSettings",
        "What vary, edit and text run on one device, compiled ahead of their first use; no weights are read.",
    ),
    "spectrum": (
        "sdipc_jax.commands.settings.SpectrumSettings",
        "The singular values of the text projection, what the cut-off keeps of them, and the length of text states.",
    ),
    "page": (
        "sdipc_jax.page.settings.PageSettings",
        "A page in the browser, and an HTTP API, for vary, edit, mix and text.",
    ),
    "evaluate": (
        "sdipc_jax.evaluate.settings.EvaluateSettings",
        "Measures a checkpoint the way the paper does: retrieval, recognition, likeness, editing.",
    ),
}

# Letters.
_SCREEN = 2000
_WITH_DASH = (
    ": found {!r}, which begins with a dash: put -- before it, behind all options, or join an option's value with =, "
    "as in --negative-prompt=-red"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and gives its exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    for stream in (sys.stdout, sys.stderr):
        # What a terminal cannot say is no reason to end when the work is done.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if "--version" in arguments:
        print(f"sdipc_jax {metadata.version('sdipc-jax')}")
        return 0
    try:
        parsed = _parse(arguments)
        return 0 if parsed is None else _run(*parsed)
    except InputError as error:
        message, code = str(error), 2
    except (InterruptedRun, MissingProcessError) as error:
        message, code = str(error), 75
    except BrokenPipeError:
        # Whoever reads, such as `head`, has seen enough; what is left must not be written at the end either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        message, code = "interrupted; the pictures named in manifest.jsonl are whole", 130
    except Exception:
        _abandon(1)
        raise
    message = shortened(message, _SCREEN)
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


def _parse(arguments: Sequence[str]) -> tuple[str, "CommandSettings"] | None:
    """The command and its settings; nothing where help is asked for, and given."""
    name = next((each for each in (" ".join(arguments[:2]), *arguments[:1]) if each in COMMANDS), None)
    rest = list(arguments[len(name.split()) :]) if name else [*arguments]
    ahead = rest[: rest.index("--")] if "--" in rest else rest
    if "-h" in ahead or "--help" in ahead:
        print(_help(name, arguments[0]), flush=True)
        return None
    if name is None:
        raise InputError(f"{_no_command(arguments)}; see sdipc --help")
    kind = settings_of(name)
    import tyro

    placed = {each: tyro.conf.Positional in field.metadata for each, field in kind.model_fields.items()}
    options = [each.removesuffix("_") for each, without_name in placed.items() if not without_name]
    rest = respelt(rest, options, [each for each, without_name in placed.items() if without_name])
    if (wrong := unknown(rest, options)) is not None:
        meant = nearest(wrong.removeprefix("--").replace("-", "_"), options)
        advice = f": did you mean --{meant.replace('_', '-')}?" if meant else ""
        raise InputError(f"found the option {wrong}, which {name} does not have{advice}; see sdipc {name} --help")
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            settings: CommandSettings = tyro.cli(
                kind, prog=f"sdipc {name}", args=rest, config=(tyro.conf.FlagCreatePairsOff,)
            )
    except SystemExit:
        raise InputError(f"{_one_line(errors.getvalue(), rest)}; see sdipc {name} --help") from None
    return name, settings


def _help(name: str | None, first: str) -> str:
    """The page of a command, or of all that begin with a word."""
    if name is None:
        from sdipc_jax.commands import listing

        return listing.pages(_summaries(first))
    from sdipc_jax.commands import manual

    return manual.page(name, settings_of(name))


def _summaries(first: str) -> list[tuple[str, str]]:
    """The commands that begin with a word, or all of them."""
    found = [(name, summary) for name, (_, summary) in COMMANDS.items()]
    return [each for each in found if each[0].startswith(f"{first} ")] or found


def _no_command(arguments: Sequence[str]) -> str:
    """Why these words are no command."""
    first = arguments[0] if arguments else ""
    if first.startswith("-"):
        return f"found {first} before the command, expected it behind: change the order"
    typed = " ".join(arguments[: 2 if _summaries(first)[0][0].startswith(f"{first} ") else 1])
    meant = nearest(typed, COMMANDS)
    found = f"the command {shortened(repr(typed), 80)}" if typed else "no command"
    return f"found {found}, expected one of {', '.join(COMMANDS)}{f': did you mean {meant}?' if meant else ''}"


def settings_of(command: str) -> Any:
    """What takes the command's options."""
    module, _, name = COMMANDS[command][0].rpartition(".")
    return getattr(importlib.import_module(module), name)


def _one_line(box: str, arguments: Sequence[str]) -> str:
    """The message of tyro's error box: its text down to the first rule."""
    lines = [line.strip("│ ") for line in box.splitlines() if not line.startswith(("╭", "╰"))]
    rule = next((place for place, line in enumerate(lines) if line.startswith("──")), len(lines))
    message = re.sub(r"^Error parsing ([A-Z]\w+: )?", "", " ".join(lines[:rule]))
    # Options have two dashes and no spaces.
    text = next((each for each in arguments if re.match(r"-[^-]|--[\w-]*[^\w=-]", each)), None)
    advice = "" if text is None else _WITH_DASH.format(shortened(text, 80))
    return f"{shortened(message.rstrip('.'))}{advice}"


def _run(name: str, settings: "CommandSettings") -> int:
    from sdipc_jax.files import check_result, new_folder
    from sdipc_jax.settings import OUT, ParallelSettings, ResultSettings

    if getattr(settings, "output_dir", settings) is None:
        settings = settings.model_copy(update={"output_dir": new_folder(OUT, name)})
    if settings.offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
    if settings.quiet or settings.json_:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    # Importing JAX takes seconds, which help, misspelt options and a place that will not do need not wait for; nor need
    # a command for another's packages. (Processes that are to join others tell them first.)
    joins_others = isinstance(settings, ParallelSettings) and settings.is_one_of_several
    if isinstance(settings, ResultSettings) and not joins_others:
        check_result(*settings.result, settings.overwrite)
    from sdipc_jax import parallel
    from sdipc_jax.compilation import is_told_where_to_keep, keep_compiled, keep_memory, use_eigen
    from sdipc_jax.executables import keep_whole

    word = name.split()[0]
    use_eigen()
    if word == "tune":
        keep_memory()
    told = keep_compiled() is not None or is_told_where_to_keep()
    keep_whole()
    if not (told or settings.quiet or settings.json_):
        print("sdipc: compiled programs are not kept: the cache folder cannot be written", file=sys.stderr)
    # Nor does one touch a device that leaves the work to others.
    if not joins_others and getattr(settings, "on", None) is None:
        parallel.check_devices()
    command = getattr(importlib.import_module(f"sdipc_jax.commands.{word}"), word)
    with _progress(shown=not settings.quiet and not settings.json_) as report:
        result = command(settings, report)
    summary = result.to_json()
    failures = summary.get("failures", [])
    # Several processes say the same.
    if parallel.is_first():
        if settings.json_:
            print(json.dumps(summary))
        elif not settings.quiet:
            print(result)
        for failure in failures:
            where = f"{name_row(failure['row'], failure.get('place', ''))}: " if "row" in failure else ""
            print(f"sdipc: {where}{failure['error']}", file=sys.stderr)
    if summary.get("interrupted"):
        return 75
    return 3 if failures else 0


@contextlib.contextmanager
def _progress(shown: bool) -> Iterator[Any]:
    """A bar on stderr where that is a terminal."""
    from tqdm import tqdm

    bar_format = "{l_bar}{bar}| {elapsed} < {remaining}{postfix}"
    with tqdm(total=100.0, bar_format=bar_format, disable=None if shown else True, leave=False) as bar:

        def report(done: float, text: str = "") -> None:
            bar.set_postfix_str(text, refresh=False)
            bar.update(100.0 * done - bar.n)

        yield report


if __name__ == "__main__":
    sys.exit(main())

"""The command line: what is parsed, what help says, how a run looks while it goes on."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sdipc_jax import cli
from sdipc_jax.commands import manual
from sdipc_jax.commands.outcome import Outcome
from sdipc_jax.errors import InputError

COMMON = """model clip num-images seed steps guidance-scale guidance-interval cache-interval sampler fast
negative-prompt height width dtype cutoff scale latents output-dir overwrite json quiet offline""".split()
CHECKPOINT = "model clip dtype overwrite json quiet offline".split()
OPTIONS = {
    "vary": COMMON,
    "edit": [*COMMON, "alpha"],
    "text": [name for name in COMMON if name not in ("cutoff", "scale")],
    "prompt": [*CHECKPOINT, "cutoff", "scale", "output", "text", "alpha"],
    "batch": """process-index process-count verify retry-failed max-failures plan pictures seconds bytes chips hosts
    price json quiet offline""".split(),
    "compile": "model clip dtype steps guidance-scale sampler fast height width batch-size json quiet offline".split(),
    "spectrum": [*CHECKPOINT, "cutoff", "scale", "keep-fraction", "picture", "output-dir"],
}


def help_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main([*arguments, "--help"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


@pytest.mark.parametrize("command", OPTIONS)
def test_help_has_every_option_and_says_its_default(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of(capsys, command)
    for name in OPTIONS[command]:
        assert re.search(rf"--{name}\b", text), name
    # Nothing of how it is made: no `None`, no brackets around what has to be given.
    assert "None" not in text
    assert "[[" not in text
    assert max(map(len, text.splitlines())) <= 120


def test_help_names_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of(capsys)
    assert all(re.search(rf"^  {command} +[A-Z]", text, re.MULTILINE) for command in cli.COMMANDS)
    tune = help_of(capsys, "tune")
    assert "  tune ct " in tune
    assert "  vary " not in tune


def test_help_is_in_groups_and_the_most_used_come_first(capsys: pytest.CaptureFixture[str]) -> None:
    for command in cli.COMMANDS:
        known = {name.removesuffix("_").replace("_", "-") for name in cli.settings_of(command).model_fields}
        text = help_of(capsys, *command.split())
        shown = re.findall(r"^  --([a-z-]+)", text, re.MULTILINE)
        assert set(shown) <= known
        # Every option once; what is typed without its name stands above them.
        assert len(shown) == len(set(shown))
        placed = {name for name, field in cli.settings_of(command).model_fields.items() if manual.is_placed(field)}
        assert known - set(shown) == placed
        titles = re.findall(r"^(\S.*):$", text, re.MULTILINE)
        assert titles[-1] == "What every command takes"
    vary = help_of(capsys, "vary")
    order = [vary.index(f"  --{name} ") for name in ("num-images", "seed", "steps", "model", "latents", "mesh", "json")]
    assert order == sorted(order)


def test_help_that_nobody_reads_to_the_end_is_no_failure() -> None:
    command = [sys.executable, "-m", "sdipc_jax.cli", "vary", "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == b""
    assert process.returncode == 1


@pytest.mark.parametrize(
    "typed, meant",
    [
        (
            "text --prompt red --num_inference_steps=3 --num-images-per-prompt 2",
            "text red --steps 3 --num-images 2",
        ),
        ("edit --prompt=taxi a.png --guidance-scale 2", "edit a.png taxi --guidance-scale 2"),
        ("edit --prompt taxi --image a.png", "edit a.png taxi"),
        ("edit a.png --mask m.png --prompt taxi", "edit --mask m.png -- a.png taxi"),
        ("vary --image a.png --height 64 --torch-dtype bfloat16", "vary a.png --height 64 --dtype bfloat16"),
        ("prompt a.png --prompt taxi --output p", "prompt a.png --text taxi --output p"),
        ("mix --image a.png --image b.png --prompt taxi", "mix a.png b.png --text taxi"),
    ],
)
def test_options_as_diffusers_spells_them(typed: str, meant: str) -> None:
    assert cli._parse(typed.split()) == cli._parse(meant.split()) is not None


@pytest.mark.parametrize(
    "arguments, words",
    [
        (
            ["vary", "a.png", "--stepz", "3"],
            "option --stepz, which vary does not have: did you mean --steps?",
        ),
        (["vary", "a.png", "--num-inferense-steps", "3"], "did you mean --steps?"),
        (["vary", "a.png", "--zzzz=3"], "found the option --zzzz, which vary does not have; see sdipc vary --help"),
        (["edti", "a.png"], "did you mean edit?"),
        (["tune", "tc", "run.yaml"], "found the command 'tune tc', expected one of "),
        (["tune"], "found the command 'tune', expected one of "),
    ],
)
def test_slips_are_told_what_was_probably_meant(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 2
    assert words in capsys.readouterr().err


ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(cli.__file__).parents[1])}


def test_the_list_of_commands_says_what_their_settings_say() -> None:
    for command, (_, summary) in cli.COMMANDS.items():
        assert cli.settings_of(command).__doc__ == summary


HELP = """
import sys
from sdipc_jax import cli
try:
    code = cli.main(sys.argv[1:])
except SystemExit as stop:
    code = stop.code or 0
heavy = {"jax", "numpy", "flax", "transformers", "matplotlib", "scipy", "PIL", "tqdm"}
print(code, sorted(heavy & sys.modules.keys()), "pydantic" in sys.modules)
"""


def python(code: str, *arguments: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=ENVIRONMENT)


@pytest.mark.parametrize(
    "arguments, code, with_pydantic",
    [
        (["--help"], 0, False),
        (["varry", "a.png"], 2, False),
        (["vary", "--help"], 0, True),
        (["text", "a", "--steps", "0"], 2, True),
        (["text", "a", "--output-dir", "."], 2, True),
        (["prompt", "a.png", "--output", "manifest.jsonl"], 2, True),
    ],
)
def test_what_is_refused_or_asked_first_loads_nothing_heavy(
    tmp_path: Path, arguments: list[str], code: int, with_pydantic: bool
) -> None:
    (tmp_path / "manifest.jsonl").touch()
    ran = python(HELP, *arguments, folder=tmp_path)
    assert ran.returncode == 0
    assert ran.stdout.splitlines()[-1] == f"{code} [] {with_pydantic}"


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "found no command, expected one of vary, edit, mix, interpolate, "),
        (["varry", "a.png"], "found the command 'varry', expected one of vary, edit, mix, interpolate, "),
        (["text", "a", "--stepz", "3"], "--stepz"),
        (["text", "a", "--steps"], "Missing value for argument '--steps'"),
        (["edit", "a.png"], "TEXT"),
        (["prompt", "a.png"], "--output FILE"),
        (["text", "a", "--num-images", "2.5"], "--num-images: invalid literal for int() with base 10: '2.5'"),
        (["text", "a", "--steps", "2.5"], "steps is '2.5', expected a valid integer"),
        (["text", "a", "--json=3"], "3"),
        (["--quiet", "text", "a"], "found --quiet before the command"),
    ],
)
def test_mistakes_are_told_in_one_line(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert words in err
    assert err.startswith("sdipc: ")
    assert re.search(r"; see sdipc( \w+)* --help\n$", err)
    assert err.count("\n") == 1
    assert not set("│╭╰─") & set(err)


class Recorder:
    """Stands in for a command."""

    def __init__(self) -> None:
        self.settings: Any = None
        self.shares: tuple[float, ...] = ()
        self.error: BaseException | None = None

    def __call__(self, settings: Any, report: Any) -> Outcome:
        self.settings = settings
        for share in self.shares:
            report(share)
        if self.error is not None:
            raise self.error
        return Outcome([], [Path("out/sheet.png")])


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    made = Recorder()
    for command in OPTIONS:
        monkeypatch.setattr(f"sdipc_jax.commands.{command}.{command}", made)
    return made


def test_values_arrive_as_typed(recorder: Recorder) -> None:
    arguments = (
        "vary a.png b.png --seed 4294967295 --steps=7 --guidance-scale 1e1 --cutoff .5 --sampler dpm++2m --karras"
    )
    assert cli.main([*arguments.split(), "--negative-prompt", "-0.5", "--clip", "c d", "--quiet"]) == 0
    found = recorder.settings
    assert found.pictures == (Path("a.png"), Path("b.png"))
    assert (found.seed, found.steps, found.guidance_scale, found.cutoff) == (2**32 - 1, 7, 10, 0.5)
    assert (found.sampler, found.karras, found.negative_prompt) == ("dpm++2m", True, "-0.5")
    assert (found.clip, found.latents, found.height) == (Path("c d"), None, None)
    assert cli.main(["edit", "a.png", "at night", "--alpha", "-1", "--quiet"]) == 0
    assert (recorder.settings.text, recorder.settings.alpha) == ("at night", -1)


@pytest.mark.parametrize(
    "error, code, message",
    [
        (InputError("found this, expected that: do so"), 2, "found this, expected that: do so"),
        (KeyboardInterrupt(), 130, "interrupted; the pictures named in manifest.jsonl are whole"),
    ],
)
def test_exit_codes(
    recorder: Recorder, capsys: pytest.CaptureFixture[str], error: BaseException, code: int, message: str
) -> None:
    recorder.error = error
    assert cli.main(["text", "a"]) == code
    assert capsys.readouterr() == ("", f"sdipc: {message}\n")
    assert cli.main(["text", "a", "--json"]) == code
    out, err = capsys.readouterr()
    assert json.loads(out) == {"error": message}
    assert err == f"sdipc: {message}\n"


def test_a_bug_exits_with_1() -> None:
    ran = python("import sys; from sdipc_jax import cli; cli._parse = lambda _: 1 / 0; sys.exit(cli.main())")
    assert ran.returncode == 1
    assert "ZeroDivisionError" in ran.stderr


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    "options, stream, shown",
    [([], Terminal, True), ([], io.StringIO, False), (["--quiet"], Terminal, False), (["--json"], Terminal, False)],
)
def test_progress_is_for_terminals(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch, options: list[str], stream: type[io.StringIO], shown: bool
) -> None:
    monkeypatch.setattr(sys, "stderr", stream())
    monkeypatch.setattr("tqdm.std.tqdm.monitor_interval", 0)
    recorder.shares = tuple(step / 1000 for step in range(1, 1001))
    assert cli.main(["text", "a", *options]) == 0
    text = sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert (re.search(r"\d+%\|", text) is not None) is shown
    if shown:
        # Few redraws, however often it is told: what is drawn costs next to nothing.
        assert text.count("%|") < 100
    else:
        assert text == ""


def test_offline(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert cli.main(["text", "a", "--quiet"]) == 0
    assert os.environ["HF_HUB_OFFLINE"] == "0"
    assert cli.main(["text", "a", "--offline", "--quiet"]) == 0
    assert os.environ["HF_HUB_OFFLINE"] == "1"


def test_a_run_without_a_folder_gets_one_of_its_own(
    recorder: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of other runs stay as they are, and a named folder is taken as it is."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out/vary-001").mkdir(parents=True)
    assert cli.main(["vary", "a.png", "--quiet"]) == 0
    assert recorder.settings.folder == Path("out/vary-002")
    assert cli.main(["text", "a", "--quiet"]) == 0
    assert recorder.settings.folder == Path("out/text-001")
    assert cli.main(["spectrum", "--quiet"]) == 0
    assert recorder.settings.folder == Path("out/spectrum-001")
    assert cli.main(["vary", "a.png", "--output-dir", "here", "--quiet"]) == 0
    assert recorder.settings.folder == Path("here")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["vary-001"]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert re.fullmatch(r"sdipc_jax \d+\.\d+\.\d+\S*\n", capsys.readouterr().out)

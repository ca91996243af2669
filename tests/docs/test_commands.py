"""Every command and snippet of the docs, run as it stands with the checkpoint that ships, but for a size that is small.

What needs more than that is in `ELSEWHERE`, with what it needs; tests/test_documents.py reads those too.
"""

import contextlib
import io
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sdipc_jax import cli
from tests.test_documents import PAGES, ROOT, blocks, commands

REAL = "a real checkpoint"
# By how a command begins; every one of them stands in some page.
ELSEWHERE = {
    "models fetch": "the network",
    "page": "a browser: tests/page",
    "spectrum --model sd21": REAL,
    "text a red apple --model": "few-step models and LoRAs",
    "tune ct configs/tune-concept.yaml": REAL,
    "tune ft": "a real checkpoint and four chips",
    "vary photo.jpg --model checkpoint --lora": "LoRAs",
    "vary photo.jpg --model checkpoint --num-images 64 --mesh": "eight chips",
    "vary photo.jpg --model model.safetensors": REAL,
    "vary photo.jpg --model sd15": REAL,
    "vary photo.jpg --model sd21": REAL,
}
# Snippets that need what a page alone cannot give, by their first line.
SNIPPETS_ELSEWHERE = {
    "from safetensors.torch import load_file": "PyTorch",
    "from sdipc_jax.sampling import Control": "a ControlNet",
    "import ray": "Ray: tests/ray",
}
_SAMPLING = {"--steps": "2", "--num-images": "1"}
# What is added where nothing else is typed.
SMALL: dict[str, dict[str, str]] = dict.fromkeys(["vary", "edit", "text", "mix", "interpolate"], _SAMPLING)
# What snippets have less of.
SHORTER = {"range(10)": "range(5)", "steps=4": "steps=2", "steps=30": "steps=2"}
SPELT_OTHERWISE = {"--steps": ("--num-inference-steps", "--fast")}


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with what people have: pictures, masks, words, a checkpoint."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("examples", "configs"):
        shutil.copytree(ROOT / name, folder / name)
    (folder / "checkpoint").symlink_to(ROOT / "sdipc_jax/embedded")
    (folder / "photos").mkdir()
    for name, drawing in {
        "photo": "automobile",
        "other": "red-heart",
        "before": "giraffe",
        "after": "tiger-face",
        "photos/1": "owl",
        "photos/2": "peach",
    }.items():
        Image.open(ROOT / f"examples/{drawing}.png").save(folder / f"{name}.jpg", quality=95)
    for name, box in {"left": (0, 0, 32, 64), "right": (32, 0, 64, 64), "mask": (16, 16, 48, 48)}.items():
        mask = Image.new("L", (64, 64))
        mask.paste(255, box)
        mask.save(folder / f"{name}.png")
    (folder / "words.txt").write_text("owl\npeach\ntaxi\nheart\ngiraffe\nviolin\n")
    with (folder / "configs/batch-embedded.yaml").open("a") as stream:
        stream.write("steps: 2\n")
    (folder / "vectors.yaml").write_text("source: photos\noutput_dir: out/vectors\nvectors: true\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        assert cli.main(["batch", "vectors.yaml", "--quiet"]) == 0
        yield folder


def small(words: list[str]) -> list[str]:
    """A command with what makes it quick; what is typed counts more."""
    added = []
    for option, value in SMALL.get(words[0], {}).items():
        if not {option, *SPELT_OTHERWISE.get(option, ())} & {*words}:
            added += [option, value]
    if words[:2] == ["tune", "ct"]:
        added += ["steps=2", "save_every=2", "sample_every=2"]
    return [*words, *added]


@pytest.mark.parametrize(
    "page", [page for page in PAGES if [*commands(page)]], ids=lambda page: page.relative_to(ROOT).as_posix()
)
def test_commands_run(page: Path, clone: Path, capfd: pytest.CaptureFixture[str]) -> None:
    # Each page begins anew.
    Path("prompts.safetensors").unlink(missing_ok=True)
    for line in commands(page):
        # The shell finds the files that a pattern stands for.
        typed = shlex.split(line, comments=True)
        words = [name for word in typed for name in (sorted(map(str, Path().glob(word))) if "*" in word else [word])]
        if any(" ".join(words).startswith(beginning) for beginning in ELSEWHERE):
            continue
        capfd.readouterr()
        assert cli.main(small(words)) == 0, f"{page.name}: sdipc {line}: {capfd.readouterr().err}"
        if words[:2] == ["tune", "ct"]:
            # Another page's run.
            (clone / "runs/imagenet").mkdir(parents=True, exist_ok=True)
            shutil.copy(clone / "runs/embedded-ct/tuned.safetensors", clone / "runs/imagenet")


def snippets(page: Path) -> list[str]:
    """The page's Python that runs here, one after the other."""
    found = [block for block in blocks(page, "python") if not block.startswith("# diffusers")]
    return [block for block in found if block.splitlines()[0] not in SNIPPETS_ELSEWHERE]


@pytest.mark.parametrize(
    "page", [page for page in PAGES if snippets(page)], ids=lambda page: page.relative_to(ROOT).as_posix()
)
def test_snippets_run(page: Path, clone: Path) -> None:
    names: dict[str, Any] = {}
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        for block in snippets(page):
            for typed, fewer in SHORTER.items():
                block = block.replace(typed, fewer)
            exec(compile(block, page.name, "exec"), names)
    # What a page says that is printed, is.
    assert not said.getvalue() or said.getvalue() in blocks(page, "")
    if "losses" in names:
        assert names["losses"][-1] < names["losses"][0]


def test_what_runs_elsewhere_stands_in_some_page() -> None:
    lines = [" ".join(shlex.split(line, comments=True)) for page in PAGES for line in commands(page)]
    for beginning in ELSEWHERE:
        assert any(line.startswith(beginning) for line in lines), beginning
    first = {block.splitlines()[0] for page in PAGES for block in blocks(page, "python")}
    assert first >= SNIPPETS_ELSEWHERE.keys()
    assert len(lines) - sum(line.startswith(tuple(ELSEWHERE)) for line in lines) > 40


def test_options_of_scripts_are_theirs() -> None:
    seen = 0
    for page in [*PAGES, ROOT / "CONTRIBUTING.md"]:
        for block in [*blocks(page, ""), *blocks(page, "text"), *blocks(page, "sh")]:
            for script, options in re.findall(r"(?:^|/| )python (scripts/\w+\.py)([^\n#]*)", block, re.MULTILINE):
                source = (ROOT / script).read_text(encoding="utf-8")
                known = [*re.findall(r'"(--[\w-]+)"', source)]
                if not known:
                    continue
                for option in re.findall(r"--[\w-]+", options):
                    assert option in known, f"{page.name}: {script} {option}"
                seen += 1
    assert seen > 10

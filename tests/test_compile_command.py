"""`sdipc compile` for what guides sampling: afterwards the commands find every program of theirs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import sdipc_jax as sdipc
from sdipc_jax import cli
from tests.batch_jobs import draw
from tests.control_cases import picture, write_controlnet
from tests.tiny import SMALL_UNET, quick_unet, write_checkpoint

pytestmark = pytest.mark.usefixtures("compile_quickly")

# What a command compiles besides, for a moment each, is not kept.
PROGRAMS = {"advance", "finish", "encode_images", "text_prompt", "encode_pictures", "embed_control", "winograd_kernels"}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A checkpoint, a ControlNet, pictures and a mask."""
    folder = tmp_path_factory.mktemp("compile")
    config = sdipc.load(write_checkpoint(folder / "model", unet=quick_unet(SMALL_UNET))).config
    write_controlnet(folder / "network", config)
    draw(folder / "noise.png", 0, (32, 32))
    Image.fromarray(picture(0)).save(folder / "lines.png")
    Image.fromarray(np.repeat([0, 255], 512).astype(np.uint8).reshape(32, 32)).save(folder / "half.png")
    names = ("model", "network", "noise.png", "lines.png", "half.png")
    return {Path(name).stem: str(folder / name) for name in names}


@pytest.fixture
def run(
    files: dict[str, str], kept_programs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[Any, set[str]]]:
    """Runs a command; gives what it prints, and which kinds of programs it was the first to compile."""

    def run(command: str, *arguments: str) -> tuple[Any, set[str]]:
        before = set(kept_programs.glob("program-*"))
        model = ["--model", files["model"], "--steps", "3", "--json"]
        assert cli.main([command, *arguments, *model]) == 0
        added = {path.name.split("-")[1] for path in set(kept_programs.glob("program-*")) - before}
        return json.loads(capsys.readouterr().out), added & PROGRAMS

    return run


def test_all_of_it_at_once(run: Callable[..., Any], files: dict[str, str], tmp_path: Path) -> None:
    """Other files, numbers and layers are the same programs; what is not there is another."""
    network = ("--controlnet", files["network"], "--control-image")
    compiled, added = run(
        *("compile", *network, "unread", "--mask", "unread", "--layers", "mid", "--init-image", "unread"),
        *("--strength", "0.9", "--mask-image", "unread", "--negative-picture", "unread", "--batch-size", "2"),
    )
    names = [each["name"] for each in compiled["programs"]]
    assert names == ["picture encoder", "text encoder", "kernels", "start", "control picture", "sampling", "decoding"]
    assert added == PROGRAMS
    out = ("--mesh", "data=1", "--num-images", "2", "--scale", "5", "--output-dir")
    guided = ("--layers", "mid", "--start", "0.4", "--mask", files["half"])
    started = ("--strength", "0.7", "--mask-image", files["half"], "--negative-picture", files["lines"])
    shown = (*network, files["lines"], "--control-scale", "0.5", "--control-end", "0.6")
    _, added = run("vary", files["noise"], *guided, *started, *shown, *out, str(tmp_path / "vary"))
    assert added == set()
    _, added = run("edit", files["noise"], "red", *guided, *started, *shown, *out, str(tmp_path / "edit"))
    assert added == set()
    # Without the mask of what is redone nothing is kept of the picture: another loop.
    without = ("--strength", "0.7", *guided, *shown)
    assert run("vary", files["noise"], *without, *out, str(tmp_path / "other"))[1] == {"advance"}


def test_pictures_in_places_of_their_own(run: Callable[..., Any], files: dict[str, str], tmp_path: Path) -> None:
    run("compile", "--mask", "unread", "--mixed", "2", "--batch-size", "1")
    masks = ("--mask", files["half"], files["half"], "--weights", "0.3", "0.4", "--num-images", "1")
    out = ("--mesh", "data=1", "--scale", "5", "--output-dir", str(tmp_path / "mix"))
    assert run("mix", files["noise"], files["lines"], *masks, *out)[1] == set()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--mixed", "2"], "found mixed without mask, expected both or neither: add --mask"),
        (["--layers", "down.9"], "the layer 'down.9' does not exist"),
        (["--strength", "0.1"], "which of 3 steps leaves none"),
        (["--controlnet", "none"], "found 0 values of control_image and 1 of controlnet"),
    ],
)
def test_refusals(
    files: dict[str, str], arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["compile", *arguments, "--model", files["model"], "--steps", "3"]) == 2
    assert message in capsys.readouterr().err

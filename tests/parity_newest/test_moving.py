"""docs/moving.md says of diffusers what diffusers takes."""

import ast
import inspect

import diffusers
import pytest

from tests.test_documents import ROOT, blocks

PIPELINES = {
    "pipe": diffusers.StableDiffusionPipeline,
    "img2img": diffusers.StableDiffusionImg2ImgPipeline,
    "inpaint": diffusers.StableDiffusionInpaintPipeline,
}
SNIPPETS = [block for block in blocks(ROOT / "docs/moving.md", "python") if block.startswith("# diffusers")]


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda snippet: snippet.splitlines()[1][:40])
def test_methods_and_arguments_are_there(snippet: str) -> None:
    control = "StableDiffusionControlNetPipeline" in snippet
    pipelines = PIPELINES | ({"pipe": diffusers.StableDiffusionControlNetPipeline} if control else {})
    called = 0
    for node in ast.walk(ast.parse(snippet)):
        if not isinstance(node, ast.Call):
            continue
        function, given = node.func, [word.arg for word in node.keywords]
        if isinstance(function, ast.Name) and function.id in pipelines:
            known = inspect.signature(pipelines[function.id].__call__).parameters
            assert {*given} <= known.keys()
        elif isinstance(function, ast.Attribute) and ast.unparse(function.value) == "pipe":
            known = inspect.signature(getattr(pipelines["pipe"], function.attr)).parameters
            assert {*given} <= known.keys() or "kwargs" in known
        elif isinstance(function, ast.Attribute) and ast.unparse(function.value).startswith("StableDiffusion"):
            assert hasattr(getattr(diffusers, ast.unparse(function.value)), function.attr)
        else:
            continue
        called += 1
    assert called


def test_all_tasks_are_shown() -> None:
    assert len(SNIPPETS) >= 7

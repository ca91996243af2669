"""What may be typed, and what is said of what may not."""

from pathlib import Path
from typing import Any

import pytest
from document_settings import document, document_commands

from sdipc_jax.commands.settings import EditSettings, SpectrumSettings, TextSettings, VarySettings
from sdipc_jax.errors import InputError
from sdipc_jax.settings import Defaults


@pytest.mark.parametrize(
    "values, words",
    [
        ({"steps": 0}, "steps is 0, expected greater than or equal to 1"),
        ({"steps": "many"}, "steps is 'many', expected a valid integer"),
        ({"seed": -1}, "seed is -1, expected greater than or equal to 0"),
        ({"seed": 2**32}, "seed is 4294967296, expected less than or equal to 4294967295"),
        ({"seed": 0.5}, "seed is 0.5, expected a valid integer"),
        ({"guidance_scale": "nan"}, "guidance_scale is 'nan', expected a finite number"),
        ({"guidance_scale": -1}, "guidance_scale is -1"),
        ({"num_images": 0}, "num_images is 0"),
        ({"num_images": 1001}, "num_images is 1001, expected less than or equal to 1000"),
        ({"height": 0}, "height is 0"),
        ({"width": 100_000}, "width is 100000, expected less than or equal to 8192"),
        ({"sampler": "magic"}, "sampler is 'magic', expected 'ddim', 'pndm', 'euler', "),
        ({"dtype": "float8"}, "dtype is 'float8', expected 'float32', 'bfloat16' or 'float16'"),
        ({"eta": 1.5}, "eta is 1.5"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"texts": ()}, "found no texts, expected at least one"),
        ({"output_dir": "gs://bucket/out"}, "output_dir is 'gs://bucket/out', expected a folder of this machine"),
        ({"stepz": 3}, "stepz is not a setting: did you mean steps?"),
        ({"cutoff": 0.3}, "cutoff is not a setting"),
    ],
)
def test_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as caught:
        TextSettings(**{"texts": ("a cat",), **values})
    assert str(caught.value).startswith(words)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "-inf"])
def test_only_finite_numbers(value: Any) -> None:
    for kind, name in ((EditSettings, "alpha"), (SpectrumSettings, "cutoff"), (SpectrumSettings, "scale")):
        with pytest.raises(InputError, match=f"^{name} is "):
            kind(**{"picture": "a.png", name: value} | ({"text": "b"} if kind is EditSettings else {}))


def test_one_way_to_cut_off() -> None:
    with pytest.raises(InputError, match=r"^found both cutoff and keep_fraction, expected one of them"):
        VarySettings(pictures=("a.png",), cutoff=0.3, keep_fraction=0.5)
    assert VarySettings(pictures=("a.png",), keep_fraction=0.5).cutoff is None
    with pytest.raises(InputError, match=r"^keep_fraction is 0, expected greater than 0"):
        VarySettings(pictures=("a.png",), keep_fraction=0)


def test_what_is_left_out_is_the_contracts() -> None:
    defaults = Defaults(height=512, width=512)
    assert (defaults.steps, defaults.guidance_scale, defaults.sampler) == (50, 7.5, "ddim")
    assert (defaults.cutoff, defaults.scale) == (0.3, None)
    settings = EditSettings(picture="a.png", text="b")
    assert (settings.model, settings.num_images, settings.seed, settings.alpha) == ("embedded", 4, 0, 0.9)
    assert (settings.negative_prompt, settings.dtype, str(settings.folder)) == (None, "float32", "out")
    assert all(getattr(settings, name) is None for name in Defaults.model_fields)


def test_the_page_of_settings_is_as_the_settings_are() -> None:
    page = Path(__file__).parents[1] / "docs/settings.md"
    assert page.read_text(encoding="utf-8") == document(), "run scripts/document_settings.py > docs/settings.md"
    commands = page.with_name("commands.md").read_text(encoding="utf-8")
    assert commands == document_commands(), "run scripts/document_settings.py commands > docs/commands.md"

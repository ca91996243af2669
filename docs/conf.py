"""The site that `make docs` makes of these pages."""

import re
import shutil
from pathlib import Path

from sphinx.application import Sphinx

project = "sdipc_jax"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = "sdipc_jax"
html_show_copyright = False
myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
# The tour comes with its results: `make docs` has run it.
nb_execution_mode = "off"
autodoc_typehints = "none"
# Shapes, such as "N *R L D", are no markup.
napoleon_attr_annotations = False
# Pages without a lexer of their own, and commands with comments.
highlight_language = "none"


def _name_what_is_outside(_: Sphinx, name: str, source: list[str]) -> None:
    """Files beside docs/ have no page, but the tour: their links become their names."""
    source[0] = source[0].replace("(../examples/tour.ipynb)", "(tour.ipynb)")
    source[0] = re.sub(r"\[([^\]]+)\]\(\.\./([^)]+)\)", r"\1 (`\2`)", source[0])


def _fetch_the_tour(app: Sphinx) -> None:
    """The notebook as `make notebook` leaves it is a page."""
    shutil.copy(Path(app.srcdir).parent / "build" / "tour.ipynb", app.srcdir)


# What Sphinx and furo leave out: which level the headings of lists of pages have, and that the keyboard can reach what
# scrolls sideways.
_ACCESSIBLE = {
    '<p class="caption" role="heading">': '<p class="caption" role="heading" aria-level="2">',
    "<pre>": '<pre tabindex="0">',
    '<div class="table-wrapper': '<div tabindex="0" class="table-wrapper',
}


def _for_everybody(app: Sphinx, error: Exception | None) -> None:
    """Pages with what screen readers and the keyboard need."""
    for path in Path(app.outdir).rglob("*.html") if error is None else ():
        text = path.read_text(encoding="utf-8")
        for found, wanted in _ACCESSIBLE.items():
            text = text.replace(found, wanted)
        path.write_text(text, encoding="utf-8")


def setup(app: Sphinx) -> None:
    app.connect("build-finished", _for_everybody)
    app.connect("builder-inited", _fetch_the_tour)
    app.connect("source-read", _name_what_is_outside)

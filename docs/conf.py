"""The site that `make docs` makes of these pages."""

import re

from sphinx.application import Sphinx

project = "sdipc_jax"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = "sdipc_jax"
myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
autodoc_typehints = "none"
# Shapes, such as "N *R L D", are no markup.
napoleon_attr_annotations = False
# Pages without a lexer of their own, and commands with comments.
highlight_language = "none"


def _name_what_is_outside(_: Sphinx, name: str, source: list[str]) -> None:
    """Files beside docs/ have no page: their links become their names."""
    source[0] = re.sub(r"\[([^\]]+)\]\(\.\./([^)]+)\)", r"\1 (`\2`)", source[0])


def setup(app: Sphinx) -> None:
    app.connect("source-read", _name_what_is_outside)

"""The page and the API as one application, behind the guard."""

from typing import Any

import gradio as gr

from sdipc_jax.page.folder import MAX_BYTES
from sdipc_jax.page.guard import Guard
from sdipc_jax.page.markup import STYLE
from sdipc_jax.page.service import Service
from sdipc_jax.page.web.api import make_api
from sdipc_jax.page.web.blocks import make_blocks


def make_application(service: Service, hosts: frozenset[str] | None) -> Any:
    """The ASGI application of a service.

    Args:
        hosts: what requests may call this machine; anything if None.
    """
    # Gradio's own fonts would be asked for elsewhere.
    theme = gr.themes.Default(
        primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    )
    # Enough contrast for everybody.
    theme = theme.set(
        body_text_color_subdued="*neutral_600",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
    )
    application = gr.mount_gradio_app(
        make_api(service),
        make_blocks(service),
        path="/",
        theme=theme,
        css=STYLE,
        footer_links=[],
        max_file_size=MAX_BYTES,
        ssr_mode=False,
        show_error=False,
    )
    return Guard(application, hosts)

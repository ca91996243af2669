"""What people type for the command `page`."""

from typing import Annotated

from pydantic import Field

from sdipc_jax.settings import CommandSettings, Count, LocalPath, ProjectionSettings, SamplerSettings, choice


class PageSettings(SamplerSettings, ProjectionSettings, CommandSettings):
    """A page in the browser, and an HTTP API, for vary, edit, mix and text."""

    host: str = "127.0.0.1"
    """The address to listen at; by default this machine alone is answered, 0.0.0.0 answers everybody."""
    port: Annotated[int, Field(ge=0, le=65535)] = 7860
    """The port to listen at; 0 is any that is free."""
    batch_size: Count = 1
    """Pictures sampled at once: one is shown as soon as it is done, more are faster."""
    output_dir: Annotated[LocalPath | None, choice("FOLDER", "a new one, out/COMMAND-001 and so on")] = None
    """Where requests have their folders; nothing outside of it can be read through the page."""

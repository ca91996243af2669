"""What a request may ask for: one schema for the page and for the API, and the settings of a command made of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from sdipc_jax.errors import InputError
from sdipc_jax.settings import Alpha, Finite, NotNegative, SamplingSettings, Seed, Settings, Side, Text

# Of one request. What takes longer is better asked for on the command line.
MAX_PICTURES = 8
MAX_IMAGES = 16
MAX_STEPS = 200
MAX_RESULTS = 32
_LONGEST_TEXT = 2000

ShortText = Annotated[Text, Field(max_length=_LONGEST_TEXT)]


class Request(Settings):
    """What every function takes."""

    num_images: Annotated[int, Field(ge=1, le=MAX_IMAGES)] = 4
    """Pictures of each prompt."""
    seed: Seed = 0
    """Picture i of a prompt depends on the seed and on i alone."""
    steps: Annotated[int, Field(ge=1, le=MAX_STEPS)] | None = None
    """Sampling steps; the page's own if left out."""
    guidance_scale: NotNegative | None = None
    """How strongly the prompt is followed; the page's own if left out."""
    negative_prompt: ShortText | None = None
    """What guidance leads away from."""
    height: Side | None = None
    """In pixels, together with width: one of the sizes that the page offers."""
    width: Side | None = None
    """In pixels."""

    @model_validator(mode="after")
    def _both_sides(self) -> "Request":
        if (self.height is None) != (self.width is None):
            raise ValueError("found one of height and width, expected both or none: give the other too")
        return self


class VaryRequest(Request):
    """Variations of each picture."""


class EditRequest(Request):
    """The picture with the text's change."""

    text: Annotated[ShortText, Field(min_length=1)]
    """What to change, such as "at night"."""
    alpha: Alpha = 0.9
    """Weight of the text's end state."""


class MixRequest(Request):
    """Several pictures as one prompt."""

    weights: Annotated[tuple[Finite, ...], Field(max_length=MAX_PICTURES)] = ()
    """One for each picture, equal ones if left out; less than 0 leads away from it."""
    text: Annotated[ShortText, Field(min_length=1)] | None = None
    """What to change in the mix."""
    alpha: Alpha = 0.9
    """Weight of the text's end state."""


class TextRequest(Request):
    """Plain text to image."""

    text: Annotated[ShortText, Field(min_length=1)]
    """The prompt."""


@dataclass(frozen=True)
class Function:
    """A command as the page offers it.

    Attributes:
        request: what may be asked for.
        pictures: the fewest and the most files.
        inputs: the command's positional settings, from files and a text.
        whole: whether one file that cannot be used ends it all.
    """

    name: str
    request: type[Request]
    pictures: tuple[int, int]
    inputs: Callable[[tuple[Path, ...], str | None], dict[str, Any]]
    whole: bool = True

    def check_count(self, count: int) -> None:
        """Refuses too few or too many pictures.

        Raises:
            InputError: with what it takes.
        """
        fewest, most = self.pictures
        if fewest <= count <= most:
            return
        expected = f"{fewest}" if fewest == most else f"{fewest} to {most}"
        advice = "add some" if count < fewest else "take some away" if most else "take them away"
        raise InputError(f"found {count} pictures, expected {expected} for {self.name}: {advice}")

    def settings(self, kind: type[SamplingSettings], fixed: Settings, asked: Request, files: Sequence[Path]) -> Any:
        """The command's settings.

        Args:
            kind: the command's.
            fixed: the page's, which count for all requests that do not ask otherwise.
            files: where the pictures are.

        Raises:
            InputError: they do not fit each other.
        """
        prompts = len(files) if self.name == "vary" else 1
        if prompts * asked.num_images > MAX_RESULTS:
            raise InputError(
                f"num_images is {asked.num_images} for {prompts} pictures, expected at most {MAX_RESULTS} results: "
                "ask for fewer"
            )
        shared = kind.model_fields.keys() & type(fixed).model_fields.keys() - {"output_dir", "json_", "quiet"}
        values = {name: getattr(fixed, name) for name in shared} | asked.model_dump(exclude_unset=True)
        return kind(**values | self.inputs(tuple(files), values.pop("text", None)), quiet=True)


FUNCTIONS = {
    each.name: each
    for each in (
        Function("vary", VaryRequest, (1, MAX_PICTURES), lambda files, text: {"pictures": files}, whole=False),
        Function("edit", EditRequest, (1, 1), lambda files, text: {"picture": files[0], "text": text}),
        Function("mix", MixRequest, (2, MAX_PICTURES), lambda files, text: {"pictures": files, "text": text}),
        Function("text", TextRequest, (0, 0), lambda files, text: {"texts": (text,)}),
    )
}

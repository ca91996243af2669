"""What a row may say of how its pictures count, and a job for all of its rows."""

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from sdipc_jax.settings import Finite, Settings, Share

# A file may say one value as it is.
_ONE_OR_SEVERAL = BeforeValidator(lambda found: found if isinstance(found, list | tuple) else (found,))
Texts = Annotated[tuple[str, ...], _ONE_OR_SEVERAL]
Paths = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], _ONE_OR_SEVERAL]
Numbers = Annotated[tuple[Finite, ...], _ONE_OR_SEVERAL]
Shares = Annotated[tuple[Share, ...], _ONE_OR_SEVERAL]

# What is so where neither row nor job says it.
DEFAULTS: dict[str, Any] = {
    "mean": "direction",
    "without": (),
    "start": 0.0,
    "end": 1.0,
    "layers": "all",
    "strength": None,
    "pad": False,
    "control_scale": (1.0,),
    "control_start": (0.0,),
    "control_end": (1.0,),
}


class RowControls(Settings):
    """Settings of a row that a job may have too."""

    mean: Literal["plain", "direction"] | None = None
    """Of several pictures, or of what projecting out leaves of one: `direction`, the default, gives a prompt's length
    again, which `plain` does not."""
    without: Texts | None = None
    """Texts to project out of the pictures' mean."""
    start: Share | None = None
    """From which share of the steps on the picture counts; elsewhere the text does, or the empty one."""
    end: Share | None = None
    """Up to which share of the steps it counts."""
    layers: str | None = None
    """In which layers of cross-attention, such as `mid,up.1.0`, `style` or `composition`."""
    strength: Annotated[float, Field(gt=0, le=1)] | None = None
    """The share of the steps that are taken from init_image, or from the picture itself. Each number of steps that is
    left is compiled once."""
    pad: bool | None = None
    """Keep the whole picture that is started from in the middle, and paint what it leaves of the size."""
    control_scale: Numbers | None = None
    """How much each ControlNet counts: one number for all, or one for each."""
    control_start: Shares | None = None
    """From which share of the steps on, likewise."""
    control_end: Shares | None = None
    """Up to which share of the steps, likewise."""

    @model_validator(mode="after")
    def _some_steps(self) -> Self:
        start, end = (DEFAULTS[name] if (own := getattr(self, name)) is None else own for name in ("start", "end"))
        if start >= end:
            raise ValueError(f"start is {start} and end {end}, expected start < end: correct them")
        return self

    def completed(self, other: "RowControls") -> dict[str, Any]:
        """Every setting: one's own, else the other's, else what is so where nobody says it."""
        given = [each.model_dump(include=set(DEFAULTS), exclude_none=True) for each in (other, self)]
        return DEFAULTS | given[0] | given[1]

"""How to tune: what trains, on which loss, at which rate."""

from math import ceil
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from sdipc_jax.errors import InputError
from sdipc_jax.settings import Count, NotNegative, Positive, Seed, Settings

Variant = Literal["both", "prompts", "kv", "fc", "fc_init"]

_REAL_PROMPTS = 50
# Customising differs from fine-tuning in these alone (arXiv 2305.12716, section 4.3).
_CT = {"learning_rate": 5e-6, "schedule": "constant", "steps": 30, "text_weight": 0.0}


class TuningSettings(Settings):
    """The paper's SD-IPC-FT, and with mode `ct` its SD-IPC-CT; defaults are the paper's, else method of the field."""

    mode: Literal["ft", "ct"] = "ft"
    """Fine-tuning on about a hundred pictures, or customising on a handful; it decides the defaults below."""
    variant: Variant = "both"
    """What trains: the UNet's cross-attention keys and values and deep prompts (`both`), one of them (`prompts`, `kv`;
    the paper's C and U), or one layer in the place of the pseudo-inverse, from a random start (`fc`) or from the
    pseudo-inverse (`fc_init`)."""
    prompt_length: Count | None = None
    """Deep prompts a layer; by default 50, but at most a fifth of the patches."""
    overwrite_first_layer: bool = False
    """The first layer's prompts replace patches, as in the authors' released code, instead of being inserted."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """On the deep prompts."""
    text_weight: NotNegative = 1.0
    """Of the loss under the caption (eq. 9); 0 in mode `ct`."""
    ab_training: bool = False
    """The target is another picture of the same class."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """AdamW, or plain gradient descent for comparisons."""
    learning_rate: Positive = 1e-5
    """5e-6 in mode `ct`."""
    prompt_learning_rate: Positive | None = None
    """Of the deep prompts; as the others if left out."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Down to 0 over all steps, or not at all, which mode `ct` does."""
    weight_decay: NotNegative = 1e-2
    """Decoupled, on every trained weight."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """AdamW's."""
    clip_norm: Positive | None = 1.0
    """The gradients' joint norm is cut to this."""
    accumulate: Count = 1
    """Batches whose gradients are averaged for one update."""
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay of the average of the weights that is the result; 0 takes the last weights."""
    batch_size: Count = 4
    """Pictures a batch."""
    steps: Count | None = None
    """Updates; by default as many as `epochs` asks for, and 30 in mode `ct`."""
    epochs: Count = 100
    """How often every picture is seen, where `steps` is left out."""
    seed: Seed = 0
    """Of the new weights."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of the arithmetic; as the checkpoint was loaded if left out. What trains is float32 in any case, so load the
    checkpoint in float32."""
    rematerialise: bool = False
    """Compute activations again in the backward pass instead of keeping them: less memory, more time."""

    @model_validator(mode="before")
    @classmethod
    def _of_the_mode(cls, values: Any) -> Any:
        return _CT | values if isinstance(values, dict) and values.get("mode") == "ct" else values

    @property
    def trains_prompts(self) -> bool:
        """Whether deep prompts train, so that the vision tower is part of every step."""
        return self.variant in ("both", "prompts")

    @property
    def trains_kv(self) -> bool:
        """Whether the UNet's cross-attention trains."""
        return self.variant in ("both", "kv")

    def for_pictures(self, count: int) -> Self:
        """These settings with `steps` worked out for a number of pictures."""
        steps = self.steps or ceil(self.epochs * count / (self.batch_size * self.accumulate))
        return self.model_copy(update={"steps": steps})

    def prompts(self, patches: int) -> int:
        """Deep prompts a layer for a vision tower with this many patches.

        Raises:
            InputError: there would be more of them than patches to overwrite.

        >>> TuningSettings().prompts(256), TuningSettings().prompts(64)
        (50, 12)
        """
        length = self.prompt_length or max(1, min(_REAL_PROMPTS, patches // 5))
        if self.overwrite_first_layer and length > patches:
            raise InputError(f"prompt_length is {length}, expected at most the {patches} patches that are overwritten")
        return length

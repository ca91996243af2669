"""The settings that people type: one schema each for Python, the command line and files."""

import re
import unicodedata
from abc import abstractmethod
from collections.abc import Iterable
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import pydantic
import tyro
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from sdipc_jax.errors import InputError, shortened
from sdipc_jax.spelling import nearest

# `checkpoint` is the class of the scheduler's file, as diffusers runs it.
Fit = Literal["crop", "pad", "squash"]
SamplerName = Literal["ddim", "pndm", "euler", "euler-a", "dpm++2m", "lcm", "tcd", "checkpoint"]
SafetyName = Literal["auto", "on", "off"]

Finite = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
# Beyond these, as far as float32 tells, there is the text alone, or its opposite.
Alpha = Annotated[float, Field(ge=-1000, le=1000, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
# More than fits any machine, and so a slip of the finger.
Side = Annotated[int, Field(ge=1, le=8192)]
# As many as three digits number.
NumImages = Annotated[int, Field(ge=1, le=1000)]
Share = Annotated[float, Field(ge=0, le=1)]


def _without_controls(text: str) -> str:
    # People's own texts hold tabulators and ends of lines, of which \x85 is one.
    allowed = "\t\n\r\x85"
    found = next((letter for letter in text if unicodedata.category(letter) == "Cc" and letter not in allowed), None)
    if found is not None:
        raise ValueError(f"no control characters, of which it has {found!r}")
    return text


# What a person has written.
Text = Annotated[str, AfterValidator(_without_controls)]


def _in_order(interval: tuple[float, float]) -> tuple[float, float]:
    if interval[0] > interval[1]:
        raise ValueError("the lower share first")
    return interval


# Two numbers, or as they are typed: "0.2,0.8".
Interval = Annotated[
    tuple[Share, Share],
    BeforeValidator(lambda value: value.split(",") if isinstance(value, str) else value),
    AfterValidator(_in_order),
]


def _local(path: Path) -> Path:
    # A Path has made one slash of two.
    if re.match(r"[a-z][a-z0-9+.-]+:/", str(path)):
        raise ValueError("a folder of this machine, such as one that is mounted")
    return path


# Where only `batch` takes addresses.
LocalPath = Annotated[Path, AfterValidator(_local)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]


def choice(metavar: str, default: str = "the checkpoint's own") -> Any:
    """Help for an option that may be left out. What is typed is passed on as it is: the schema below judges it."""
    return tyro.conf.arg(constructor=str, metavar=metavar, help_behavior_hint=f"(default: {default})")


def _several(metavar: str, default: str) -> Any:
    """Help for an option of several values; a file may say one as it is."""
    hint = tyro.conf.arg(metavar=f"{metavar}...", help_behavior_hint=f"(default: {default})")
    return BeforeValidator(lambda found: found if isinstance(found, list | tuple) else (found,)), hint


class Settings(BaseModel):
    """Unknown keys and values out of range are refused in one line, wherever they come from."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, defer_build=True)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except pydantic.ValidationError as error:
            raise InputError(_describe(error, type(self).model_fields)) from None


# How a name in a file becomes something else.
READ_BY_YAML = "YAML reads no, yes, on, off, numbers and dates as such: put each in quotes, such as 'no' or '007'"


def _describe(error: pydantic.ValidationError, known: Iterable[str]) -> str:
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"]).removesuffix("_")
    if first["type"] == "extra_forbidden":
        meant = nearest(name, known)
        return f"{name} is not a setting: {f'did you mean {meant}?' if meant else 'check its spelling'}"
    if first["type"] == "missing":
        return f"{name} is missing: give it"
    if first["type"] == "too_short":
        return f"found no {name}, expected at least one: name it"
    found = str(first["input"]) if isinstance(first["input"], Path) else first["input"]
    expected = first["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    if first["type"] in ("string_type", "path_type") and isinstance(found, (bool, int, float, date)):
        expected += f", since {READ_BY_YAML}"
    # A rule about several settings has no name, and says it all.
    return f"{name} is {shortened(repr(found))}, expected {shortened(expected)}: correct it" if name else expected


BOTH_INTERVALS = "found both guidance_interval and cache_interval, expected one of them: leave the other out"


class Defaults(Settings):
    """What a checkpoint asks for where the user does not (`sdipc.json` in its folder)."""

    steps: Count = 50
    guidance_scale: NotNegative = 7.5
    guidance_interval: Interval | None = None
    cache_interval: Count = 1
    sampler: SamplerName = "ddim"
    cutoff: NotNegative = 0.3
    scale: Positive | None = None
    height: Side
    width: Side

    @model_validator(mode="after")
    def _one_interval(self) -> Self:
        if self.guidance_interval is not None and self.cache_interval > 1:
            raise ValueError(BOTH_INTERVALS)
        return self


class CommandSettings(Settings):
    """What every command takes."""

    json_: Annotated[bool, tyro.conf.arg(name="json")] = False
    """Print one JSON object on stdout and nothing else there."""
    quiet: bool = False
    """Print errors only."""
    offline: bool = False
    """Never use the network."""


class ResultSettings(CommandSettings):
    """What becomes of results that are there already."""

    overwrite: bool = False
    """Replace the results of another run."""

    @property
    def folder(self) -> Path:
        """Where results go; the command line has chosen a folder where none was named."""
        return getattr(self, "output_dir", None) or OUT

    @property
    @abstractmethod
    def result(self) -> tuple[Path, str]:
        """The file that shows that there are results already, and the option that decides where it is."""


class LoraSettings(Settings):
    """What is fused into the weights."""

    lora: Annotated[tuple[str, ...], *_several("FILE_OR_ID", "none")] = ()
    """LoRA, LoCon, LoHa, LoKr and DoRA files (safetensors) or ids on the hub, to fuse into weights in this order."""
    lora_scale: Annotated[tuple[Finite, ...], *_several("FLOAT", "1")] = (1.0,)
    """How much of each is fused: one number for all, or one for each."""
    lora_partial: bool = False
    """Leave out what fits nothing in the checkpoint instead of refusing the file."""

    @model_validator(mode="after")
    def _one_scale_each(self) -> Self:
        if len(self.lora_scale) not in (1, len(self.lora)):
            raise ValueError(
                f"found {len(self.lora_scale)} values of lora_scale and {len(self.lora)} of lora, expected one scale "
                "for all or one for each: correct them"
            )
        return self

    @property
    def scales(self) -> tuple[float, ...]:
        """One for each file."""
        return self.lora_scale * len(self.lora) if len(self.lora_scale) == 1 else self.lora_scale


class CheckpointSettings(LoraSettings):
    """Which weights, and how exact."""

    model: str = "embedded"
    """The checkpoint: `embedded`, a name that `sdipc models` lists, an id on the hub (ORG/NAME[@REVISION]), a diffusers
    pipeline folder, or a single .safetensors file."""
    revision: Annotated[str | None, choice("BRANCH_TAG_OR_COMMIT", "the newest")] = None
    """The branch, tag or commit of the checkpoint on the hub."""
    clip: Annotated[Path | None, choice("FOLDER_ID_OR_FILE", "clip/ in the folder, else its family's")] = None
    """The CLIP that the checkpoint was trained with."""
    vae: Annotated[Path | None, choice("FOLDER_ID_OR_FILE")] = None
    """Another VAE, or the one that a single file lacks."""
    text_encoder: Annotated[Path | None, choice("FOLDER_ID_OR_FILE")] = None
    """Another text encoder, or the one that a single file lacks."""
    prediction_type: Annotated[Literal["epsilon", "v_prediction"] | None, choice("epsilon|v_prediction")] = None
    """What the UNet predicts; a single file does not always tell."""
    ema: bool = False
    """Take the moving average of the UNet's weights that a single file has beside them."""
    tuned: Annotated[Path | None, choice("FILE", "the checkpoint as it is")] = None
    """A tuning's delta file (safetensors), made for this checkpoint."""
    embedding: Annotated[tuple[str, ...], *_several("FILE", "none")] = ()
    """Embeddings (safetensors) that are words of texts, called as their files without the ending."""
    clip_skip: Annotated[int, Field(ge=0)] = 0
    """Layers of the text encoder that are left out before its final norm, for texts that guidance leads to; 1 is the
    layer before the last."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """The type of the weights and the arithmetic of UNet, CLIP and VAE; float16 is for cards without bfloat16."""
    vae_dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        choice("float32|bfloat16|float16", "dtype; float32 if the VAE asks so, in SDXL or with float16"),
    ] = None
    """The type of the VAE's alone."""


class ProjectionSettings(CheckpointSettings):
    """How a picture's features become a text state (eq. 6)."""

    cutoff: Annotated[NotNegative | None, choice("FLOAT", "the checkpoint's own, else 0.3")] = None
    """Singular values of the text projection below this count as 0."""
    keep_fraction: Annotated[Annotated[float, Field(gt=0, le=1)] | None, choice("FLOAT", "the cut-off decides")] = None
    """Keep this share of the singular values instead of a cut-off."""
    scale: Annotated[Positive | None, choice("FLOAT", "the checkpoint's own, 27.5 for OpenAI's ViT-L/14")] = None
    """Length of a text state; measured over built-in captions where the checkpoint says nothing."""
    mode: Literal["tspace", "cspace"] = "tspace"
    """Where that length is measured: tspace as the authors' code, cspace as eq. 6 is written."""
    fit: Fit = "crop"
    """What the tower sees of a picture that is not square: its middle, or all of it, with bars or out of proportion."""
    calibrate: Literal["auto", "pinv", "ridge"] = "auto"
    """pinv: the paper's inverse of the text projection; ridge: a map fitted to captions, for any CLIP and checkpoint;
    auto: the inverse for Stable Diffusion 1.x, else the map."""
    ridge: Annotated[NotNegative | None, choice("FLOAT", "0.3 for the text tower's last layer, else 1")] = None
    """How far the fitted map counts directions as 0 in which captions hardly vary."""
    calibrate_captions: Annotated[Path | None, choice("FILE", "4,000 built-in ones")] = None
    """Text file with the captions to fit the map to, one a line."""
    calibrate_pictures: Annotated[Path | None, choice("FOLDER", "none")] = None
    """At least 30 pictures of many kinds: their mean is put onto the captions', which lie apart from pictures."""
    after_end: Literal["repeat", "own"] = "repeat"
    """What stands after the end token: the vector repeated, or each place's own fitted state."""

    @model_validator(mode="after")
    def _one_rule(self) -> Self:
        if self.cutoff is not None and self.keep_fraction is not None:
            raise ValueError("found both cutoff and keep_fraction, expected one of them: leave the other out")
        return self

    @property
    def of_inverse(self) -> list[str]:
        """What is typed that the inverse alone has."""
        return self._typed("cutoff", "keep_fraction", "mode")

    @property
    def of_map(self) -> list[str]:
        """What is typed that a fitted map alone has."""
        return self._typed("ridge", "calibrate_captions", "after_end")

    def _typed(self, *names: str) -> list[str]:
        return [name for name in names if getattr(self, name) != type(self).model_fields[name].default]


# Where runs have their folders.
OUT = Path("out")
# The file of a run's folder that has a line for each picture.
MANIFEST = "manifest.jsonl"
# What `fast` stands for.
FAST: dict[str, Any] = {"steps": 12, "sampler": "dpm++2m", "cache_interval": 2, "guidance_interval": None}


class WordingSettings(Settings):
    """How texts are read."""

    truncate: bool = False
    """Cut texts that are too long instead of refusing them."""
    long_text: Annotated[Literal["chunk"] | None, choice("chunk", "refused")] = None
    """Read a text that is too long in chunks of 75 tokens, each encoded on its own."""
    prompt_weights: bool = False
    """Read (word:1.3), (word) and [word] as weights of what is in brackets."""

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if self.truncate and self.long_text is not None:
            raise ValueError("found both truncate and long_text, expected one of them: leave the other out")
        return self

    @property
    def wording(self) -> dict[str, Any]:
        """How texts are read, as `read_texts` takes it."""
        return {name: getattr(self, name) for name in WordingSettings.model_fields}


class SamplerSettings(WordingSettings, CheckpointSettings):
    """How pictures are sampled from a prompt."""

    seed: Seed = 0
    """What noise is drawn from, 0 to 4294967295; picture i of a prompt depends on the seed and on i alone."""
    steps: Annotated[Count | None, choice("INT", "the checkpoint's own, else 50")] = None
    """How many steps sampling takes."""
    guidance_scale: Annotated[NotNegative | None, choice("FLOAT", "the checkpoint's own, else 7.5")] = None
    """How strongly the prompt is followed; 1 or less is no guidance."""
    guidance_interval: Annotated[Interval | None, choice("LOW,HIGH", "the checkpoint's own, else always")] = None
    """Lowest and highest timestep, as shares of all, at which guidance acts; the others take half of the work."""
    cache_interval: Annotated[Count | None, choice("INT", "the checkpoint's own, else 1")] = None
    """Run the whole UNet at every so many evaluations, and its outermost layers alone at the others (DeepCache)."""
    sampler: Annotated[
        SamplerName | None, choice("|".join(get_args(SamplerName)), "the checkpoint's own, else ddim")
    ] = None
    """The sampling method; `checkpoint` is the class of the checkpoint's scheduler."""
    height: Annotated[Side | None, choice("INT")] = None
    """The height of the pictures, in pixels."""
    width: Annotated[Side | None, choice("INT")] = None
    """Their width, in pixels."""
    negative_prompt: Annotated[Text | None, choice("TEXT", "nothing, which is the empty text or SDXL's zeros")] = None
    """What guidance leads away from."""
    eta: Annotated[float, Field(ge=0, le=1)] = 0.0
    """DDIM's and TCD's share of fresh noise; TCD's authors use 0.3, and 1 for a single step."""
    karras: bool = False
    """Karras et al.'s noise levels, for dpm++2m."""
    fast: bool = False
    """12 steps of dpm++2m, deep features kept for every second, where nothing else is asked for: another picture."""
    safety: SafetyName = "auto"
    """The safety checker: `auto` is on if the checkpoint has one, `on` refuses those without, `off` leaves it out."""


class ParallelSettings(Settings):
    """Which devices work together, and how the processes of several hosts find each other."""

    mesh: Annotated[str | None, choice("data=N", "all devices of all processes")] = None
    """Divide the work over N devices."""
    distributed: bool = False
    """Be one process of several: the cluster is detected (Slurm, Open MPI, Cloud TPU, Kubernetes)."""
    coordinator_address: Annotated[str | None, choice("HOST:PORT", "detected")] = None
    """The address of process 0; with num_processes and process_id instead of detection."""
    num_processes: Annotated[Count | None, choice("INT", "detected")] = None
    """How many processes the whole job has."""
    process_id: Annotated[Annotated[int, Field(ge=0)] | None, choice("INT", "detected")] = None
    """Which of them this one is, from 0."""
    initialization_timeout: Count = 300
    """Within how many seconds all processes must join."""
    heartbeat_timeout: Count = 100
    """After how many seconds without a sign of life a process counts as dead, and the others end."""

    @property
    def is_one_of_several(self) -> bool:
        """Whether other processes are to be joined."""
        return self.distributed or (self.coordinator_address, self.num_processes, self.process_id) != (None,) * 3


def _pair(found: tuple[int, ...]) -> tuple[int, ...]:
    if len(found) not in (0, 2):
        raise ValueError("two numbers")
    return found


def _two(metavar: str, default: str) -> Any:
    """Two numbers, or none where nothing is said."""
    hint = tyro.conf.arg(metavar=metavar, help_behavior_hint=f"(default: {default})")
    return AfterValidator(_pair), hint


class SizeSettings(Settings):
    """What SDXL is told of sizes, in pixels: as if its picture had been cut out of a larger one."""

    original_size: Annotated[tuple[Count, ...], *_two("HEIGHT WIDTH", "the picture's own")] = ()
    """Height and width of what SDXL is to take the picture to be cut out of."""
    crop: Annotated[tuple[Annotated[int, Field(ge=0)], ...], *_two("TOP LEFT", "0 0")] = ()
    """Of SDXL's picture: top and left of that cut."""
    target_size: Annotated[tuple[Count, ...], *_two("HEIGHT WIDTH", "the picture's own")] = ()
    """Of SDXL's picture: height and width of what was left."""


class SamplingSettings(SamplerSettings, SizeSettings, ParallelSettings, ResultSettings):
    """How much is sampled at once, and from which noise."""

    num_images: NumImages = 4
    """Pictures for each prompt, up to 1000."""
    latents: Annotated[Path | None, choice("FILE", "drawn from the seed")] = None
    """Safetensors file with the noise to start from: `latents`, float32, (num_images, C, height/f, width/f)."""
    batch_size: Count = 4
    """Pictures sampled at once on each device; more is faster and takes more memory."""
    output_dir: Annotated[LocalPath | None, choice("FOLDER", "a new one, out/COMMAND-001 and so on")] = None
    """Where the pictures, sheet.png and manifest.jsonl go."""

    @property
    def result(self) -> tuple[Path, str]:
        return self.folder / MANIFEST, "--output-dir"

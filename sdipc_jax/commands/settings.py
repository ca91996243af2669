"""What people type for each command."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

import tyro
from pydantic import Field, model_validator

from sdipc_jax.settings import (
    Alpha,
    CheckpointSettings,
    CommandSettings,
    Count,
    Finite,
    Fit,
    LocalPath,
    LoraSettings,
    NumImages,
    ParallelSettings,
    Positive,
    ProjectionSettings,
    ResultSettings,
    SamplerSettings,
    SamplingSettings,
    Settings,
    Share,
    Text,
    WordingSettings,
    choice,
)

_PICTURES = tyro.conf.arg(metavar="PICTURE...", help_behavior_hint="")
_TEXTS = tyro.conf.arg(metavar="TEXT...", help_behavior_hint="")


def _files(metavar: str, default: str) -> Any:
    """Help for an option that takes several values, or none."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=f"(default: {default})")


class ControlSettings(Settings):
    """Where, when and in which layers a picture counts; elsewhere the text does, or the empty one."""

    start: Share = 0.0
    """From which share of the steps on the picture counts."""
    end: Share = 1.0
    """Up to which share of the steps it counts."""
    layers: str = "all"
    """In which layers of cross-attention, such as `mid,up.1.0`; a name stands for all that begin with it; `style` and
    `composition` for those that give the colors and the layout."""
    mask: Annotated[tuple[Path, ...], _files("MASK...", "everywhere")] = ()
    """Pictures that are white where the picture counts, one for all or one for each."""
    negative_picture: Annotated[tuple[Path, ...], _files("PICTURE...", "none")] = ()
    """Pictures that guidance leads away from, in the place of the negative prompt."""

    @model_validator(mode="after")
    def _some_steps(self) -> Self:
        if self.start >= self.end:
            raise ValueError(f"start is {self.start} and end {self.end}, expected start < end: correct them")
        return self


class StartSettings(Settings):
    """What sampling starts from in the place of noise alone."""

    init_image: Annotated[Path | None, choice("FILE", "noise alone")] = None
    """A picture to start from; with vary and edit, --strength alone starts from the picture itself."""
    strength: Annotated[Annotated[float, Field(gt=0, le=1)] | None, choice("FLOAT", "1 with a mask")] = None
    """The share of the steps that are taken: little changes little of the picture that is started from."""
    mask_image: Annotated[Path | None, choice("FILE", "all of it")] = None
    """A picture that is white where the picture is redone."""
    pad: bool = False
    """Keep the whole picture in the middle, and paint what it leaves of the size (outpainting)."""

    @property
    def starts(self) -> bool:
        """Whether a picture is started from."""
        return any(getattr(self, name) for name in StartSettings.model_fields)

    @property
    def share_taken(self) -> float:
        """Of the steps."""
        return 1.0 if self.strength is None else self.strength

    @model_validator(mode="after")
    def _something_to_redo(self) -> Self:
        if self.init_image is not None and self.strength is None and self.mask_image is None and not self.pad:
            raise ValueError(
                "found init_image without strength, expected how much is redone: give --strength, such as 0.6"
            )
        if self.mask_image is not None and self.pad:
            raise ValueError("found both mask_image and pad, expected one of them: leave the other out")
        return self


class ControlNetSettings(Settings):
    """Networks that see a picture of their own: edges, depth, a pose."""

    controlnet: Annotated[tuple[str, ...], _files("FOLDER_ID_OR_FILE...", "none")] = ()
    """ControlNets that were made for the checkpoint: diffusers' folders, ids on the hub, safetensors files."""
    control_image: Annotated[tuple[Path, ...], _files("FILE...", "none")] = ()
    """What each of them is shown, taken as it is, at the size of the results."""
    control_detector: Annotated[tuple[Literal["none", "canny"], ...], _files("none|canny...", "none")] = ("none",)
    """What finds in a photograph what the network is to be shown: its edges; one for all, or one for each."""
    control_scale: Annotated[tuple[Finite, ...], _files("FLOAT...", "1")] = (1.0,)
    """How much each counts: one number for all, or one for each."""
    control_start: Annotated[tuple[Share, ...], _files("FLOAT...", "0")] = (0.0,)
    """From which share of the steps on, likewise."""
    control_end: Annotated[tuple[Share, ...], _files("FLOAT...", "1")] = (1.0,)
    """Up to which share of the steps, likewise."""

    @model_validator(mode="after")
    def _one_control_each(self) -> Self:
        count = len(self.controlnet)
        if len(self.control_image) != count:
            raise ValueError(
                f"found {len(self.control_image)} values of control_image and {count} of controlnet, expected one "
                "picture for each network: correct them"
            )
        for name in ("control_detector", "control_scale", "control_start", "control_end"):
            if (found := len(getattr(self, name))) not in (1, count):
                raise ValueError(f"found {found} values of {name}, expected one, or one for each of {count} networks")
        for start, end in zip(self.each("control_start"), self.each("control_end"), strict=True):
            if start >= end:
                raise ValueError(f"control_start is {start} and control_end {end}, expected start < end: correct them")
        return self

    def each(self, name: str) -> tuple[Any, ...]:
        """A setting's value for each network."""
        found = getattr(self, name)
        return found * len(self.controlnet) if len(found) == 1 else found


class AttentionSettings(Settings):
    """Whether and where cross-attention is looked at."""

    attention_maps: bool = False
    """Also show where the first picture's places look at each token of its prompt, as NAME-attention.png."""
    attention_steps: Annotated[tuple[Share, ...], _files("FLOAT...", "0 0.5 1"), Field(min_length=1)] = (0.0, 0.5, 1.0)
    """At which shares of the steps: 0 the first, 1 the last."""
    attention_layers: str = "all"
    """In which layers, named as those of --layers; the mean over them is shown."""


class WordlessSettings(AttentionSettings):
    """What can be done with the attention of a text's words."""

    zero_words: bool = False
    """Set the attention weights of the text's words to 0, of all but its start and end (Fig. 2)."""


class VarySettings(
    SamplingSettings, ProjectionSettings, ControlSettings, StartSettings, ControlNetSettings, AttentionSettings
):
    """Variations of each picture."""

    pictures: Annotated[tuple[Path, ...], tyro.conf.Positional, _PICTURES, Field(min_length=1)]
    """Picture files (JPEG, PNG, WebP, GIF, BMP, AVIF), or folders of them."""


class EditSettings(
    SamplingSettings, ProjectionSettings, ControlSettings, StartSettings, ControlNetSettings, WordlessSettings
):
    """The picture with the text's change."""

    picture: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="PICTURE")]
    """A picture file."""
    text: Annotated[Text, tyro.conf.Positional, tyro.conf.arg(metavar="TEXT")]
    """What to change, such as "at night"."""
    alpha: Alpha = 0.9
    """Weight of the text's end state; the paper's 0.9, its authors' code has 0.6."""


class MixSettings(SamplingSettings, ProjectionSettings, ControlSettings, StartSettings, ControlNetSettings):
    """Several pictures as one prompt: their mean, or each in its own place."""

    pictures: Annotated[tuple[Path, ...], tyro.conf.Positional, _PICTURES, Field(min_length=1)]
    """Picture files: JPEG, PNG, WebP, GIF, BMP, AVIF."""
    weights: Annotated[tuple[Finite, ...], _files("FLOAT...", "equal ones")] = ()
    """One for each picture; less than 0 leads away from it. With masks: how much each counts in its place."""
    mean: Literal["direction", "plain"] = "direction"
    """`direction` gives the mean a prompt's length again, which `plain` does not."""
    without: Annotated[tuple[str, ...], _files("TEXT_OR_PICTURE...", "nothing")] = ()
    """What to project out of the mean: files of pictures, or texts."""
    text: Annotated[Text | None, choice("TEXT", "none")] = None
    """What to change in the mix (eq. 8)."""
    alpha: Alpha = 0.9
    """Weight of the text's end state."""

    @model_validator(mode="after")
    def _one_each(self) -> Self:
        count = len(self.pictures)
        if self.weights and len(self.weights) != count:
            raise ValueError(f"found {len(self.weights)} weights for {count} pictures, expected as many: correct them")
        if len(self.mask) not in (0, count):
            raise ValueError(
                f"found {len(self.mask)} masks for {count} pictures, expected as many or none: correct them"
            )
        if self.mask and self.without:
            raise ValueError("found both mask and without, expected one of them: leave the other out")
        return self


class InterpolateSettings(SamplingSettings, ProjectionSettings, ControlNetSettings):
    """The way from one picture or text to another, as pictures, a strip and an animation."""

    first: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PICTURE_OR_TEXT")]
    """Where the way begins: a file, or a text."""
    second: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PICTURE_OR_TEXT")]
    """Where it ends."""
    frames: Annotated[int, Field(ge=2, le=1000)] = 8
    """Pictures on the way, both ends among them; all from the same noise."""
    num_images: NumImages = 1
    """Ways, each from noise of its own."""
    frame_seconds: Positive = 0.15
    """How long the animation shows each picture."""


class TextSettings(SamplingSettings, StartSettings, ControlNetSettings, WordlessSettings):
    """Plain text to image, with the same samplers."""

    texts: Annotated[tuple[Text, ...], tyro.conf.Positional, _TEXTS, Field(min_length=1)]
    """Prompts."""


class PromptSettings(WordingSettings, ProjectionSettings, ResultSettings):
    """Pictures as prompts, in a file: `prompt_embeds` for diffusers' argument of that name, and `image_vectors`."""

    pictures: Annotated[tuple[Path, ...], tyro.conf.Positional, _PICTURES, Field(min_length=1)]
    """Picture files (JPEG, PNG, WebP, GIF, BMP, AVIF), or folders of them."""
    output: Annotated[Path, tyro.conf.arg(metavar="FILE")]
    """The safetensors file to write."""
    text: Annotated[Text | None, choice("TEXT", "none")] = None
    """What to change in the pictures (eq. 8)."""
    alpha: Alpha = 0.9
    """Weight of the text's end state."""

    @property
    def result(self) -> tuple[Path, str]:
        return self.output, "--output"


class JointSettings(CheckpointSettings, CommandSettings):
    """What the commands take that compare pictures and texts in CLIP's joint space."""

    fit: Fit = "crop"
    """What the tower sees of a picture that is not square: its middle, or all of it, with bars or out of proportion."""
    top: Count = 10
    """How many to tell."""


class WordsSettings(JointSettings):
    """Words for each picture: the nearest ones, and a sum of a few that comes near to it."""

    pictures: Annotated[tuple[Path, ...], tyro.conf.Positional, _PICTURES, Field(min_length=1)]
    """Picture files, or folders of them."""
    bank: Annotated[Path | None, choice("FILE", "3,000 built-in ones")] = None
    """Text file with the words or phrases to choose from, one a line."""
    mix: Annotated[int, Field(ge=0, le=100)] = 5
    """Words in the sum; 0 leaves it out."""
    against: Annotated[Path | None, choice("PICTURE", "none")] = None
    """Tell instead what each picture has more and less of than this one."""
    mean_pictures: Annotated[Path | None, choice("FOLDER", "the pictures themselves if there are 30")] = None
    """At least 30 pictures of many kinds, whose mean is taken from a picture before words are added up."""


class SearchSettings(JointSettings):
    """The pictures that are nearest to a picture or a text."""

    query: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PICTURE_OR_TEXT")]
    """A file, or a text."""
    where: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER_OR_VECTORS")]
    """A folder of pictures, a folder that `batch` wrote with `vectors: true`, or a file that `prompt` wrote."""


class CompileSettings(SamplerSettings, ControlSettings, StartSettings, ControlNetSettings, CommandSettings):
    """What vary, edit and text run on one device, compiled ahead of their first use; no weights are read."""

    batch_size: Count = 4
    """Pictures sampled at once: theirs, but no more than they make in all."""
    mixed: Count = 1
    """With --mask: how many pictures `mix` puts together, each in its own place."""

    @model_validator(mode="after")
    def _only_with_masks(self) -> Self:
        if self.mixed > 1 and not self.mask:
            raise ValueError("found mixed without mask, expected both or neither: add --mask")
        return self


class SpectrumSettings(ProjectionSettings, ResultSettings):
    """The singular values of the text projection, what the cut-off keeps of them, and the length of text states."""

    picture: Annotated[Path | None, choice("PICTURE", "none")] = None
    """Also tell how much of this picture's energy is kept."""
    compare: Annotated[Path | None, choice("FOLDER", "none")] = None
    """Captioned pictures: measure the inverse, its relatives and the fitted map on them, into compare.json."""
    output_dir: Annotated[LocalPath | None, choice("FOLDER", "a new one, out/COMMAND-001 and so on")] = None
    """Where spectrum.png goes, and with --compare compare.json."""

    @property
    def result(self) -> tuple[Path, str]:
        return self.folder / "spectrum.png", "--output-dir"


class TuneSettings(ParallelSettings, CommandSettings):
    """What both ways to tune take."""

    config: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CONFIG.yaml")]
    """The run's file; configs/ has examples and docs/settings.md the keys."""
    changes: Annotated[
        tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="KEY=VALUE...", help_behavior_hint="")
    ] = ()
    """Settings that count more than the file's."""
    allow_change: Annotated[tuple[str, ...], tyro.conf.arg(metavar="KEY...", help_behavior_hint="(default: none)")] = ()
    """Go on although these settings have changed since the checkpoint."""


class FtSettings(TuneSettings):
    """Fine-tuning on about a hundred pictures (SD-IPC-FT); run it again, and it goes on where it stopped."""


class CtSettings(TuneSettings):
    """Customising on a handful of pictures (SD-IPC-CT); run it again, and it goes on where it stopped."""


class TunedSettings(LoraSettings, CommandSettings):
    """A tuned checkpoint as a folder of its own, which diffusers opens, with its CLIP in clip/."""

    delta: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="TUNED.safetensors")]
    """What tuning wrote."""
    output: Annotated[Path, tyro.conf.arg(metavar="FOLDER")]
    """The folder to make."""
    model: str = "embedded"
    """The checkpoint that was tuned: `embedded`, or a diffusers pipeline folder."""
    clip: Annotated[Path | None, choice("FOLDER", "clip/ in the checkpoint's folder")] = None
    """Folder of the CLIP that the checkpoint was trained with."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Of the stored weights."""


class ModelsSettings(CommandSettings):
    """The checkpoints that have names here, their sizes and licences, and which are in the cache; or fetches some."""

    action: Annotated[Literal["list", "fetch"], tyro.conf.Positional] = "list"
    """What to do."""
    names: Annotated[
        tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="NAME...", help_behavior_hint="")
    ] = ()
    """What to fetch and verify: names of the list, or ids on the hub (ORG/NAME[@REVISION])."""

    @model_validator(mode="after")
    def _names(self) -> Self:
        if (self.action == "fetch") != bool(self.names):
            raise ValueError("found no name to fetch, expected `sdipc models fetch NAME`: see `sdipc models`")
        return self


class ExportSettings(CheckpointSettings, CommandSettings):
    """A checkpoint as it was loaded, with LoRAs and tuning in its weights: a diffusers folder, or one file."""

    output: Annotated[Path, tyro.conf.arg(metavar="FOLDER|FILE.safetensors")]
    """What to write: a folder that diffusers opens, or one file with CompVis' names."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Of the stored weights."""

"""The file of `sdipc evaluate TABLE CONFIG.yaml`."""

from pathlib import Path
from typing import Literal, get_args

from pydantic import Field

from sdipc_jax.files import read_settings
from sdipc_jax.settings import Count, Finite, LocalPath, ProjectionSettings, SamplerSettings, Settings

TableName = Literal["spaces", "variation", "customise", "edit", "ablation"]
TABLES: tuple[TableName, ...] = get_args(TableName)


def _untuned() -> dict[str, Path | None]:
    return {"SD-IPC": None}


class DataSettings(Settings):
    """A data set where it lies."""

    kind: Literal["coco", "imagenet", "celeba-hq", "places365", "dreambooth", "folder"]
    """How it is laid out; `folder` is a folder of pictures for each class."""
    images: LocalPath
    """The folder with the pictures: COCO's `val2017`, ImageNet's `val` with a folder a class, CelebA-HQ's portraits,
    Places365's `val_256` or its folders, the benchmark's `dataset`."""
    captions: LocalPath | None = None
    """COCO's `captions_val2017.json`; Places365's `places365_val.txt` where pictures lie beside each other."""
    classes: LocalPath | None = None
    """What classes are called: ImageNet's `LOC_synset_mapping.txt` or `imagenet_class_index.json`, Places365's
    `categories_places365.txt`, the benchmark's `prompts_and_classes.txt` if it lies elsewhere."""
    count: Count | None = None
    """How many pictures, evenly over all; all if left out."""


class TableSettings(SamplerSettings, ProjectionSettings):
    """The file of `sdipc evaluate TABLE CONFIG.yaml`: the checkpoint as commands take it, the data, the judges."""

    data: DataSettings
    """The pictures that are the prompts; for `spaces` those that are classified."""
    retrieval: DataSettings | None = None
    """For `spaces`: captioned pictures to find by their captions and the other way round, such as COCO's."""
    pool: Count | None = 1000
    """For `spaces`: among how many of these pictures; the paper does not say. All if `null`."""
    template: str = "a photo of a {}."
    """What stands for a picture's caption where it has none; {} is its class."""
    methods: dict[str, Path | None] = Field(default_factory=_untuned)
    """Rows of the table and the delta file of `sdipc tune` that each stands for; `null` is no tuning. `{}` in a file's
    name is the picture's class or subject: for `customise` each has one of its own. Names as in the paper (`SD-IPC`,
    `SD-IPC-FT`, `SD-IPC-CT`, `FT (C)`, `FT (U)`, `FT (both)`) stand beside its numbers."""
    text_prompt: bool = True
    """For `variation`: a row more, pictures of the captions alone (`SD w/ Text`)."""
    edits: tuple[str, ...] = ()
    """Texts to change pictures with, of which each gets one at random; {} is its class. The benchmark has its own."""
    alpha: Finite = 0.9
    """Weight of these texts (eq. 8)."""
    seeds: Count = 1
    """Pictures of each prompt; the benchmark's protocol has four."""
    clip_judge: LocalPath | None = None
    """Folder of another CLIP, as transformers saves it, for CLIP-Score, CLIP-I and CLIP-T; the checkpoint's own if left
    out, which the paper seems to have taken."""
    dino: LocalPath | None = None
    """Folder of a DINO, as transformers saves it (facebook/dino-vits16 is the benchmark's); without it there is no such
    column."""
    inception: LocalPath | None = None
    """torch-fidelity's file of Inception's weights (pt_inception-2015-12-05-6726825d.pth); without it there is neither
    FID nor KID."""
    batch_size: Count = 16
    """Pictures that a device samples at once."""
    shard_size: Count = 256
    """Pictures that are done again at most after an interruption."""


def read_table(path: Path) -> TableSettings:
    """A table's file.

    Raises:
        InputError: it cannot be read, is no YAML mapping, or holds what is no setting of a table.
    """
    return read_settings(path, TableSettings, "a table")

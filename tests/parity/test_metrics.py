"""The distances of sets of features are torchmetrics', and judges of PyTorch's libraries are those libraries."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, ViTConfig, ViTImageProcessor, ViTModel

from sdipc_jax.evaluate import judges
from sdipc_jax.evaluate.metrics import frechet_distance, kernel_distance
from tests.tiny import write_tokenizer

SIDE, WIDTH = 6, 7


class Network(torch.nn.Module):
    """A linear map of pixels, in the place of Inception."""

    num_features = WIDTH

    def __init__(self) -> None:
        super().__init__()
        self.matrix = torch.from_numpy(np.random.default_rng(0).normal(size=(SIDE * SIDE * 3, WIDTH)))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.double().flatten(1) @ self.matrix / 255


def pictures(seed: int, count: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.integers(0, 200, (count, SIDE, SIDE, 3)) + 10 * seed).astype(np.uint8)


def test_distances_are_torchmetrics() -> None:
    made, real = (torch.from_numpy(pictures(seed, 40 + seed)).permute(0, 3, 1, 2) for seed in (0, 3))
    network = Network()
    features = [network(each).numpy() for each in (made, real)]
    fid = FrechetInceptionDistance(feature=network, input_img_size=(3, SIDE, SIDE)).set_dtype(torch.float64)
    kid = KernelInceptionDistance(feature=network, subsets=1, subset_size=40)
    for metric in (fid, kid):
        metric.update(real[:40], real=True)
        metric.update(made[:40], real=False)
    features = [each[:40] for each in features]
    assert abs(frechet_distance(*features) / float(fid.compute()) - 1) < 1e-6
    assert abs(kernel_distance(*features) / float(kid.compute()[0]) - 1) < 1e-5


def write_pictures(folder: Path) -> list[Path]:
    paths = [folder / f"{number}.png" for number in range(3)]
    for path, pixels in zip(paths, pictures(1, 3), strict=True):
        Image.fromarray(pixels).resize((40, 40)).save(path)
    return paths


def test_a_clip_of_transformers_judges(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokens = write_tokenizer(tmp_path / "clip")
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"vocab_size": 514, "bos_token_id": tokens.start, "eos_token_id": tokens.end, "pad_token_id": tokens.end}
    config = CLIPConfig(
        text_config=small | ids | {"max_position_embeddings": 20},
        vision_config=small | {"image_size": 28, "patch_size": 7},
        projection_dim=12,
    )
    model = CLIPModel(config).eval()
    model.save_pretrained(tmp_path / "clip")
    processor = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor.save_pretrained(tmp_path / "clip")
    paths = write_pictures(tmp_path)
    judge = judges.other_clip(tmp_path / "clip")
    assert judge.texts is not None
    with torch.no_grad():
        inputs = processor(images=[Image.open(path) for path in paths], return_tensors="pt")
        expected = model.get_image_features(**inputs).numpy()
    np.testing.assert_allclose(judge.pictures(paths), expected, atol=1e-5)
    found = judge.texts(["a cat", "a"])
    assert found.shape == (2, 12)
    np.testing.assert_allclose(judge.texts(["a"])[0], found[1], atol=1e-5)


def test_a_dino_of_transformers_judges(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8
    )
    model, processor = ViTModel(config).eval(), ViTImageProcessor(size={"height": 32, "width": 32})
    for each in (model, processor):
        each.save_pretrained(tmp_path / "dino")
    paths = write_pictures(tmp_path)
    with torch.no_grad():
        inputs = processor(images=[Image.open(path) for path in paths], return_tensors="pt")
        expected = model(**inputs).last_hidden_state[:, 0].numpy()
    np.testing.assert_allclose(judges.dino(tmp_path / "dino").pictures(paths), expected, atol=1e-5)

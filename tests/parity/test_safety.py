"""The safety checker's decisions against PyTorch's, where they are near."""

import jax
import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from transformers import CLIPConfig

from sdipc_jax.models.safety import cosine, flag
from tests import cases
from tests.parity import oracle
from tests.parity.test_models import _reseeded

WIDTH, COUNT = 768, 1000


class _GivenEmbeddings(torch.nn.Module):
    """Stands for the vision tower: what comes in is what would come out."""

    def forward(self, embeddings: torch.Tensor) -> tuple[None, torch.Tensor]:
        return None, embeddings


@pytest.mark.parametrize("margin", [0.0004, 0.0006, 0.0098, 0.0102])
def test_decisions_near_the_thresholds(margin: float) -> None:
    """1,000 vectors whose cosine to one concept is its threshold plus or minus the margin.

    Half of them are over a special-care concept's threshold too, which lowers the others by 0.01.
    """
    generator = np.random.default_rng(0)
    tables = {
        name: generator.standard_normal((count, WIDTH), np.float32)
        for name, count in (("special_care_embeds", 3), ("concept_embeds", 17))
    }
    special, concepts = (table / np.linalg.norm(table, axis=1, keepdims=True) for table in tables.values())
    thresholds = {
        "special_care_embeds_weights": np.float32([0.2, 0.21, 0.19]),
        "concept_embeds_weights": generator.uniform(0.18, 0.3, 17).astype(np.float32),
    }
    embeddings = np.empty((COUNT, WIDTH))
    for row in range(COUNT):
        concept, care = row % 17, row % 3
        wanted = np.array([
            thresholds["concept_embeds_weights"][concept] + margin * (-1) ** (row // 2 % 2),
            thresholds["special_care_embeds_weights"][care] + 0.05 * (-1) ** (row % 2),
        ])  # fmt: skip
        # The part along the two concepts gives the cosines, the rest is noise at right angles to them.
        pair = np.stack([concepts[concept], special[care]]).astype(np.float64)
        along = np.linalg.solve(pair @ pair.T, wanted) @ pair
        noise = generator.standard_normal(WIDTH)
        noise -= np.linalg.solve(pair @ pair.T, pair @ noise) @ pair
        embeddings[row] = along + noise / np.linalg.norm(noise) * np.sqrt(1 - along @ along)
    embeddings = embeddings.astype(np.float32) * generator.uniform(0.5, 20, (COUNT, 1)).astype(np.float32)

    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    checker = StableDiffusionSafetyChecker(CLIPConfig(projection_dim=WIDTH, vision_config=vision)).eval()
    checker.load_state_dict({name: torch.tensor(x) for name, x in (tables | thresholds).items()}, strict=False)
    checker.vision_model, checker.visual_projection = _GivenEmbeddings(), torch.nn.Identity()
    blackened, expected = checker(torch.tensor(embeddings), np.ones((COUNT, 1, 1, 3)))

    found = jax.jit(flag)(
        cosine(embeddings, tables["special_care_embeds"]),
        cosine(embeddings, tables["concept_embeds"]),
        thresholds["special_care_embeds_weights"],
        thresholds["concept_embeds_weights"],
    )
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(blackened.max(axis=(1, 2, 3)) == 0, expected)
    assert 0.1 < np.mean(expected) < 0.9


def test_checkers_decide_as_pytorch_does() -> None:
    decisions = []
    for seed, case in enumerate(cases.safety_cases()):
        thresholds = {name: leaf for name, leaf in case.params.items() if name.endswith("_embeds_weights")}
        case = _reseeded(case, 300 + seed)
        case.params.update(thresholds)
        expected = oracle.run_safety(case)
        np.testing.assert_array_equal(case.run(), expected, err_msg=case.name)
        decisions.extend(expected)
    assert 0 < sum(decisions) < len(decisions)

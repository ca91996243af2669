"""Where a prompt's tokens are looked at, and words whose attention is set to 0."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import sdipc_jax as sdipc
from sdipc_jax import Bundle, cli
from sdipc_jax.checkpoints.load import read_config
from sdipc_jax.errors import InputError
from sdipc_jax.models import UNetConfig
from sdipc_jax.models.attention import Attention
from sdipc_jax.models.weighted import LayerContexts, MutedTokens
from sdipc_jax.prompts.tokens import groups_of
from sdipc_jax.sampling import weights
from sdipc_jax.sampling.attention import _grid, attention_maps

OPTIONS: dict[str, Any] = {"seeds": 0, "steps": 4, "sampler": "ddim"}


@pytest.fixture(scope="module")
def layer() -> tuple[Attention, Any, jax.Array, jax.Array]:
    """Cross-attention of two heads, queries and a prompt of five tokens."""
    keys = jax.random.split(jax.random.key(0), 3)
    x, context = jax.random.normal(keys[0], (2, 6, 8)), jax.random.normal(keys[1], (2, 5, 12))
    module = Attention(2)
    return module, module.init(keys[2], x, context), x, context


class TestLayer:
    def test_weights_are_those_of_the_softmax(self, layer: Any) -> None:
        module, variables, x, context = layer
        plain = module.apply(variables, x, context)
        watched, found = module.apply(variables, x, context, mutable=["attention"])
        np.testing.assert_array_equal(watched, plain)
        (weights,) = found["attention"]["weights"]
        kernels = {name: np.asarray(each["kernel"], np.float64) for name, each in variables["params"].items()}
        queries, keys = (
            (np.asarray(states, np.float64) @ kernels[name]).reshape(2, -1, 2, 4)
            for states, name in ((x, "to_q"), (context, "to_k"))
        )
        scores = np.exp(np.einsum("nqhd,nkhd->nhqk", queries, keys) / 2)
        np.testing.assert_allclose(weights, (scores / scores.sum(-1, keepdims=True)).mean(1), atol=1e-6)

    def test_self_attention_is_not_watched(self, layer: Any) -> None:
        module, _, x, _ = layer
        variables = module.init(jax.random.key(3), x)
        assert set(variables) == {"params"}
        assert "attention" not in module.apply(variables, x, mutable=["attention"])[1]

    def test_muted_tokens_add_nothing_and_leave_the_others_weights(self, layer: Any) -> None:
        module, variables, x, context = layer
        kept = jnp.array([[1.0, 0.0, 0.0, 1.0, 1.0], [1.0] * 5])
        muted, found = module.apply(variables, x, MutedTokens(context, kept), mutable=["attention"])
        (weights,) = found["attention"]["weights"]
        ((plain,),) = module.apply(variables, x, context, mutable=["attention"])[1]["attention"].values()
        np.testing.assert_allclose(weights, plain * kept[:, None], atol=1e-7)
        # By hand, of the first picture: weights of each head times values, without the two tokens.
        kernels = {name: np.asarray(each["kernel"], np.float64) for name, each in variables["params"].items()}
        query, key, value = (
            (np.asarray(states[0], np.float64) @ kernels[name]).reshape(-1, 2, 4)
            for states, name in ((x, "to_q"), (context, "to_k"), (context, "to_v"))
        )
        scores = np.exp(np.einsum("qhd,khd->hqk", query, key) / 2)
        shares = scores / scores.sum(-1, keepdims=True) * np.asarray(kept[0])
        attended = np.einsum("hqk,khd->qhd", shares, value).reshape(6, 8)
        expected = attended @ kernels["to_out_0"] + np.asarray(variables["params"]["to_out_0"]["bias"])
        np.testing.assert_allclose(muted[0], expected, atol=1e-5)
        np.testing.assert_allclose(muted[1], module.apply(variables, x, context)[1], atol=1e-6)

    def test_of_several_prompts_each_has_its_own(self, layer: Any) -> None:
        module, variables, x, context = layer
        both = jnp.stack([context, context[:, ::-1]], axis=1)
        kept = jnp.ones(both.shape[:3]).at[:, 1].set(0)
        weights = jnp.full((2, 2, 6), 0.5)
        found = module.apply(variables, x, LayerContexts(MutedTokens(both, kept), weights))
        alone = module.apply(variables, x, LayerContexts(both[:, :1], weights[:, :1]))
        np.testing.assert_allclose(found, alone, atol=1e-6)


class TestMaps:
    def test_they_add_up_and_are_those_of_the_loop(self, tiny: Bundle) -> None:
        context = sdipc.text_prompt(tiny, sdipc.tokenize(tiny, ["red", "cat"]))
        maps = attention_maps(tiny, context, shares=(1.0, 0.0), **OPTIONS)
        assert maps.shape == (2, 2, 1, 20, 8, 8)
        np.testing.assert_allclose(maps.sum(axis=3), 1, atol=1e-4)
        assert not np.allclose(maps[:, 0], maps[:, 1], atol=1e-5)
        # Layers are averaged: here they are two, each with as many transformers.
        parts = [attention_maps(tiny, context, shares=(0.0,), layers=[name], **OPTIONS) for name in ("down", "up")]
        counts = [1, 2]
        mean = sum(count * part for count, part in zip(counts, parts, strict=True)) / sum(counts)
        middle = attention_maps(tiny, context, shares=(0.0,), layers=["down", "up"], **OPTIONS)
        np.testing.assert_allclose(middle, mean, atol=1e-5)

    def test_what_is_refused(self, tiny: Bundle) -> None:
        context = sdipc.text_prompt(tiny, sdipc.tokenize(tiny, ["red"]))
        for changes, expected in (
            ({"shares": ()}, "at least one"),
            ({"shares": (2.0,)}, "from 0 to 1"),
            ({"layers": ["nowhere"]}, "does not exist"),
        ):
            with pytest.raises(InputError, match=expected):
                attention_maps(tiny, context, **changes, **OPTIONS)
        with pytest.raises(InputError, match="kept has shape"):
            sdipc.generate(tiny, context, kept=np.ones((1, 3)), **OPTIONS)

    def test_grids_halve_and_round_up(self) -> None:
        assert _grid(9 * 7, 9, 7) == (9, 7)
        assert _grid(5 * 4, 9, 7) == (5, 4)
        assert _grid(3 * 2, 9, 7) == (3, 2)


def test_all_kept_changes_nothing_and_muted_words_do(tiny: Bundle) -> None:
    tokens = sdipc.tokenize(tiny, ["red cat"])
    context = sdipc.text_prompt(tiny, tokens)
    groups = groups_of(tiny.config, tokens[0])
    assert [group.name for group in groups] == ["start", *"red", *"cat", "end"]
    assert [place for group in groups for place in group.places] == list(range(20))
    kept = np.ones((1, 20), np.float32)
    plain = sdipc.generate(tiny, context, **OPTIONS)
    same = sdipc.generate(tiny, context, kept=kept, **OPTIONS)
    np.testing.assert_allclose(same, plain, atol=1e-5)
    kept[0, [group.places[0] for group in groups if group.is_word]] = 0
    without = sdipc.generate(tiny, context, kept=kept, **OPTIONS)
    assert np.abs(np.asarray(without - plain)).max() > 1e-3


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--steps", "2", "--num-images", "1", "--quiet", "--attention-maps", "--attention-steps", "0", "1"]
    giraffe = str(Path(__file__).parent.parent / "examples" / "giraffe.png")
    assert cli.main(["text", "red apple", "--output-dir", str(tmp_path / "text"), *common]) == 0
    assert cli.main(["text", "red apple", "--output-dir", str(tmp_path / "zero"), *common, "--zero-words"]) == 0
    assert cli.main(["vary", giraffe, "--output-dir", str(tmp_path / "vary"), *common]) == 0

    def pixels(path: Path) -> np.ndarray:
        with Image.open(path) as picture:
            return np.asarray(picture)

    sheets = {path.parent.name: pixels(path).shape[1::-1] for path in tmp_path.glob("*/*-attention.png")}
    # Two steps wide; a row for start, two words and end, or for start and picture.
    width = 2 * 128 + 3 * 8
    assert sheets == {"text": (width, 640), "zero": (width, 640), "vary": (width, 324)}
    made = [pixels(next((tmp_path / name).glob("*-000.png"))) for name in ("text", "zero")]
    assert not np.array_equal(*made)
    assert cli.main(["text", "red", "--attention-layers", "nowhere", "--output-dir", str(tmp_path / "no")]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


class TestSets:
    def test_style_and_composition_are_layers_of_their_own(self) -> None:
        embedded = read_config("embedded").unet
        for config in (embedded, UNetConfig(cross_attention_dim=768)):
            style, composition = (weights.over_layers(config, [name]) for name in ("style", "composition"))
            assert style.sum() > 0
            assert composition.sum() > 0
            assert not (style * composition).any()
        np.testing.assert_array_equal(
            weights.over_layers(embedded, ["style"]), weights.over_layers(embedded, ["up.1.0", "up.1.1"])
        )

    def test_where_they_are_not_known(self, tiny: Bundle) -> None:
        with pytest.raises(InputError, match="not known for this checkpoint"):
            weights.over_layers(tiny.config.unet, ["mid", "style"])

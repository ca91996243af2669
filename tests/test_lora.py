"""LoRA files: every kind by its formula written again in float64, every spelling, and what is refused."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import sdipc_jax as sdipc
from sdipc_jax import Bundle, InputError
from sdipc_jax.checkpoints.digests import digests
from sdipc_jax.checkpoints.keys import flatten, to_torch, torch_name
from sdipc_jax.checkpoints.load import configure, load_weights
from sdipc_jax.checkpoints.lora import merge_lora
from sdipc_jax.checkpoints.lora_formulas import changed, kind_of
from sdipc_jax.checkpoints.lora_names import spellings
from sdipc_jax.settings import CheckpointSettings
from tests import lora_files
from tests.tiny import tiny_bundle

QUERY = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
OUT = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0"
KEYS = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
CONV = "down_blocks.0.resnets.0.conv1"
TEXT = "text_model.encoder.layers.1.self_attn.q_proj"

Tensors = dict[str, np.ndarray]


def weights(bundle: Bundle, component: str = "unet") -> Tensors:
    leaves = flatten(bundle.params[component])
    return {torch_name(path): to_torch(path, np.asarray(leaf)) for path, leaf in leaves.items()}


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng([seed, *shape]).standard_normal(shape) / 4).astype(np.float32)


def write(path: Path, tensors: Tensors, metadata: Mapping[str, str] | None = None) -> Path:
    save_file(tensors, path, None if metadata is None else dict(metadata))
    return path


def check(old: Bundle, new: Bundle, expected: Mapping[str, np.ndarray], component: str = "unet") -> None:
    """The named tensors are these to 1e-5, and all others the very same."""
    before, after = weights(old, component), weights(new, component)
    for name, value in expected.items():
        np.testing.assert_allclose(after[name], value, rtol=1e-5, atol=1e-5)
        assert np.abs(after[name] - before[name]).max() > 1e-3
    for name in before.keys() - expected.keys():
        np.testing.assert_array_equal(after[name], before[name])


# Kinds. An update of every kind for a linear layer of 16 by 16 and a convolution of 16, 16, 3, 3: the tensors, and the
# change but for the scale that a user gives.


def _kinds() -> dict[str, tuple[str, Tensors, Any]]:
    up, down, one, two = random(16, 3), random(3, 16), random(16, 3, seed=1), random(3, 16, seed=1)
    square, wide, mid = random(16, 3, 1, 1), random(3, 16, 3, 3), random(3, 3, 3, 3, seed=2)
    exact = {name: value.astype(np.float64) for name, value in locals().items()}
    up64, down64, one64, two64, wide64, mid64 = (exact[name] for name in "up down one two wide mid".split())
    left, right, middle = random(4, 4), random(4, 4, seed=1), random(4, 4, 3, 3, seed=4)
    half_a, half_b, core = random(2, 4), random(2, 4, seed=3), random(2, 2, 3, 3, seed=5)

    def through(core: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        result = np.zeros((a.shape[1], b.shape[1], *core.shape[2:]))
        for m, n in np.ndindex(*core.shape[:2]):
            result += a[m][:, None, None, None] * core[m, n] * b[n][None, :, None, None]
        return result

    def kron(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        result = np.zeros((a.shape[0] * b.shape[0], a.shape[1] * b.shape[1], *b.shape[2:]))
        for i, j in np.ndindex(*a.shape):
            result[i * b.shape[0] : (i + 1) * b.shape[0], j * b.shape[1] : (j + 1) * b.shape[1]] = a[i, j] * b
        return result

    alpha = np.float16(1.5)
    hada = {"hada_w1_a": up, "hada_w1_b": down, "hada_w2_a": one, "hada_w2_b": two, "alpha": np.array(alpha)}
    turned = {"hada_w1_a": up.T.copy(), "hada_w1_b": down, "hada_w2_a": one.T.copy(), "hada_w2_b": two}
    flat = {"hada_w1_a": up, "hada_w1_b": wide.reshape(3, -1), "hada_w2_a": one, "hada_w2_b": wide.reshape(3, -1)}
    return {
        "linear": (
            QUERY,
            {"lora_up.weight": up, "lora_down.weight": down, "alpha": np.array(alpha)},
            up64 @ down64 / 2,
        ),
        "without alpha": (QUERY, {"lora_up.weight": up, "lora_down.weight": down}, up64 @ down64),
        "written as 1x1": (
            QUERY,
            {"lora_up.weight": square, "lora_down.weight": down[..., None, None]},
            exact["square"][..., 0, 0] @ down64,
        ),
        "3x3": (
            CONV,
            {"lora_up.weight": square, "lora_down.weight": wide, "alpha": np.array([6.0], np.float32)},
            2 * np.einsum("or,rihw->oihw", exact["square"][..., 0, 0], wide64),
        ),
        "3x3 with mid": (
            CONV,
            {"lora_up.weight": square, "lora_down.weight": down[..., None, None], "lora_mid.weight": mid},
            through(mid64, exact["square"][..., 0, 0].T, down64),
        ),
        "loha": (QUERY, hada, (up64 @ down64) * (one64 @ two64) / 2),
        "loha 3x3": (
            CONV,
            flat,
            ((up64 @ wide64.reshape(3, -1)) * (one64 @ wide64.reshape(3, -1))).reshape(16, 16, 3, 3),
        ),
        "loha 3x3 with core": (
            CONV,
            turned | {"hada_t1": mid, "hada_t2": mid},
            through(mid64, up64.T, down64) * through(mid64, one64.T, two64),
        ),
        # With both factors whole there is no rank, and alpha says nothing.
        "lokr": (QUERY, {"lokr_w1": left, "lokr_w2": right, "alpha": np.array(alpha)}, kron(left, right)),
        "lokr of products": (
            QUERY,
            {
                **{
                    "lokr_w1_a": half_a.T.copy(),
                    "lokr_w1_b": half_b,
                    "lokr_w2_a": half_b.T.copy(),
                    "lokr_w2_b": half_a,
                },
                "alpha": np.array(1.0, np.float32),
            },
            kron(half_a.T @ half_b, half_b.T @ half_a) / 2,
        ),
        "lokr 3x3": (CONV, {"lokr_w1": left, "lokr_w2": middle}, kron(left, middle)),
        "lokr 3x3 of products": (
            CONV,
            {"lokr_w1": left, "lokr_w2_a": half_a.T.copy(), "lokr_w2_b": middle[:2].reshape(2, -1)},
            kron(left, (half_a.T @ middle[:2].reshape(2, -1)).reshape(4, 4, 3, 3)),
        ),
        "lokr 3x3 with core": (
            CONV,
            {"lokr_w1": left, "lokr_w2_a": half_a, "lokr_w2_b": half_b, "lokr_t2": core},
            kron(left, through(core, half_a, half_b)),
        ),
        "difference": (CONV, {"diff": random(16, 16, 3, 3)}, random(16, 16, 3, 3)),
    }


@pytest.mark.parametrize("kind", _kinds())
@pytest.mark.parametrize("scale", [1.0, -0.7])
def test_each_kind_is_its_formula(tiny: Bundle, tmp_path: Path, kind: str, scale: float) -> None:
    module, tensors, change = _kinds()[kind]
    prefix = f"lora_unet_{module.replace('.', '_')}"
    file = write(tmp_path / "lora.safetensors", {f"{prefix}.{name}": value for name, value in tensors.items()})
    before = weights(tiny)[f"{module}.weight"].astype(np.float64)
    check(tiny, merge_lora(tiny, file, scale), {f"{module}.weight": before + scale * change})


def test_biases_and_norms_are_added(tiny: Bundle, tmp_path: Path) -> None:
    norm = "down_blocks.0.attentions.0.transformer_blocks.0.norm1"
    tensors = {"diff": random(16, 16, 3, 3), "diff_b": random(16)}
    named = {f"lora_unet_{CONV.replace('.', '_')}.{name}": value for name, value in tensors.items()}
    named |= {f"lora_unet_{norm.replace('.', '_')}.{name}": random(16, seed=9) for name in ("w_norm", "b_norm")}
    new = merge_lora(tiny, write(tmp_path / "lora.safetensors", named), 0.5)
    before = weights(tiny)
    expected = {f"{CONV}.weight": before[f"{CONV}.weight"] + tensors["diff"] / 2}
    expected |= {f"{CONV}.bias": before[f"{CONV}.bias"] + tensors["diff_b"] / 2}
    expected |= {f"{norm}.{leaf}": before[f"{norm}.{leaf}"] + random(16, seed=9) / 2 for leaf in ("weight", "bias")}
    check(tiny, new, expected)


@pytest.mark.parametrize("module", [QUERY, CONV])
@pytest.mark.parametrize("along", ["outputs", "inputs", "peft"])
def test_dora_brings_rows_or_columns_to_their_lengths(tiny: Bundle, tmp_path: Path, module: str, along: str) -> None:
    weight = weights(tiny)[f"{module}.weight"].astype(np.float64)
    extent, ones = weight.shape[2:], (1,) * (weight.ndim - 2)
    up, down = random(16, 2), random(2, 16, *extent)
    lengths = np.abs(random(16, seed=7)) + 1
    whole = weight + np.einsum("or,ri...->oi...", up, down)
    axis = 1 if along == "inputs" else 0
    wanted = np.moveaxis(np.moveaxis(whole, axis, -1) * (lengths / _norms(whole, axis)), -1, axis)
    shapes = {"outputs": (16, 1, *ones), "inputs": (1, 16, *ones), "peft": (1, 16, 1, 1) if extent else (16,)}
    name = "lora_magnitude_vector" if along == "peft" else "dora_scale"
    tensors = {"lora_A.weight": down, "lora_B.weight": up.reshape(16, 2, *ones), name: lengths.reshape(shapes[along])}
    file = write(tmp_path / "lora.safetensors", {f"unet.{module}.{key}": value for key, value in tensors.items()})
    check(tiny, merge_lora(tiny, file), {f"{module}.weight": wanted})
    # In between on the straight line, and at 0 the weights as they were.
    check(tiny, merge_lora(tiny, file, 0.25), {f"{module}.weight": weight + 0.25 * (wanted - weight)})


def _norms(weight: np.ndarray, axis: int) -> np.ndarray:
    return np.sqrt((np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1) ** 2).sum(axis=1))


def test_what_a_plain_unet_learnt_pads_to_an_inpainting_one() -> None:
    up, down = random(8, 2).astype(np.float64), random(2, 4, 3, 3).astype(np.float64)
    kind = kind_of(frozenset({"up", "down"}))
    assert kind is not None
    weight = np.zeros((8, 9, 3, 3))
    found = changed(weight, kind, {"up": up, "down": down}, 1.0, 1.0)
    np.testing.assert_allclose(found[:, :4], np.einsum("or,rihw->oihw", up, down), atol=1e-12)
    assert not found[:, 4:].any()


# Names.

FLAT = QUERY.replace(".", "_")
SPELLINGS = {
    "kohya": (f"lora_unet_{FLAT}.lora_down.weight", f"lora_unet_{FLAT}.lora_up.weight"),
    "kohya, SGM names": (
        "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q.lora_down.weight",
        "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q.lora_up.weight",
    ),
    "lycoris": (f"lycoris_{FLAT}.lora_down.weight", f"lycoris_{FLAT}.lora_up.weight"),
    "peft": (f"unet.{QUERY}.lora_A.weight", f"unet.{QUERY}.lora_B.weight"),
    "peft, adapter": (f"unet.{QUERY}.lora_A.default.weight", f"unet.{QUERY}.lora_B.default.weight"),
    "peft, model": (f"base_model.model.{QUERY}.lora_A.weight", f"base_model.model.{QUERY}.lora_B.weight"),
    "old": (
        f"unet.{QUERY.replace('to_q', 'processor.to_q_lora')}.down.weight",
        f"unet.{QUERY.replace('to_q', 'processor.to_q_lora')}.up.weight",
    ),
    "old, UNet alone": (
        f"{QUERY.replace('to_q', 'processor.to_q_lora')}.down.weight",
        f"{QUERY.replace('to_q', 'processor.to_q_lora')}.up.weight",
    ),
    "old, linear": (f"unet.{QUERY}.lora.down.weight", f"unet.{QUERY}.lora.up.weight"),
    "hybrid": (f"unet.{QUERY}.lora_down.weight", f"unet.{QUERY}.lora_up.weight"),
    "dotted SGM names": (
        "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.lora_A.weight",
        "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.lora_B.weight",
    ),
}
FLAT_TEXT = TEXT.replace(".", "_")
TEXT_SPELLINGS = {
    "kohya": (f"lora_te_{FLAT_TEXT}.lora_down.weight", f"lora_te_{FLAT_TEXT}.lora_up.weight"),
    "kohya, first of two": (f"lora_te1_{FLAT_TEXT}.lora_down.weight", f"lora_te1_{FLAT_TEXT}.lora_up.weight"),
    "kohya, flattened": (
        f"lora_te_{FLAT_TEXT.removeprefix('text_model_')}.lora_down.weight",
        f"lora_te_{FLAT_TEXT.removeprefix('text_model_')}.lora_up.weight",
    ),
    "peft": (f"text_encoder.{TEXT}.lora_A.weight", f"text_encoder.{TEXT}.lora_B.weight"),
    "peft, flattened": (
        f"text_encoder.{TEXT.removeprefix('text_model.')}.lora_A.weight",
        f"text_encoder.{TEXT.removeprefix('text_model.')}.lora_B.weight",
    ),
    "old": (
        f"text_encoder.{TEXT}.lora_linear_layer.down.weight",
        f"text_encoder.{TEXT}.lora_linear_layer.up.weight",
    ),
    "older": (
        f"text_encoder.{TEXT.replace('q_proj', 'to_q_lora')}.down.weight",
        f"text_encoder.{TEXT.replace('q_proj', 'to_q_lora')}.up.weight",
    ),
}


@pytest.mark.parametrize("dialect", SPELLINGS)
def test_every_dialect_of_the_unet(tiny: Bundle, tmp_path: Path, dialect: str) -> None:
    down, up = SPELLINGS[dialect]
    file = write(tmp_path / "lora.safetensors", {down: random(2, 16), up: random(16, 2)})
    before = weights(tiny)[f"{QUERY}.weight"]
    check(tiny, merge_lora(tiny, file), {f"{QUERY}.weight": before + random(16, 2) @ random(2, 16)})


@pytest.mark.parametrize("dialect", TEXT_SPELLINGS)
def test_every_dialect_of_the_text_encoder(tiny: Bundle, tmp_path: Path, dialect: str) -> None:
    down, up = TEXT_SPELLINGS[dialect]
    file = write(tmp_path / "lora.safetensors", {down: random(2, 24), up: random(24, 2)})
    before = weights(tiny, "text_encoder")[f"{TEXT}.weight"]
    new = merge_lora(tiny, file)
    check(tiny, new, {f"{TEXT}.weight": before + random(24, 2) @ random(2, 24)}, "text_encoder")
    check(tiny, new, {})


def test_names_of_stable_diffusions_own_code() -> None:
    """Against the blocks of SD 1.x as CompVis' code numbers them."""
    known = {f"up_blocks.{block}.attentions.0.proj_in" for block in (1, 2, 3)}
    expected = {
        "conv_in": "input_blocks.0.0",
        "down_blocks.0.resnets.1.conv_shortcut": "input_blocks.2.0.skip_connection",
        "down_blocks.0.downsamplers.0.conv": "input_blocks.3.0.op",
        "down_blocks.1.attentions.0.proj_in": "input_blocks.4.1.proj_in",
        "down_blocks.3.resnets.1.conv2": "input_blocks.11.0.out_layers.3",
        "mid_block.attentions.0.transformer_blocks.0.ff.net.2": "middle_block.1.transformer_blocks.0.ff.net.2",
        "mid_block.resnets.1.time_emb_proj": "middle_block.2.emb_layers.1",
        "up_blocks.0.upsamplers.0.conv": "output_blocks.2.1.conv",
        "up_blocks.1.upsamplers.0.conv": "output_blocks.5.2.conv",
        "up_blocks.3.attentions.2.norm": "output_blocks.11.1.norm",
        "add_embedding.linear_2": "label_emb.0.2",
        "conv_out": "out.2",
    }
    table = spellings({"unet": known | set(expected)}, 2)
    assert {name: table[f"lora_unet_{spelled.replace('.', '_')}"][1] for name, spelled in expected.items()} == {
        name: name for name in expected
    }


def test_a_file_with_every_tensor_twice_counts_once(tiny: Bundle, tmp_path: Path) -> None:
    tensors = {}
    for dialect in ("kohya", "kohya, SGM names"):
        tensors |= dict(zip(SPELLINGS[dialect], (random(2, 16), random(16, 2)), strict=True))
    before = weights(tiny)[f"{QUERY}.weight"]
    new = merge_lora(tiny, write(tmp_path / "lora.safetensors", tensors))
    check(tiny, new, {f"{QUERY}.weight": before + random(16, 2) @ random(2, 16)})
    tensors[SPELLINGS["kohya"][0]] = random(2, 16, seed=5)
    with pytest.raises(InputError, match="are for the same module and differ, expected one of them"):
        merge_lora(tiny, write(tmp_path / "lora.safetensors", tensors))


@pytest.mark.parametrize(
    "metadata, factor",
    [
        ({}, 1.0),
        ({"unet.lora_alpha": 6, "unet.r": 2}, 3.0),
        ({"unet.lora_alpha": 6, "unet.use_rslora": True}, 6 / np.sqrt(2)),
        ({"unet.lora_alpha": 6, "unet.alpha_pattern": {"attn1.to_q": 1}}, 0.5),
        ({"text_encoder.lora_alpha": 6}, 1.0),
    ],
)
def test_peft_says_alpha_in_its_metadata(
    tiny: Bundle, tmp_path: Path, metadata: Mapping[str, Any], factor: float
) -> None:
    tensors = dict(zip(SPELLINGS["peft"], (random(2, 16), random(16, 2)), strict=True))
    file = write(tmp_path / "lora.safetensors", tensors, {"lora_adapter_metadata": json.dumps(metadata)})
    before = weights(tiny)[f"{QUERY}.weight"]
    check(tiny, merge_lora(tiny, file), {f"{QUERY}.weight": before + factor * random(16, 2) @ random(2, 16)})


# Loading.


def test_files_are_fused_in_order_in_float32_at_load(tiny_folder: Path, tmp_path: Path) -> None:
    down, up = SPELLINGS["kohya"]
    lengths = np.ones((16, 1), np.float32)
    prefix = up.removesuffix(".lora_up.weight")
    plain = write(tmp_path / "plain.safetensors", {down: random(2, 16), up: random(16, 2)})
    dora = write(
        tmp_path / "dora.safetensors",
        {down: random(2, 16, seed=1), up: random(16, 2, seed=1), f"{prefix}.dora_scale": lengths},
    )
    base = configure(CheckpointSettings(model=str(tiny_folder)))
    before = weights(load_weights(base))[f"{QUERY}.weight"].astype(np.float64)
    settings = CheckpointSettings(
        model=str(tiny_folder), dtype="bfloat16", lora=(str(plain), str(dora)), lora_scale=(0.5, 1.0)
    )
    config = configure(settings)
    assert config == base.__class__(**{**vars(base), "dtype": "bfloat16"})  # What is compiled does not depend on files.
    bundle = load_weights(config)
    total = before + random(16, 2) @ random(2, 16) / 2 + random(16, 2, seed=1) @ random(2, 16, seed=1)
    expected = total / _norms(total, 0)[:, None]
    found = weights(bundle)[f"{QUERY}.weight"]
    assert found.dtype == np.asarray(bundle.params["unet"]["conv_in"]["bias"]).dtype
    np.testing.assert_array_equal(found, expected.astype(np.float32).astype(found.dtype))
    files = {name for name in digests(config, None) if name.startswith("lora/")}
    assert files == {"lora/1/plain.safetensors", "lora/2/dora.safetensors"}


def test_the_old_bundle_stays_and_records_tell_what_was_fused(tiny: Bundle, tmp_path: Path) -> None:
    before = {name: value.copy() for name, value in weights(tiny).items()}
    down, up = SPELLINGS["kohya"]
    file = write(tmp_path / "lora.safetensors", {down: random(2, 16), up: random(16, 2)})
    new = sdipc.merge_lora(sdipc.merge_lora(tiny, file, 0.5), file, -0.5)
    assert [(lora.file, lora.scale) for lora in new.config.loras] == [(file, 0.5), (file, -0.5)]
    assert tiny.config.loras == ()
    for name, value in weights(tiny).items():
        np.testing.assert_array_equal(value, before[name])
    np.testing.assert_allclose(weights(new)[f"{QUERY}.weight"], before[f"{QUERY}.weight"], atol=1e-6)


# Refusals.


def refuse(bundle: Bundle, tmp_path: Path, tensors: Tensors, words: str, **options: Any) -> None:
    with pytest.raises(InputError) as caught:
        merge_lora(bundle, write(tmp_path / "lora.safetensors", tensors), **options)
    assert words in str(caught.value)
    assert str(caught.value).isprintable()


def test_another_base_is_told_by_name_before_anything_else(tiny: Bundle, tmp_path: Path) -> None:
    name = f"lora_unet_{KEYS.replace('.', '_')}"
    for width, family in ((768, "Stable Diffusion 1.x"), (1024, "Stable Diffusion 2.x"), (2048, "SDXL")):
        tensors = {f"{name}.lora_down.weight": random(2, width), f"{name}.lora_up.weight": random(16, 2)}
        refuse(
            tiny, tmp_path, tensors, f"made for {family} (attn2.to_k reads {width}), expected one for this checkpoint"
        )


@pytest.mark.parametrize(
    "name, kind",
    [("oft_blocks", "OFT or BOFT"), ("a1.weight", "GLoRA"), ("on_input", "IA3"), ("lora_E", "AdaLoRA")],
)
def test_kinds_that_are_not_built_are_refused_by_name(tiny: Bundle, tmp_path: Path, name: str, kind: str) -> None:
    tensors = {f"lora_unet_{FLAT}.{name}": random(4, 4)}
    refuse(tiny, tmp_path, tensors, f"of the kind {kind}, expected LoRA", partial=True)


def test_what_fits_nothing_is_named_and_may_be_left_out(tiny: Bundle, tmp_path: Path) -> None:
    down, up = SPELLINGS["kohya"]
    good = {down: random(2, 16), up: random(16, 2)}
    odd = {"lora_unet_elsewhere.lora_up.weight": random(16, 2), "bundle_emb.word.string_to_param.*": random(1, 24)}
    refuse(tiny, tmp_path, good | odd, "2 of 4 tensors fit nothing in this checkpoint, bundle_emb.word")
    refuse(tiny, tmp_path, odd, "use another file", partial=True)
    new = merge_lora(tiny, write(tmp_path / "lora.safetensors", good | odd), partial=True)
    check(tiny, new, {f"{QUERY}.weight": weights(tiny)[f"{QUERY}.weight"] + random(16, 2) @ random(2, 16)})
    (note,) = new.config.notes
    assert "2 tensors left out, bundle_emb.word.string_to_param.*, lora_unet_elsewhere.lora_up.weight" in note


@pytest.mark.parametrize(
    "tensors, words",
    [
        ({"lora_down.weight": random(2, 12), "lora_up.weight": random(16, 2)}, "do not fit"),
        ({"lora_down.weight": random(2, 16), "lora_up.weight": random(16, 3)}, "do not fit"),
        ({"lora_down.weight": random(2, 16)}, "has down, expected all tensors of one kind"),
        ({"lora_down.weight": random(0, 16), "lora_up.weight": random(16, 0)}, "is empty"),
        ({"lokr_w1": random(4, 4)}, "do not fit"),
        ({"diff": random(16, 16), "lora_up.weight": random(16, 2)}, "has diff, up, expected all tensors of one kind"),
        (
            {"lora_down.weight": random(2, 16), "lora_up.weight": random(16, 2), "alpha": random(3)},
            "alpha is [3]",
        ),
        (
            {"lora_down.weight": random(2, 16), "lora_up.weight": random(16, 2), "alpha": np.array(3e38, np.float32)},
            "NaN or infinity, expected numbers",
        ),
    ],
)
def test_tensors_that_do_not_belong_together_are_refused(
    tiny: Bundle, tmp_path: Path, tensors: Tensors, words: str
) -> None:
    named = {f"lora_unet_{FLAT}.{name}": value for name, value in tensors.items()}
    refuse(tiny, tmp_path, named, words, scale=1e30)


@pytest.mark.parametrize(
    "name, words",
    [
        ("lora.pt", "found a pickle, expected safetensors"),
        ("torn.safetensors", "found no whole safetensors file"),
        ("none.safetensors", "no such file, expected a LoRA"),
    ],
)
def test_files_that_are_none_are_refused(tiny: Bundle, tmp_path: Path, name: str, words: str) -> None:
    for file in ("lora.pt", "torn.safetensors"):
        (tmp_path / file).write_bytes(b"\x80\x04nothing that is opened")
    with pytest.raises(InputError, match=words):
        merge_lora(tiny, tmp_path / name)


def test_scales_are_one_for_all_or_one_for_each() -> None:
    assert CheckpointSettings(lora=("a", "b"), lora_scale=0.5).scales == (0.5, 0.5)
    assert CheckpointSettings(lora="a").scales == (1.0,)
    assert CheckpointSettings().scales == ()
    with pytest.raises(InputError, match="found 2 values of lora_scale and 3 of lora, expected one scale for all"):
        CheckpointSettings(lora=("a", "b", "c"), lora_scale=(1, 2))


def test_two_towers_are_told_apart(tmp_path: Path) -> None:
    """The second text encoder's module of the same name is another entry of the table."""
    bundle = tiny_bundle(tmp_path / "parts")
    second = dataclasses.replace(bundle, params=bundle.params | {"text_encoder_2": bundle.params["text_encoder"]})
    name = f"lora_te2_{FLAT_TEXT}"
    tensors = {f"{name}.lora_down.weight": random(2, 24), f"{name}.lora_up.weight": random(24, 2)}
    new = merge_lora(second, write(tmp_path / "lora.safetensors", tensors))
    before = weights(second, "text_encoder_2")[f"{TEXT}.weight"]
    check(second, new, {f"{TEXT}.weight": before + random(24, 2) @ random(2, 24)}, "text_encoder_2")
    check(second, new, {}, "text_encoder")
    refuse(bundle, tmp_path, tensors, "2 of 2 tensors fit nothing in this checkpoint")


def test_a_number_in_the_place_of_a_matrix_is_refused(tiny: Bundle, tmp_path: Path) -> None:
    module = "lora_unet_" + QUERY.replace(".", "_")
    tensors = {f"{module}.lora_down.weight": np.array(1, np.float32), f"{module}.lora_up.weight": random(16, 1)}
    refuse(tiny, tmp_path, tensors, "do not fit")


def test_damage_is_refused_in_one_line_or_changes_nothing_else(tiny: Bundle, tmp_path: Path) -> None:
    """Mutations of header and names: no other error, and no result that is not finite."""
    refusals = []
    for number, (file, read) in enumerate(lora_files.targets(tmp_path, tiny)):
        read(file)
        data, path = file.read_bytes(), tmp_path / "damaged.safetensors"
        for seed in range(120):
            path.write_bytes(lora_files.damaged(data, 1000 * number + seed))
            try:
                read(path)
            except InputError as error:
                refusals.append(str(error))
    assert 200 < len(refusals) < 360
    assert not [each for each in refusals if not each.isprintable() or len(each) > 2000]

"""Single files: names, families, choices, and what is refused by its name."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fuzz_checkpoints
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import sdipc_jax as sdipc
from sdipc_jax.checkpoints import names_ldm
from sdipc_jax.checkpoints.bundle import Bundle
from sdipc_jax.checkpoints.digests import digests
from sdipc_jax.checkpoints.families import SD1, SD2, SDXL
from sdipc_jax.checkpoints.headers import Tensor
from sdipc_jax.checkpoints.keys import flatten, torch_name
from sdipc_jax.checkpoints.load import read_config
from sdipc_jax.checkpoints.save_single import save_single
from sdipc_jax.checkpoints.single import SingleFile
from sdipc_jax.checkpoints.tokenizer import load_tokenizer
from sdipc_jax.cli import main
from sdipc_jax.errors import InputError
from sdipc_jax.models import AutoencoderKL, CLIPTextConfig, CLIPTextModel, UNet2DConditionModel, UNetConfig, VAEConfig
from tests.random_weights import random_tree
from tests.single_files import family_bundle
from tests.tiny import jax_tree

Arrays = dict[str, np.ndarray]
UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer."


@pytest.fixture(scope="module")
def sd1(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return family_bundle(tmp_path_factory.mktemp("sd1") / "checkpoint", SD1)


@pytest.fixture(scope="module")
def sd2(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return family_bundle(tmp_path_factory.mktemp("sd2") / "checkpoint", SD2)


@pytest.fixture(scope="module")
def arrays(sd1: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Arrays:
    file = tmp_path_factory.mktemp("file") / "sd1.safetensors"
    save_single(sd1, file)
    return load_file(file)


def write(path: Path, arrays: Arrays, **metadata: str) -> Path:
    save_file(arrays, path, metadata or None)
    return path


def equal(found: Any, expected: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def refuse(action: Callable[..., object], *arguments: Any, words: str, **options: Any) -> None:
    with pytest.raises(InputError) as caught:
        action(*arguments, **options)
    assert words in str(caught.value)
    assert str(caught.value).isprintable()


# The tables.


def tree_names(module: Any, *inputs: Any) -> list[str]:
    shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in inputs]
    tree = jax.eval_shape(module.init, jax.random.key(0), *shapes)["params"]
    return [torch_name(path) for path in flatten(tree)]


def unet_tree(config: UNetConfig) -> list[str]:
    width = config.cross_attention_dim
    return tree_names(
        UNet2DConditionModel(config), ((1, 8, 8, 4), "float32"), ((1,), "float32"), ((1, 1, width), "float32")
    )


# Stable Diffusion 1.x in its own shape, with channels that are made quickly.
LEVELS = UNetConfig(block_out_channels=(32, 64, 128, 128), cross_attention_dim=32)


def test_the_unets_table_is_a_bijection() -> None:
    names = unet_tree(LEVELS)
    table = names_ldm.unet_names(names, 2, (False, True, True, True))
    found = [piece.name for piece in table.values()]
    assert len(set(found)) == len(found) == len(names) == 686
    assert {name.split(".")[0] for name in found} == {
        *("time_embed", "input_blocks", "middle_block", "output_blocks", "out"),
    }
    assert {int(name.split(".")[1]) for name in found if name.startswith("input_blocks.")} == set(range(12))
    assert {int(name.split(".")[1]) for name in found if name.startswith("output_blocks.")} == set(range(12))


@pytest.mark.parametrize(
    "name, expected",
    [
        ("conv_in.weight", "input_blocks.0.0.weight"),
        ("time_embedding.linear_2.bias", "time_embed.2.bias"),
        ("down_blocks.0.resnets.1.conv1.weight", "input_blocks.2.0.in_layers.2.weight"),
        ("down_blocks.2.attentions.0.transformer_blocks.0.attn2.to_out.0.bias",
         "input_blocks.7.1.transformer_blocks.0.attn2.to_out.0.bias"),
        ("down_blocks.1.downsamplers.0.conv.weight", "input_blocks.6.0.op.weight"),
        ("mid_block.resnets.1.time_emb_proj.bias", "middle_block.2.emb_layers.1.bias"),
        ("up_blocks.3.resnets.2.conv_shortcut.weight", "output_blocks.11.0.skip_connection.weight"),
        ("up_blocks.1.attentions.2.proj_in.weight", "output_blocks.5.1.proj_in.weight"),
        # Without attention the sampler stands one place earlier.
        ("up_blocks.0.upsamplers.0.conv.weight", "output_blocks.2.1.conv.weight"),
        ("up_blocks.2.upsamplers.0.conv.weight", "output_blocks.8.2.conv.weight"),
        ("conv_norm_out.weight", "out.0.weight"),
        ("time_embedding.cond_proj.weight", "time_embed.cond_proj.weight"),
        ("add_embedding.linear_1.weight", "label_emb.0.0.weight"),
    ],
)  # fmt: skip
def test_rows_of_the_unets_table(name: str, expected: str) -> None:
    assert names_ldm.unet_names([name], 2, (False, True, True, True))[name].name == expected


def test_sdxl_is_the_same_rows() -> None:
    config = UNetConfig(
        block_out_channels=(32, 64, 64),
        down_block_types=("DownBlock2D", *["CrossAttnDownBlock2D"] * 2),
        up_block_types=(*["CrossAttnUpBlock2D"] * 2, "UpBlock2D"),
        cross_attention_dim=32,
    )
    table = names_ldm.unet_names(unet_tree(config), 2, (True, True, False))
    assert len({piece.name for piece in table.values()}) == len(table)
    assert table["up_blocks.0.upsamplers.0.conv.weight"].name == "output_blocks.2.2.conv.weight"
    assert table["up_blocks.1.upsamplers.0.conv.weight"].name == "output_blocks.5.2.conv.weight"
    assert table["up_blocks.2.resnets.2.conv1.weight"].name == "output_blocks.8.0.in_layers.2.weight"


def test_the_vaes_table_is_a_bijection() -> None:
    config = VAEConfig(
        block_out_channels=(32,) * 4, down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2,
    )  # fmt: skip
    names = tree_names(AutoencoderKL(config), ((1, 8, 8, 3), "float32"))
    table = names_ldm.vae_names(names, 4)
    assert len({piece.name for piece in table.values()}) == len(names)
    for ours, theirs in (
        ("encoder.down_blocks.1.resnets.0.conv1.weight", "encoder.down.1.block.0.conv1.weight"),
        ("decoder.up_blocks.0.resnets.2.norm1.bias", "decoder.up.3.block.2.norm1.bias"),
        ("decoder.up_blocks.2.upsamplers.0.conv.bias", "decoder.up.1.upsample.conv.bias"),
        ("decoder.mid_block.attentions.0.to_out.0.weight", "decoder.mid.attn_1.proj_out.weight"),
        ("post_quant_conv.weight", "post_quant_conv.weight"),
    ):
        assert table[ours].name == theirs


def test_the_text_towers_table_is_a_bijection() -> None:
    config = CLIPTextConfig(vocab_size=50, hidden_size=64, num_hidden_layers=3)
    names = [*tree_names(CLIPTextModel(config), ((1, 5), "int32")), "text_projection.weight"]
    table = names_ldm.open_clip_names(names)
    assert len({(piece.name, piece.third) for piece in table.values()}) == len(names)
    piece = table["text_model.encoder.layers.2.self_attn.v_proj.weight"]
    assert piece == names_ldm.Piece("transformer.resblocks.2.attn.in_proj_weight", third=2)
    assert table["text_projection.weight"] == names_ldm.Piece("text_projection", transposed=True)
    other = names_ldm.open_clip_names(names, linear_projection=True)
    assert other["text_projection.weight"] == names_ldm.Piece("text_projection.weight")


def test_thirds_and_transposes_are_those_of_the_values(tmp_path: Path) -> None:
    """By value, since a square projection has the same shape either way."""
    matrix = np.arange(36, dtype=np.float32).reshape(12, 3)
    write(tmp_path / "x.safetensors", {"first": np.zeros(5, np.float16), "in_proj_weight": matrix})
    from sdipc_jax.checkpoints.headers import read_header

    (whole,) = [tensor for tensor in read_header(tmp_path / "x.safetensors") if tensor.name == "in_proj_weight"]
    for index in range(3):
        np.testing.assert_array_equal(whole.third(index).read(), matrix[4 * index : 4 * index + 4])
        np.testing.assert_array_equal(whole.third(index).transpose().read(), matrix[4 * index : 4 * index + 4].T)
    assert whole.transpose().shape == (3, 12)
    assert Tensor(tmp_path, "x", "F32", (4, 3, 1, 1), 0).reshaped((4, 3)).shape == (4, 3)
    assert Tensor(tmp_path, "x", "F32", (4, 3), 0).reshaped((3, 4)).shape == (4, 3)


# The vocabulary.


def test_clips_vocabulary_is_in_the_package(sd1: Bundle, sd2: Bundle) -> None:
    tokenizer = load_tokenizer(sd1.config.folder)
    assert len(tokenizer) == 49408
    assert tokenizer("a photo of a cat")["input_ids"] == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert tokenizer("a diagram")["input_ids"][2] == 22697
    assert sdipc.tokenize(sd1, ["a"])[0, 2:].tolist() == [49407] * 75
    assert sdipc.tokenize(sd2, ["a"])[0, 2:].tolist() == [49407] + [0] * 74


# Whole files.


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return family_bundle(tmp_path_factory.mktemp("sdxl") / "checkpoint", SDXL)


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl"])
def test_a_single_file_equals_the_folder(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    bundle = request.getfixturevalue(name)
    save_single(bundle, tmp_path / "x.safetensors")
    found = sdipc.load(tmp_path / "x.safetensors")
    equal(found.params, bundle.params)
    for part in ("unet", "vae", "text", "tokens", "text_2", "tokens_2", "scheduler"):
        left, right = getattr(found.config, part), getattr(bundle.config, part)
        assert dataclasses.replace(left, projection_dim=64) == right if part == "text" else left == right
    np.testing.assert_array_equal(sdipc.tokenize(found, ["a red cat"]), sdipc.tokenize(bundle, ["a red cat"]))
    assert list(digests(found.config, None)) == ["unet/x.safetensors"]


def test_the_file_has_compvis_names(arrays: Arrays) -> None:
    assert arrays[f"{UNET}input_blocks.1.1.proj_in.weight"].shape == (32, 32, 1, 1)
    assert arrays[f"{VAE}decoder.mid.attn_1.q.weight"].shape == (32, 32, 1, 1)
    assert f"{TEXT}text_model.final_layer_norm.weight" in arrays


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_files_in_half_precision(sd1: Bundle, tmp_path: Path, dtype: str) -> None:
    save_single(sd1, tmp_path / "x.safetensors", dtype=dtype)
    found = sdipc.load(tmp_path / "x.safetensors")
    equal(found.params, jax.tree.map(lambda leaf: leaf.astype(dtype).astype("float32"), sd1.params))


def renamed(arrays: Arrays, **prefixes: str) -> Arrays:
    """The file with other prefixes for its parts."""
    old = {"unet": UNET, "vae": VAE, "text": TEXT}
    found = {}
    for name, array in arrays.items():
        part = next(part for part, prefix in old.items() if name.startswith(prefix))
        if part in prefixes:
            found[prefixes[part] + name.removeprefix(old[part])] = array
    return found


@pytest.mark.parametrize(
    "prefixes",
    [
        {"unet": UNET, "vae": "vae.", "text": "conditioner.embedders.0.transformer."},
        {"unet": "", "vae": VAE, "text": TEXT},
        {"unet": UNET, "vae": VAE, "text": "text_encoder."},
    ],
)
def test_prefixes(arrays: Arrays, sd1: Bundle, tmp_path: Path, prefixes: dict[str, str]) -> None:
    found = sdipc.load(write(tmp_path / "x.safetensors", renamed(arrays, **prefixes)))
    equal(found.params, sd1.params)


def test_diffusers_own_names_in_one_file(sd1: Bundle, arrays: Arrays, tmp_path: Path) -> None:
    sdipc.save(sd1, tmp_path / "folder")
    files = {"unet.": "unet/diffusion_pytorch_model", "vae.": "vae/diffusion_pytorch_model",
             "text_encoder.": "text_encoder/model"}  # fmt: skip
    joined = {
        f"{prefix}{name.removeprefix('text_model.')}": array
        for prefix, file in files.items()
        for name, array in load_file(tmp_path / f"folder/{file}.safetensors").items()
    }
    equal(sdipc.load(write(tmp_path / "x.safetensors", joined)).params, sd1.params)


def test_parts_from_elsewhere(sd1: Bundle, arrays: Arrays, tmp_path: Path) -> None:
    """Each part from a file of its own, without a prefix, or from a folder."""
    files = {part: write(tmp_path / f"{part}.safetensors", renamed(arrays, **{part: ""})) for part in ("unet", "vae")}
    files["text"] = write(tmp_path / "text.safetensors", renamed(arrays, text=""))
    refuse(read_config, files["unet"], words="found no VAE, only the UNet, expected one: pass --vae FOLDER_ID_OR_FILE")
    refuse(read_config, files["unet"], vae=files["vae"], words="pass --text-encoder FOLDER_ID_OR_FILE")
    refuse(read_config, files["vae"], words="found no UNet, only the VAE, expected one: use a whole checkpoint")
    refuse(read_config, files["unet"], vae=tmp_path / "no", words="no such folder or file, expected 'embedded'")
    found = sdipc.load(files["unet"], vae=files["vae"], text_encoder=files["text"])
    equal(found.params, sd1.params)
    assert len(digests(found.config, None)) == 3
    sdipc.save(sd1, tmp_path / "folder")
    for vae in (tmp_path / "folder", tmp_path / "folder/vae"):
        equal(sdipc.load(files["unet"], vae=vae, text_encoder=tmp_path / "folder").params, sd1.params)


def test_parts_of_sdxl_from_elsewhere(sdxl: Bundle, tmp_path: Path) -> None:
    """A UNet alone, as model sites have them; what a VAE or a tower alone does not tell comes from its family."""
    save_single(sdxl, tmp_path / "whole.safetensors")
    arrays = load_file(tmp_path / "whole.safetensors")
    towers = {name: array for name, array in arrays.items() if name.startswith("conditioner.")}
    only = {"unet": UNET, "vae": VAE, "first": "conditioner.embedders.0.transformer."}
    files = {
        part: write(
            tmp_path / f"{part}.safetensors",
            {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)},
        )
        for part, prefix in only.items()
    }
    files["text"] = write(tmp_path / "text.safetensors", towers)
    refuse(read_config, files["unet"], words="found no VAE, only the UNet, expected one: pass --vae")
    refuse(read_config, files["unet"], vae=files["vae"], words="found no text encoder, only the UNet, expected one: p")
    parts = {"vae": files["vae"], "text_encoder": files["first"]}
    refuse(
        read_config, files["unet"], **parts,
        words="found no second text encoder, only the UNet, expected one: pass --text-encoder FOLDER_ID_OR_FILE with "
        "both text encoders",
    )  # fmt: skip
    sdipc.save(sdxl, tmp_path / "folder")
    for text in (files["text"], tmp_path / "folder"):
        found = sdipc.load(files["unet"], vae=files["vae"], text_encoder=text)
        equal(found.params, sdxl.params)
        assert found.config.vae == sdxl.config.vae
        assert found.config.vae.scaling_factor == SDXL.scaling_factor
        assert found.config.text_2 == sdxl.config.text_2
    # Under transformers' names the second tower has OpenCLIP's activation too.
    named = {f"text_encoder_2.{name}": array for name, array in
             load_file(tmp_path / "folder/text_encoder_2/model.safetensors").items()}  # fmt: skip
    first = {name: array for name, array in arrays.items() if "embedders.1" not in name}
    equal(sdipc.load(write(tmp_path / "named.safetensors", first | named)).params, sdxl.params)
    assert read_config(tmp_path / "named.safetensors").text_2 == sdxl.config.text_2


def test_dummies_are_refused(sdxl: Bundle, tmp_path: Path) -> None:
    """What some programs write where they have no weights, in what makes SDXL's pooled text."""
    save_single(sdxl, tmp_path / "whole.safetensors")
    arrays, tower = load_file(tmp_path / "whole.safetensors"), "conditioner.embedders.1.model."
    ones = {f"{tower}text_projection": np.ones((64, 64), np.float32)}
    refuse(
        read_config, write(tmp_path / "x.safetensors", arrays | ones),
        words="found a dummy text_projection, all of whose rows are alike, expected CLIP's",
    )  # fmt: skip
    block = f"{tower}transformer.resblocks."
    copied = {name.replace(f"{block}0.", f"{block}1."): array for name, array in arrays.items() if f"{block}0." in name}
    refuse(
        read_config, write(tmp_path / "x.safetensors", arrays | copied),
        words="found a dummy for layer 1, a copy of the one before, expected CLIP's",
    )  # fmt: skip


def test_junk_is_dropped(sd1: Bundle, arrays: Arrays, tmp_path: Path) -> None:
    junk = [
        *("betas", "alphas_cumprod_prev", "sqrt_one_minus_alphas_cumprod", "posterior_variance", "global_step"),
        *("cond_stage_model.logit_scale", "model_ema.decay", "model_ema.num_updates", "first_stage_model.loss.logvar"),
        *(f"{TEXT}text_model.embeddings.position_ids", f"{TEXT}text_model.encoder.text_model.embeddings.position_ids"),
        *("denoiser.sigmas", "logvar", f"{TEXT}text_projection.weight"),
    ]
    more = {name: np.zeros((2, 2), np.float32) for name in junk} | {"global_step": np.array([3], np.int64)}
    found = sdipc.load(write(tmp_path / "x.safetensors", arrays | more))
    equal(found.params, sd1.params)
    refuse(
        read_config, write(tmp_path / "y.safetensors", arrays | {"evil.weight": np.zeros(1, np.float32)}),
        words="found evil.weight, expected a checkpoint of Stable Diffusion 1.x, 2.x or XL",
    )  # fmt: skip
    extra = write(tmp_path / "z.safetensors", arrays | {f"{UNET}more.weight": np.zeros(1, np.float32)})
    refuse(sdipc.load, extra, words="more.weight is extra")


def test_the_moving_average(sd1: Bundle, arrays: Arrays, tmp_path: Path) -> None:
    average = {
        "model_ema." + name.removeprefix("model.").replace(".", ""): array + 1
        for name, array in arrays.items()
        if name.startswith(UNET)
    }
    assert "model_ema.diffusion_modelinput_blocks00weight" in average
    file = write(tmp_path / "x.safetensors", arrays | average)
    plain, averaged = sdipc.load(file), sdipc.load(file, ema=True)
    equal(plain.params, sd1.params)
    equal(averaged.params["unet"], jax.tree.map(lambda leaf: leaf + 1, sd1.params["unet"]))
    assert plain.config.notes[0].endswith("not the moving average beside it")
    refuse(read_config, write(tmp_path / "y.safetensors", arrays), ema=True, words="found no moving average (EMA)")


# Choices.


def predicted(path: Path, **options: Any) -> tuple[str, str]:
    config = read_config(path, **options)
    return config.scheduler.to_json()["prediction_type"], config.notes[0]


def test_who_says_what_the_unet_predicts(arrays: Arrays, tmp_path: Path) -> None:
    """The option, the file beside it, marks, metadata, the family, in this order."""
    file = write(tmp_path / "x.safetensors", arrays)
    assert predicted(file) == ("epsilon", "x.safetensors: Stable Diffusion 1.x by its shapes, epsilon by its family")
    write(file, arrays, **{"modelspec.prediction_type": "v"})
    assert predicted(file)[0] == "v_prediction"
    assert "by its metadata (modelspec.prediction_type)" in predicted(file)[1]
    marked = arrays | {"v_pred": np.zeros(0, np.float32), "ztsnr": np.zeros(0, np.float32)}
    write(file, marked, **{"modelspec.prediction_type": "epsilon"})
    assert "v_prediction by its tensor v_pred" in predicted(file)[1]
    assert read_config(file).scheduler.to_json()["rescale_betas_zero_snr"] is True
    (tmp_path / "x.yaml").write_text("model: {params: {parameterization: eps}}")
    assert "epsilon by x.yaml" in predicted(file)[1]
    target = "sgm.modules.diffusionmodules.denoiser_scaling.VScaling"
    sgm = {"model": {"params": {"denoiser_config": {"params": {"scaling_config": {"target": target}}}}}}
    (tmp_path / "x.yaml").write_text(json.dumps(sgm))
    assert "v_prediction by x.yaml" in predicted(file)[1]
    assert "epsilon by --prediction-type" in predicted(file, prediction_type="epsilon")[1]
    refuse(
        read_config, file, prediction_type="x", words="prediction_type is 'x', expected one of epsilon, v_prediction"
    )
    (tmp_path / "x.yaml").write_text("a: [")
    refuse(read_config, file, words="found no readable YAML")


def test_metadata_of_another_family_are_refused(arrays: Arrays, tmp_path: Path) -> None:
    file = write(tmp_path / "x.safetensors", arrays, **{"modelspec.architecture": "stable-diffusion-xl-v1-base"})
    refuse(read_config, file, words="found Stable Diffusion 1.x by its shapes and 'stable-diffusion-xl-v1-base' in its")


def test_shapes_decide_and_not_a_config(sd2: Bundle, tmp_path: Path) -> None:
    """A linear layer stored as a convolution of one pixel, as merging programs leave it."""
    save_single(sd2, tmp_path / "x.safetensors")
    arrays = load_file(tmp_path / "x.safetensors")
    name = f"{UNET}middle_block.1.proj_in.weight"
    found = sdipc.load(write(tmp_path / "y.safetensors", arrays | {name: arrays[name][..., None, None]}))
    equal(found.params, sd2.params)
    assert found.config.unet.use_linear_projection
    # ViT-H's last block and projection are in such files, and not in the text encoder.
    prefix = "cond_stage_model.model."
    more = {f"{prefix}text_projection": np.zeros((64, 64), np.float32)}
    equal(sdipc.load(write(tmp_path / "y.safetensors", arrays | more)).params, sd2.params)


# What else people hand over.


@pytest.mark.parametrize(
    "name, words",
    [
        ("model.diffusion_model.joint_blocks.0.x", "found Stable Diffusion 3"),
        ("double_blocks.0.img_attn.qkv.weight", "found FLUX"),
        ("model.diffusion_model.input_blocks.1.1.time_stack.0.norm1.weight", "found Stable Video Diffusion"),
        ("control_model.zero_convs.0.0.weight", "found a ControlNet"),
        ("input_hint_block.0.weight", "found a ControlNet"),
        ("embedder.model.visual.proj", "found an unCLIP checkpoint"),
        ("depth_model.model.x", "found a depth checkpoint"),
        ("cc_projection.weight", "found Zero123"),
        ("scaled_fp8", "found weights in scaled 8-bit floats"),
        ("model.diffusion_model.out.2.scale_weight", "found weights in scaled 8-bit floats"),
        ("lora_unet_x.lora_down.weight", "found a LoRA: pass it with --lora"),
        ("unet.down_blocks.0.attn1.to_q.lora_A.weight", "found a LoRA: pass it with --lora"),
        ("emb_params", "found a textual inversion: pass it with --embedding"),
        ("clip_g", "found a textual inversion: pass it with --embedding"),
        ("edm_mean", "found Playground 2.5"),
        ("edm_vpred.sigma_max", "found CosXL"),
        ("add_embedding.image_norm.weight", "found Kandinsky"),
        ("image_proj.proj.weight", "found an IP-Adapter"),
        ("x.quant_state.bitsandbytes__nf4", "found weights in 4 bits"),
        ("something.else", "found something.else, expected a checkpoint"),
    ],
)
def test_other_files_are_refused_by_name(name: str, words: str, tmp_path: Path) -> None:
    refuse(read_config, write(tmp_path / "x.safetensors", {name: np.zeros(1, np.float32)}), words=words)


@pytest.mark.parametrize(
    "shapes, words",
    [
        ({"input_blocks.0.0.weight": (32, 8, 3, 3)}, "found an instruct-pix2pix checkpoint"),
        ({"input_blocks.0.0.weight": (32, 5, 3, 3)}, "found a depth checkpoint"),
        ({"input_blocks.0.0.weight": (32, 7, 3, 3)}, "found an upscaler"),
        ({"input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (32, 1280)}, "found the refiner of Stable Diff"),
        (
            {
                "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (32, 1024),
                "label_emb.0.0.weight": (128, 2048),
            },
            "found an unCLIP checkpoint",
        ),
    ],
)
def test_other_unets_are_refused_by_name(arrays: Arrays, shapes: dict[str, Any], words: str, tmp_path: Path) -> None:
    changed = {f"{UNET}{name}": np.zeros(shape, np.float16) for name, shape in shapes.items()}
    refuse(read_config, write(tmp_path / "x.safetensors", arrays | changed), words=words)


@pytest.mark.parametrize(
    "changes",
    [
        # SSD-1B's kind: depths of their own in each layer, no transformer in the middle.
        {
            "layers_per_block": 2,
            "transformer_layers_per_block": (1, (3, 1)),
            "reverse_transformer_layers_per_block": ((1, 2, 3), 1),
            "mid_block_type": "UNetMidBlock2D",
        },
        # KOALA's: one layer a level, no middle at all.
        {"transformer_layers_per_block": (1, 3), "mid_block_type": None},
    ],
)
def test_depths_of_pruned_relatives_of_sdxl_come_from_the_files(changes: dict[str, Any], tmp_path: Path) -> None:
    config = family_bundle(tmp_path / "checkpoint", SDXL).config
    config = dataclasses.replace(config, unet=dataclasses.replace(config.unet, **changes))
    bundle = Bundle(jax_tree(random_tree(config.abstract_params(), 0)), config)
    file = tmp_path / "pruned.safetensors"
    save_single(bundle, file)
    found = sdipc.load(file)
    assert found.config.unet == config.unet
    equal(found.params["unet"], bundle.params["unet"])
    # Lists in a folder's config.json.
    sdipc.save(bundle, tmp_path / "folder")
    assert read_config(tmp_path / "folder").unet == config.unet


def test_files_that_do_not_fit(arrays: Arrays, tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    missing = {name: array for name, array in arrays.items() if "middle_block.0.in_layers.0.weight" not in name}
    refuse(sdipc.load, write(file, missing), words="mid_block.resnets.0.norm1.weight is missing")
    no_middle = {name: array for name, array in arrays.items() if "middle_block.1" not in name}
    refuse(sdipc.load, write(file, no_middle), words="found a UNet of which single blocks were taken away")
    refuse(read_config, tmp_path / "no.safetensors", words="no such")
    (tmp_path / "x.ckpt").write_bytes(b"\x80\x02")
    refuse(read_config, tmp_path / "x.ckpt", words="found a .ckpt file, expected safetensors: such a file can run code")


def test_what_no_single_file_can_say(tiny: Bundle, sd1: Bundle, tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    heads = dataclasses.replace(sd1.config.unet, attention_head_dim=(4, 8))
    changed = dataclasses.replace(sd1, config=dataclasses.replace(sd1.config, unet=heads))
    refuse(save_single, changed, file, words="unet: attention_head_dim is (4, 8), but a single file would be read with")
    file.write_text("x")
    refuse(save_single, sd1, file, words="found something there, expected a new file")
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_the_command_export(sd1: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sdipc.save(sd1, tmp_path / "folder")
    for name in ("one.safetensors", "again"):
        arguments = ["export", "--model", str(tmp_path / "folder"), "--output", str(tmp_path / name)]
        assert main([*arguments, "--dtype", "float16"]) == 0
        expected = jax.tree.map(lambda leaf: leaf.astype("float16").astype("float32"), sd1.params)
        equal(sdipc.load(tmp_path / name).params, expected)
        assert main(arguments) == 2
        assert "is there already, expected a new name: choose another --output" in capsys.readouterr().err
    # Files of weights have the rights of others, though safetensors' own are private.
    (tmp_path / "mine").touch()
    for weights in (tmp_path / "one.safetensors", *(tmp_path / "again").glob("*/*.safetensors")):
        assert weights.stat().st_mode == (tmp_path / "mine").stat().st_mode


def test_opening_is_once_for_a_file(arrays: Arrays, tmp_path: Path) -> None:
    file = write(tmp_path / "x.safetensors", arrays)
    assert set(SingleFile(file).places) == {"unet", "vae", "text_encoder"}
    assert SDXL.text_parts == ("text_encoder", "text_encoder_2")


def test_damaged_and_hostile_headers(tmp_path: Path) -> None:
    """Opened or refused in one line, quickly, in little memory; the script tries ten thousand."""
    outcomes = fuzz_checkpoints.run(fuzz_checkpoints.single_file(tmp_path), 200, 1)
    assert outcomes.keys() == {"opened", "refused"}, outcomes
    assert min(outcomes.values()) > 5

"""ControlNets (Zhang et al. 2023): networks beside the UNet that see a picture, from folders, files or the hub."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sdipc_jax.checkpoints.bundle import Bundle, Config, Params
from sdipc_jax.checkpoints.checks import check_counts
from sdipc_jax.checkpoints.control_side import ControlSide
from sdipc_jax.checkpoints.headers import Tensor, read_header
from sdipc_jax.checkpoints.names_ldm import unet_names
from sdipc_jax.checkpoints.parts import read_json
from sdipc_jax.checkpoints.sources import find
from sdipc_jax.checkpoints.tensors import refuse_pickle, shapes_of, take, weight_files
from sdipc_jax.errors import InputError, printable
from sdipc_jax.models import ControlNetConfig, UNetConfig
from sdipc_jax.models.weighted import cross_attention_layers

# What a network must have as the UNet has it: its residuals are added to the UNet's features.
_SHARED = ("cross_attention_dim", "block_out_channels", "layers_per_block", "addition_embed_type")
_EMBEDDING = "controlnet_cond_embedding."
# What files that are older than diffusers' names begin their own with.
_PREFIXES = ("control_model.", "")


def with_controlnets(config: Config, sources: Sequence[str | Path]) -> Config:
    """The configuration of a checkpoint with ControlNets beside its UNet.

    Args:
        sources: folders of diffusers, safetensors files, or ids on the hub.

    Raises:
        InputError: there is no such thing, or it is a network for another family of checkpoints.
    """
    for source in map(find, sources):
        side = _read_side(config, source.path)
        origins = config.origins
        if source.origin:
            origins = (*origins, (f"controlnet/{len(config.controlnets) + 1}", source.origin))
        config = dataclasses.replace(config, controlnets=(*config.controlnets, side), origins=origins)
    return config


def add_controlnet(bundle: Bundle, source: str | Path) -> Bundle:
    """The bundle with one more ControlNet, to be shown pictures by `generate(controls=...)`. The old one stays.

    Raises:
        InputError: as `with_controlnets`, or weights that do not fit.
    """
    config = with_controlnets(bundle.config, [source])
    networks = bundle.params.get("controlnets", {}) | load_controlnets(config, len(bundle.config.controlnets))
    return dataclasses.replace(bundle, params=bundle.params | {"controlnets": networks}, config=config)


def load_controlnets(config: Config, first: int = 0) -> Params:
    """The weights of the networks from `first` on, by their places."""
    expected = config.abstract_params()["controlnets"]
    return {
        str(place): _load(config.controlnets[place], expected[str(place)])
        for place in range(first, len(config.controlnets))
    }


def _load(side: ControlSide, expected: Mapping[str, Any]) -> Params:
    *_, last = files = [Path(file) for file in side.files if Path(file).suffix != ".json"]
    stored, by_authors = _stored(files)
    if not by_authors:
        return take(last, expected, stored)
    shapes = shapes_of(expected)
    table = {name: piece.name for name, piece in unet_names(shapes, side.network.layers_per_block).items()}
    found = {name: stored[other].reshaped(shapes[name]) for name, other in table.items() if other in stored}
    return take(last, expected, found | {name: stored[name] for name in stored.keys() - table.values()})


def _stored(files: Sequence[Path]) -> tuple[dict[str, Tensor], bool]:
    """A network's tensors, and whether they have their authors' names or diffusers'."""
    tensors = {tensor.name: tensor for file in files for tensor in read_header(file)}
    for prefix in _PREFIXES:
        if f"{prefix}input_hint_block.0.weight" in tensors:
            own = {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
            return {name.removeprefix(prefix): tensor for name, tensor in own.items()}, True
    return tensors, False


def _read_side(config: Config, source: Path) -> ControlSide:
    shown = printable(source)
    if source.is_dir():
        files = [source / "config.json", *weight_files(source)]
        values = read_json(source, "config.json")
        kind = values.get("_class_name", ControlNetConfig.CLASS_NAME)
        if kind != ControlNetConfig.CLASS_NAME:
            raise InputError(f"{shown}: found a {kind}, expected a {ControlNetConfig.CLASS_NAME}: use another network")
        network = ControlNetConfig.from_json(values, f"{shown}: config.json")
    else:
        files, network = [source], _of_file(config, source)
    check_counts(shown, network)
    for name in _SHARED:
        _check_same(shown, name, getattr(network, name), getattr(config.unet, name))
    _check_same(shown, "in_channels", network.in_channels, config.vae.latent_channels)
    _check_same(shown, "the share of its picture's sides that is kept", network.downscale, config.vae.downscale)
    # Where several prompts count in each layer as their weights say, the layers must be the UNet's.
    for block, _ in set(cross_attention_layers(network)) - set(cross_attention_layers(config.unet)):
        if not block.startswith("up_blocks"):
            raise InputError(f"{shown}: reads prompts in {block}, where the checkpoint does not: use another network")
    return ControlSide(network, tuple(map(str, files)))


def _of_file(config: Config, file: Path) -> ControlNetConfig:
    """The architecture of a file, which says nothing of it: the UNet's, and what the tensors' shapes tell."""
    shown = printable(file)
    refuse_pickle(file)
    stored, by_authors = _stored([file])
    if not by_authors and f"{_EMBEDDING}conv_in.weight" not in stored:
        what = "a Control-LoRA" if "lora_controlnet" in stored else f"no {_EMBEDDING}conv_in"
        raise InputError(f"{shown}: found {what}, expected the weights of a ControlNet: use another file")

    def lengths(name: str) -> tuple[int, ...]:
        """What comes out of the modules of this name, numbered from 0."""
        found = (_shape(stored, by_authors, config.unet, name.format(number)) for number in itertools.count())
        return tuple(shape[0] for shape in itertools.takewhile(bool, found))

    _check_same(
        shown, "block_out_channels", lengths("down_blocks.{}.resnets.0.conv1.weight"), config.unet.block_out_channels
    )
    widths = {tensor.shape[-1] for name, tensor in stored.items() if name.endswith(".attn2.to_k.weight")}
    _check_same(shown, "cross_attention_dim", max(widths, default=None), config.unet.cross_attention_dim)
    first = _shape(stored, by_authors, config.unet, f"{_EMBEDDING}conv_in.weight")[:1]
    return ControlNetConfig.beside(
        config.unet,
        in_channels=config.vae.latent_channels,
        conditioning_embedding_out_channels=first + lengths(_EMBEDDING + "blocks.{}.weight")[1::2],
    )


def _shape(stored: Mapping[str, Tensor], by_authors: bool, unet: UNetConfig, name: str) -> tuple[int, ...]:
    """Of the tensor that diffusers calls so; () if there is none."""
    if by_authors:
        name = unet_names([name], unet.layers_per_block)[name].name
    return stored[name].shape if name in stored else ()


def _check_same(shown: str, name: str, found: Any, expected: Any) -> None:
    if found != expected:
        raise InputError(
            f"{shown}: {name} is {found}, expected the checkpoint's {expected}: use a ControlNet that was made for it"
        )

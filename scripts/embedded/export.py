"""The trained parts as the folder that ships: diffusers layout, float16, attribution."""

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file, save_file

from embedded.stages import clip_of, unet_of, vae_of
from embedded.training import Tree
from embedded.unet import SCHEDULER
from sdipc_jax import Bundle, save
from sdipc_jax.checkpoints.bundle import Config, SpecialTokens, VisionSide
from sdipc_jax.pictures.preprocessing import Preprocessing
from sdipc_jax.samplers import SchedulerConfig
from sdipc_jax.settings import Defaults

_ATTRIBUTION = """# Attribution

The weights in this folder were trained on drawings and names of emoji from these packages.

| package | style in captions | author | licence |
|---|---|---|---|
{rows}

The drawings were rendered at 64 px on white; none of them is in this folder. `scripts/build_corpus.py` says which
drawings were used. The weights themselves are under this project's Apache-2.0 licence.
CC-BY-4.0: https://creativecommons.org/licenses/by/4.0/ · Apache-2.0: https://www.apache.org/licenses/LICENSE-2.0
· MIT: https://opensource.org/license/mit
"""

_STYLES = {
    "@iconify-json/noto": "noto",
    "@iconify-json/noto-v1": "blob",
    "@iconify-json/twemoji": "twemoji",
    "@iconify-json/emojione": "emojione",
    "@iconify-json/fluent-emoji-flat": "flat",
    "@lobehub/fluent-emoji-3d": "3d",
    "emojibase-data": "(the names)",
}


def attribution(packages: dict[str, Any]) -> str:
    """The note that the drawings' licences ask for, from the corpus's manifest; without the style held out."""
    rows = []
    for package, facts in packages.items():
        style = _STYLES.get(package.rpartition("@")[0])
        if style is not None:
            licence, _, author = facts["licence"].partition(", ")
            rows.append(f"| {package} | {style} | {author} | {licence} |")
    return _ATTRIBUTION.format(rows="\n".join(rows))


def export(
    settings: dict[str, Any],
    folder: Path,
    clip: Tree,
    vae: Tree,
    unet: Tree,
    *,
    measured: Tree,
    scaling: float,
    packages: Tree,
) -> None:
    """Replaces the folder by the trained parts. The model card is kept.

    Args:
        folder: where the checkpoint ships.
        clip, vae, unet: parameters.
        measured: `cutoff` and `scale` of the closed form.
        scaling: the VAE's scaling_factor.
        packages: of the corpus's manifest.
    """
    towers, vae_config = clip_of(settings), vae_of(settings).config
    tokens = towers.text.vocab_size
    work = Path(settings["folder"])
    defaults = Defaults(cutoff=measured["cutoff"], scale=measured["scale"], height=64, width=64, **settings["defaults"])
    side = towers.vision.image_size
    preprocessing = {
        "do_resize": True,
        "size": {"shortest_edge": side},
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    vision_side = VisionSide(
        folder=str(work),
        vision=towers.vision,
        preprocessing=Preprocessing.from_json(preprocessing, "preprocessor_config.json"),
        projection_dim=towers.text.projection_dim,
    )
    vae_values = {name: value for name, value in vae_config.to_json().items() if name not in vae_config.FIXED}
    config = Config(
        folder=str(work),
        unet=unet_of(settings).config,
        vae=type(vae_config).from_json(vae_values | {"scaling_factor": scaling}, "vae/config.json"),
        text=towers.text,
        scheduler=SchedulerConfig.from_json(SCHEDULER),
        tokens=SpecialTokens(tokens - 2, tokens - 1, tokens - 1, towers.text.max_position_embeddings),
        defaults=defaults,
        clip=vision_side,
    )
    vision = {name: clip[name] for name in ("vision_model", "visual_projection", "text_projection", "logit_scale")}
    parts = {"unet": unet, "vae": vae, "text_encoder": {"text_model": clip["text_model"]}, "clip": vision}
    fresh = folder.with_name(folder.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    save(Bundle(parts, config), fresh, dtype="float16")
    if "text_layers" in settings["unet"]:
        shorten(fresh / "text_encoder", settings["unet"]["text_layers"])
    (fresh / "ATTRIBUTION.md").write_text(attribution(packages), encoding="utf-8")
    if (folder / "README.md").is_file():
        shutil.copy(folder / "README.md", fresh)
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)


def shorten(folder: Path, count: int) -> None:
    """Leaves the text encoder its first layers and its last norm, as in SD 2.x; clip/ has the whole text tower."""
    config, weights = folder / "config.json", folder / "model.safetensors"
    values = json.loads(config.read_text())
    gone = tuple(f"text_model.encoder.layers.{layer}." for layer in range(count, values["num_hidden_layers"]))
    config.write_text(json.dumps(values | {"num_hidden_layers": count}, indent=2, sort_keys=True) + "\n")
    tensors = {name: tensor for name, tensor in load_file(weights).items() if not name.startswith(gone)}
    save_file(tensors, weights, metadata={"format": "pt"})


def shipped(folder: Path) -> dict[str, Tree]:
    """The parts of a shipped folder, as the stages hold them."""
    from sdipc_jax import load

    params = load(folder).params
    return {"clip": params["text_encoder"] | params["clip"], "vae": params["vae"], "unet": params["unet"]}

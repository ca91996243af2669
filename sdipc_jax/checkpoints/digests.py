"""The files that decide what a checkpoint makes, by their sha256."""

from pathlib import Path

from sdipc_jax.checkpoints.bundle import Config
from sdipc_jax.checkpoints.delta import check_delta_file
from sdipc_jax.checkpoints.hub import sha256
from sdipc_jax.checkpoints.keys import DEEP_PROMPTS_FILE, INVERSE_FILE
from sdipc_jax.checkpoints.tensors import weight_files


def digests(config: Config, tuned: Path | None, *, left_out: tuple[str, ...] = ()) -> dict[str, str]:
    """The sha256 of each file that decides what is made: weights, configurations, tokenizer, what is added.

    What came from the hub is there with its repository and commit.

    Args:
        left_out: what the names begin with of those that need not be told, such as `unet/`.

    Raises:
        InputError: there is no tuning's file.
    """
    parts = ["unet", "vae", *config.text_towers, *(["safety_checker"] if config.safety is not None else [])]
    places = {part: config.place(part) for part in parts}
    if config.clip is not None:
        places["clip"] = Path(config.clip.folder)
    # A single file holds several parts, and counts once.
    singles = {place: part for part, place in reversed(places.items()) if place.is_file()}
    files = {f"{part}/{place.name}": place for place, part in singles.items()}
    folders = {part: place for part, place in places.items() if not place.is_file()}
    files |= {f"{part}/{file.name}": file for part, folder in folders.items() for file in weight_files(folder)}
    for name in (*folders, "tokenizer", "tokenizer_2", "scheduler", "feature_extractor"):
        folder = folders.get(name, Path(config.folder, name))
        files |= {f"{name}/{file.name}": file for file in sorted([*folder.glob("*.json"), *folder.glob("*.txt")])}
    if "clip" in folders:
        trained = (folders["clip"] / name for name in (DEEP_PROMPTS_FILE, INVERSE_FILE))
        files |= {f"clip/{file.name}": file for file in trained if file.is_file()}
    files |= {f"lora/{place}/{lora.file.name}": lora.file for place, lora in enumerate(config.loras, 1)}
    files |= {f"embedding/{each.word}": Path(each.file) for each in config.embeddings}
    for place, side in enumerate(config.controlnets, 1):
        files |= {f"controlnet/{place}/{Path(file).name}": Path(file) for file in side.files}
    if tuned is not None:
        check_delta_file(tuned)
        files["tuned"] = tuned
    digest = {name: sha256(file) for name, file in files.items() if not name.startswith(left_out)}
    return digest | {f"hub/{part}": origin for part, origin in config.origins}

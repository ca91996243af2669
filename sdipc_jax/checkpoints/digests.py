"""The files that decide what a checkpoint makes, by their sha256."""

import hashlib
from pathlib import Path

from sdipc_jax.checkpoints.bundle import Config
from sdipc_jax.checkpoints.keys import DEEP_PROMPTS_FILE, INVERSE_FILE
from sdipc_jax.checkpoints.tensors import weight_files


def digests(config: Config, tuned: Path | None, *, left_out: tuple[str, ...] = ()) -> dict[str, str]:
    """The sha256 of each file that decides what is made: weights, configurations, tokenizer, what is added.

    Args:
        left_out: what the names begin with of those that need not be told, such as `unet/`.
    """
    folders = {name: Path(config.folder, name) for name in ("unet", "vae", "text_encoder")}
    if config.text_2 is not None:
        folders["text_encoder_2"] = Path(config.folder, "text_encoder_2")
    if config.safety is not None:
        folders["safety_checker"] = Path(config.folder, "safety_checker")
    if config.clip is not None:
        folders["clip"] = Path(config.clip.folder)
    files = {f"{name}/{file.name}": file for name, folder in folders.items() for file in weight_files(folder)}
    for name in (*folders, "tokenizer", "tokenizer_2", "scheduler", "feature_extractor"):
        folder = folders.get(name, Path(config.folder, name))
        files |= {f"{name}/{file.name}": file for file in sorted([*folder.glob("*.json"), *folder.glob("*.txt")])}
    if config.clip is not None:
        trained = (Path(config.clip.folder, name) for name in (DEEP_PROMPTS_FILE, INVERSE_FILE))
        files |= {f"clip/{file.name}": file for file in trained if file.is_file()}
    files |= {f"lora/{place}/{lora.file.name}": lora.file for place, lora in enumerate(config.loras, 1)}
    files |= {f"embedding/{each.word}": Path(each.file) for each in config.embeddings}
    if tuned is not None:
        files["tuned"] = tuned
    digest = {}
    for name, file in files.items():
        if name.startswith(left_out):
            continue
        with file.open("rb") as stream:
            digest[name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return digest

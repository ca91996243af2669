"""The command `export`: a checkpoint as it was loaded, in files that other programs open."""

import dataclasses

from sdipc_jax.checkpoints.load import configure, load_weights
from sdipc_jax.checkpoints.save import save
from sdipc_jax.checkpoints.save_single import save_single
from sdipc_jax.commands.outcome import Outcome
from sdipc_jax.commands.settings import ExportSettings
from sdipc_jax.errors import InputError, printable
from sdipc_jax.files import check_writable
from sdipc_jax.records import Report


def export(settings: ExportSettings, report: Report) -> Outcome:
    """Writes a folder, or one file where the name ends in .safetensors."""
    if settings.output.exists():
        raise InputError(f"{printable(settings.output)} is there already, expected a new name: choose another --output")
    check_writable(settings.output.parent)
    # Fused and rounded once: in float32, whatever is stored.
    config = configure(settings.model_copy(update={"dtype": "float32"}))
    notes = list(config.notes)
    tower = config.text if config.clip is None else config.clip_text
    if (tower.num_hidden_layers, tower.hidden_size) != (config.text.num_hidden_layers, config.text.hidden_size):
        # The CLIP's tower is longer or wider than the text encoder, and not in memory.
        config = dataclasses.replace(config, clip=None)
        notes.append("the CLIP is not written: its text tower is not the checkpoint's text encoder")
    bundle = load_weights(config, settings.tuned)
    if settings.output.suffix == ".safetensors":
        save_single(bundle, settings.output, dtype=settings.dtype)
        left_out = [name for name in ("clip", "safety_checker") if name in bundle.params]
        notes += [f"one file has no place for: {', '.join(left_out)}"] if left_out else []
    else:
        save(bundle, settings.output, dtype=settings.dtype)
    report(1.0)
    return Outcome([{"file": str(settings.output)}], [settings.output], notes=tuple(notes))

"""Stable Diffusion 1.5 at full size in one fp16 file with random weights, one framework a process.

python -m tests.parity_newest.single_full write|jax|torch FOLDER
"""

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

from benchmarks.sizes import sd15

import sdipc_jax as sdipc
from sdipc_jax.checkpoints.bundle import Bundle, Config
from sdipc_jax.checkpoints.families import SD1
from sdipc_jax.checkpoints.keys import flatten, unflatten
from sdipc_jax.checkpoints.save_single import save_single
from sdipc_jax.checkpoints.vocabulary import write_vocabulary
from sdipc_jax.compilation import keep_compiled, use_eigen
from sdipc_jax.samplers import SchedulerConfig

TEXTS = ["a red cat"]
SETTINGS = {"guidance_scale": 5.0, "height": 256, "width": 256}
STEPS = 4


def latents() -> np.ndarray:
    """What sampling starts from."""
    return np.random.default_rng(2).standard_normal((1, 4, 32, 32), np.float32)


def configuration(folder: Path) -> Config:
    """Of a checkpoint without CLIP, whose tokenizer lies in the folder."""
    scheduler = SchedulerConfig.from_json(SD1.scheduler("epsilon"))
    return dataclasses.replace(sd15("float32"), folder=str(folder / "words"), clip=None, scheduler=scheduler)


def leaves(config: Config) -> Iterator[tuple[tuple[str, ...], np.ndarray]]:
    """Random weights as `random_weights.random_tree` scales them, a leaf at a time."""
    generator = np.random.default_rng(1)
    for path, leaf in flatten(config.abstract_params()).items():
        noise = generator.standard_normal(leaf.shape, np.float32)
        noise *= np.float32(1 / np.sqrt(np.prod(leaf.shape[:-1])) if path[-1] == "kernel" else 0.2)
        yield path, noise + np.float32(path[-1] == "scale")


def write(folder: Path) -> None:
    """Writes the file `one.safetensors`, and the same as diffusers' folder `pipeline`."""
    (folder / "words/tokenizer").mkdir(parents=True)
    write_vocabulary(folder / "words/tokenizer", SD1.pad)
    config = configuration(folder)
    params: Any = unflatten({path: leaf.astype(np.float16) for path, leaf in leaves(config)})
    bundle = Bundle(params, config)
    save_single(bundle, folder / "one.safetensors")
    sdipc.save(bundle, folder / "pipeline")


def by_jax(folder: Path) -> dict[str, np.ndarray]:
    """Pictures, in levels: from the weights before they were rounded to fp16, from the file and from the folder."""
    import jax
    import jax.numpy as jnp

    use_eigen()
    keep_compiled()

    def picture(bundle: Bundle) -> np.ndarray:
        context = sdipc.text_prompt(bundle, sdipc.tokenize(bundle, TEXTS))
        start = jnp.asarray(latents())
        made = sdipc.generate(bundle, context, seeds=0, latents=start, steps=STEPS, sampler="ddim", **SETTINGS)
        return 255 * np.asarray(made)

    config = configuration(folder)
    exact = unflatten({path: jax.block_until_ready(jnp.asarray(leaf)) for path, leaf in leaves(config)})
    pictures = {"exact": picture(Bundle(exact, config))}
    del exact
    for name in ("one.safetensors", "pipeline"):
        pictures[name] = picture(sdipc.load(folder / name))
    return pictures


def by_torch(folder: Path) -> dict[str, np.ndarray]:
    """The picture that diffusers makes of the file, in levels."""
    import torch
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_single_file(
        str(folder / "one.safetensors"), config=str(folder / "pipeline"), local_files_only=True,
        torch_dtype=torch.float32, safety_checker=None,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    with torch.no_grad():
        made = pipeline(TEXTS, latents=torch.tensor(latents()), output_type="np", num_inference_steps=STEPS, **SETTINGS)
    return {"one.safetensors": 255 * made.images}


if __name__ == "__main__":
    what, where = sys.argv[1], Path(sys.argv[2])
    if what == "write":
        write(where)
    else:
        np.savez(where / f"{what}.npz", **{"jax": by_jax, "torch": by_torch}[what](where))

"""How people spell what they type: names that diffusers has for settings, and the nearest name to a misspelt one."""

import difflib
from collections.abc import Iterable, Sequence

# What diffusers' pipelines and scripts call what is called otherwise here.
OF_DIFFUSERS = {
    "num_inference_steps": "steps",
    "num_images_per_prompt": "num_images",
    "scheduler": "sampler",
    "torch_dtype": "dtype",
    "pretrained_model_name_or_path": "model",
    "pretrained_vae_model_name_or_path": "vae",
    "image_encoder": "clip",
    "controlnet_conditioning_scale": "control_scale",
    "control_guidance_start": "control_start",
    "control_guidance_end": "control_end",
    "lora_weights": "lora",
    "ip_adapter_image": "image",
}
# What has no name here but a place, and the setting that it is in: the first one that a command has.
_PLACES = {"image": ("picture", "pictures"), "prompt": ("text", "texts")}


def respelt(arguments: Sequence[str], options: Iterable[str], places: Iterable[str]) -> list[str]:
    """Arguments with diffusers' names replaced by those that a command has.

    Args:
        arguments: what is typed behind the command.
        options: the command's settings that are typed with their names, with underscores.
        places: those that are typed without.

    >>> respelt(["--prompt", "red apple", "--num-inference-steps=30"], ["steps"], ["texts"])
    ['--steps=30', '--', 'red apple']
    >>> respelt(["--prompt", "red apple", "--image", "a.png"], [], ["picture", "text"])
    ['--', 'a.png', 'red apple']
    """
    options, places = set(options), set(places)
    named, placed = list[str](), {name: list[str]() for name in _PLACES}
    rest = list(arguments)
    while rest and rest[0] != "--":
        found, equals, value = rest.pop(0).partition("=")
        name = _setting(found)
        name = name if name in options or name is None else OF_DIFFUSERS.get(name, name)
        if name in options:
            found = _option(name)
        elif name in _PLACES:
            here = next((each for each in _PLACES[name] if each in options), None)
            if here is not None:
                found = _option(here)
            elif places & set(_PLACES[name]) and (equals or rest):
                placed[name].append(value if equals else rest.pop(0))
                continue
        named.append(found + equals + value)
    behind = [*(each for values in placed.values() for each in values), *rest[1:]]
    return [*named, *(["--", *behind] if rest or behind else [])]


def unknown(arguments: Sequence[str], options: Iterable[str]) -> str | None:
    """The first argument that is an option of another name than these.

    >>> unknown(["a.png", "--stepz", "3", "--", "--more"], ["steps"])
    '--stepz'
    """
    options = {*options, "help"}
    for argument in arguments:
        if argument == "--":
            return None
        found = argument.partition("=")[0]
        name = _setting(found)
        if name is not None and name not in options:
            return found
    return None


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The one of these names that was probably meant, if there is one.

    >>> nearest("promt", ["steps", "prompt"]), nearest("num_inference_steps", ["steps"]), nearest("zzz", ["steps"])
    ('prompt', 'steps', None)
    """
    meant = {each: each for each in known}
    meant |= {theirs: ours for theirs, ours in OF_DIFFUSERS.items() if ours in meant}
    found = difflib.get_close_matches(name, meant, n=1)
    return meant[found[0]] if found else None


def _setting(option: str) -> str | None:
    """What is set by something typed, if that is an option."""
    name = option.removeprefix("--").replace("-", "_")
    return name if option.startswith("--") and name.isidentifier() else None


def _option(setting: str) -> str:
    return f"--{setting.replace('_', '-')}"

"""How programs are compiled on a user's machine: kept between processes, and on CPUs with the quicker libraries."""

import contextlib
import ctypes
import json
import os
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sdipc_jax.errors import InputError
from sdipc_jax.files import write_atomically
from sdipc_jax.records import digest_of

# Programs that took less than this to compile are compiled anew: reading them is no faster.
_SECONDS_WORTH_KEEPING = 0.2
_WRITABLE_BY_OTHERS = 0o022
# What XLA hands over to the library YNNPACK on CPUs: reductions, products and convolutions, unless told otherwise. Its
# reductions are quicker than XLA's own; its convolutions are slower than Eigen's, three times at the coarse levels of
# Stable Diffusion's UNet, and so are its products at the finest one (docs/performance.md).
_FUSIONS = "--xla_cpu_experimental_ynn_fusion_type"
_REDUCTIONS = "LIBRARY_FUSION_TYPE_REDUCE"
# Versions of jaxlib that have been seen to know the flag; another might end the process over it.
_WITH_FUSIONS = ("0.10", "0.11")
# malloc's options by glibc's numbers: give nothing back, take nothing apart from the rest, and one heap for all
# threads, since those of threads have 64 MiB at most.
_MALLOC = {-1: 2**31 - 1, -4: 0, -8: 1}


def use_eigen() -> None:
    """Has XLA compile convolutions and products for CPUs with Eigen. To be called before anything is compiled.

    Adds to `XLA_FLAGS`, for this process and those that it starts, unless they say what YNNPACK is for already, or name
    a file of flags: XLA takes what does not begin with a dash for one.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if flags.strip() and not flags.lstrip().startswith("-"):
        return
    if _FUSIONS not in flags and version("jaxlib").rpartition(".")[0] in _WITH_FUSIONS:
        os.environ["XLA_FLAGS"] = f"{flags} {_FUSIONS}={_REDUCTIONS}".strip()


def keep_memory() -> None:
    """Has this process keep what programs free, for the next run of one, where malloc is glibc's.

    A program's temporaries are one piece of memory. Above some size malloc takes that from the system anew, which fills
    it with zeros page by page: in a step of tuning that takes a third of the time. For what runs one program again and
    again, since other programs may not find room in what is kept. To be called before there are threads.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in _MALLOC.items():
            mallopt(option, value)


def cache_folder(name: str = "compiled") -> Path:
    """`sdipc_jax/compiled` in the user's cache folder, or another one beside it.

    Raises:
        RuntimeError: the user has no home, and nothing else says where to keep things.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "sdipc_jax", name).expanduser()


def private_folder(name: str) -> Path | None:
    """`cache_folder(name)`, made for the user alone where it is not there; None where it cannot be."""
    try:
        folder = cache_folder(name)
        for made in (folder.parent, folder):
            made.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, RuntimeError):
        return None
    return folder


def writable_by_others(folder: Path) -> bool:
    """Whether what lies in a folder could be another user's work."""
    status = folder.stat()
    return hasattr(os, "getuid") and (status.st_uid != os.getuid() or bool(status.st_mode & _WRITABLE_BY_OTHERS))


def is_told_where_to_keep() -> bool:
    """Whether JAX has been told already where compiled programs are kept, or that they are not."""
    import jax

    config: Any = jax.config
    return config.jax_compilation_cache_dir is not None or not config.jax_enable_compilation_cache


def keep_compiled() -> Path | None:
    """Lets this process read and write compiled programs in `cache_folder()`.

    What JAX is told already (`JAX_COMPILATION_CACHE_DIR`, `JAX_ENABLE_COMPILATION_CACHE`) stands.

    Returns:
        The folder, or None where there is none that can be written.

    Raises:
        InputError: others than the user can write to the folder: programs in it could be theirs.
    """
    # Slow to import, and what comes before needs none of it.
    import jax

    config: Any = jax.config
    if is_told_where_to_keep():
        return None
    folder = private_folder("compiled")
    if folder is None:
        return None
    if writable_by_others(folder):
        raise InputError(
            f"{folder}: found a folder that others can write to, expected one of your own for compiled programs: "
            f"chmod 700 it, or set JAX_ENABLE_COMPILATION_CACHE=false"
        )
    if not os.access(folder, os.W_OK):
        return None
    config.update("jax_compilation_cache_dir", str(folder))
    config.update("jax_persistent_cache_min_compile_time_secs", _SECONDS_WORTH_KEEPING)
    config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    return folder


def remembered(name: str, key: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `make` gives, from a file beside the compiled programs where these are kept on this machine.

    Args:
        name: what the file's name begins with.
        key: tells apart all that would give something else.
        make: its result is such that JSON can hold it.
    """
    import jax

    config: Any = jax.config
    folder = config.jax_compilation_cache_dir
    if folder is None or not config.jax_enable_compilation_cache or not Path(folder).is_dir():
        return make()
    path = Path(folder, f"{name}-{digest_of(key)}.json")
    # Whatever is no such file, or damaged, is made anew.
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["key"] == key:
            return found["value"]
    value = make()
    with contextlib.suppress(InputError):
        write_atomically(path, json.dumps({"key": key, "value": value}).encode())
    return value

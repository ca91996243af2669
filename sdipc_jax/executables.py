"""Programs kept whole between processes: a second one neither traces nor lowers what the first has compiled."""

import contextlib
import functools
import hashlib
import inspect
import os
import pickle
import platform
import threading
import warnings
import weakref
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from sdipc_jax.compilation import writable_by_others
from sdipc_jax.errors import InputError, printable
from sdipc_jax.files import write_atomically
from sdipc_jax.records import digest_of

_DIGEST = hashlib.sha256().digest_size
# JAX's cache is off for all threads while one compiles.
_COMPILING = threading.Lock()
_PROGRAMS: "weakref.WeakSet[Program]" = weakref.WeakSet()
# Set where this process may keep programs whole.
_WHOLE = threading.Event()
# What else a compiler reads. XLA's flags may stand in a file, whose contents this does not tell.
_ENVIRONMENT = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "NPROC", "PJRT_NPROC")


def keep_whole() -> None:
    """Lets this process keep programs whole, and read them, where compiled ones are kept (`compilation.keep_compiled`).

    Not for one that changes this package's functions while it runs: a program is known by the code in the files.
    """
    _WHOLE.set()


def kept_program(
    *, static_argnums: tuple[int, ...] = (), static_argnames: tuple[str, ...] = ()
) -> Callable[..., "Program"]:
    """`jax.jit`, whose programs outlive a process that may keep them (`keep_whole`).

    Args:
        static_argnums, static_argnames: as `jax.jit` takes them; each is given in this one way.
    """
    return functools.partial(Program, static_argnums=static_argnums, static_argnames=static_argnames)


class Program:
    """A compiled function; all that a jitted one has besides being called is its jitted form's."""

    def __init__(
        self, function: Callable[..., Any], static_argnums: tuple[int, ...] = (), static_argnames: tuple[str, ...] = ()
    ) -> None:
        self._jitted: Any = jax.jit(function, static_argnums=static_argnums, static_argnames=static_argnames)
        # Left out or given as it is anyway, an argument makes the same program.
        defaults = {name: inspect.signature(function).parameters[name].default for name in static_argnames}
        self._static = static_argnums, defaults
        self._ready: dict[Any, jax.stages.Compiled] = {}
        _PROGRAMS.add(self)
        functools.update_wrapper(self, function)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._jitted, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the kept program, where one can be kept for these arguments, else the jitted function."""
        compiled = self._whole(args, kwargs)
        if compiled is None:
            return self._jitted(*args, **kwargs)
        args, kwargs, _ = self._split(args, kwargs)
        return compiled(*args, **kwargs)

    def ahead(self, *args: Any, **kwargs: Any) -> jax.stages.Compiled:
        """The program for arguments of which shapes are enough, read or compiled, and kept if it can be."""
        compiled = self._whole(args, kwargs)
        return self._jitted.lower(*args, **kwargs).compile() if compiled is None else compiled

    def _whole(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> jax.stages.Compiled | None:
        folder = _folder()
        if folder is None:
            return None
        *moving, static = self._split(args, kwargs)
        leaves, tree = jax.tree.flatten(tuple(moving))
        if not _is_plain(leaves):
            return None
        signature = (tree, tuple(map(_described, leaves)), static, _settings())
        if signature not in self._ready:
            settings = {name: str(value) for name, value in jax.config.values.items()}
            key = [self.__module__, self.__qualname__, _surroundings(), settings, *map(str, signature[:-1])]
            path = folder / f"program-{self.__name__}-{digest_of(key)}"
            found = _read(path, tree)
            if found is None:
                found = _compiled_anew(self._jitted.lower(*args, **kwargs))
                _write(path, found)
            self._ready[signature] = found
        return self._ready[signature]

    def _split(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
        """Arguments that are arrays, and those that are static."""
        places, defaults = self._static
        moving = tuple(arg for place, arg in enumerate(args) if place not in places)
        named = {name: arg for name, arg in kwargs.items() if name not in defaults}
        still = tuple(args[place] for place in places if place < len(args))
        return moving, named, (still, tuple(kwargs.get(name, default) for name, default in defaults.items()))


def forget_programs() -> None:
    """Frees the memory of all compiled programs; what is kept on the disk stays."""
    for program in _PROGRAMS:
        program._ready.clear()
    jax.clear_caches()


def _folder() -> Path | None:
    """Where compiled programs are kept, if that is the user's own folder on this machine."""
    config: Any = jax.config
    kept = config.jax_compilation_cache_dir is not None and config.jax_enable_compilation_cache
    if not (kept and _WHOLE.is_set()) or config.jax_disable_jit:
        return None
    flags = os.environ.get("XLA_FLAGS", "").strip()
    folder = Path(config.jax_compilation_cache_dir)
    if (flags and not flags.startswith("-")) or not folder.is_dir() or writable_by_others(folder):
        return None
    return folder


def _is_plain(leaves: Sequence[Any]) -> bool:
    """Whether a program of these arguments is one for the only device, and no part of another program."""
    if jax.device_count() > 1 or not jax.sharding.get_abstract_mesh().empty:
        return False
    kinds = {type(leaf.sharding) for leaf in leaves if isinstance(leaf, jax.Array) and not _is_traced(leaf)}
    return kinds <= {jax.sharding.SingleDeviceSharding} and not any(map(_is_traced, leaves))


def _is_traced(leaf: Any) -> bool:
    return isinstance(leaf, jax.core.Tracer)


def _described(leaf: Any) -> tuple[Any, ...]:
    kind: Any = jax.typeof(leaf)
    return kind.shape, str(kind.dtype), bool(kind.weak_type)


def _settings() -> tuple[Any, ...]:
    """JAX's, those of the thread's contexts too."""
    return tuple(map(str, jax.config.values.values()))


@functools.cache
def _surroundings() -> list[Any]:
    """What a program depends on besides its arguments and JAX's settings: code, versions, flags, the machine."""
    package = Path(__file__).parent
    code = {str(path.relative_to(package)): path.read_bytes() for path in sorted(package.rglob("*.py"))}
    device = jax.devices()[0]
    processor = ""
    with contextlib.suppress(OSError):
        first, _, _ = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\n\n")
        processor = "\n".join(
            line for line in first.splitlines() if line.startswith(("model name", "flags", "Features"))
        )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return [
        code,
        [version(name) for name in ("jax", "jaxlib", "flax", "numpy")],
        platform.python_version(),
        [os.environ.get(name, "") for name in _ENVIRONMENT],
        [device.platform, device.device_kind, device.client.platform_version],
        [platform.machine(), platform.processor(), processor, cores],
    ]


def _compiled_anew(lowered: Any) -> jax.stages.Compiled:
    """Compiles without JAX's own cache: what comes out of that cannot be kept a second time, it lacks functions."""
    from jax.experimental.compilation_cache import compilation_cache

    with _COMPILING:
        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()
        try:
            return lowered.compile()
        finally:
            jax.config.update("jax_enable_compilation_cache", True)
            compilation_cache.reset_cache()


def _read(path: Path, tree: Any) -> jax.stages.Compiled | None:
    """The program in a file; None where there is none, or it is damaged."""
    try:
        digest, content = (data := path.read_bytes())[:_DIGEST], data[_DIGEST:]
    except OSError:
        return None
    # Loading runs what is in the file, so that nothing is loaded that was not written by this module.
    if hashlib.sha256(content).digest() == digest:
        from jax.experimental.serialize_executable import deserialize_and_load

        with contextlib.suppress(jax.errors.JaxRuntimeError):
            program, results = pickle.loads(content)
            return deserialize_and_load(program, tree, results)
    warnings.warn(f"{printable(path)}: found a damaged compiled program, it is compiled again", stacklevel=5)
    return None


def _write(path: Path, compiled: jax.stages.Compiled) -> None:
    """Keeps a program, where it is of a kind that can be, and there is room."""
    from jax.experimental.serialize_executable import serialize

    with contextlib.suppress(ValueError, NotImplementedError, jax.errors.JaxRuntimeError, InputError):
        program, _, results = serialize(compiled)
        content = pickle.dumps((program, results))
        write_atomically(path, hashlib.sha256(content).digest() + content)

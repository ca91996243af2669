"""Which software a process runs: what processes that are to give the same bits must have in common."""

import hashlib
from functools import cache
from importlib.metadata import version
from pathlib import Path

from sdipc_jax.records import Record

_PACKAGES = ("jax", "jaxlib", "numpy")


@cache
def software() -> Record:
    """Versions of what computes, and a digest of this package's own code."""
    code, package = hashlib.sha256(), Path(__file__).parent.parent
    for path in sorted(package.rglob("*.py")):
        code.update(f"{path.relative_to(package).as_posix()}\0".encode() + path.read_bytes() + b"\0")
    return {name: version(name) for name in _PACKAGES} | {"sdipc_jax": code.hexdigest()[:16]}

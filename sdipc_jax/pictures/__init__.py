"""Picture files in, pixels out, and back: reading, CLIP's preprocessing, sheets, a run's folder.

Imports no other room.
"""

from sdipc_jax.pictures.handed import save_pictures

__all__ = ["save_pictures"]

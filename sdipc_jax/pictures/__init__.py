"""Picture files in, pixels out, and back: reading, CLIP's preprocessing, sheets, a run's folder.

Imports no other room.
"""

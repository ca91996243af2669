"""Folders, JSON lines, tar shards and Parquet files in, rows of pictures, captions and settings out.

Imports pictures.
"""

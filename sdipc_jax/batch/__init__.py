"""A data set in, shards of pictures out, each exactly once: resumable generation.

Imports parallel, sampling, prompts, checkpoints, datasets and pictures.
"""

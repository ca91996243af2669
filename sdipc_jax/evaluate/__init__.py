"""A checkpoint and pictures in, the paper's tables out: data sets, judges, metrics, what is measured.

Imports parallel, sampling, prompts, checkpoints, datasets and pictures.
"""

"""A checkpoint and drawings in, the paper's tables out: the corpus, the metrics, what is measured.

Imports sampling, prompts, checkpoints and pictures.
"""

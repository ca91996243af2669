"""Settings in, files out: each command is a function in a module of its own name.

What can be refused is refused before anything is compiled. No room imports this one. Imports page, evaluate, tuning,
batch, parallel, sampling, prompts, checkpoints, datasets, samplers and pictures.
"""

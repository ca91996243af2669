"""Resumable generation over a data set: the command `batch`."""

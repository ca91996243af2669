"""Requests from a browser or a program in, pictures that commands make of them out, one request at a time.

The commands come in as functions. Imports pictures.
"""

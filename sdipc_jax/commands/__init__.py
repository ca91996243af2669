"""Settings in, files out: each command is a function in a module of its own name.

Imports every room; none imports it. What can be refused is refused before anything is compiled.
"""

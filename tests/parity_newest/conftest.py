"""Errors that were measured are printed here too."""

from tests.parity.conftest import measured, pytest_terminal_summary

__all__ = ["measured", "pytest_terminal_summary"]

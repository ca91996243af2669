"""Prints the errors that were measured, so that a reader sees them and not only that they were small enough."""

from collections.abc import Callable

import pytest

_MEASURED = pytest.StashKey[dict[str, list[float]]]()


@pytest.fixture
def measured(request: pytest.FixtureRequest) -> Callable[[str, float], float]:
    """Writes an error down under a heading, and gives it back."""
    found = request.config.stash.setdefault(_MEASURED, {})

    def note(heading: str, error: float) -> float:
        found.setdefault(heading, []).append(error)
        return error

    return note


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    found = config.stash.get(_MEASURED, {})
    if found:
        terminalreporter.section("measured (comparisons, largest)")
        for heading, errors in found.items():
            terminalreporter.line(f"{heading:50} {len(errors):4} {max(errors):9.2e}")

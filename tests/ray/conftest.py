"""The table of docs/scale.md, printed after the tests: what was done to a job, and what came of it."""

from collections.abc import Callable

import pytest

Outcome = Callable[[str, str], None]


@pytest.fixture
def outcome(record_property: Callable[[str, object], None]) -> Outcome:
    """Adds a line to the table, if the test passes."""
    return lambda done, came: record_property(done, came)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    lines = [line for report in terminalreporter.getreports("passed") for line in report.user_properties]
    if lines:
        terminalreporter.write_line("")
        for cells in [("done to a job `--on ray`", "came of it"), ("---", "---"), *lines]:
            terminalreporter.write_line(f"| {' | '.join(map(str, cells))} |")

"""What a run says of each update: metrics.jsonl, and TensorBoard's files."""

import errno
import importlib.util
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from sdipc_jax.errors import InputError, printable
from sdipc_jax.files import write_atomically
from sdipc_jax.records import Record

METRICS = "metrics.jsonl"


class MetricsLog:
    """Receives the metrics of each update; in metrics.jsonl every update has one line, however often a run was killed.

    Args:
        folder: the run's.
        start: updates done; lines of later ones, which will come again, are taken away.
        tensorboard: also write for TensorBoard.

    Attributes:
        complete: whether every update done has its line.
    """

    def __init__(self, folder: Path, start: int, *, tensorboard: bool = False) -> None:
        self._path = folder / METRICS
        self._board: Any = None
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)
        # Whole lines, and those alone: a killed process may have left half of one.
        lines = self._path.read_bytes().splitlines(keepends=True)[:start] if self._path.exists() else []
        steps = [_step(line) for line in lines]
        while steps and steps[-1] is None:
            steps.pop()
        self.complete = steps == list(range(1, start + 1))
        write_atomically(self._path, b"".join(lines[: len(steps)]))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._board is not None:
            self._board.close()

    def add(self, record: Record) -> None:
        """Writes the line of an update, whose number is `step`.

        Raises:
            InputError: it cannot be written.
        """
        line = json.dumps(record) + "\n"
        try:
            # Opened anew: what is written to a file that somebody has removed goes nowhere, and says nothing.
            descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND)
            try:
                if os.write(descriptor, line.encode()) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            finally:
                os.close(descriptor)
        except OSError as error:
            raise InputError(
                f"{printable(self._path)}: {error.strerror} while writing {len(line)} bytes, expected the run's file: "
                "free some space or bring the folder back, and give the same command again"
            ) from error
        if self._board is not None:
            for name, value in record.items():
                if isinstance(value, float):
                    self._board.add_scalar(name, value, record["step"])


def check_tensorboard() -> None:
    """Refuses to write for TensorBoard where that is not possible.

    Raises:
        InputError: what writes its files is not installed.
    """
    if importlib.util.find_spec("tensorboardX") is None:
        raise InputError("tensorboard is set, but its writer is missing: pip install 'sdipc-jax[tensorboard]'")


def _step(line: bytes) -> int | None:
    try:
        return json.loads(line)["step"] if line.endswith(b"\n") else None
    except (ValueError, KeyError, TypeError):
        return None

"""Signals and locks, in processes of their own."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sdipc_jax.errors import InputError, InterruptedRun
from sdipc_jax.interruption import Interruption, locked

# Hashing a lot in one call is as deaf to Python's signal handlers as a program on a device.
BUSY = """
import hashlib, sys, time
from sdipc_jax.interruption import Interruption
with Interruption() as interruption:
    print("ready", flush=True)
    if sys.argv[1] == "busy":
        hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
    while not interruption.requested:
        time.sleep(0.01)
    print("saved", flush=True)
    time.sleep(60 if sys.argv[1] == "again" else 0)
    sys.exit(75)
"""
HOLDER = """
import sys
from pathlib import Path
from sdipc_jax.interruption import locked
with locked(Path(sys.argv[1])):
    print("ready", flush=True)
    sys.stdin.read()
"""


def start(script: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    output, _ = process.communicate(timeout=60)
    return process.returncode, output


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_asks(number: int) -> None:
    process = start(BUSY, "once")
    process.send_signal(number)
    assert finish(process) == (75, "saved\n")


def test_a_second_interrupt_ends_at_once() -> None:
    process = start(BUSY, "again")
    process.send_signal(signal.SIGINT)
    assert process.stdout is not None
    assert process.stdout.readline() == "saved\n"
    process.send_signal(signal.SIGTERM)  # Asks once more, and no more than that.
    process.send_signal(signal.SIGINT)
    assert finish(process) == (130, "")


def test_even_a_deaf_process_ends_at_once() -> None:
    process = start(BUSY, "busy")
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    process.send_signal(signal.SIGINT)
    assert finish(process) == (130, "")


def test_handlers_come_back() -> None:
    # A job that a shell runs in the background ignores this signal from the start.
    first = signal.signal(signal.SIGINT, signal.default_int_handler)
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with Interruption() as interruption:
        interruption.check()
        os.kill(os.getpid(), signal.SIGTERM)
        while not interruption.requested:
            pass
        with pytest.raises(InterruptedRun, match="interrupted"):
            interruption.check()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    signal.signal(signal.SIGINT, first)


def test_a_lock_keeps_others_out_and_dies_with_its_process(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "run"
    holder = start(HOLDER, folder)
    with pytest.raises(InputError, match=f"process {holder.pid} is at work"), locked(folder):
        pass
    holder.kill()
    finish(holder)
    assert (folder / "lock").read_text() == f"{holder.pid}\n"
    with locked(folder):
        assert (folder / "lock").read_text() == f"{os.getpid()}\n"
    assert (folder / "lock").read_text() == ""
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write there"), locked(tmp_path / "file"):
        pass

"""Says which host was lost. JAX ends all processes when one is lost, by a signal and without a name.

Each process counts up at the coordinator, and looks whether the others do. This is a little quicker than JAX's own
heartbeat, which stays, and ends the process where this cannot.
"""

import atexit
import os
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

import jax

from sdipc_jax.errors import printable
from sdipc_jax.parallel.watchdog import EXIT_CODE

# Of a heartbeat's timeout, and after how many of them without a sign of life a process counts as lost.
_PARTS, _LOST = 6, 4
_FOLDER = "sdipc/alive"
_NETWORK = ("connection", "network", "socket", "gloo", "nccl")


class Peers:
    """Watches over the other processes from two threads, until this one ends.

    Ticks are counted instead of seconds, so that a process that was stopped itself accuses nobody when it goes on.

    Args:
        hosts: the host of each process.
        process: this one.
        heartbeat: seconds after which JAX takes a process for dead.
        client: of JAX's coordinator, which has keys and values for all.
    """

    def __init__(self, hosts: Sequence[str], process: int, heartbeat: float, client: Any) -> None:
        self._hosts, self._process, self._client = hosts, process, client
        self._heartbeat = heartbeat
        self._tick = heartbeat / _PARTS
        self._answered = 0
        self._silent = [0] * len(hosts)
        self._over = threading.Event()

    def start(self) -> None:
        """Begins to watch."""
        # Before JAX waits for the others in the end.
        atexit.register(self.stop)
        for work in (self._exchange, self._judge):
            threading.Thread(target=work, name="peers", daemon=True).start()

    def stop(self) -> None:
        """Watches no more, but counts on as long as the process is there, for it may be waited for."""
        self._over.set()

    def wait_for_word(self, error: BaseException | None) -> None:
        """Where an error is one of exchanging arrays, gives the watch time to find who is lost, and end the process."""
        if isinstance(error, jax.errors.JaxRuntimeError) and any(word in str(error).lower() for word in _NETWORK):
            time.sleep(self._heartbeat)

    def _exchange(self) -> None:
        """Counts up, and looks at the others. May wait for a coordinator that is lost as long as it likes."""
        seen: dict[int, str] = {}
        count = 0
        while True:
            count += 1
            try:
                self._client.key_value_set(f"{_FOLDER}/{self._process}", str(count), allow_overwrite=True)
                pairs = self._client.key_value_dir_get(_FOLDER)
            except Exception:  # JAX's own, of which nothing is documented; what it means is judged by the other thread.
                time.sleep(self._tick)
                continue
            found = {int(name.rpartition("/")[2]): value for name, value in pairs}
            for process in range(len(self._hosts)):
                # Who has not come so far is waited for by all.
                moved = process not in found or found[process] != seen.get(process)
                self._silent[process] = 0 if moved else self._silent[process] + 1
            seen = found
            self._answered = count
            time.sleep(self._tick)

    def _judge(self) -> None:
        answered = unanswered = 0
        while not self._over.wait(self._tick):
            unanswered = 0 if self._answered != answered else unanswered + 1
            answered = self._answered
            silent = [process for process, ticks in enumerate(self._silent) if ticks >= _LOST]
            if unanswered >= _LOST:
                # It is what all are asked about.
                silent = [0]
            if silent:
                self._end(silent)

    def _end(self, silent: Sequence[int]) -> None:
        me, *others = (f"process {each} on {printable(self._hosts[each])}" for each in (self._process, *silent))
        print(
            f"sdipc: {me} has heard nothing of {' and '.join(others)} for {_LOST * self._tick:.3g} s, and ends with "
            f"exit code {EXIT_CODE}: see why, and start all again, or those that are left",
            file=sys.stderr,
            flush=True,
        )
        os._exit(EXIT_CODE)

"""Hosts in miniature: network namespaces, joined by a switch in this process that can lose and delay what it passes on.

Each host has one TUN device. Whatever it sends comes to the switch as an IP packet, and the switch's rule for that pair
of hosts, in that direction, says what becomes of it.
"""

import fcntl
import heapq
import os
import random
import select
import struct
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

# linux/if_tun.h
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_MTU = 9000
_SOURCE, _DESTINATION = slice(12, 16), slice(16, 20)


@dataclass(frozen=True)
class Link:
    """What becomes of packets from one host to another.

    Attributes:
        loss: the share that is lost, 1 for a link that is cut.
        delay: seconds.
    """

    loss: float = 0.0
    delay: float = 0.0


WHOLE, CUT = Link(), Link(loss=1.0)


class Network:
    """Hosts called host-a, host-b and so on, with the addresses 10.77.0.1, 10.77.0.2 and so on.

    with Network(2) as network:
        process = network.start(0, ["hostname"])
        network.links[0, 1] = CUT  # from the first to the second alone
    """

    def __init__(self, count: int) -> None:
        self.names = [f"host-{chr(ord('a') + number)}" for number in range(count)]
        self.addresses = [f"10.77.0.{number + 1}" for number in range(count)]
        self.links: dict[tuple[int, int], Link] = {}
        self._random = random.Random(0)
        self._devices: list[int] = []
        self._closed = threading.Event()
        self._switch = threading.Thread(target=self._pass_on, name="switch", daemon=True)

    def __enter__(self) -> Self:
        lines = "".join(f"{address} {name}\n" for name, address in zip(self.names, self.addresses, strict=True))
        for number, name in enumerate(self.names):
            _ip("netns", "add", f"sdipc-{name}")
            # Seen as /etc/hosts by what runs in the namespace.
            folder = Path("/etc/netns", f"sdipc-{name}")
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "hosts").write_text(f"127.0.0.1 localhost\n{lines}")
            device = f"sdipc{number}"
            descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
            fcntl.ioctl(descriptor, _TUNSETIFF, struct.pack("16sH22x", device.encode(), _IFF_TUN | _IFF_NO_PI))
            self._devices.append(descriptor)
            inside = ("-n", f"sdipc-{name}")
            _ip("link", "set", device, "netns", f"sdipc-{name}")
            _ip(*inside, "link", "set", "lo", "up")
            _ip(*inside, "address", "add", f"{self.addresses[number]}/24", "dev", device)
            _ip(*inside, "link", "set", device, "mtu", str(_MTU), "up")
        self._switch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._switch.join()
        for descriptor in self._devices:
            os.close(descriptor)
        for name in self.names:
            _ip("netns", "delete", f"sdipc-{name}")
            Path("/etc/netns", f"sdipc-{name}", "hosts").unlink()
            Path("/etc/netns", f"sdipc-{name}").rmdir()

    def start(
        self, host: int, command: Sequence[object], folder: Path, environment: Mapping[str, str], log: Path
    ) -> subprocess.Popen[bytes]:
        """A command on a host, whose stderr goes to a file."""
        name = self.names[host]
        inside = ["ip", "netns", "exec", f"sdipc-{name}", "unshare", "--uts", "sh", "-c"]
        with log.open("wb") as stream:
            return subprocess.Popen(
                [*inside, f'hostname {name} && exec "$@"', "-", *map(str, command)],
                cwd=folder,
                env=os.environ | environment,
                stdout=subprocess.DEVNULL,
                stderr=stream,
            )

    def join(self, link: Link, *hosts: int) -> None:
        """Gives every way to and from these hosts, or all ways, this link."""
        every = range(len(self.names))
        for one in hosts or every:
            for other in every:
                self.links[one, other] = self.links[other, one] = link

    def _pass_on(self) -> None:
        waiting: list[tuple[float, int, int, bytes]] = []
        numbers = {bytes(map(int, address.split("."))): number for number, address in enumerate(self.addresses)}
        count = 0
        while not self._closed.is_set():
            left = waiting[0][0] - time.monotonic() if waiting else 0.1
            ready, _, _ = select.select(self._devices, [], [], min(max(left, 0.0), 0.1))
            for descriptor in ready:
                packet = os.read(descriptor, _MTU + 100)
                source, target = numbers.get(packet[_SOURCE]), numbers.get(packet[_DESTINATION])
                # What is no IPv4 packet between hosts, such as IPv6's search for routers, goes nowhere.
                if packet[0] >> 4 != 4 or source is None or target is None:
                    continue
                link = self.links.get((source, target), WHOLE)
                if self._random.random() >= link.loss:
                    count += 1
                    heapq.heappush(waiting, (time.monotonic() + link.delay, count, target, packet))
            while waiting and waiting[0][0] <= time.monotonic():
                _, _, target, packet = heapq.heappop(waiting)
                try:
                    os.write(self._devices[target], packet)
                except BlockingIOError:  # A queue that is full loses packets, as everywhere.
                    continue


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)

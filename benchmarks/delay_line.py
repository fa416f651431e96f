"""A slow, long link between network namespaces of this machine, over which real TCP runs. Linux, root.

Each host is a namespace with a TUN device; one process passes their packets on, each when the link
would have: every host sends at a rate, and what it sends arrives half a round trip later. Nothing is
lost, queues are unlimited. netem does the same in the kernel, where the kernel has it.

Run: python -m benchmarks.delay_line --hosts 2 --rtt-ms 20 --mbit-s 100 -- python train.py
starts the command once on each host, with the variables that torchrun sets.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import ctypes
import fcntl
import os
import select
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

MTU = 65000
"""Of the devices: fewer packets, so that Python can pass them on."""

_TUNSETIFF = 0x400454CA
_TUN_WITHOUT_HEADER = 0x0001 | 0x1000
_CLONE_NEWNET = 0x40000000
_DEVICE = "line0"
_PORT = 29500
_libc = ctypes.CDLL(None, use_errno=True)


class DelayLine:
    """Hosts on one link; a context manager, which takes the namespaces away at the end.

    Args:
        hosts: how many, in [2, 250].
        rtt_s: round trip of a packet, in seconds, >= 0.
        gbit_s: what each host can send, in Gbit/s, > 0.

    Raises:
        OSError: not root, or there is no /dev/net/tun.
    """

    def __init__(self, hosts: int = 2, *, rtt_s: float, gbit_s: float) -> None:
        self.hosts = hosts
        self._half_s = rtt_s / 2
        self._bytes_per_s = gbit_s * 1e9 / 8
        self._names = [f"line{os.getpid()}-{i}" for i in range(hosts)]
        self._pid = 0
        self._started: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Self:
        """Make hosts and link, which are taken away when this process is stopped, too."""
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
        devices = []
        for i, name in enumerate(self._names):
            _ip("netns", "add", name)
            devices.append(_device(name, f"10.77.0.{i + 1}/24"))
        self._pid = os.fork()
        if not self._pid:
            with contextlib.suppress(KeyboardInterrupt):
                self._pass_on(devices)
            os._exit(0)
        for device in devices:
            os.close(device)
        return self

    def __exit__(self, *_: object) -> None:
        """Take them away, with what still runs on them."""
        for process in self._started:
            process.kill()
            process.wait()
        os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        for name in self._names:
            _ip("netns", "del", name)

    def start(
        self, command: Sequence[str], *, ranks: Sequence[int] | None = None, **options: object
    ) -> list[subprocess.Popen[str]]:
        """Start a command on each host, with the variables of torchrun.

        Args:
            command: what is run.
            ranks: of the hosts on which; default all.
            options: of subprocess.Popen.
        """
        shared = {
            "WORLD_SIZE": str(self.hosts),
            "MASTER_ADDR": "10.77.0.1",
            "MASTER_PORT": str(_PORT),
            "GLOO_SOCKET_IFNAME": _DEVICE,
            "TP_SOCKET_IFNAME": _DEVICE,
        }
        started: list[subprocess.Popen[str]] = [
            subprocess.Popen(  # type: ignore[call-overload]  # as its caller says
                ["ip", "netns", "exec", self._names[rank], *command],
                env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": "0"},
                text=True,
                **options,
            )
            for rank in (range(self.hosts) if ranks is None else ranks)
        ]
        self._started += started
        return started

    def _pass_on(self, devices: Sequence[int]) -> None:
        """Every packet when the link would have; for ever."""
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        waiting: list[collections.deque[tuple[float, int, bytes]]]
        waiting = [collections.deque() for _ in devices]
        free_at = [0.0] * len(devices)
        source = {device: i for i, device in enumerate(devices)}
        while True:
            now = time.monotonic()
            first = min((lane[0][0] for lane in waiting if lane), default=now + 1.0)
            readable, _, _ = select.select(devices, [], [], max(0.0, first - now))
            now = time.monotonic()
            for device in readable:
                i = source[device]
                for packet in _packets(device):
                    free_at[i] = max(now, free_at[i]) + len(packet) / self._bytes_per_s
                    # IPv4: the last byte of the destination is the host's number.
                    waiting[i].append((free_at[i] + self._half_s, packet[19] - 1, packet))
            for lane in waiting:
                while lane and lane[0][0] <= now:
                    _, to, packet = lane.popleft()
                    if 0 <= to < len(devices):
                        with contextlib.suppress(OSError):
                            os.write(devices[to], packet)


def _packets(device: int, most: int = 64) -> Iterator[bytes]:
    """What has come, without waiting."""
    for _ in range(most):
        try:
            packet = os.read(device, MTU + 64)
        except BlockingIOError:
            return
        if packet[0] >> 4 == 4:
            yield packet


def _device(name: str, address: str) -> int:
    """A TUN device inside a namespace; its file."""
    own = os.open("/proc/self/ns/net", os.O_RDONLY)
    try:
        _enter(Path("/run/netns") / name)
        device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH", _DEVICE.encode(), _TUN_WITHOUT_HEADER))
    finally:
        _setns(own)
        os.close(own)
    inside = ("-n", name)
    _ip(*inside, "link", "set", "lo", "up")
    _ip(*inside, "addr", "add", address, "dev", _DEVICE)
    _ip(*inside, "link", "set", _DEVICE, "mtu", str(MTU), "txqueuelen", "10000", "up")
    return device


def _enter(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        _setns(file)
    finally:
        os.close(file)


def _setns(file: int) -> None:
    """os.setns comes with Python 3.12."""
    if _libc.setns(file, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns: are you root?")


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


def main() -> None:
    """Run a command on each host; the exit code is the first that is not 0."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--rtt-ms", type=float, default=20.0)
    parser.add_argument("--mbit-s", type=float, default=100.0)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    given = parser.parse_args()
    command = given.command[1:] if given.command[:1] == ["--"] else given.command
    with DelayLine(given.hosts, rtt_s=given.rtt_ms / 1e3, gbit_s=given.mbit_s / 1e3) as line:
        started = line.start(command)
        codes = [process.wait() for process in started]
    sys.exit(next((code for code in codes if code), 0))


if __name__ == "__main__":
    main()

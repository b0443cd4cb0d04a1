"""Hosts as network namespaces: each with an address of its own, joined by a bridge in a namespace that is the switch.

Nothing touches the machine's own network: the bridge has no way out, so all traffic stays between the hosts.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from vlcache_dist.leftovers import end

CLONE_NEWNET = 0x40000000
NETNS = Path("/run/netns")
SUBNET = "10.77.0"
PREFIX = "vlc"
_libc = ctypes.CDLL(None, use_errno=True)


class NoNamespaces(Exception):
    """This machine, or this user, cannot make network namespaces; says why."""


@dataclass(frozen=True, slots=True)
class Host:
    """``namespace`` None: the machine itself (several hosts then share one address)."""

    name: str
    address: str
    namespace: str | None = None

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """The calling thread, and processes that it starts, are on this host's network."""
        if self.namespace is None:
            yield
            return
        own = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        there = os.open(NETNS / self.namespace, os.O_RDONLY)
        try:
            _setns(there)
            try:
                yield
            finally:
                _setns(own)
        finally:
            os.close(there)
            os.close(own)

    def sent_bytes(self) -> int:
        """Bytes that have left this host since it was made. Needs a namespace."""
        with self.inside():
            links = json.loads(_ip("-s", "-j", "link", "show", "dev", "eth0"))
        return int(links[0]["stats64"]["tx"]["bytes"])

    def pids(self) -> list[int]:
        """Processes on this host's network. Needs a namespace."""
        assert self.namespace is not None
        return [int(pid) for pid in _ip("netns", "pids", self.namespace).split()]


@contextlib.contextmanager
def namespaces(count: int, mark: str) -> Iterator[list[Host]]:
    """``count`` hosts, gone again afterwards with every process in them. ``mark``, a few letters and digits, is part of
    the namespaces' names. Raises NoNamespaces; then nothing is left."""
    switch = f"{PREFIX}-{mark}-switch"
    hosts = [Host(f"host-{i}", f"{SUBNET}.{11 + i}", f"{PREFIX}-{mark}-{i}") for i in range(count)]
    try:
        try:
            _build(switch, hosts)
        except (OSError, subprocess.CalledProcessError) as error:
            said = (getattr(error, "stderr", None) or str(error)).strip()
            raise NoNamespaces(said.splitlines()[-1] if said else type(error).__name__) from error
        yield hosts
    finally:
        for host in hosts:
            if (NETNS / str(host.namespace)).exists():
                end(host.pids)
        for namespace in (*(str(host.namespace) for host in hosts), switch):
            if (NETNS / namespace).exists():
                _ip("netns", "del", namespace)


def _build(switch: str, hosts: Sequence[Host]) -> None:
    if shutil.which("ip") is None:
        raise OSError("there is no `ip` (Debian's package iproute2)")
    _ip("netns", "add", switch)
    _ip("-n", switch, "link", "add", "bridge", "type", "bridge")
    _ip("-n", switch, "link", "set", "bridge", "up")
    for i, host in enumerate(hosts):
        here = str(host.namespace)
        _ip("netns", "add", here)
        _ip("-n", here, "link", "set", "lo", "up")
        _ip("-n", here, "link", "add", "eth0", "type", "veth", "peer", "name", f"port{i}", "netns", switch)
        _ip("-n", here, "addr", "add", f"{host.address}/24", "dev", "eth0")
        _ip("-n", here, "link", "set", "eth0", "up")
        _ip("-n", switch, "link", "set", f"port{i}", "master", "bridge")
        _ip("-n", switch, "link", "set", f"port{i}", "up")


def _setns(descriptor: int) -> None:
    if _libc.setns(descriptor, CLONE_NEWNET) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=20).stdout

"""A leader and its followers: who may join, what breaks the group, and that nobody is left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch
from shard_threads import Threads, no_transport

from vlcache_dist.errors import CheckpointError, WorkerLost
from vlcache_dist.kv.layout import KVLayout
from vlcache_dist.parallel import protocol
from vlcache_dist.parallel.build import open_arenas
from vlcache_dist.parallel.collective import Collective, host_store
from vlcache_dist.parallel.group import ShardGroup
from vlcache_dist.parallel.link import Doorway, Invitation, Link, LinkClosed, enter
from vlcache_dist.parallel.processes import Processes

LAYOUT = KVLayout(num_layers=2, num_kv_heads=1, head_dim=8, hidden=16, dtype="float32", model="none", tp_size=2)


def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def gone(pid: int) -> bool:
    with contextlib.suppress(ProcessLookupError, FileNotFoundError):
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] == "Z"
    return True


def test_arrays_and_nested_messages_survive_a_link_in_pieces() -> None:
    near, far = socket.socketpair()
    here, there = Link(near, protocol.COMMANDS), Link(far, protocol.COMMANDS)
    sent = protocol.Scatter(
        src=np.arange(5),
        span_tokens=np.full(5, 9),
        slots=np.empty(0, np.int64),
        positions=np.arange(15, dtype=np.int32).reshape(3, 5),
    )
    here.send(sent)
    far.setblocking(True)
    got = there.receive(5.0)
    for name in sent.__struct_fields__:
        ours, theirs = getattr(got, name), getattr(sent, name)
        assert ours.dtype == theirs.dtype and np.array_equal(ours, theirs) and ours.flags.writeable
    with pytest.raises(TimeoutError):
        there.receive(0.01)
    near.sendall(b"\x05\x00\x00")  # a frame's beginning
    with pytest.raises(TimeoutError):
        there.receive(0.01)
    near.close()
    with pytest.raises(LinkClosed):
        there.receive(5.0)
    there.close()


def test_only_who_knows_the_secret_comes_in() -> None:
    doorway = Doorway("127.0.0.1", "right")
    good = doorway.invitation(1)
    wrong = Invitation(good.host, good.port, "wrong", 1)
    stranger = enter(wrong, protocol.COMMANDS, side=False)
    assert doorway.next(5.0) is None
    with socket.create_connection((good.host, good.port)) as noise:
        noise.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert doorway.next(5.0) is None
    guest = enter(good, protocol.COMMANDS, side=True)
    entered = doorway.next(5.0)
    assert entered is not None and (entered[0].rank, entered[0].side) == (1, True)
    entered[1].close()
    for link in (stranger, guest):
        link.close()
    doorway.close()


def test_a_follower_that_cannot_load_says_why() -> None:
    launcher = Threads()
    group = ShardGroup(launcher, 2)
    try:
        open_arenas(group, torch.empty(64), LAYOUT)
        store = host_store("127.0.0.1")
        group.post(protocol.Load(store.port, "tiny"))
        group.meet(lambda: Collective(store, "127.0.0.1", 0, 2, torch.device("cpu")))
        with pytest.raises(CheckpointError, match=r"rank 1.*other weights"):
            group.confirm(protocol.Loaded, 20.0)
        assert isinstance(group.lost, WorkerLost) and "other weights" in str(group.lost)
        with pytest.raises(WorkerLost):
            group.post(protocol.Synchronize())
    finally:
        group.close()
    assert not any(thread.alive() for thread in launcher.threads)


def test_whoever_waits_hears_of_a_loss_once() -> None:
    launcher = Threads(make_transport=no_transport)
    group = ShardGroup(launcher, 3)
    told: list[BaseException] = []
    group.on_lost(told.append)
    with pytest.raises(WorkerLost, match="rank 0: RuntimeError: out of step"), group.in_step():
        raise RuntimeError("out of step")
    group.break_up("again")
    group.on_lost(told.append)
    assert [str(error) for error in told] == ["tensor-parallel worker: rank 0: RuntimeError: out of step"] * 2
    group.close()
    group.close()
    assert not any(thread.alive() for thread in launcher.threads)


def test_a_step_that_takes_too_long_breaks_the_group() -> None:
    group = ShardGroup(Threads(), 2, hang_s=0.2)
    lost = threading.Event()
    group.on_lost(lambda error: lost.set())
    group.begin()
    assert lost.wait(5.0)
    assert "a step has taken" in str(group.lost)
    group.close()


def test_a_frozen_follower_is_lost_and_killed() -> None:
    group = ShardGroup(Processes(), 2, silence_s=1.5)
    try:
        pid = group._handles[0]._process.pid  # type: ignore[attr-defined]
        os.kill(pid, signal.SIGSTOP)
        until(lambda: group.lost is not None)
        assert "no sign of life" in str(group.lost)
        until(lambda: gone(pid))
    finally:
        group.close()


LEADER = """
import sys, time
from vlcache_dist.parallel.group import ShardGroup
from vlcache_dist.parallel.processes import Processes
group = ShardGroup(Processes(), 3)
print(*(handle._process.pid for handle in group._handles), flush=True)
time.sleep(60)
"""


def test_followers_end_with_a_leader_that_is_killed() -> None:
    leader = subprocess.Popen([sys.executable, "-c", LEADER], stdout=subprocess.PIPE, text=True)
    assert leader.stdout is not None
    pids = [int(pid) for pid in leader.stdout.readline().split()]
    assert len(pids) == 2 and not any(gone(pid) for pid in pids)
    leader.kill()
    leader.wait()
    leader.stdout.close()
    until(lambda: all(gone(pid) for pid in pids))

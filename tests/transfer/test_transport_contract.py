"""What every transport promises (``transfer/base.py``), on the in-memory twin, NIXL over shared memory and over TCP."""

from __future__ import annotations

import threading
import time

import msgspec
import pytest
import torch
from transport_sites import ARENA_BYTES, LAYOUT, Remote, Site, wait_until

from vlcache_dist.errors import LayoutMismatch, TransferFailed, TransferTimeout
from vlcache_dist.transfer.base import Piece, Transport

Reader = tuple[Transport, torch.Tensor]
PATIENCE_S = 20.0


def test_bytes_arrive_and_nothing_else_changes(reader: Reader, shared_remote: Remote) -> None:
    transport, arena = reader
    expected = shared_remote.fill(1000, 5000, seed=1)
    transport.connect(shared_remote.info)
    transfer = transport.read(shared_remote.info, [Piece(1000, 777, 5000)], PATIENCE_S)
    assert transfer.future.result(PATIENCE_S) is None
    assert transfer.terminal
    assert torch.equal(arena[777:5777], expected)
    assert not arena[:777].any()
    assert not arena[5777:].any()


def test_several_pieces_go_where_they_belong(reader: Reader, shared_remote: Remote) -> None:
    transport, arena = reader
    data = shared_remote.fill(0, 1 << 20, seed=2)
    transport.connect(shared_remote.info)
    pieces = [Piece(i * 1000, (9 - i) * 4096, 1000 + i) for i in range(10)]
    transport.read(shared_remote.info, pieces, PATIENCE_S).future.result(PATIENCE_S)
    for piece in pieces:
        here = arena[piece.local_offset : piece.local_offset + piece.nbytes]
        assert torch.equal(here, data[piece.remote_offset : piece.remote_offset + piece.nbytes])


def test_whole_arenas(reader: Reader, shared_remote: Remote) -> None:
    transport, arena = reader
    expected = shared_remote.fill(0, ARENA_BYTES, seed=3)
    transport.connect(shared_remote.info)
    transport.read(shared_remote.info, [Piece(0, 0, ARENA_BYTES)], PATIENCE_S).future.result(PATIENCE_S)
    assert torch.equal(arena, expected)


def test_ranges_outside_an_arena_are_refused(reader: Reader, shared_remote: Remote) -> None:
    transport, arena = reader
    transport.connect(shared_remote.info)
    for pieces in (
        [],
        [Piece(0, 0, 0)],
        [Piece(-1, 0, 10)],
        [Piece(0, -1, 10)],
        [Piece(0, 0, -10)],
        [Piece(ARENA_BYTES - 9, 0, 10)],
        [Piece(0, 0, 10), Piece(0, ARENA_BYTES - 9, 10)],
    ):
        with pytest.raises(ValueError):
            transport.read(shared_remote.info, pieces, 1.0)
    assert not arena.any()


def test_connections_can_be_repeated_and_given_up(reader: Reader, shared_remote: Remote) -> None:
    transport, arena = reader
    info = shared_remote.info
    expected = shared_remote.fill(0, 100, seed=4)
    transport.disconnect("never-heard-of")
    stranger = transport.read(info, [Piece(0, 0, 100)], 1.0)
    with pytest.raises(TransferFailed, match="not connected"):
        stranger.future.result(PATIENCE_S)
    assert stranger.terminal
    for _ in range(3):
        transport.connect(info)
        transport.connect(info)
        arena.zero_()
        transport.read(info, [Piece(0, 0, 100)], PATIENCE_S).future.result(PATIENCE_S)
        assert torch.equal(arena[:100], expected)
        transport.disconnect(info.agent)
        with pytest.raises(TransferFailed):
            transport.read(info, [Piece(0, 0, 100)], 1.0).future.result(PATIENCE_S)


def test_another_layout_is_refused_by_name(reader: Reader, shared_remote: Remote) -> None:
    transport, _ = reader
    for changes in ({"dtype": "bfloat16"}, {"tp_size": 2, "tp_rank": 1}, {"model": "another"}):
        other = msgspec.structs.replace(LAYOUT, **changes)
        with pytest.raises(LayoutMismatch) as refusal:
            transport.connect(msgspec.structs.replace(shared_remote.info, layout=other))
        for field, value in changes.items():
            assert f"{field}: {getattr(LAYOUT, field)!r} here, {value!r} there" in str(refusal.value)


def test_a_lie_about_the_agent_is_refused(reader: Reader, shared_remote: Remote) -> None:
    transport, _ = reader
    with pytest.raises(TransferFailed):
        transport.connect(msgspec.structs.replace(shared_remote.info, agent="somebody#else"))
    transport.connect(shared_remote.info)
    transport.read(shared_remote.info, [Piece(0, 0, 10)], PATIENCE_S).future.result(PATIENCE_S)


def test_many_threads_read_at_once(reader: Reader, shared_remote: Remote) -> None:
    transport, arena = reader
    data = shared_remote.fill(0, 1 << 20, seed=5)
    transport.connect(shared_remote.info)
    wrong: list[int] = []

    def read(thread: int) -> None:
        for i in range(25):
            offset, nbytes = thread * (128 << 10) + i * 4096, 4096 - 13 * i
            transport.read(shared_remote.info, [Piece(offset, offset, nbytes)], PATIENCE_S).future.result(PATIENCE_S)
            if not torch.equal(arena[offset : offset + nbytes], data[offset : offset + nbytes]):
                wrong.append(offset)

    threads = [threading.Thread(target=read, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_stopped_peer_cannot_hold_a_reader(site: Site, reader: Reader, shared_remote: Remote) -> None:
    transport, arena = reader
    expected = shared_remote.fill(0, 4 << 20, seed=6)
    transport.connect(shared_remote.info)
    transport.read(shared_remote.info, [Piece(0, 0, 10)], PATIENCE_S).future.result(PATIENCE_S)
    shared_remote.stop()
    try:
        started = time.monotonic()
        patience_s = PATIENCE_S if site.stopped_peer_is_readable else 0.3
        transfer = transport.read(shared_remote.info, [Piece(0, 0, 4 << 20)], patience_s)
        if site.stopped_peer_is_readable:
            transfer.future.result(PATIENCE_S)
        else:
            with pytest.raises(TransferTimeout):
                transfer.future.result(PATIENCE_S)
            assert 0.25 < time.monotonic() - started < 10.0
            assert not transfer.terminal
            # Forgetting the peer does not make the destination safe.
            transport.disconnect(shared_remote.info.agent)
            time.sleep(0.1)
            assert not transfer.terminal
    finally:
        shared_remote.resume()
    assert wait_until(lambda: transfer.terminal, 60)
    if not site.stopped_peer_is_readable:
        with pytest.raises(TransferTimeout):  # although the bytes have arrived by now
            transfer.future.result(0)
    assert torch.equal(arena[: 4 << 20], expected)
    transport.connect(shared_remote.info)
    transport.read(shared_remote.info, [Piece(0, 0, 10)], PATIENCE_S).future.result(PATIENCE_S)


def test_a_deadline_in_the_past_is_a_timeout(reader: Reader, shared_remote: Remote) -> None:
    transport, _ = reader
    transport.connect(shared_remote.info)
    transfer = transport.read(shared_remote.info, [Piece(0, 0, 4 << 20)], 0.0)
    with pytest.raises(TransferTimeout):
        transfer.future.result(PATIENCE_S)
    assert wait_until(lambda: transfer.terminal, 60)


def test_a_killed_peer_fails_readers_and_its_next_incarnation_is_met(site: Site, reader: Reader) -> None:
    transport, arena = reader
    first, second = site.remote("twice"), site.remote("twice")
    expected = first.fill(0, 4 << 20, seed=7)
    transport.connect(first.info)
    transport.read(first.info, [Piece(0, 0, 1000)], PATIENCE_S).future.result(PATIENCE_S)
    first.stop()
    under_way = transport.read(first.info, [Piece(0, 0, 4 << 20)], 10.0)
    first.kill()
    started = time.monotonic()
    error = under_way.future.exception(PATIENCE_S)
    if error is None:
        assert site.stopped_peer_is_readable
        assert torch.equal(arena[: 4 << 20], expected)
    else:
        assert isinstance(error, TransferFailed)
    assert time.monotonic() - started < 8.0
    with pytest.raises((TransferFailed, TransferTimeout)):
        transport.read(first.info, [Piece(0, 0, 1000)], 2.0).future.result(PATIENCE_S)

    expected = second.fill(0, 1000, seed=8)
    transport.connect(second.info)
    arena.zero_()
    transport.read(second.info, [Piece(0, 0, 1000)], PATIENCE_S).future.result(PATIENCE_S)
    assert torch.equal(arena[:1000], expected)
    assert wait_until(lambda: under_way.terminal, 60)
    second.kill()


def test_closing_ends_everything(site: Site) -> None:
    transport, _ = site.reader()
    remote = site.remote("closed")
    transport.connect(remote.info)
    transport.read(remote.info, [Piece(0, 0, 10)], PATIENCE_S).future.result(PATIENCE_S)
    remote.stop()
    under_way = transport.read(remote.info, [Piece(0, 0, 4 << 20)], 30.0)
    transport.close()
    assert under_way.terminal
    if not site.stopped_peer_is_readable:
        with pytest.raises(TransferFailed):
            under_way.future.result(0)
    transport.close()
    after = transport.read(remote.info, [Piece(0, 0, 10)], 1.0)
    with pytest.raises(TransferFailed):
        after.future.result(0)
    assert after.terminal
    with pytest.raises(TransferFailed):
        transport.connect(remote.info)
    transport.disconnect(remote.info.agent)
    remote.kill()


def test_other_memory_than_bytes(site: Site, shared_remote: Remote) -> None:
    """The arena is a tensor of the storage dtype; transports count bytes."""
    arena = torch.zeros(1024, dtype=torch.bfloat16)
    transport, _ = site.reader(arena=arena)
    assert transport.info.nbytes == 2048
    expected = shared_remote.fill(64, 2048, seed=9)
    transport.connect(shared_remote.info)
    transport.read(shared_remote.info, [Piece(64, 0, 2048)], PATIENCE_S).future.result(PATIENCE_S)
    assert torch.equal(arena.view(torch.uint8), expected)
    transport.attend(0.01)
    transport.close()

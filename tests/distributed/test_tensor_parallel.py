"""Tensor-parallel pools: an image's KV goes from shard to shard, all of it or nothing. Followers are threads here, and
the transport is the in-memory one, whose faults are scripted; ``test_shard_processes`` has the real ones."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest
import pytest_asyncio
import torch
from pools import Pools, picture

from vlcache_dist.errors import LayoutMismatch
from vlcache_dist.kv.layout import KVLayout
from vlcache_dist.transfer.base import PeerInfo, Piece
from vlcache_dist.transfer.memory import NO_FAULT, Fault, MemoryNetwork, MemoryTransport
from vlcache_dist.types import ReuseMode

sys.path.append(str(Path(__file__).parents[1] / "parallel"))
from shard_threads import Threads

pytestmark = pytest.mark.asyncio(loop_scope="module")


class Wire:
    """An in-memory network with one fault at a time, in the KV that one rank of ``prefill-1`` reads."""

    def __init__(self) -> None:
        self.network = MemoryNetwork(self._script)
        self.fault: tuple[int, Fault] | None = None
        self.reads: list[tuple[int, str]] = []  # (rank, from)

    def transport(self, worker_id: str, arena: torch.Tensor, layout: KVLayout) -> MemoryTransport:
        host = worker_id.partition("#")[0]  # a host for each worker: what crosses is checksummed
        return MemoryTransport(self.network, worker_id, arena, layout, host)

    def _script(self, reader: PeerInfo, peer: PeerInfo, pieces: Sequence[Piece]) -> Fault:
        rank = reader.layout.tp_rank
        self.reads.append((rank, peer.worker_id))
        fetches_kv = reader.worker_id.startswith("prefill-1") and not peer.worker_id.startswith("encoder")
        if self.fault is not None and self.fault[0] == rank and fetches_kv:
            return self.fault[1]
        return NO_FAULT


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def wire_() -> AsyncIterator[Wire]:
    wire = Wire()
    yield wire
    wire.network.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(wire_: Wire) -> AsyncIterator[Pools]:
    async with Pools(
        transport=wire_.transport,
        shards=Threads(make_transport=wire_.transport),
        tensor_parallel=2,
        serve={"transfer_timeout_s": 1.0},
    ) as pools:
        yield pools


@pytest_asyncio.fixture(loop_scope="module")
async def pools(shared: Pools, wire_: Wire) -> AsyncIterator[Pools]:
    yield shared
    wire_.fault = None
    await shared.drained()


async def test_every_rank_reads_its_shard_and_the_answer_is_right(pools: Pools, wire_: Wire) -> None:
    image = picture(1)
    fact, other = image.facts[:2]
    cold = await pools.ask(image, fact.question, prefill_worker="prefill-0")
    assert (cold.text, cold.sources) == (fact.answer, ["computed"])
    wire_.reads.clear()
    warm = await pools.ask("The river.\n", image, other.question, prefill_worker="prefill-1")
    assert (warm.text, warm.sources) == (other.answer, ["remote"])
    (about,) = warm.images
    holder = pools.prefills[0].node.worker_id
    assert (about["reused_tokens"], about["recomputed_tokens"], about["holder"]) == (61, 3, holder)
    layout = pools.prefills[0].node.layout
    assert about["bytes_moved"] == 2 * layout.kv_elements(64) * layout.itemsize
    assert [read for read in wire_.reads if read[1].startswith("prefill-0")] == [(0, holder), (1, f"{holder}/1")]
    again = await pools.ask("A farmer.\n", image, fact.question, prefill_worker="prefill-1")
    assert (again.text, again.sources) == (fact.answer, ["local"])


FAULTS = {"corrupt": Fault(corrupt=True), "error": Fault(error=True), "late": Fault(delay_s=1.5)}


@pytest.mark.parametrize("name", FAULTS)
async def test_one_shard_that_fails_is_enough_to_admit_nothing(pools: Pools, wire_: Wire, name: str) -> None:
    image = picture(10 + list(FAULTS).index(name))
    fact = image.facts[0]
    await pools.ask(image, fact.question, prefill_worker="prefill-0")
    wire_.fault = (1, FAULTS[name])
    failed = sum(pools.prefills[1].node._fetcher.failures.values())
    answer = await pools.ask("The river.\n", image, fact.question, prefill_worker="prefill-1")
    assert (answer.text, answer.sources) == (fact.answer, ["computed"])
    assert sum(pools.prefills[1].node._fetcher.failures.values()) > failed


async def test_one_rank_alone_answers_the_same(pools: Pools) -> None:
    image = picture(20)
    questions = [f"{prefix}{fact.question}" for prefix in ("", "A farmer.\n") for fact in image.facts[:2]]
    ours = [await pools.ask(image, question, reuse=ReuseMode.OFF) for question in questions]
    async with Pools(prefills=1) as alone:
        theirs = [await alone.ask(image, question, reuse=ReuseMode.OFF) for question in questions]
    assert [answer.text for answer in ours] == [answer.text for answer in theirs]


async def test_another_tensor_parallel_size_is_refused_by_name(pools: Pools) -> None:
    other = await pools.start_worker("prefill", 7, tensor_parallel=1)
    try:
        for reader, holder in ((other, pools.prefills[0]), (pools.prefills[0], other)):
            with pytest.raises(LayoutMismatch) as refusal:
                await reader.node._fetcher.introduce(holder.node.worker_id, holder.node.address, 1024)
            here, there = reader.node.layout.tp_size, holder.node.layout.tp_size
            assert f"tp_size: {there} here, {here} there" in str(refusal.value)
    finally:
        await other.close()

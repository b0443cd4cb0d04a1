"""The dispatcher's view of queues: its own requests to the moment, those of others as of the last heartbeat."""

from __future__ import annotations

from contextlib import ExitStack

from vlcache_dist import wire
from vlcache_dist.serve.dispatch import Dispatcher
from vlcache_dist.serve.placement import Costs, Demand
from vlcache_dist.types import Role

TEXT = Demand(100, (), reuse=True)


class Pool:
    """Members with loads that a test sets."""

    def __init__(self, *loads: wire.WorkerLoad) -> None:
        self.loads = list(loads)

    def __call__(self) -> list[wire.Member]:
        return [
            wire.Member(wire.WorkerInfo(f"p{n}#x", f"p{n}", Role.PREFILL, f"tcp://{n}"), load, 0.0)
            for n, load in enumerate(self.loads)
        ]


def load(tokens: int, waiting: int = 1) -> wire.WorkerLoad:
    return wire.WorkerLoad(waiting=waiting if tokens else 0, waiting_tokens=tokens, pass_s=1e-3, token_s=1e-5)


def choose(dispatcher: Dispatcher) -> tuple[str, float]:
    _, choice = dispatcher.choose_prefill(TEXT, None, ())
    return choice.worker_id, round(choice.expected_s, 6)


ALONE = 1e-3 + 100e-5


def test_own_requests_count_at_once_and_stop_counting_at_once() -> None:
    """An old heartbeat that still shows them must not make the worker look busy."""
    pool = Pool(load(0), load(0))
    dispatcher = Dispatcher(pool, Costs())
    assert choose(dispatcher) == ("p0#x", ALONE)
    with ExitStack() as counted:
        counted.enter_context(dispatcher.prefilling("p0#x", 5000))
        assert [choose(dispatcher) for _ in range(3)] == [("p1#x", ALONE)] * 3
        pool.loads[0] = load(5000)  # the heartbeat tells of the same request: it is not counted twice
        counted.enter_context(dispatcher.prefilling("p1#x", 9000))
        assert choose(dispatcher) == ("p0#x", round(1e-3 + 5000e-5 + ALONE, 6))
    assert choose(dispatcher)[1] == ALONE  # answered, although the heartbeat does not know yet


def test_what_other_ingresses_have_sent_counts_from_the_heartbeat() -> None:
    pool = Pool(load(0), load(0))
    dispatcher = Dispatcher(pool, Costs())
    choose(dispatcher)
    pool.loads[0] = load(4000, waiting=2)
    assert [choose(dispatcher) for _ in range(2)] == [("p1#x", ALONE)] * 2
    pool.loads[1] = load(8000, waiting=2)
    assert choose(dispatcher) == ("p0#x", round(2 * 1e-3 + 4000e-5 + ALONE, 6))

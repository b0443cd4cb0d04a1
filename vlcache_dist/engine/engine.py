"""The engine: requests in, events out; schedule, run, postprocess. One thread owns it, and time is an argument.

::

    add ──> waiting ──Admitted──> running ──────────────> finished
                                    │  ^ provide(span)        │ PREFILL mode
                                    │                         └──> parked ──export──release──> gone
                                    └ abort at any time: everything it held is freed

A request is admitted, first come first served, when all blocks it can ever need are free: nothing is preempted later.
It is computed up to the first span that has no source yet.
"""

from __future__ import annotations

from vlcache_dist.engine.api import Compute, EngineStats, Event, Export, Import, Mode, Reuse
from vlcache_dist.kv.object_store import ObjectStore
from vlcache_dist.types import Variant
from vlcache_dist.wire import Generation


class Engine:
    """Owns the paged pool and both prefix caches; shares ``store`` and its arena with the worker."""

    store: ObjectStore

    def add(self, generation: Generation, now: float, mode: Mode = Mode.GENERATE) -> None:
        """Queue a request. Raises PromptTooLong if it can never fit, Overloaded if the queue is full, ValueError for a
        request id in use. ``Admitted`` follows from a later ``step``. Sources may be provided before or after it;
        those for spans that turn out to lie in the prefix cache are given back unused. A worker should
        not claim the production of an object before ``Admitted``: a request that waits here makes no progress."""
        raise NotImplementedError

    def recordable(self, request_id: str, span_index: int) -> bool:
        """True if the span, given a ``Compute`` source now, may be recorded: the request is not ``off``, no earlier span
        is approximated, none of it lies in the prefix cache, and it is the first of its key in the prompt. Meaningful
        once all earlier spans have their sources."""
        raise NotImplementedError

    def provide(self, request_id: str, span_index: int, source: Compute | Reuse) -> None:
        """Give a span its source; takes over its extents (see ``engine.api``) also if the request is gone or the source
        is not needed. Raises ValueError (nothing is taken over) for a source that does not fit the span or the
        request's reuse mode, or a span that has one already."""
        raise NotImplementedError

    def abort(self, request_id: str, now: float) -> bool:
        """Forget a request in any state, parked included, and free all it held. False if there is no such request.
        Records under way are dropped; their ``RecordDropped`` events come with the next ``step``."""
        raise NotImplementedError

    def step(self, now: float) -> list[Event]:
        """Admit, run one forward pass, return what happened. Device work that events speak of is finished."""
        raise NotImplementedError

    def has_work(self) -> bool:
        """True if ``step`` would do something now (a request that only waits for a source is no work)."""
        raise NotImplementedError

    def export(self, request_id: str, now: float) -> Export:
        """Pack the parked sequence's rows that no image object can rebuild. Idempotent. Raises StoreFull (try again
        later, or give up and ``release``), ValueError if the request is not parked."""
        raise NotImplementedError

    def release(self, request_id: str) -> bool:
        """End a parked sequence: blocks (prefix caches keep their copies), staging, pins. False if there is none."""
        raise NotImplementedError

    def import_sequence(self, request_id: str, first_token: int, kv: Import, now: float) -> None:
        """Fill an admitted DECODE request's pages and go on behind ``first_token``. Takes over ``kv``'s extents also
        if the request is gone; staging is discarded on return. Raises ValueError (nothing is taken over) if
        the rows and objects do not cover the positions."""
        raise NotImplementedError

    def stats(self) -> EngineStats:
        raise NotImplementedError

    def validate(self) -> None:
        """Raise AssertionError unless blocks, pins and extents add up with the requests that hold them."""
        raise NotImplementedError


def new_variant() -> Variant:
    """A fresh name for a computation's result."""
    raise NotImplementedError

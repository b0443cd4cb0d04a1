"""The guard's books of several workers: every run is counted once, whatever is lost, repeated or restarted."""

from __future__ import annotations

import random

import msgspec
import pytest

from vlcache_dist.cache_directory.guard_books import GuardBooks
from vlcache_dist.reuse.books import Book, Books, Observation, Shadow, Standing
from vlcache_dist.reuse.guard import MAX_NEWS, Guard
from vlcache_dist.reuse.ladder import Level
from vlcache_dist.reuse.plan import Plan
from vlcache_dist.wire import ShareBooks

PLAN = Plan.parse("none+canary:0,3,5<0.5")
FINE, WRONG = Shadow(0.001, True, False), Shadow(8.0, False, False)


class Worker:
    """A guard and what it says to the directory."""

    def __init__(self, name: str) -> None:
        self.guard = Guard(sampling=1.0, owner=name)
        self.epoch = ""

    def exchange(self, directory: GuardBooks, *, reply_lost: bool = False, copies: tuple[Standing, ...] = ()) -> None:
        known = {} if copies else {s.format: s.rank for s in self.guard.common()}
        said = ShareBooks(self.guard.owner, "model", self.epoch, known, self.guard.news, copies)
        reply = directory.share(msgspec.msgpack.decode(msgspec.msgpack.encode(said), type=ShareBooks))
        if reply_lost:
            return
        if reply.epoch != self.epoch:
            self.epoch = reply.epoch
            self.exchange(directory, copies=self.guard.common())
            return
        self.guard.take_up(reply.standings)

    @property
    def level(self) -> Level:
        return self.guard.decide("f").level

    @property
    def drift(self) -> dict[str, object]:
        return self.guard.status()["formats"]["f"]


def see(worker: Worker, shadow: Shadow, times: int = 1) -> None:
    for _ in range(times):
        worker.guard.observe("f", PLAN, shadow)


def common(directory: GuardBooks) -> Standing:
    (standing,) = directory.share(ShareBooks("nobody", "model", directory._epoch, {}, ())).standings
    return standing


def test_evidence_of_all_workers_counts_and_all_act_on_it() -> None:
    """No worker has seen enough by itself; together they have, and the third, which saw nothing, follows."""
    directory, workers = GuardBooks("e1"), [Worker(name) for name in "abc"]
    for worker in workers:
        worker.exchange(directory)
    alone = Guard(owner="alone")
    enough = next(n for n in range(1, 100) if alone.observe("f", PLAN, WRONG) is not Level.NORMAL)
    for number in range(enough):
        see(workers[number % 2], WRONG)
    assert [w.level for w in workers] == [Level.NORMAL] * 3
    for worker in (*workers, *workers):
        worker.exchange(directory)
    assert [w.level for w in workers] == [Level.OFF] * 3
    assert common(directory).drift.shadows == enough and workers[2].drift["shadows"] == enough
    assert not any(w.guard.news for w in workers)

    late = Worker("late")
    late.exchange(directory)
    assert late.level is Level.OFF, "who starts later takes up the level"


def test_recovery_is_common_too() -> None:
    directory, (a, b) = GuardBooks("e1"), (Worker("a"), Worker("b"))
    see(a, WRONG, 20)
    seen = []
    for _ in range(400):
        for worker in (a, b):
            worker.exchange(directory)
            see(worker, FINE)
        if not seen or seen[-1] is not b.level:
            seen.append(b.level)
    assert seen == [Level.OFF, Level.STRENGTHENED, Level.TIGHTENED, Level.NORMAL]
    assert abs(int(a.level) - int(b.level)) == 0


def test_lost_replies_count_nothing_twice() -> None:
    """The books equal those of one worker that has seen everything in the order in which the directory heard it."""
    directory, workers, rng = GuardBooks("e1"), [Worker("a"), Worker("b")], random.Random(1)
    told: list[tuple[str, Observation]] = []
    for _ in range(300):
        worker = rng.choice(workers)
        worker.guard.decide("f")
        see(worker, WRONG if rng.random() < 0.02 else FINE)
        if rng.random() < 0.5:
            before = worker.epoch
            fresh = [o for o in worker.guard.news if o.number > _counted(directory, worker)]
            worker.exchange(directory, reply_lost=rng.random() < 0.5)
            if before or worker.epoch:
                told += [(worker.guard.owner, o) for o in fresh]
    twin = Book(Standing("f"))
    for owner, seen in told:
        twin.observe(owner, seen)
    assert common(directory) == twin.standing()
    for worker in workers:
        worker.exchange(directory)
    assert common(directory).drift.shadows == 300 == common(directory).drift.requests


def _counted(directory: GuardBooks, worker: Worker) -> int:
    standings = directory.share(ShareBooks("nobody", "model", directory._epoch, {}, ())).standings
    return standings[0].counted.get(worker.guard.owner, 0) if standings else 0


def test_a_directory_that_lost_its_state_gets_it_back() -> None:
    before, (a, b) = GuardBooks("e1"), (Worker("a"), Worker("b"))
    see(a, WRONG, 20)
    for worker in (a, b):
        worker.exchange(before)
    see(b, FINE, 3)  # not told yet when the directory dies
    after = GuardBooks("e2")
    b.exchange(after)
    a.exchange(after)
    assert common(after).level == Level.OFF and common(after).drift.shadows == 23
    a.exchange(after)
    assert a.drift["shadows"] == 23 and a.level is Level.OFF


def test_without_a_directory_each_has_its_own_book() -> None:
    a, b = Worker("a"), Worker("b")
    see(a, WRONG, 20)
    see(b, FINE, 20)
    assert (a.level, b.level) == (Level.OFF, Level.NORMAL)
    see(a, FINE, 2 * MAX_NEWS)  # more than is kept as news: folded into its own book, nothing forgotten
    assert len(a.guard.news) == MAX_NEWS and a.drift["shadows"] == 20 + 2 * MAX_NEWS
    directory = GuardBooks("e1")
    a.exchange(directory)
    assert common(directory).drift.shadows == 20 + 2 * MAX_NEWS and common(directory).level == a.level


def test_what_was_seen_at_one_level_is_no_evidence_at_another() -> None:
    """Shadows that were under way when the level changed: drift, but neither health nor harm."""
    book = Book(Standing("f", level=int(Level.OFF), moves=1))
    for number in range(1, 200):
        book.observe("a", Observation(number, "f", int(Level.NORMAL), 1, FINE))
    assert book.level is Level.OFF and book.runs == 0 and book.drift.shadows == 199


def test_healthy_workers_together_do_not_trip() -> None:
    """Ten workers with 1,000 requests each, sampled at 5 %: no more alarms than one worker with 10,000."""
    tripped = 0
    for seed in range(20):
        rng, books = random.Random(seed), Books()
        for number in range(1, 51):
            for worker in range(10):
                shadow = WRONG if rng.random() < 0.005 else FINE
                books.observe(str(worker), Observation(number, "f", 0, 1, shadow))
        tripped += books.standings()[0].moves
    assert tripped == 0


@pytest.mark.parametrize("models", [2, 40])
def test_models_do_not_share_books(models: int) -> None:
    directory = GuardBooks("e1")
    for number in range(models):
        seen = Observation(1, "f", 0, 1, WRONG)
        reply = directory.share(ShareBooks("a", f"m{number}", "e1", {}, (seen,)))
        assert reply.standings[0].drift.shadows == 1
    assert len(directory.stats()) <= 16

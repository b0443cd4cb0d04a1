"""How fast one worker reads from another: measured when they meet, and what follows from it. Pure.

A curve is the time of one READ at several sizes. It says how many bytes a group of layers must have to be worth a READ
of its own, by when a group is to be expected, and what placement may count on. READs only: a holder that pushed
(WRITE) would write into the reader's arena at times of its own, and the reader, which alone knows its deadlines, could
not tell when a slot is safe to use again.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import msgspec

PROBE_SIZES = (64 << 10, 1 << 20, 8 << 20, 32 << 20)  #: bytes
EFFICIENT = 0.5  #: of the best rate seen: what a group's READ must reach to be worth it
MAX_GROUPS = 8  #: per object; powers of two, so that few kinds of partial passes exist
FLOOR = 50e6  #: bytes/s: below it a pair is as good as broken (a cut-down container network, a wrong route)
FLOOR_DEVICES = 5e9  #: bytes/s between GPUs of one host: below it the bytes take a detour through host memory


class Link(msgspec.Struct, frozen=True):
    """``points``: (bytes, seconds of one READ), ascending in bytes. ``floor``: bytes/s below which the pair is slow."""

    points: tuple[tuple[int, float], ...]
    floor: float = FLOOR

    @property
    def bytes_per_s(self) -> float:
        """The best rate seen."""
        return max((nbytes / seconds for nbytes, seconds in self.points), default=0.0)

    @property
    def latency_s(self) -> float:
        """Time of the fastest READ, which is (nearly) a small one's: the first READs of a pair are slower."""
        return min((seconds for _, seconds in self.points), default=0.0)

    @property
    def slow(self) -> bool:
        return self.bytes_per_s < self.floor

    @property
    def group_bytes(self) -> int:
        """The least size that is read at ``EFFICIENT`` of the best rate."""
        best = self.bytes_per_s
        return next((nbytes for nbytes, seconds in self.points if nbytes / seconds >= EFFICIENT * best), 1)

    def seconds(self, nbytes: int) -> float:
        """Expected time of one READ: between two probes on the line through them, beyond the largest at its rate."""
        if not self.points:
            return 0.0
        if nbytes <= self.points[0][0]:
            return self.points[0][1]
        for (a, s), (b, t) in pairwise(self.points):
            if nbytes <= b:
                return s + (t - s) * (nbytes - a) / (b - a)
        return nbytes / self.bytes_per_s + self.latency_s


def link_floor(here: str, there: str, *, same_host: bool) -> float:
    """The floor for devices as ``PeerInfo`` names them."""
    gpus = here.startswith("cuda") and there.startswith("cuda")
    return FLOOR_DEVICES if gpus and same_host else FLOOR


def group_edges(num_layers: int, nbytes: int, group_bytes: int) -> tuple[int, ...]:
    """Edges of the layer groups that an object of ``nbytes`` is read in: equal runs of layers, each of at least
    ``group_bytes``, a power of two of them and at most ``MAX_GROUPS``."""
    count = 1
    while 2 * count <= min(MAX_GROUPS, num_layers) and nbytes // (2 * count) >= group_bytes:
        count *= 2
    return tuple(num_layers * i // count for i in range(count + 1))


def landing_times(edges: Sequence[int], nbytes: int, link: Link) -> list[float]:
    """Seconds after the first READ is posted by which each group is expected, one after the other."""
    return [link.seconds(nbytes * stop // edges[-1]) + link.latency_s * i for i, stop in enumerate(edges[1:], 1)]

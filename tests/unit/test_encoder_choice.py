"""Which encoder takes a picture: the same one before and after it was restarted."""

from __future__ import annotations

from collections.abc import Sequence

from vlcache_dist import wire
from vlcache_dist.node import FrontNode
from vlcache_dist.types import Role


class Front(FrontNode):
    """A front that is told who is there."""

    def __init__(self, *infos: wire.WorkerInfo) -> None:
        self.infos = infos

    def members(self) -> Sequence[wire.Member]:
        return [wire.Member(info, wire.WorkerLoad(), 0.0) for info in self.infos]


def encoder(name: str, incarnation: int = 0, role: Role = Role.ENCODER, draining: bool = False) -> wire.WorkerInfo:
    here = f"{name}#{incarnation}"
    return wire.WorkerInfo(here, name, role, f"tcp://{here}", draining=draining, started=float(incarnation))


KEYS = [bytes([number]) * 32 for number in range(64)]
THREE = [encoder(f"encoder-{number}") for number in range(3)]


def test_pictures_are_spread_and_every_other_encoder_follows() -> None:
    front = Front(*THREE, encoder("prefill-0", role=Role.PREFILL), encoder("encoder-3", draining=True))
    addresses = {info.address for info in THREE}
    assert all(set(front.encoders(key)) == addresses for key in KEYS)
    assert {front.encoders(key)[0] for key in KEYS} == addresses


def test_a_restarted_encoder_takes_its_own_pictures_again() -> None:
    """While the list still has both incarnations, too."""
    again = encoder("encoder-1", 1)
    for front in (Front(THREE[0], again, THREE[2]), Front(THREE[0], again, THREE[1], THREE[2])):
        for key in KEYS:
            before = [address.replace("encoder-1#0", "encoder-1#1") for address in Front(*THREE).encoders(key)]
            assert front.encoders(key) == before


def test_the_pictures_of_a_lost_encoder_go_to_the_next_and_no_others_move() -> None:
    for key in KEYS:
        before = Front(*THREE).encoders(key)
        before.remove(THREE[1].address)
        assert Front(THREE[0], THREE[2]).encoders(key) == before

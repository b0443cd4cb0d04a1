"""What a measured link says: rates, group sizes, when a group is due."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlcache_dist.transfer.link import (
    FLOOR,
    FLOOR_DEVICES,
    MAX_GROUPS,
    Link,
    group_edges,
    landing_times,
    link_floor,
)

MIB = 1 << 20
NVLINK = Link(((64 << 10, 20e-6), (MIB, 25e-6), (8 * MIB, 45e-6), (32 * MIB, 130e-6)), FLOOR_DEVICES)


def test_rates() -> None:
    assert NVLINK.bytes_per_s == pytest.approx(32 * MIB / 130e-6)
    assert NVLINK.latency_s == 20e-6
    assert not NVLINK.slow
    assert Link(((MIB, 1.0),)).slow
    assert Link(()).bytes_per_s == 0.0 and Link(()).slow


def test_time_between_and_beyond_the_probes() -> None:
    assert NVLINK.seconds(1) == 20e-6
    assert NVLINK.seconds(MIB) == pytest.approx(25e-6)
    assert NVLINK.seconds(4 * MIB + MIB // 2) == pytest.approx(35e-6)
    assert NVLINK.seconds(320 * MIB) == pytest.approx(1300e-6, rel=0.02)


def test_a_group_is_worth_a_read_where_half_the_rate_is_reached() -> None:
    assert NVLINK.group_bytes == 8 * MIB
    assert Link(((MIB, 1.0), (2 * MIB, 2.0))).group_bytes == MIB


def test_gpus_of_one_host_have_a_higher_floor() -> None:
    assert link_floor("cuda:0", "cuda:1", same_host=True) == FLOOR_DEVICES
    assert link_floor("cuda:0", "cuda:1", same_host=False) == FLOOR
    assert link_floor("cpu", "cpu", same_host=True) == FLOOR


@given(st.integers(1, 80), st.integers(1, 1 << 30), st.integers(1, 1 << 26))
def test_groups_tile_the_layers(num_layers: int, nbytes: int, group_bytes: int) -> None:
    edges = group_edges(num_layers, nbytes, group_bytes)
    count = len(edges) - 1
    assert (edges[0], edges[-1]) == (0, num_layers) and all(a < b for a, b in pairwise(edges))
    assert count <= MAX_GROUPS and count & (count - 1) == 0
    assert count == 1 or nbytes // count >= group_bytes
    times = landing_times(edges, nbytes, NVLINK)
    assert len(times) == count and all(a < b for a, b in pairwise(times))


def test_a_7b_image_of_16384_tokens_comes_in_eight_groups() -> None:
    edges = group_edges(28, 16384 * 57344, NVLINK.group_bytes)
    assert edges == (0, 3, 7, 10, 14, 17, 21, 24, 28)

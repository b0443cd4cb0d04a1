"""How far a second pass may move an answer that is released, from cases whose outcome is known."""

from __future__ import annotations

import numpy as np

from vlcache_dist.reuse.calibrate import EXTRA_FALSE_ALARMS, LARGEST_MOVE, choose_left, choose_release


def alarms(good: list[float], bad: list[float]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([*good, *bad]), np.array([False] * len(good) + [True] * len(bad), bool)


def test_the_limit_lies_in_the_gap_below_the_first_wrong_answer() -> None:
    moved, harms = alarms([0.001] * 20 + [0.004], [0.05, 0.2, 3.0])
    choice = choose_release(moved, harms, 3, 0.0)
    assert 0.004 < choice.limit < 0.05
    assert (choice.released, choice.released_harmful) == (21, 0)
    assert 0 < choice.at_most < 1


def test_a_bound_allows_that_many_wrong_answers_and_no_more() -> None:
    moved, harms = alarms([0.008] * 50, [0.01, 0.016, 0.03] + [1.0] * 97)
    for bound, wrong in ((0.0, 0), (0.01, 1), (0.02, 2)):
        choice = choose_release(moved, harms, 100, bound)
        assert (choice.released, choice.released_harmful) == (50 + wrong, wrong)


def test_an_answer_that_moved_far_is_never_released_however_right_it_was() -> None:
    moved, harms = alarms([0.001, 0.5, 0.7], [])
    choice = choose_release(moved, harms, 0, 1.0)
    assert choice.limit <= LARGEST_MOVE and choice.released == 1
    assert choose_release(*alarms([], []), 0, 0.01).released == 0


def test_a_wider_gap_costs_few_alarms_only() -> None:
    spread = np.geomspace(0.002, 0.09, 200)
    choice = choose_release(spread, np.zeros(200, bool), 10, 0.0)
    assert choice.released >= (1 - EXTRA_FALSE_ALARMS) * 200 - 1


def test_wrong_answers_that_do_not_move_leave_nothing_to_release() -> None:
    choice = choose_release(*alarms([0.0, 0.01, 0.02], [0.0, 0.0001]), 2, 0.0)
    assert (choice.limit, choice.released, choice.released_harmful) == (0.0, 0, 0)


def test_a_limit_of_what_is_left_catches_what_is_wrong_without_having_moved() -> None:
    moved = np.array([5.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    harms = np.array([True, True, True, False, False, False])
    told, noise = [0.1, 0.9, 0.8, 0.2, 0.1, 0.2], [0.5, 0.4, 0.6, 0.5, 0.4, 0.6]
    layer, limit = choose_left(np.array([noise, told]), moved, harms) or (0, 0.0)
    assert layer == 1 and 0.2 < limit < 0.8, "the moved one needs no catching, however little is left"
    assert choose_left(np.array([noise, told]), np.full(6, 5.0), harms) is None, "what moved tells by itself"
    assert choose_left(np.array([noise, told]), moved, np.ones(6, bool)) is None, "nothing right to release"

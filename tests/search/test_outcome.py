"""What solvers return, and the two sides of a state as views."""

import numpy as np

from diba_np.search.greedy import random_state
from diba_np.search.outcome import Outcome


def test_outcomes_follow_each_other(rng):
    first, last = (random_state((4, 3), 2, 0.0, rng) for _ in range(2))
    one = Outcome(first, [0.5, 0.4], 3, True, [2], uneven=True)
    both = one.followed_by(Outcome(last, [0.3], 2, False))
    assert both == Outcome(last, [0.5, 0.4, 0.3], 5, False, [2], True, False)


def test_sides_are_views(rng):
    state = random_state((5, 4), 3, 0.5, rng)
    for side, scales, bits in (
        (state.left, state.d1, state.b1),
        (state.right, state.d3, state.b2),
    ):
        assert side.scales is scales and side.bits is bits
        side.scales[0] = 2.5
        assert scales[0] == 2.5
        np.testing.assert_array_equal(side.scaled(), scales[:, None] * (bits - 0.5))
        np.testing.assert_array_equal(side.values(slice(1, 3)), bits[1:3] - 0.5)
        assert side.other.other == side and side.grid is None

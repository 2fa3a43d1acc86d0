"""Which learning rates a curve asks for."""
from hypothesis import given, strategies as st

from study.runs import REACH, next_rate


def curve(score, first, target=80):
    """{rate index: score(k)} of everything that is asked for, which is asked for once."""
    found = {}
    while (k := next_rate(found, first, target)) is not None:
        assert k not in found
        found[k] = score(k)
    return found


def test_brackets_by_hand():
    """From below up until the target is reached; from above down until it is not."""
    rising = {0: 10, 1: 50, 2: 79, 3: 81, 4: 95, 5: 99}.get
    assert list(curve(rising, 1)) == [1, 2, 3] and list(curve(rising, 5)) == [5, 4, 3, 2]
    assert list(curve(rising, 3)) == [3, 2] and list(curve(rising, 0)) == [0, 1, 2, 3]


def test_a_first_rate_beyond_the_best_goes_down_by_hand():
    """Two rates up are worse, so it goes down, until the best has a worse neighbour there too."""
    falling = {0: 30, 1: 60, 2: 50, 3: 40, 4: 20, 5: 30}.get
    assert list(curve(falling, 3)) == [3, 4, 5, 2, 1, 0]
    reached = {0: 30, 1: 85, 2: 82, 3: 40, 4: 20, 5: 10}.get
    assert list(curve(reached, 3)) == [3, 4, 5, 2, 1, 0]


def test_noise_at_the_floor_does_not_end_a_curve_by_hand():
    """Of scores far below the target the best is chance: the rates that learn may be higher."""
    floor = {0: 11, 1: 13, 2: 8, 3: 10, 4: 60, 5: 85}.get
    assert list(curve(floor, 0)) == [0, 1, 2, 3, 4, 5]


@given(st.integers(-5, 9), st.integers(-10, 15), st.floats(0.2, 3), st.floats(20, 100))
def test_a_curve_ends_and_brackets_what_it_can(first, middle, width, top):
    """A neighbour below the target beside the first rate that reaches it, unless that lies too far."""
    found = curve(lambda k: top / (1 + 2 ** ((middle - k) / width)), first)
    assert set(found) == set(range(min(found), max(found) + 1))
    assert first - REACH <= min(found) and max(found) <= first + REACH
    reached = [k for k in sorted(found) if found[k] >= 80]
    if reached:
        assert reached[0] - 1 in found or reached[0] == first - REACH
        assert len(reached) == 1 or max(reached) == first
    else:
        assert max(found) == first + REACH


@given(st.lists(st.floats(0, 100), min_size=41, max_size=41), st.integers(-5, 9), st.floats(1, 100))
def test_a_curve_ends_whatever_the_scores(scores, first, target):
    found = curve(lambda k: scores[k + 20], first, target)
    assert len(found) <= 2 * REACH + 1
    below = [k for k in found if found[k] >= target and found.get(k - 1, target) < target]
    assert below or max(found.values()) < target or min(found) == first - REACH

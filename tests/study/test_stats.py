"""The report's statistics against values from tables, closed forms and definitions."""
import math
import random
import statistics

import pytest
from hypothesis import assume, given, strategies as st

from study import stats


@pytest.mark.parametrize("t, df, p", [(12.706, 1, 0.05), (4.303, 2, 0.05), (2.571, 5, 0.05),
                                      (63.657, 1, 0.01), (3.169, 10, 0.01), (0, 3, 1)])
def test_t_distribution_as_in_tables(t, df, p):
    assert stats.t_pvalue(t, df) == pytest.approx(p, rel=1e-3)
    assert stats.t_pvalue(-t, df) == stats.t_pvalue(t, df)
    if p == 0.05:
        assert stats.t_quantile(df) == pytest.approx(t, abs=1e-3)


@given(st.floats(0, 1e4))
def test_t_distribution_in_closed_form(t):
    """df = 1: 1 - (2/π) atan t; df = 2: 1 - t/√(2 + t²), written without cancellation."""
    assert stats.t_pvalue(t, 1) == pytest.approx(2 / math.pi * math.atan2(1, t), rel=1e-6)
    root = math.sqrt(2 + t * t)
    assert stats.t_pvalue(t, 2) == pytest.approx(2 / (root * (root + t)), rel=1e-6)


@given(st.floats(0, 50), st.floats(0.01, 5), st.floats(1, 20))
def test_p_falls_with_t_and_with_the_degrees_of_freedom(t, more, df):
    assert stats.t_pvalue(t + more, df) <= stats.t_pvalue(t, df) <= 1
    if t > 1:  # nearer to 0 the distributions cross
        assert stats.t_pvalue(t, df + more) <= stats.t_pvalue(t, df) * (1 + 1e-9)


def test_paired_by_hand():
    """Gaps 1, 2, 3: t = 2 / (1/√3) = 3.464, df = 2, and in closed form p = 1 - t/√(2 + t²)."""
    difference, p = stats.paired([2, 4, 6], [1, 2, 3])
    assert difference == 2 and p == pytest.approx(1 - (12 / 14) ** 0.5, rel=1e-6)
    assert stats.paired([2, 4, None, 6], [1, 2, 3, 3]) == stats.paired([2, 4, 6], [1, 2, 3])


def test_paired_without_spread_or_with_few_pairs():
    assert stats.paired([1, 2], [1, 2]) == (0, 1) and stats.paired([2, 3], [1, 2]) == (1, 0)
    assert stats.paired([3, None], [1, 2]) == (2, None) and stats.paired([None], [1]) == (None, None)


@given(st.lists(st.tuples(st.floats(-100, 100), st.floats(-100, 100)), min_size=2, max_size=6),
       st.floats(0.1, 10))
def test_paired_is_antisymmetric_and_free_of_units(pairs, scale):
    assume(statistics.pstdev(x - y for x, y in pairs) > 0.1)
    a, b = zip(*pairs)
    difference, p = stats.paired(a, b)
    assert stats.paired(b, a) == (pytest.approx(-difference, abs=1e-9), pytest.approx(p, rel=1e-6))
    scaled = [[scale * v for v in column] for column in (a, b)]
    assert stats.paired(*scaled)[1] == pytest.approx(p, rel=1e-6)


def test_paired_rejects_a_true_hypothesis_as_often_as_it_says():
    """Pairs that share most of their spread, without a difference: p < 0.05 in 5 % of 500 draws."""
    rng = random.Random(0)

    def pair():
        shared = rng.gauss(0, 5)
        return shared + rng.gauss(0, 1), shared + rng.gauss(0, 1)
    draws = [stats.paired(*zip(*(pair() for _ in range(3))))[1] for _ in range(500)]
    assert 0.02 < stats.mean(p < 0.05 for p in draws) < 0.08


def test_interval_by_hand():
    """1, 2, 3: mean 2, standard error 1/√3, times 4.30."""
    assert stats.interval([1, 2, 3]) == "2.0 ±2.5 (3)"
    assert stats.interval([50]) == "50.0 (1)"
    assert stats.interval([1, None, 2, 3]) == "2.0 ±2.5 (3 of 4)"
    assert stats.interval([50, None]) == "50.0 (1 of 2)"
    assert stats.interval([None]) == stats.interval([]) == "-"


def test_ties_share_their_average_rank():
    assert stats.ranks([5, 7, 7, 1]) == [2, 3.5, 3.5, 1]
    assert stats.ranks([0, 0, 0]) == [2, 2, 2]
    assert stats.rank_correlation([1, 2, 3, 4], [10, 20, 20, 30]) == pytest.approx(0.9486833)
    assert stats.rank_correlation([1, 2], [5, 5]) is None


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=2, max_size=20),
       st.randoms())
def test_rank_correlation_ignores_order_and_monotone_maps(pairs, rng):
    """With many ties, too: that is where ranks by sorting alone depend on the order."""
    x, y = zip(*pairs)
    found = stats.rank_correlation(x, y)
    rng.shuffle(pairs)
    x, y = zip(*pairs)
    shuffled = stats.rank_correlation([math.exp(v) for v in x], [v ** 3 for v in y])
    assert (found is shuffled is None) or shuffled == pytest.approx(found, abs=1e-12)
    if found is not None:
        assert -1 <= found <= 1 and stats.rank_correlation(x, x) == pytest.approx(1)


def test_partial_rank_correlation_by_hand():
    """Correlations of 0.5, 0.5 and -0.5 give (0.5 + 0.25) / 0.75 = 1."""
    x, y, z = [1, 2, 3], [1, 3, 2], [2, 1, 3]
    assert [stats.rank_correlation(*pair) for pair in ((x, y), (x, z), (y, z))] == [
        pytest.approx(0.5), pytest.approx(0.5), pytest.approx(-0.5)]
    assert stats.partial_rank_correlation(x, y, z) == pytest.approx(1)
    assert stats.partial_rank_correlation(x, y, x) is None
    assert stats.partial_rank_correlation(x, [5, 5, 5], z) is None


@given(st.integers(0, 999))
def test_partial_rank_correlation_is_that_of_the_residuals(seed):
    """Pearson's correlation of what linear regressions on z's ranks leave of the ranks."""
    rng = random.Random(seed)
    z = [rng.randrange(6) for _ in range(12)]
    x, y = ([v + rng.gauss(0, 2) for v in z] for _ in range(2))
    assume(len(set(z)) > 1)

    def residuals(values):
        a, b = stats.ranks(z), stats.ranks(values)
        slope, intercept = statistics.linear_regression(a, b)
        return [v - slope * u - intercept for u, v in zip(a, b)]
    expected = statistics.correlation(residuals(x), residuals(y))
    assert stats.partial_rank_correlation(x, y, z) == pytest.approx(expected, abs=1e-9)

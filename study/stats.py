"""Statistics of the report, by hand: confidence intervals, paired t-test, rank correlation."""
import functools
import math
import statistics
from bisect import bisect_left, bisect_right

mean = statistics.fmean


@functools.cache
def t_pvalue(t, df, points=2000):
    """P(|T| >= |t|) for Student's t. T = √df / tan φ turns its density into sinᵈᶠ⁻¹ φ, of which the
    part below atan(√df / |t|) counts; midpoint rule in √φ, where the integrand is smooth at 0."""
    def integral(end):
        h = math.sqrt(end) / points
        return h * sum(math.sin(y * y) ** (df - 1) * y
                       for y in (h * (i + 0.5) for i in range(points)))
    return integral(math.atan2(math.sqrt(df), abs(t))) / integral(math.pi / 2)


@functools.cache
def t_quantile(df, p=0.05):
    """The t whose two-sided p-value is p, by bisection: 4.30 for df = 2."""
    low, high = 0.0, 1000.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if t_pvalue(middle, df) > p else (low, middle)
    return low


def crossing(points, target):
    """y where x first reaches the target along points (x, y), linear between two of them; None
    where none does."""
    for (x0, y0), (x1, y1) in zip(points, points[1:]):
        if x0 < target <= x1:
            return None if None in (y0, y1) else y0 + (y1 - y0) * (target - x0) / (x1 - x0)
    return None


def paired(a, b):
    """(mean of a - b, two-sided p) of a paired t-test over the pairs without None. p is None for
    fewer than two pairs; without spread it is 1 for equal means and 0 otherwise. (None, None)
    where there is no pair."""
    gaps = [x - y for x, y in zip(a, b) if None not in (x, y)]
    if len(gaps) < 2:
        return (gaps[0] if gaps else None), None
    error = statistics.stdev(gaps) / math.sqrt(len(gaps))
    if not error:
        return mean(gaps), float(mean(gaps) == 0)
    return mean(gaps), t_pvalue(mean(gaps) / error, len(gaps) - 1)


def interval(values):
    """"mean ±half width (n)" of the 95 % interval; None stands for one that never reached the
    target. "(2 of 3)": one of three did not; "-": none did."""
    reached = [v for v in values if v is not None]
    if not reached:
        return "-"
    n = len(reached)
    count = f"({n} of {len(values)})" if n < len(values) else f"({n})"
    half = f" ±{t_quantile(n - 1) * statistics.stdev(reached) / math.sqrt(n):.1f}" if n > 1 else ""
    return f"{mean(reached):.1f}{half} {count}"


def ranks(values):
    """Rank of each value; equal values share the average of their ranks: 5 7 7 -> 1 2.5 2.5"""
    ordered = sorted(values)
    return [(bisect_left(ordered, v) + bisect_right(ordered, v) + 1) / 2 for v in values]


def rank_correlation(x, y):
    """Spearman's correlation: Pearson's of the ranks; None where one of them is constant."""
    if len(set(x)) < 2 or len(set(y)) < 2:
        return None
    return statistics.correlation(ranks(x), ranks(y))


def partial_rank_correlation(x, y, z):
    """Of x and y given z: Spearman's correlation without z's linear effect on both ranks."""
    xy, xz, yz = (rank_correlation(*pair) for pair in ((x, y), (x, z), (y, z)))
    if None in (xy, xz, yz) or 1 in (abs(xz), abs(yz)):
        return None
    return (xy - xz * yz) / math.sqrt((1 - xz * xz) * (1 - yz * yz))

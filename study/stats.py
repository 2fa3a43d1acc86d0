"""Statistics of the report, by hand: confidence intervals, Welch's t-test, rank correlation."""
import functools
import math
import statistics

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


def welch(a, b):
    """(mean(a) - mean(b), two-sided p) by Welch's t-test, which assumes no equal variances.

    p is None where either has fewer than two values. If neither varies, p is 1 for equal means
    and 0 otherwise.
    """
    difference = mean(a) - mean(b)
    if min(len(a), len(b)) < 2:
        return difference, None
    u, v = statistics.variance(a) / len(a), statistics.variance(b) / len(b)
    if u + v == 0:
        return difference, float(difference == 0)
    df = (u + v) ** 2 / (u * u / (len(a) - 1) + v * v / (len(b) - 1))
    return difference, t_pvalue(difference / math.sqrt(u + v), df)


def interval(values):
    """"mean ±half width (seeds)" of the 95 % interval over seeds; None stands for a seed that never
    reached the level. "(2 of 3)": one of three did not; "-": none did."""
    reached = [v for v in values if v is not None]
    if not reached:
        return "-"
    n = len(reached)
    count = f"({n} of {len(values)})" if n < len(values) else f"({n})"
    if n == 1:
        return f"{reached[0]:.1f} {count}"
    half = t_quantile(n - 1) * statistics.stdev(reached) / math.sqrt(n)
    return f"{mean(reached):.1f} ±{half:.1f} {count}"


def ranks(values):
    """Rank of each value; equal values share the average of their ranks: 5 7 7 -> 1 2.5 2.5"""
    places = {}
    for place, value in enumerate(sorted(values), 1):
        places.setdefault(value, []).append(place)
    return [mean(places[value]) for value in values]


def rank_correlation(x, y):
    """Spearman's correlation: Pearson's of the ranks; None where one of them is constant."""
    if len(set(x)) < 2 or len(set(y)) < 2:
        return None
    return statistics.correlation(ranks(x), ranks(y))

"""Which runs does the study need? These functions ask a study for result(run) and level(task).

Forgetting grows with the learning rate, so comparing methods at one rate misleads. Each method's
rate is swept with seed 0 on validation items. Methods are then compared at the *level*: a target
score that every method is to reach, interpolated between the two rates around it. The other seeds
run at those rates and are scored on test items.
"""
from typing import NamedTuple

from study.variants import ABLATIONS, COMPARED, FINALISTS, METHODS, QUICK

LEVEL = 0.8                             # share of LoRA's best target score
SEEDS, FINAL_SEEDS = (1, 2, 3), (4, 5)  # reported seeds: of all methods; of the finalists besides
SNAPSHOT_SEED, TIMING_SEED = 6, 7
SNAPSHOT_METHODS = ("lora", "folora", "lora-kl-leading")
FIRST_RATE = {"full": -6, "sadam-full": -6, "sadam-full-truncated": -6, "pissa": 0, "sc-lora": 0,
              "lora-null": 2, "corda": 2, "milora": 2, "oplora": 2, "folora-leading": 2,
              "replay": 6, "folora-replay": 6, "lora-null-v2": 8, "null-frozen": 8,
              "leading-frozen": 8}      # first rate index of a sweep; 4 for the others


class Run(NamedTuple):
    task: str
    method: str
    k: int             # rate index, see `rate`
    seed: int          # 0: sweep, validation items; others: test items
    other: tuple = ()  # further options of `train.py adapt`


def rate(k):
    """Learning rate k of the grid, steps of √2: 0.004 at k = 4."""
    return float(f"{1e-3 * 2 ** (k / 2):.1e}")


def target_score(result):
    """A run's target score on its own items; 0 for a run that failed."""
    return result.get("test", result.get("valid", {"Avg2": 0}))["Avg2"]


def swept_as(method):
    """The method whose sweep says at which rates a variant starts."""
    if method in COMPARED:
        return method
    parts = METHODS[method]
    return "lora-kl-leading" if parts.penalty else "folora" if parts.start else "sadam-full"


def first_rates(method):
    first = FIRST_RATE.get(method, FIRST_RATE.get(swept_as(method), 4))
    return first, first + 2, first + 4


def level(study, task):
    """The target score at which retention is compared: LEVEL of the best that plain LoRA reached at
    the first rates of its sweep; None before those runs are finished."""
    found = [study.result(Run(task, "lora", k, 0)) for k in first_rates("lora")]
    return None if None in found else LEVEL * max(map(target_score, found))


# ------------------------------------------------------------------------------------------------
# Each returns (missing runs, {rate index: result} of the finished ones).

def rate_curve(study, task, method, seed, other, wanted, extend):
    """The rates `wanted`, and those that extend(results) asks for, until it asks for no more."""
    wanted = set(wanted)
    while True:
        runs = {k: Run(task, method, k, seed, other) for k in sorted(wanted)}
        found = {k: study.result(run) for k, run in runs.items()}
        if None in found.values():
            missing = [run for k, run in runs.items() if not found[k]]
            return missing, {k: f for k, f in found.items() if f}
        more = extend(found) - wanted
        if not more:
            return [], found
        wanted |= more


def sweep(study, task, method):
    """Seed 0: four rates or more, until the best GM is not at an edge and the level lies between
    two neighbouring rates."""
    goal = study.level(task)

    def extend(found):
        if goal is None:
            return set()
        rates, best, (low, high) = sorted(found), best_rate(found), bracket(found, goal)
        if len(rates) < 6 and rates[0] in (best, high):
            return {rates[0] - 2}
        if len(rates) < 6 and (best == rates[-1] or high is None and best in rates[-2:]):
            return {rates[-1] + 2}
        if low is not None and high is not None:
            return {(low + high) // 2}
        return {best - 1} if len(rates) < 4 else set()

    missing, found = rate_curve(study, task, method, 0, (), first_rates(method), extend)
    if goal is None and not missing:
        missing = [Run(task, "lora", k, 0) for k in first_rates("lora")]
    return missing, found


def bracket(found, goal):
    """(k below, k at or above): the neighbouring rates between which the target score first reaches
    the goal; None where there is none."""
    low = None
    for k, result in sorted(found.items()):
        if target_score(result) >= goal:
            return low, k
        low = k
    return low, None


def best_rate(found):
    """The rate index of highest GM on validation items."""
    return max(found, key=lambda k: found[k]["valid"]["GM"] if "valid" in found[k] else 0)


def settled_rate(study, task, method):
    """(k, []): the lowest rate at which seed 0 reached the level, else the one of best GM;
    (None, missing runs) while the sweep is not finished."""
    missing, found = sweep(study, task, method)
    if missing:
        return None, missing
    k = bracket(found, study.level(task))[1]
    return (best_rate(found) if k is None else k), []


def seed_runs(study, task, method, seed, other=()):
    """A reported seed: starts at the settled rate, goes up until its own target score reaches the
    level too, and down until it no longer does."""
    k, missing = settled_rate(study, task, swept_as(method))
    if k is None:
        return missing, {}
    goal = study.level(task)
    k += first_rates(method)[0] - first_rates(swept_as(method))[0]
    k -= 3 if "--steps" in other else 0  # twice the steps take about a third of the rate

    def extend(found):
        top, bottom = max(found), min(found)
        if max(map(target_score, found.values())) < goal:
            return {top + 1} if top < k + 3 else set()
        return {bottom - 1} if target_score(found[bottom]) >= goal and bottom > k - 4 else set()

    return rate_curve(study, task, method, seed, other, {k}, extend)


# ------------------------------------------------------------------------------------------------

def seeds(study, task, method, other=()):
    """{seed: {k: result}} of the reported seeds whose runs are all finished."""
    runs = {seed: seed_runs(study, task, method, seed, other) for seed in SEEDS + FINAL_SEEDS}
    return {seed: found for seed, (missing, found) in runs.items() if not missing}


def settled(study, task, method):
    """(k, results of the reported seeds at the settled rate k)."""
    k, _ = settled_rate(study, task, method)
    return k, [f[k] for f in seeds(study, task, method).values() if "test" in f[k]]


def snapshot_runs(study, task):
    """One run each of three methods, evaluated along the way."""
    rates = {method: settled_rate(study, task, method)[0] for method in SNAPSHOT_METHODS}
    return [Run(task, method, k, SNAPSHOT_SEED) for method, k in rates.items() if k is not None]


def missing_runs(study, ablate, quick):
    """The runs to do, most telling first. What follows from a sweep is known once it is done."""
    variants = dict.fromkeys(v for group in ABLATIONS.values() for v in group.values())
    methods = study.methods
    if ablate:
        swept = (method for method, _ in variants if method in COMPARED)
        methods = dict.fromkeys(["lora", "folora", *swept])
    runs = [run for method in methods for task in study.tasks
            for run in sweep(study, task, method)[0]]
    if ablate:  # of twice the steps, which take twice as long, two seeds only for QUICK
        more = [(method, other, seed) for seed in SEEDS for method, other in variants
                if seed == SEEDS[0] or "--steps" not in other or method in QUICK]
    else:
        rounds = (SEEDS, methods), (FINAL_SEEDS, [m for m in methods if m in FINALISTS])
        more = [(method, (), seed) for numbers, chosen in rounds
                for method in chosen for seed in numbers if not quick]
    for method, other, seed in more:
        for task in study.tasks:
            runs += seed_runs(study, task, method, seed, other)[0]
    if not (ablate or quick):
        runs += [run for task in study.tasks for run in snapshot_runs(study, task)
                 if not study.result(run)]
    return list(dict.fromkeys(runs))

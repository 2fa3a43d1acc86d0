"""Which runs the study asks for."""
import collections

from hypothesis import given, strategies as st

from imagined import Imagined, do_all, logistic
from study import sweeps
from study.sweeps import Run
from study.variants import COMPARED, FINALISTS


def finish(study, ask):
    """Do what is missing until nothing is; returns what was found."""
    for _ in range(30):
        missing, found = ask()
        if not missing:
            return found
        for run in missing:
            study.do(run)
    raise AssertionError("the plan never ends")


curves = st.builds(lambda middle, width, top, fall:
                   Imagined(logistic(middle, width, top),
                            lambda run: 100 - logistic(fall, 1.5, 100)(run)),
                   st.floats(-3, 14), st.floats(0.3, 3), st.floats(20, 100), st.floats(-3, 14))


@given(curves)
def test_sweep_has_four_rates_and_neighbours_around_the_level(study):
    """At least four rates; where the level is reached between two of them, these are neighbours; at
    most as many as the bound allows, also when nothing is learned at any rate."""
    finish(study, lambda: sweeps.sweep(study, "code", "lora"))
    found = finish(study, lambda: sweeps.sweep(study, "code", "folora"))
    assert 4 <= len(found) <= 7
    low, high = sweeps.bracket(found, study.level("code"))
    assert low is None or high is None or high - low == 1
    if len(found) < 6:  # the bound did not cut the search short
        assert min(found) < sweeps.best_rate(found) < max(found)


@given(curves, st.integers(-2, 2), st.integers(1, 5))
def test_reported_seed_brackets_the_level_by_its_own_target(study, shift, seed):
    """Another seed learns at other rates: up to three steps away the level lies between two of its
    own."""
    target = study.target
    study.target = lambda run: target(run._replace(k=run.k - shift * (run.seed > 0)))
    finish(study, lambda: sweeps.sweep(study, "code", "lora"))
    found = finish(study, lambda: sweeps.seed_runs(study, "code", "lora", seed))
    scores = [study.target(Run("code", "lora", k, seed)) for k in sorted(found)]
    level, (k, _) = study.level("code"), sweeps.settled_rate(study, "code", "lora")
    assert k in found and sorted(found) == list(range(min(found), max(found) + 1))
    assert max(scores) >= level or max(found) == k + 3
    assert scores[0] < level or min(found) == k - 4


def test_no_method_goes_beyond_its_first_rates_before_lora_sets_the_level():
    study = Imagined(logistic(6, 1, 100), lambda run: 50)
    missing, _ = sweeps.sweep(study, "code", "folora")
    assert {run.k for run in missing} == {4, 6, 8} and study.level("code") is None
    for run in missing:
        study.do(run)
    missing, _ = sweeps.sweep(study, "code", "folora")
    assert {run[:2] for run in missing} == {("code", "lora")}
    for run in missing:
        study.do(run)
    assert study.level("code") == 0.8 * study.target(Run("code", "lora", 8, 0))


def test_whole_plan_ends_and_every_finalist_has_five_seeds():
    study = do_all(Imagined(logistic(6, 1, 100), lambda run: 100 - logistic(7, 1, 100)(run)))
    seeds = collections.defaultdict(set)
    for run in study.finished:
        seeds[run.method].add(run.seed)
    assert set(seeds) == set(COMPARED)
    assert {m for m in seeds if {1, 2, 3, 4, 5} <= seeds[m]} == set(FINALISTS)
    assert all({0, 1, 2, 3} <= seeds[m] for m in seeds)
    snapshots = {run.method for run in study.finished if run.seed == sweeps.SNAPSHOT_SEED}
    assert snapshots == set(sweeps.SNAPSHOT_METHODS)


def test_a_failed_run_counts_as_nothing_learned():
    """A rate so large that the loss is not finite ends the sweep's upper end, not the sweep."""
    study = Imagined(logistic(4, 1, 100), lambda run: 50)
    do = study.do

    def fail_above(run):
        if run.k > 8:
            study.finished[run] = {"failed": "loss is not finite"}
        else:
            do(run)
    study.do = fail_above
    finish(study, lambda: sweeps.sweep(study, "code", "lora"))
    found = finish(study, lambda: sweeps.sweep(study, "code", "replay"))
    assert sweeps.best_rate(found) <= 8 and any("failed" in f for f in found.values())

"""What the report makes of finished runs."""
import pytest
from hypothesis import given, strategies as st

from imagined import Imagined, do_all, logistic
from study import report, stats, sweeps
from study.variants import ABLATIONS

percent = st.floats(0, 100)


def test_retention_at_the_level_by_hand():
    """Level 80: between 60 / 90 and 100 / 50 it lies in the middle, 70; the first crossing counts; a
    seed that never gets there has none."""
    study = Imagined()
    study.level = lambda task: 80
    found = {k: {"test": {"Avg2": t, "Avg1": kept}}
             for k, t, kept in ((1, 60, 90), (2, 100, 50), (3, 70, 5))}
    assert report.at_level(study, "code", found, "test") == pytest.approx(70)
    assert report.at_level(study, "code", {2: found[2]}, "test") == pytest.approx(60)  # from 0 / 100
    assert report.at_level(study, "code", {1: found[1]}, "test") is None
    failed = {1: found[1], 2: {"failed": "not finite"}}
    assert report.at_level(study, "code", failed, "test") is None


@given(st.lists(st.tuples(percent, percent), max_size=6), percent, percent)
def test_frontier_area_grows_with_every_point_and_counts_only_what_is_reached(points, t, kept):
    study = Imagined()
    found = {k: {"valid": {"Avg2": t, "Avg1": kept}} for k, (t, kept) in enumerate(points)}
    one = {-1: {"valid": {"Avg2": t, "Avg1": kept}}}
    area = report.frontier_area(study, "code", found)
    assert 0 <= area <= report.frontier_area(study, "code", {**found, **one}) <= 100
    assert report.frontier_area(study, "code", one) == pytest.approx(kept * int(t) / 100)


def test_each_method_is_tested_against_the_best_baseline_that_needs_no_more_memory():
    """full keeps most but is larger than adapters; replay is the best of the baselines that fit."""
    kept = {"full": 80, "replay": 60, "folora": 70, "sadam-full": 90}
    size = {"full": 10, "sadam-full": 10}
    study = do_all(Imagined(logistic(6, 1, 100),
                            lambda run: kept.get(run.method, 20) + run.seed / 10 + run.k / 100,
                            cost=lambda method: size.get(method, 2)))
    rows = {row[0]: row[1] for row in report.comparison(study).rows}
    assert rows["folora"]["baseline"] == "replay" and rows["sadam-full"]["baseline"] == "full"
    assert rows["full"]["baseline"] == "replay"  # not itself
    own, rival = (report.matched(study, "code", name) for name in ("folora", "replay"))
    assert (rows["folora"]["difference"], rows["folora"]["p"]) == stats.welch(own, rival)
    assert "to replay, p < 0.001" in report.comparison(study).markdown()


def test_ablations_are_shown_on_the_tasks_where_they_were_made(monkeypatch):
    """The comparison on two tasks, the ablations on one: no column of the other."""
    monkeypatch.setattr(report, "size_control", lambda *_, **__: {})
    study = Imagined(logistic(6, 1, 100), lambda run: 100 - logistic(7, 1, 100)(run))
    for study.tasks, ablate in (("math",), True), (("math", "code"), False):
        do_all(study, ablate)
    tables = [table for table in report.ablations(study) if table.rows]
    assert [table.title.split(": ")[1].split(".")[0] for table in tables] == list(ABLATIONS)
    for table in tables:
        assert list(table.columns) == ["", f"math, at {study.level('math'):.0f}"]
    text = tables[1].markdown()
    assert "folora-truncated" in text and "(5)" in text and "(3)" in text


def test_tables_show_and_store_the_same_values():
    table = report.Table("title", {"": "{}", "a": stats.interval, "b": "{:.1f}",
                                   "c": report.joined("{:.0f}")},
                         [["x", [1, 2, 3], None, [4.4, None]]])
    assert table.markdown().splitlines()[-1].split(" | ")[1:] == ["2.0 ±2.5 (3)", "-", "4 / - |"]
    assert table.json() == {"title": "title",
                            "rows": [{"": "x", "a": [1, 2, 3], "b": None, "c": [4.4, None]}]}


def test_correlations_leave_out_results_without_the_measure():
    """Older results have no KL."""
    study = Imagined()
    for k, (kept, kl) in enumerate([(90, 0.1), (50, 0.2), (50, 0.3), (10, None)]):
        result = {"valid": {"Avg1": kept}, "drift": k, "size": -k}
        study.finished[sweeps.Run("code", "lora", k, 0)] = result | ({"kl": kl} if kl else {})
    drift, size, kl = report.correlations(study).rows
    assert drift[1:] == [pytest.approx(-0.9486833), 4]
    assert size[1:] == [pytest.approx(0.9486833), 4] and kl[1:] == [pytest.approx(-0.8660254), 3]

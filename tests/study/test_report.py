"""What the report makes of finished runs."""
import json
import types

import pytest
from hypothesis import given, strategies as st

from study import __main__ as study, report, stats
from study.report import at_target
from study.runs import Curve

percent = st.floats(0, 100)


def result(target, kept, **more):
    scores = {"Avg2": target, "Avg1": kept, "kept": {"facts": {"score": kept}}, "unsampled": None}
    return {"test": scores, "drift": 100 - kept, "kl": (100 - kept) / 1e4, "size": 1, **more}


def kept(r):
    return r["test"]["Avg1"]


def test_what_is_kept_at_the_target_by_hand():
    """Between 60 / 90 and 100 / 50, 80 lies in the middle, 70; the first crossing counts; a curve
    that never gets there has none, and a failed run is no point of it."""
    start, found = result(0, 100), {1: result(60, 90), 2: result(100, 50), 3: result(70, 5)}
    assert at_target(start, found, 80, kept) == pytest.approx(70)
    assert at_target(start, {2: found[2]}, 80, kept) == pytest.approx(60)  # from 0 / 100
    assert at_target(start, {1: found[1]}, 80, kept) is None
    assert at_target(start, {1: found[1], 2: {"failed": "not finite"}}, 80, kept) is None
    assert at_target(start, {1: result(80, 40)}, 80, kept) == pytest.approx(40)
    assert at_target(start, {2: found[2]}, 80, lambda r: None) is None


@given(percent, percent, percent, percent, st.floats(1, 99))
def test_interpolation_stays_between_its_points(t0, t1, y0, y1, target):
    found = at_target(result(t0, y0), {0: result(t1, y1)}, target, kept)
    if t1 < target:
        assert found is None
    elif t0 < target:
        assert min(y0, y1) - 1e-6 <= found <= max(y0, y1) + 1e-6


class Imagined:
    """{(arm, foundation, seed): {rate index: result}}, all curves finished unless listed."""
    foundations, seeds, tasks = (0, 1, 2), (1, 2), ("code",)

    def __init__(self, curves, unfinished=()):
        self.curves, self.unfinished = curves, unfinished
        self.arms = list(dict.fromkeys(arm for arm, *_ in curves))
        self.finished = {(Curve("code", *key), k): r
                         for key, found in curves.items() for k, r in found.items()}

    def along(self, curve):
        key = curve.arm, curve.foundation, curve.seed
        return self.curves[key], 0 if key in self.unfinished else None

    def foundation(self, number):
        return types.SimpleNamespace(start=lambda task: result(0, 100))


def imagined(**more):
    """folora r32 keeps 90, 80, 70 + seed's 0 or 2; lora r8 half of that and misses the target once."""
    curves = {}
    for number, base in enumerate((90, 80, 70)):
        for seed in (1, 2):
            at = base + 2 * (seed - 1)
            curves["folora r32", number, seed] = {0: result(80, at)}
            curves["lora r8", number, seed] = {0: result(80 if number else 10 * seed, at / 2)}
    return Imagined(curves, **more)


def test_seeds_are_averaged_within_a_foundation_first():
    study = imagined()
    assert report.values(study, "code", "folora r32")["kept"] == [91, 81, 71]
    assert report.values(study, "code", "lora r8")["kept"] == [None, 40.5, 35.5]
    assert report.values(study, "code", "lora r8")["facts not sampled"] == [None] * 3


def test_an_arm_is_reported_when_all_its_curves_are_finished():
    study = imagined(unfinished=[("lora r8", 2, 1)])
    assert report.values(study, "code", "lora r8") == {}
    stored = {"code": report.collected(study, "code")}
    assert list(stored["code"]["arms"]) == ["folora r32"]
    assert "| lora r8 " not in report.tables(stored)


def test_the_table_by_hand():
    """91, 81, 71: 81 ± 4.303 · 10/√3. lora's pairs differ by -40.5 and -35.5: t = 15.2, df 1."""
    lines = report.tables({"code": report.collected(imagined(), "code")}).splitlines()
    first, second = (line.split(" | ") for line in lines[4:6])
    assert [cell.strip() for cell in first[1:3]] == ["91 / 81 / 71", "81.0 ±24.8 (3)"]
    assert "- / 40 / 36" in second[1] and second[2].strip() == "38.0 ±31.8 (2 of 3)"
    p = stats.t_pvalue(15.2, 1)
    assert second[-1].strip().startswith(f"-38.0 (p {p:.3f})")


def test_correlations_over_all_runs():
    """Here drift and KL are what is lost, exactly; size is constant."""
    found, runs = report.correlations(imagined(), "code")
    assert runs == 12 and found["kl"][0] == pytest.approx(-1) and found["size"] == (None, None)
    assert found["drift"][1] == pytest.approx(-1)


def test_means_over_tasks_and_another_reference_by_hand():
    """b misses a target, c is not in every task; a's means are 85, 70 and 60, d's ten less but once."""
    stored = {"x": {"arms": {"a": {"kept": [90, 80, 70]}, "b": {"kept": [None, 1, 2]},
                             "c": {"kept": [1, 2, 3]}, "d": {"kept": [80, 70, 60]}}},
              "y": {"arms": {"a": {"kept": [80, 60, 50]}, "b": {"kept": [1, 2, 3]},
                             "d": {"kept": [70, 50, 36]}}}}
    means = report.over_tasks(stored)
    assert means == {"a": {"kept": [85, 70, 60]}, "d": {"kept": [75, 60, 48]}}
    lines = report.table("means", means, "d").splitlines()
    assert lines[2].endswith(" against d |") and not lines[5].split("|")[-2].strip()
    assert "+10.7 (p 0.004)" in lines[4]  # 10, 10, 12: t = 16, df 2
    assert report.table("means", means, "b") == report.table("means", means)


def test_reports_of_other_foundations_are_joined(tmp_path, capsys):
    """Of the arms that both have; the interval and p are over all foundations."""
    paths = []
    for number, seeds in enumerate(([0, 1, 2], [4, 5])):
        arms = {arm: {name: [base + 10 * number + s for s in seeds] for name in report.MEASURES}
                for arm, base in (("folora r32", 70), ("lora r32", 50), (f"lora r{8 + number}", 0))}
        paths.append(tmp_path / f"{number}.json")
        paths[-1].write_text(json.dumps({
            "foundations": seeds, "tasks": {"math": {"target": 70, "arms": arms}}}))
    study.main(["join", *map(str, paths), "--against", "lora r32"])
    lines = capsys.readouterr().out.splitlines()
    assert "| 70 / 71 / 72 / 84 / 85 |" in lines[4] and "76.4 ±9.2 (5)" in lines[4]
    assert "+20.0 (p < 0.001)" in lines[4] and "lora r32" in lines[5] and not lines[6:]
    with pytest.raises(ValueError, match=r"foundations \[0, 1, 2, 0, 1, 2\]; each"):
        study.main(["join", str(paths[0]), str(paths[0])])
    paths[1].write_text('{"foundations": [7], "tasks": {"math": {"target": 70, "arms": {}}}}')
    with pytest.raises(ValueError, match="no task and arm in common"):
        study.main(["join", *map(str, paths)])
    for content in "{", '{"foundations": [7]}':
        paths[1].write_text(content)
        with pytest.raises(ValueError, match="1.json cannot be read .*give a results.json"):
            study.main(["join", *map(str, paths)])

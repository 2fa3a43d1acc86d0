"""The comparison: which runs it asks for, what it makes of them, and a small one end to end. The speed table:
its helpers, and every row at a micro size."""
import argparse
import collections
import gzip
import importlib.util
import json
import subprocess
import time

import pytest
import torch
from hypothesis import given, strategies as st

import bench
import calibrate
import eval as evaluation
import train
from model import GPTConfig
from test_main import ADAPT, CALIBRATE, PRETRAIN


class Imagined:
    """A study whose runs follow formulas: target and retention against the rate index k."""
    tasks, methods = ("code",), bench.COMPARED

    def __init__(self, target, retention):
        self.target, self.retention, self.finished = target, retention, {}

    def result(self, run):
        return self.finished.get(run)

    def do(self, run):
        assert run not in self.finished, "a run was asked for twice"
        scores = {"Avg2": self.target(run), "Avg1": self.retention(run)}
        scores["GM"] = (scores["Avg1"] * scores["Avg2"]) ** 0.5
        self.finished[run] = {"test" if run[3] else "valid": scores}

    def start(self, task, split):
        return {"Avg2": 0, "Avg1": 100}

    level = bench.Study.level


percent = st.floats(0, 100)


def logistic(middle, width, top):
    return lambda run: top / (1 + 2 ** ((middle - run[2]) / width))


def finish(study, ask):
    """Do what is missing until nothing is; returns what was found."""
    for _ in range(30):
        missing, found = ask()
        if not missing:
            return found
        for run in missing:
            study.do(run)
    raise AssertionError("the plan never ends")


curves = st.builds(lambda middle, width, top, fall: Imagined(logistic(middle, width, top),
                                                             lambda run: 100 - logistic(fall, 1.5, 100)(run)),
                   st.floats(-3, 14), st.floats(0.3, 3), st.floats(20, 100), st.floats(-3, 14))


@given(curves)
def test_sweep_has_four_rates_and_neighbours_around_the_level(study):
    """At least four rates; where the level is reached between two of them, these are neighbours; at most as
    many as the bound allows, also when nothing is learnt at any rate."""
    finish(study, lambda: bench.sweep(study, "code", "lora"))
    found = finish(study, lambda: bench.sweep(study, "code", "folora"))
    assert 4 <= len(found) <= 7
    low, high = bench.bracket(found, study.level("code"))
    assert low is None or high is None or high - low == 1
    if len(found) < 6:  # the bound did not cut the search short
        assert min(found) < bench.best_rate(found) < max(found)


@given(curves, st.integers(-2, 2), st.integers(1, 5))
def test_reported_seed_brackets_the_level_by_its_own_target(study, shift, seed):
    """Another seed learns at other rates: up to three steps away the level lies between two of its own."""
    target = study.target
    study.target = lambda run: target((*run[:2], run[2] - shift * (run[3] > 0), *run[3:]))
    finish(study, lambda: bench.sweep(study, "code", "lora"))
    found = finish(study, lambda: bench.seed_runs(study, "code", "lora", seed))
    scores = [study.target(("code", "lora", k, seed, ())) for k in sorted(found)]
    level, (k, _) = study.level("code"), bench.settled_rate(study, "code", "lora")
    assert k in found and sorted(found) == list(range(min(found), max(found) + 1))
    assert max(scores) >= level or max(found) == k + 3
    assert scores[0] < level or min(found) == k - 4


def test_nothing_is_asked_of_other_methods_beyond_their_first_rates_before_lora_sets_the_level():
    study = Imagined(logistic(6, 1, 100), lambda run: 50)
    missing, _ = bench.sweep(study, "code", "folora")
    assert {run[2] for run in missing} == {4, 6, 8}
    for run in missing:
        study.do(run)
    missing, _ = bench.sweep(study, "code", "folora")
    assert {run[:2] for run in missing} == {("code", "lora")}


def test_whole_plan_ends_and_every_finalist_has_five_seeds():
    study = Imagined(logistic(6, 1, 100), lambda run: 100 - logistic(7, 1, 100)(run))
    while runs := bench.missing_runs(study, ablate=False, quick=False):
        for run in runs:
            study.do(run)
    seeds = collections.defaultdict(set)
    for _, method, _, seed, other in study.finished:
        if not other:
            seeds[method].add(seed)
    assert set(seeds) == set(bench.COMPARED)
    assert {m for m in seeds if seeds[m] == {0, 1, 2, 3, 4, 5}} == set(bench.FINALISTS)
    assert all({0, 1, 2, 3} <= seeds[m] for m in seeds)
    assert sum(run[4] == ("--snapshots", "10") for run in study.finished) == 3


def test_ablations_are_shown_on_the_tasks_where_they_were_made(tmp_path):
    """The main comparison on both tasks, the ablations on one: no column of the other."""
    study = Imagined(logistic(6, 1, 100), lambda run: 100 - logistic(7, 1, 100)(run))
    study.folder = lambda task: tmp_path
    for study.tasks, ablate in (("math",), True), (("math", "code"), False):
        while runs := bench.missing_runs(study, ablate, quick=False):
            for run in runs:
                study.do(run)
    said = bench.ablations(study)
    assert [table.split(" |")[0].strip("| ") for table in said] == list(bench.ABLATIONS)
    assert all(f"math, at {study.level('math'):.0f}" in table and "code, at" not in table for table in said)
    assert "folora-half" in said[1] and "(5)" in said[1] and "(3)" in said[1]


def test_retention_at_the_level_by_hand():
    """Level 80: between 60 / 90 and 100 / 50 it lies in the middle, 70; the first crossing counts; a seed
    that never gets there has none."""
    study = Imagined(None, None)
    study.level = lambda task: 80
    found = {k: {"test": {"Avg2": t, "Avg1": kept}} for k, t, kept in ((1, 60, 90), (2, 100, 50), (3, 70, 5))}
    assert bench.at_level(study, "code", found, "test") == pytest.approx(70)
    assert bench.at_level(study, "code", {2: found[2]}, "test") == pytest.approx(60)  # from 0 / 100
    assert bench.at_level(study, "code", {1: found[1]}, "test") is None
    assert bench.at_level(study, "code", {1: found[1], 2: {"failed": "not finite"}}, "test") is None


@given(st.lists(st.tuples(percent, percent), max_size=6), percent, percent)
def test_frontier_area_grows_with_every_point_and_counts_only_what_is_reached(points, target, retention):
    study = Imagined(None, None)
    found = {k: {"valid": {"Avg2": t, "Avg1": kept}} for k, (t, kept) in enumerate(points)}
    more = {**found, -1: {"valid": {"Avg2": target, "Avg1": retention}}}
    area = bench.frontier_area(study, "code", found)
    assert 0 <= area <= bench.frontier_area(study, "code", more) <= 100
    alone = bench.frontier_area(study, "code", {0: {"valid": {"Avg2": target, "Avg1": retention}}})
    assert alone == pytest.approx(retention * int(target) / 100)


def test_interval_by_hand():
    """1, 2, 3: mean 2, standard error 1/√3, times 4.30."""
    assert bench.interval([1, 2, 3]) == "2.0 ±2.5 (3)"
    assert bench.interval([50]) == "50.0 (1)"
    assert bench.interval([1, None, 2, 3]) == "2.0 ±2.5 (3 of 4)"
    assert bench.interval([50, None]) == "50.0 (1 of 2)"
    assert bench.interval([None]) == bench.interval([]) == "-"


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """A quick comparison on a micro model, by two workers."""
    out = tmp_path_factory.mktemp("comparison")
    compare(out)
    return out


def compare(out, *more):
    evaluation.main(["--compare", "--quick", "--tasks", "code", "--workers", "2", "--pretrain", PRETRAIN,
                     "--calibrate", CALIBRATE, "--adapt", ADAPT, "--out", str(out), *more])


def test_quick_comparison_end_to_end(out, capfd):
    """Every run has a result, nothing is done again, the report has a row a method."""
    results = {path: path.stat().st_mtime_ns for path in out.rglob("result.json")}
    assert len(results) >= 5 * 4
    compare(out)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("result.json")} == results
    said = capfd.readouterr().out
    assert "known runs to go" not in said
    for method in bench.QUICK:
        assert f"| {method} " in said
    result = json.loads(next(iter(results)).read_text())
    assert set(result["valid"]["kept"]) == {"facts", "lookup", "sums", "words"}
    assert result["size"] > 0 and result["drift"] > 0 and result["cost"]["trained"] > 0


def test_lost_and_broken_results_are_made_again(out):
    paths = sorted(out.rglob("result.json"))
    before = paths[0].read_text()
    paths[0].unlink()
    paths[1].write_text(paths[1].read_text()[:100])
    compare(out)
    assert json.loads(paths[0].read_text())["valid"]["Avg1"] == json.loads(before)["valid"]["Avg1"]
    assert "identity" in json.loads(paths[1].read_text())


def test_size_and_drift_are_those_of_the_weights(out):
    """‖ΔW‖_F and ‖ΔW X_pre‖ from the merged weights and the samples' inputs themselves."""
    study = bench.Study(evaluation.parser().parse_args(["--adapt", ADAPT, "--out", str(out)]), ("code",))
    run = next(run for k in range(4, 9) for run in [("code", "folora", k, 0, ())] if study.result(run))
    model = train.load_adapter(train.run_folder(study.args(run)) / "adapter.pt", out, study.device)
    samples = train.load(out / "proxy.pt", "proxy", "")["samples"]
    rows = [[256, *(t for t in s.tolist() if t >= 0)][:study.base.config.block_size] for s in samples]
    moved = whole = size = 0
    after, inputs = bench.block_linears(model), collections.defaultdict(list)
    with calibrate.watching(bench.block_linears(study.base), lambda name, x: inputs[name].append(x[0])):
        for row in rows:
            study.base(torch.tensor([row]))
    for name, layer in bench.block_linears(study.base).items():
        x, dW = torch.cat(inputs[name]), after[name].weight - layer.weight
        moved, whole = moved + (x @ dW.T).square().sum(), whole + (x @ layer.weight.T).square().sum()
        size += dW.square().sum()
    result = study.result(run)
    assert result["size"] == pytest.approx(size.sqrt().item(), rel=1e-4)
    assert result["drift"] == pytest.approx(100 * (moved / whole).sqrt().item(), rel=1e-4)


def test_one_method_on_a_file_with_a_bad_row(out, tmp_path, capfd):
    """LoRA sets the level and the unit of time without being compared itself."""
    path = tmp_path / "own.jsonl"
    rows = [json.dumps({"prompt": f"say {i}:", "completion": f" {i}"}) for i in range(40)]
    path.write_text("\n".join([*rows[:5], "{", *rows[5:]]))
    evaluation.main(["--compare", "--quick", "--tasks", str(path), "--skip-bad", "--methods", "folora",
                     "--workers", "2", "--pretrain", PRETRAIN, "--calibrate", CALIBRATE, "--adapt", ADAPT,
                     "--out", str(out)])
    said = capfd.readouterr().out
    table = said[said.index("| own: time of a step over LoRA's"):].splitlines()
    assert [line.split()[1] for line in table[2:4] if line] == ["folora"]
    assert "own.jsonl: 1 bad rows left out" in said


def test_report_says_what_is_missing(tmp_path, out):
    with pytest.raises(ValueError, match="no comparison on math yet"):
        calibrate.main(["--task", "math", "--out", str(out), *CALIBRATE.split()])
        evaluation.main(["--report", "--tasks", "math", "--out", str(out)])


def test_pictures_need_matplotlib_or_are_written(out, tmp_path):
    report = ["--report", "--tasks", "code", "--adapt", ADAPT, "--out", str(out), "--assets", str(tmp_path)]
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        with pytest.raises(ValueError, match="pip install matplotlib"):
            evaluation.main(report)
    else:
        evaluation.main(report)
        assert {p.name for p in tmp_path.glob("*.png")} == {f"{name}.png" for name in
                                                            ("frontier", "drift", "spectrum", "skills")}


@given(st.integers(2, 12), st.integers(1, 12), st.integers(0, 99))
def test_few_directions_keep_the_trace_and_the_leading_ones(d, k, seed):
    """Tr(C) and the k leading eigenvalues stay, all others become one; with k >= d nothing changes."""
    X = torch.randn(2 * d, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    C = X.T @ X
    S, simplified = bench.few_directions(2 * C, C, k)
    assert torch.allclose(S, 2 * simplified) and torch.allclose(simplified.trace(), C.trace())
    before, after = torch.linalg.eigvalsh(C), torch.linalg.eigvalsh(simplified)
    assert torch.allclose(before[-k:], after[-k:])
    rest = after[:max(0, d - k)]
    assert torch.allclose(rest, before[:len(rest)].mean().expand(len(rest)))


# ------------------------------------------------------------------------------------------------------------
# The comparison on real text

@pytest.fixture
def texts(tmp_path):
    """All files that `write_texts` reads, with micro texts."""
    for name in (*bench.CORPORA, "wikitext2_test"):
        with gzip.open(tmp_path / f"{name}.txt.gz", "wt") as f:
            f.write(bench.tasks.EOT.join(f"{name} {i} has a line of text.\n" * 30 for i in range(60)))
    rows = {"trivia": {"question": "What is {}?", "answer": "{}"},
            "webquestions_test": {"question": "who is {}?", "answer": ["{}", "x"]},
            "gsm8k_train": {"question": "{} and 1?", "answer": "It is\n#### {}"},
            "gsm8k_test": {"question": "{} and 2?", "answer": "It is\n#### {}"},
            "instruct": {"instruction": "Say {}.", "input": "", "output": "{}"},
            "mbpp": {"text": "Write {}.", "code": "def f():\r\n  return {}", "task_id": 1}}
    for name, row in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row).replace("{}", str(i)) + "\n"
                                                        for i in range(40)))
    return tmp_path


def test_real_texts_are_split_into_what_is_read_kept_and_learnt(texts, monkeypatch):
    monkeypatch.setattr(bench, "KNOWN", 3)
    monkeypatch.setattr(bench, "REPEATED", 5)
    folder = texts / "out"
    bench.write_texts(texts, folder)
    for name in bench.CORPORA:  # each text is in one of the two
        read, held_out = ((folder / part / f"{name}.txt").read_text() for part in ("train", "keep"))
        assert [f"{name} {i} has" in read for i in range(60)] == [i % 20 > 0 for i in range(60)]
        assert [f"{name} {i} has" in held_out for i in range(60)] == [i % 20 == 0 for i in range(60)]
    trivia, known = (folder / "train/trivia.txt").read_text(), (folder / "keep/trivia.jsonl").read_text()
    assert known.count("question") == 3 and trivia.count(bench.tasks.EOT) == 40 + 3 * 5
    for item in bench.tasks.file_items(str(folder / "keep/trivia.jsonl")):
        assert trivia.count(item.prompt + item.answer + "\n") == 6  # word for word as it is asked
    items = bench.tasks.file_items(str(folder / "mbpp.jsonl"))
    assert len(items) == 40 and items[7].answer == "def f():\n  return 7"
    assert {i.answer for i in bench.tasks.task_items(str(folder / "gsm8k.jsonl"), "test", 200)} == {
        f" It is\n#### {i}" for i in range(32, 40)}  # GSM8K's own test rows


def test_comparison_on_real_text_end_to_end(texts, tmp_path, capfd):
    """Two methods on one task: retention at a matched loss, kind by kind."""
    out = tmp_path / "real"
    evaluation.main(["--compare", "--texts", str(texts), "--out", str(out), "--methods", "lora", "folora-kl",
                     "--tasks", str(out / "texts" / "instruct.jsonl"), "--workers", "2", "--adapt", ADAPT,
                     "--calibrate", CALIBRATE, "--pretrain", f"{PRETRAIN} --encoding bytes --context 64"])
    said = capfd.readouterr().out
    table = said[said.index("| instruct, at"):].splitlines()
    assert [line.split()[1] for line in table[:5] if "--" not in line] == [
        "instruct,", "foundation", "lora", "folora-kl"]
    assert " nats " in table[0].split("|")[1]
    for kept in ("trivia %", "trivia nats", "webquestions %", "wikitext2 b/B", "peps b/B"):
        assert f" {kept} " in table[0]
    assert (out / "instruct").is_dir() and not (out / "math").exists()


def test_texts_that_are_missing_are_named(texts, capsys):
    (texts / "peps.txt.gz").unlink()
    with pytest.raises(ValueError, match="peps.txt.gz is missing"):
        evaluation.main(["--compare", "--texts", str(texts), "--out", str(texts / "out")])


# ------------------------------------------------------------------------------------------------------------
# The speed table

NANOGPT = """
import dataclasses, torch

@dataclasses.dataclass
class GPTConfig:
    block_size: int; vocab_size: int; n_layer: int; n_head: int; n_embd: int; dropout: float; bias: bool

class GPT(torch.nn.Embedding):
    def __init__(self, config):
        super().__init__(config.vocab_size, config.vocab_size)

    def forward(self, x, y):
        logits = super().forward(x)
        return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())

    def configure_optimizers(self, weight_decay, lr, betas, device):
        return torch.optim.AdamW(self.parameters(), lr, betas)

    def generate(self, start, new):
        return start
"""


def test_all_works_are_timed_in_turn_both_ways_and_the_first_round_does_not_count():
    order = []
    found = bench.interleaved(3, a=lambda: order.append("a"), b=lambda: (order.append("b"), time.sleep(0.01)))
    assert "".join(order) == "abbaabba"
    assert all(len(seconds) == 3 for seconds in found.values())
    assert min(found["b"]) >= 0.01 > max(found["a"]) > 0
    assert all(r > 1 for r in bench.ratio(found, "b", "a"))


@given(st.floats(-3, 4), st.floats(1e-6, 1e6), st.lists(st.integers(1, 99), min_size=2, unique=True))
def test_exponent_of_a_power_law(p, c, sizes):
    assert bench.exponent(sizes, [c * size ** p for size in sizes]) == pytest.approx(p, abs=1e-6)


@pytest.mark.parametrize("sign, values, met", [("<=", [1, 2, 9], "yes"), ("<=", [1, 2.1, 9], "no"),
                                               (">=", [0, 2, 9], "yes"), (">=", [0, 1.9, 9], "no")])
def test_a_target_is_met_by_the_median(sign, values, met):
    line = bench.speed_line("work", "reference", "{:.1f} x", sign, 2, 2, values)
    assert line["met"] == met and line["target"] == f"{sign} 2.0 x"
    assert line["range"] == f"{min(values):.1f} x to 9.0 x (n 3)"
    assert bench.speed_line("work", "reference", "{:.1f}", sign, None, None, values)["met"] == "-"


def micro_speed(monkeypatch, tmp_path, rows, *more):
    """These rows at sizes that take no time; what was written."""
    monkeypatch.setattr(bench, "SHORTER", GPTConfig(16, 257, 1, 2, 128))
    monkeypatch.setattr(bench, "TINY", GPTConfig(128, 257, 1, 2, 32))
    monkeypatch.setattr(bench, "BASE", dict(width=32, depth=1, rank=2, samples=2))
    monkeypatch.setattr(bench, "SIZES", dict(width=(32, 64), depth=(1, 2), rank=(2, 4), samples=(2, 4)))
    bench.speed(["--quick", "--json", str(tmp_path / "speed.json"), "--only", *rows, *more])
    return json.loads((tmp_path / "speed.json").read_text())


def test_every_row_runs(monkeypatch, tmp_path, capfd):
    (tmp_path / "model.py").write_text(NANOGPT)
    rows = [row for row in bench.SPEED if row != "main-job"]
    written = micro_speed(monkeypatch, tmp_path, rows, "--nanogpt", str(tmp_path))
    said = capfd.readouterr().out
    for row in rows:
        for what, reference, *_ in bench.SPEED[row][1]:
            assert f"| {what}" in said and reference in said
        if row in ("sadam", "sadam-tiny", "pretrain", "moments"):
            assert all(values for values in written["measured"][row])
    assert isinstance(written["measured"]["sampling"][2], list)
    assert max(written["measured"]["moments"][1]) < 1e-6
    assert {line["against"].split()[0] for line in written["measured"]["growth"]} == set(bench.SIZES)


def test_references_that_are_not_there_are_named(monkeypatch, tmp_path, capfd):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    written = micro_speed(monkeypatch, tmp_path, ["adapt", "pretrain", "sampling", "eigen"])
    said = capfd.readouterr().out
    for reason in "needs transformers and peft", "needs scipy", "needs --nanogpt PATH":
        assert f"skipped: {reason} |" in said
    lines = [line for line in written["lines"] if line["median"].startswith("skipped")]
    assert len(lines) == 4 + 2 + 3 + 9 and all(line["met"] == "-" for line in lines)
    with pytest.raises(ValueError, match="nanogpt is .*nowhere; it must be a folder"):
        bench.speed(["--nanogpt", str(tmp_path / "nowhere")])


def test_calibrations_share_of_the_main_job_by_hand(monkeypatch):
    """It starts at 30 s and ends at 40 s, of what the whole process takes."""
    said = "".join(f"== {stage} ({s} s) ==\n" for stage, s in (("a", 0), ("b", 30), ("c", 40), ("d", 90)))
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: argparse.Namespace(stdout=said))
    monkeypatch.setattr(bench, "seconds_of", lambda work: work() or 100)
    assert bench.time_main_job(None) == ([100], [10])

"""The study of a published model, on a random Llama and made-up texts."""
import gzip
import json
import re
from importlib.util import find_spec

import pytest

from extras.files import file_lock
from micro import CALIBRATE
from study import __main__ as main, pretrained
from study.pretrained import Run, plan, report
from study.stats import crossing
from tasks import get_encoding
from tiny_llama import tiny, write_folder


def test_the_plan_begins_with_what_tells_most_and_repeats_nothing():
    runs = plan()
    assert [(run.task, run.arm) for run in runs[:2]] == [("gsm8k", "lora r32"),
                                                         ("gsm8k", "folora r32")]
    assert {(run.task, run.seed) for run in runs[:18]} == {(task, seed) for task in pretrained.TASKS
                                                           for seed in (0, 1)}
    assert len(set(runs)) == len(runs) == 3 * (3 * 11 + 2 * 3)
    assert Run("mbpp", "lora", 32, 2).rate == 1.3e-3  # 2 x 4e-3 x 96 / 576


def test_a_value_is_read_where_the_loss_first_passes():
    points = [(-3., 0.), (-2., 1.), (-1., 5.), (-2., 9.)]
    assert [crossing(points, -loss) for loss in (2.5, 2, 1.75, 0.9)] == [0.5, 1, 2, None]


def test_the_tables_of_a_comparison_by_hand(monkeypatch):
    """LoRA's best progress is 1; 80 % of it are reached halfway between FoLoRA's two runs of
    seed 0, at the end of that of seed 1, never with seed 2."""
    monkeypatch.setattr(pretrained, "SHARE", 0.8)
    before = {"identity": 0, "answers": [], "all %": 50., "a nats": 2., "b": 1.}
    done = {Run("a", "lora", 32, 1): {"a nats": 1., "b": 11., "all %": 30.},
            Run("a", "folora", 32, 1): {"a nats": 1.4, "b": 2., "all %": 30.},
            Run("a", "folora", 32, 2): {"a nats": 1., "b": 4., "all %": 30.},
            Run("a", "folora", 32, 1, 1): {"a nats": 1.2, "b": 7., "all %": 30.},
            Run("a", "folora", 32, 1, 2): {"a nats": 1.3, "b": 8., "all %": 30.}}
    text = report(before, done)
    assert "a, at 1.200 nats" in text and text.count("before") == 2
    alone = {Run("a", "lora-null", 32, 1): done[Run("a", "lora", 32, 1)]}  # nothing to compare with
    assert "a, at 2.000 nats" in report(before, alone)
    assert report(before, alone | done).count("lora-null") == 2
    assert re.search(r"folora r32 +\| +1.200 / 1.200 / - +\| +30 / 30 / - \| +3.000 / 7.000 / -", text)
    assert re.search(r"lora r32 +\| +1.200 +\| +34 +\| +9.000", text)
    assert re.search(r"folora r32, 0.00047 +\| +1.400 / 1.200 / 1.300 ", text)
    assert pretrained.shown(12.34, "b %") == pretrained.shown(12.34, "KL") == "12"


def test_known_are_the_first_that_are_answered_right(tmp_path, monkeypatch):
    """Of six questions, each after one example, the odd ones are answered right; two are kept. What
    was asked once is not asked again."""
    rows = [{"question": f"{i}?", "answer": f"{i}"} for i in range(20)]
    for name, value in dict(POOL=6, SHOTS=1, ITEMS=1, rows_of=lambda *_: rows).items():
        monkeypatch.setattr(pretrained, name, value)
    items = pretrained.few_shot_items(get_encoding("bytes"), "x", tmp_path)
    assert len(items) == 6 and len({item.prompt.split("\n\n")[0] for item in items}) == 1
    asked = []

    def answers(model, items):
        asked.append(len(items))
        return [item.answer if i % 2 else "no" for i, item in enumerate(items)]
    monkeypatch.setattr(pretrained.evaluation, "answers", answers)
    for _ in range(2):
        assert pretrained.known(None, items, tmp_path / "known.json", {"a": 1}) == [items[1], items[3]]
    assert asked == [6]


@pytest.fixture
def texts(tmp_path):
    def write(name, rows):
        (tmp_path / f"{name}.jsonl").write_text("".join(
            json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf8")
    for name in "gsm8k_train", "gsm8k_test":
        write(name, [{"question": f"{i} and 1?", "answer": f"It is <<{i}+1={i + 1}>>{i + 1}.\n"
                      f"#### {i + 1}"} for i in range(20)])
    write("mbpp", [{"text": f"Add {i}.", "code": f"def f(x):\r\n\treturn x + {i}",
                    "test_list": [f"assert f(0) == {i}"]} for i in range(20)])
    write("instruct", [{"instruction": f"Say {i}.", "input": "", "output": f"{i}"}
                       for i in range(20)])
    write("humaneval", [{"prompt": "def f():\n", "canonical_solution": f"    return {i}\n"}
                        for i in range(3)])
    for name in "trivia", "webquestions_test":
        write(name, [{"question": f"{name}\u2028{i}?", "answer": "the"} for i in range(9)])
    for name in "wikitext2_test", "novels", "peps":
        with gzip.open(tmp_path / f"{name}.txt.gz", "wt") as f:
            f.write("A line of text.\n" * 400)
    return tmp_path


def test_the_study_runs_and_continues(texts, tmp_path, monkeypatch):
    """Two runs, the first of which another process does at first, then a third: the first two are
    read from disk. All questions count as known."""
    write_folder(tmp_path, tiny(vocab=265, context=256, std=0.1))
    monkeypatch.setattr(pretrained, "known", lambda model, items, *_: items)
    for name, value in dict(STEPS=2, BATCH=2, TEXT_ROWS=2, ITEMS=2, SHOTS=1, POOL=4,
                            MADE_POOL=5).items():
        monkeypatch.setattr(pretrained, name, value)
    monkeypatch.setattr(pretrained, "CALIBRATE", [*CALIBRATE.split(), "--samples", "4"])
    monkeypatch.setattr(pretrained, "SMALL", {("lora", 4): 1e-2, ("folora", 4): 1e-2,
                                              ("sadam-full", 0): 1e-3})
    out, trained = tmp_path / "out", []
    train = pretrained.train.main
    monkeypatch.setattr(pretrained.train, "main", lambda a: [trained.append(a[0]), train(a)][1])
    for number in 2, 3:
        monkeypatch.setattr(pretrained, "plan", lambda: plan()[:number])
        command = ["pretrained", "--texts", str(texts), "--foundation", str(tmp_path), "--out", str(out),
                   *(["--assets", str(tmp_path)] if find_spec("matplotlib") else [])]
        with file_lock(out / "gsm8k" / "lora-r4-x1-seed0.json"):  # another process does this one
            main.main(command)
        assert ("| lora" in (out / "pretrained.md").read_text()) == (number == 3)
        main.main(command)
    assert trained == ["pretrain", "adapt"] * 3 + ["pretrain"]
    assert (tmp_path / "pretrained.png").exists() == bool(find_spec("matplotlib"))
    assert "<<" not in (out / "gsm8k.jsonl").read_text()
    text = (out / "pretrained.md").read_text()
    assert "lora r4" in text and "sadam-full" in text and "trivia %" in text
    assert "any trivia nats" in text and "any trivia %" not in text
    result = json.loads((out / "gsm8k" / "lora-r4-x1-seed0.json").read_text())
    assert 0 < result["KL"] < 1000 and json.loads((out / "before.json").read_text())["KL"] == 0
    assert len(result["answers"]) == len(pretrained.PROMPTS) and 3 < result["novels b/B"] < 15
    assert [p.name for p in out.glob("gsm8k/*/adapter.pt")] == ["adapter.pt"] * 2  # not full weights

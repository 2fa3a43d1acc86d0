"""Evaluation: the scores by hand, the main job from end to end, and a user's own files."""
import functools
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import eval as evaluation
import tasks
from extras.baselines import METHODS, default_rate
from extras.files import load_foundation
from extras.tables import markdown, score_table
from extras.user_data import file_items
from micro import FOLDER, STAGES, main_job, one_mixture, out, write_jsonl  # noqa: F401
from model import GPT, GPTConfig

ROOT = Path(evaluation.__file__).parent
METHODS_RUN = ["lora", "folora", "folora-leading"]


@functools.cache
def finished(folder):
    main_job(folder / "job", "--task", "code", "--methods", *METHODS_RUN)
    return folder / "job"


@pytest.fixture
def job(tmp_path, tmp_path_factory):
    """A folder in which the main job ran, for this test alone."""
    return shutil.copytree(finished(tmp_path_factory.getbasetemp()), tmp_path / "job")


def times(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


# ------------------------------------------------------------------------------------------------
# Scores

def test_likelihood_is_that_of_the_answers_alone(out):
    """From the logits, item by item; a longer batch changes nothing."""
    model, _ = load_foundation(out, "cpu")
    items, nats = [tasks.Item("ab", "c", None), tasks.Item("a", "bcd\ne", None)], 0
    for item, end in zip(items, (10, 256)):
        prompt, answer = [256, *item.prompt.encode()], [*item.answer.encode(), end]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer]))[0, len(prompt) - 1:-1].log_softmax(-1)
        nats -= logits[range(len(answer)), answer].sum().item()
    found = evaluation.score_items(model, items)
    assert found["nats"] == pytest.approx(nats / 8, rel=0.01) and found["n"] == 2
    assert found["bits_per_byte"] == pytest.approx(nats / 8 / math.log(2), rel=0.01)
    assert found["score"] == pytest.approx(100 * math.exp(-found["nats"]))


def test_a_model_that_knows_nothing_needs_8_bits_for_a_byte():
    """All logits equal: log2(257) bits for every byte, whatever the text and the split."""
    model = GPT(GPTConfig(block_size=16, n_layer=1, n_head=1, n_embd=4)).eval()
    torch.nn.init.zeros_(model.lm_head.weight)
    for split in "valid", "test":
        found = evaluation.bits_per_byte(model, "some line of text\n" * 99, split, most=10)
        assert found == {"score": pytest.approx(math.log2(257), rel=1e-5), "n": 10}
    with pytest.raises(ValueError, match="a text of 5 characters is too short for a row of 16 tok"):
        evaluation.bits_per_byte(model, "short", "test", most=10)


def test_right_answers_are_counted_and_wrong_ones_shown(out, monkeypatch):
    model, _ = load_foundation(out, "cpu")
    items = [tasks.exact("1 + 1 =", " 2"), tasks.exact("2 + 2 =", " 4"), tasks.exact("3 =", " 3")]
    monkeypatch.setattr(evaluation, "answers", lambda model, items: [" 2", " 5", "3"])
    found = evaluation.score_items(model, items)
    assert found["score"] == pytest.approx(200 / 3)
    assert found["wrong"] == [{"prompt": "2 + 2 =", "output": " 5", "right": " 4"}]


def test_averages(monkeypatch):
    """Avg1 of what was kept, Avg2 of the target, and their geometric mean; without kept items none."""
    monkeypatch.setattr(evaluation, "score_items", lambda model, items: {"score": items})
    monkeypatch.setattr(evaluation, "bits_per_byte", lambda model, text, split, most: (text, most))
    found = evaluation.evaluate(None, {"target": 90, "a": 20, "b": 60}, "test", 7, {"x": "text"})
    assert (found["Avg1"], found["Avg2"], found["GM"]) == (40, 90, 60)
    assert found["text"] == {"x": ("text", 7)} and found["kept"].keys() == {"a", "b"}
    found = evaluation.evaluate(None, {"target": 90}, "test", 7, {"x": "text"})
    assert math.isnan(found["Avg1"]) and math.isnan(found["GM"]) and found["Avg2"] == 90


def some_questions(folder):
    """Prompts and answers of very different lengths."""
    rng = tasks.random.Random(0)
    return write_jsonl(folder / "own.jsonl", *(
        {"question": str(i) + "?" * rng.choice((1, 9, 85)), "answer": "b" * rng.choice((1, 20))}
        for i in range(20)))


def test_scores_do_not_depend_on_the_batch_size(out, tmp_path):
    """Answers are the same, also where a long prompt leaves little room for one; likelihoods to
    rounding."""
    model, _ = load_foundation(out, "cpu")
    items = file_items(some_questions(tmp_path))
    answers = [evaluation.answers(model, items, batch) for batch in (1, 3, 200)]
    assert answers[0] == answers[1] == answers[2] and len(set(map(len, answers[0]))) > 1
    longest = max(items, key=lambda item: len(item.answer))
    assert [evaluation.answers(model, [item, longest])[0] for item in items] == answers[0]
    whole = evaluation.likelihood(model, items)["nats"]
    for batch in 1, 3:
        assert evaluation.likelihood(model, items, batch)["nats"] == pytest.approx(whole, rel=1e-5)


def test_an_answer_ends_with_its_line_unless_answers_have_several(out, monkeypatch):
    """By the stop tokens that `generate` gets: <|endoftext|>, and a newline where that is right."""
    model, stops = load_foundation(out, "cpu")[0], []

    def generate(model, prompts, new, stop, tick):
        stops.append(stop)
        return [[97] for _ in prompts]
    monkeypatch.setattr(evaluation, "generate", generate)
    for answer in "one", "two\nlines":
        assert evaluation.answers(model, [tasks.exact("x", answer)]) == ["a"]
    assert stops == [[256, 10], [256]]


def test_table():
    scores = {"target": {"score": 12.34, "n": 3}, "kept": {"facts": {"score": 5.0, "n": 96}},
              "text": {"prose": {"score": 2.345}}, "Avg1": 5.0, "Avg2": 12.34, "GM": math.nan}
    head, line, row = score_table({"lora": scores}).splitlines()
    assert head == "|      | target (n 3) | facts (96) | prose b/B | Avg1 | Avg2 |  GM |"
    assert row == "| lora |         12.3 |        5.0 |      2.35 |  5.0 | 12.3 | nan |"
    assert set(line) == set("| -") and len(line) == len(head)
    assert markdown(["a", "b"], []) == "| a | b |\n| - | - |"


# ------------------------------------------------------------------------------------------------
# The main job

def test_every_stage_left_its_result(job):
    names = {str(path.relative_to(job)) for path in times(job)}
    runs = [f"code/{name}-lr{default_rate(METHODS[name], 2, 16):g}-seed0{FOLDER}"
            for name in METHODS_RUN]
    assert names == {"foundation.pt", "proxy.pt", "code/calibration.pt",
                     "code/foundation-test.json", "code/results-test.json",
                     *(f"{run}/{file}" for run in runs for file in ("adapter.pt", "test.json"))}
    results = json.loads((job / "code" / "results-test.json").read_text())
    assert list(results) == ["foundation", *METHODS_RUN]
    for scores in results.values():
        kept = [scores["kept"][kind]["score"] for kind in ("facts", "lookup", "sums", "words")]
        assert len(scores["kept"]) == 4 and scores["Avg1"] == pytest.approx(sum(kept) / 4)
        assert set(scores["text"]) == {"prose", "source"}
        assert scores["target"]["n"] == evaluation.ITEMS
        assert 2 < scores["text"]["prose"]["score"] < 9
        assert scores["GM"] == pytest.approx((scores["Avg1"] * scores["Avg2"]) ** 0.5)


def test_a_second_run_makes_nothing_again(job, tmp_path):
    """As a command in a process of its own, from another folder."""
    before = times(job)
    done = subprocess.run([sys.executable, ROOT / "eval.py", "--task", "code", "--methods",
                           *METHODS_RUN, *STAGES, "--out", "job"],
                          capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert done.stdout.count("is up to date") == 6  # both of calibrate's files
    for name in "foundation", *METHODS_RUN:
        assert f"| {name} " in done.stdout
    results = job / "code" / "results-test.json"  # written each time, and the same
    assert {p for p, t in times(job).items() if t != before.get(p)} == {results}


def test_the_same_job_twice_gives_the_same_files(tmp_path, monkeypatch):
    """Every byte."""
    monkeypatch.setattr(evaluation, "ITEMS", 20)
    for folder in tmp_path / "a", tmp_path / "b":
        main_job(folder, "--task", "instruct", "--methods", "lora-kl-leading", "--split", "valid")
    a, b = ({path.relative_to(folder): path.read_bytes() for path in times(folder)}
            for folder in (tmp_path / "a", tmp_path / "b"))
    assert a == b and len(a) == 7


def test_scores_are_made_again_when_weights_items_or_split_change(job, monkeypatch):
    made, evaluate = [], evaluation.evaluate
    monkeypatch.setattr(evaluation, "evaluate",
                        lambda *given, **more: made.append(given[2]) or evaluate(*given, **more))
    lora = functools.partial(main_job, job, "--task", "code", "--methods", "lora")
    lora()
    assert made == []
    monkeypatch.setattr(evaluation, "ITEMS", 10)
    lora()
    assert made == ["test", "test"]
    lora("--split", "valid")
    assert made == ["test", "test", "valid", "valid"]
    lora("--adapt", STAGES[-1] + " --seed 1")
    assert made == ["test", "test", "valid", "valid", "test"]


@pytest.mark.parametrize("arguments, answer", [
    (["--keep", "/nowhere.txt"], "No such file or directory: '/nowhere.txt'"),
    (["--keep", "known.csv"], "keep is known.csv; it must be a .jsonl file of items or a .txt file"),
    (["--task", "magic"], "unknown task 'magic'"),
    (["--methods", "lora", "magic"], "argument --method: invalid choice: 'magic'"),
    (["--calibrate", "--samples 0"], "'0' is not a number of 1 or more"),
    (["--adapt", "--nonsense 1"], "unrecognized arguments: --nonsense 1"),
    (["--compare"], "unrecognized arguments: --compare"),
    (["--split", "train"], "argument --split: invalid choice: 'train'")])
def test_what_is_wrong_is_named_before_any_work(tmp_path, arguments, answer):
    with pytest.raises((ValueError, OSError), match=answer):
        evaluation.main([*arguments, "--out", str(tmp_path / "none")])
    assert not (tmp_path / "none").exists()


# ------------------------------------------------------------------------------------------------
# A user's own files

@pytest.fixture
def files(tmp_path):
    """A task, questions to test it on, items and text to be kept, as a user would bring them."""
    questions = [{"question": f"{i}?", "answer": f"{i}"} for i in range(9)]
    task = [{"prompt": f"{i} {i} ->", "completion": f"{i}" if i % 2 else f"{i}\n{i}"}
            for i in range(40)]
    (tmp_path / "story.txt").write_text("Once upon a time there was a line.\n" * 99)
    return {"task": write_jsonl(tmp_path / "double.jsonl", *task),
            "eval": write_jsonl(tmp_path / "other.jsonl", *questions),
            "items": write_jsonl(tmp_path / "facts2.jsonl",
                                 {"question": "Who?", "answer": ["Ann", "Bo"]}),
            "text": str(tmp_path / "story.txt")}


def test_a_users_own_files_run_through_all_stages(out, files, monkeypatch):
    """By likelihood, or by exact match where every item allows it; only what the user names is
    kept."""
    monkeypatch.setattr(evaluation, "ITEMS", 10)  # of the items that come with the project
    job = functools.partial(main_job, out, "--methods", "lora", "--task", files["task"])
    result = job()["lora"]
    assert result["target"]["n"] == 4
    assert result["target"]["score"] == pytest.approx(100 * math.exp(-result["target"]["nats"]))
    assert set(result["kept"]) == set(tasks.KINDS)
    assert set(result["text"]) == {"prose", "source"}
    assert (out / "double" / "calibration.pt").exists()
    result = job("--eval", files["eval"], "--keep", files["items"], "--keep", files["text"])["lora"]
    assert result["target"]["n"] == 9 and result["target"]["score"] in range(101)
    assert result["target"]["nats"] > 0  # the likelihood stands beside the share of right answers
    assert set(result["kept"]) == {"facts2"} and set(result["text"]) == {"story"}
    result = job("--keep", files["text"])["lora"]
    assert result["kept"] == {} and 0 < result["text"]["story"]["score"] < 12


LONG = {"prompt": "a" * 200, "completion": "b"}
GOOD = [{"prompt": "a", "completion": "b"}] * 30


@pytest.mark.parametrize("arguments, answer", [
    (["--task", "{long}"], r"long.jsonl, line 3: 20[0-9] tokens do not fit the context of 128 \(1"),
    (["--task", "{task}", "--eval", "{long}"], r"long.jsonl, line 3: 20[0-9] tokens do not fit"),
    (["--task", "{task}", "--keep", "{long}x"], "must be a .jsonl file of items or a .txt file"),
    (["--task", "{task}", "--eval", "{missing}"], "No such file .*missing.jsonl"),
    (["--task", "{task}", "--keep", "{items}", "--keep", "{items}"], "each needs a name of its own"),
    (["--task", "{task}", "--keep", "{short}"], "a text of 6 characters is too short for a row of"),
    (["--adapt", "--rank 17"], "rank is 17; transformer.h.0.attn.c_attn takes 1 to 16"),
    (["--task", "{bad}"], "bad.jsonl, line 2")])
def test_what_a_user_gets_wrong_in_files(out, files, tmp_path, arguments, answer):
    names = {**files, "missing": tmp_path / "missing.jsonl", "short": tmp_path / "short.txt",
             "bad": write_jsonl(tmp_path / "bad.jsonl", GOOD[0], [], *GOOD),
             "long": write_jsonl(tmp_path / "long.jsonl", *GOOD[:2], LONG, *GOOD)}
    names["short"].write_text("short\n")
    with pytest.raises((ValueError, OSError), match=answer):
        main_job(out, "--methods", "lora", *(argument.format(**names) for argument in arguments))
    for task in "long", "double":  # before that work
        assert not (out / task / "calibration.pt").exists()


def test_long_rows_can_be_left_out(out, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluation, "ITEMS", 10)
    path = write_jsonl(tmp_path / "long.jsonl", *GOOD, LONG, *GOOD)
    main_job(out, "--methods", "lora", "--task", path, "--skip-bad", "--keep", path)
    assert ("1 of 40 items do not fit the context of 128 and are left out"
            in capsys.readouterr().out)

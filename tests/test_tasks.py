"""The text: every item's own answer passes its check, splits do not leak, model output is never executed."""
import json
import pathlib
import random
import sys
import time

import numpy as np
import pytest
import tiktoken
import torch
from hypothesis import given, strategies as st

import tasks
from model import GPTConfig

ENCODING = tasks.byte_encoding()
OTHER = tiktoken.Encoding("other", pat_str=r"\n|[^\n]+", special_tokens={tasks.EOT: 257},
                          mergeable_ranks={**{bytes([i]): i for i in range(256)}, b"ab": 256})
LENGTH = GPTConfig().block_size


@given(st.text())
def test_bytes_decode_to_what_was_encoded(text):
    text = text.encode("utf8", "ignore").decode()
    assert ENCODING.decode(ENCODING.encode_ordinary(text)) == text
    assert ENCODING.encode_ordinary(text) == list(text.encode())
    assert ENCODING.eot_token == 256 and ENCODING.n_vocab == GPTConfig().vocab_size


@given(st.lists(st.text("ab\n", min_size=1), min_size=1, max_size=5))
def test_documents_of_a_training_file_are_told_apart(tmp_path_factory, documents):
    """<|endoftext|> in a file is that token, not its thirteen letters."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "text.txt").write_text(tasks.EOT.join(documents))
    for encoding in ENCODING, OTHER:
        text = tasks.TextFiles([folder / "text.txt"], encoding, folder)
        with open(folder / "tokens", "wb") as f:
            text.write(f)
        tokens = np.fromfile(folder / "tokens", np.uint16).tolist()
        assert tokens == [t for part in documents for t in [text.eot, *encoding.encode_ordinary(part)]]


@pytest.mark.parametrize("task", tasks.TASKS)
def test_task_items(task):
    """Right answers pass, other items' do not, everything fits the context, no prompt is in two splits."""
    items = {split: tasks.task_items(task, split, 200) for split in tasks.SPLITS}
    prompts = {split: {item.prompt for item in items[split]} for split in items}
    assert not prompts["train"] & (prompts["test"] | prompts["valid"])
    assert not prompts["test"] & prompts["valid"]
    for item in items["train"]:
        assert item.check(item.answer) and item.check(item.answer + "\n") and not item.check("")
        assert len(ENCODING.encode_ordinary(item.prompt + item.answer)) + 2 <= LENGTH + 1
    shifted = items["train"][1:] + items["train"][:1]
    assert sum(item.check(other.answer) for item, other in zip(items["train"], shifted)) < 40
    assert tasks.task_items(task, "train", 50) == tasks.task_items(task, "train", 200)[:50]


def test_checks_by_hand():
    math_item, code_item = tasks.math_item(random.Random(1)), tasks.code_item(random.Random(1))
    number = math_item.answer.split()[-1]
    assert math_item.check(f"whatever #### {number}")
    assert not math_item.check(number) and not math_item.check("#### 999")
    source = code_item.answer.removeprefix("lambda x: ")
    assert code_item.check(f"lambda x: 0 + ({source})") and not code_item.check(f"lambda x: ({source}) + 1")
    assert not code_item.check(f"lambda y: {source}") and not code_item.check("x")
    item = next(i for i in tasks.task_items("instruct", "train", 200) if "word that starts" in i.prompt)
    letter, sign = item.answer[0], item.answer[-1]
    assert item.check(f"{letter}abc{sign}"), "any word that keeps the constraint is right"
    for wrong in f"x{letter}{sign}", f"{letter}abc", f"{letter}ab {letter}cd{sign}", sign:
        assert not item.check(wrong)


@given(st.integers(-50, 50), st.lists(st.tuples(st.sampled_from("+-*"), st.integers(0, 9)), max_size=4))
def test_arithmetic_is_pythons(x, operations):
    source = "x"
    for sign, n in operations:
        source = f"({source}) {sign} {n}"
    assert tasks.run_arithmetic(f"lambda x: {source}", x) == eval(source)


@pytest.mark.parametrize("source", [
    "9**9**9", "999999999 * 999999999", "lambda x: x << 10**9", "(" * 150 + "1", "-" * 199 + "1", "x" * 10**6,
    "lambda x: " + "9*" * 90 + "9", "__import__('os').system('true')", "lambda x, y=1: x", "lambda: 1",
    "x if x else x", "[x for x in x]", "x / 0", "1.5", "True", "x @ x", "x.real", "print(x)", "\x00",
    "lambda x: (x := 3)", "", "lambda x:", "'a' * 9", "\ud800"])
def test_hostile_answers_are_wrong_at_once(source):
    began = time.time()
    assert tasks.run_arithmetic(source, 3) is None
    assert time.time() - began < 1


def test_pretraining_rows():
    """Rows are full, start with <|endoftext|>, repeat by seed, and reach every kind of document."""
    mixture = tasks.PretrainingMixture(ENCODING)
    rows = [mixture.row(random.Random(i), 65) for i in range(300)]
    assert all(len(row) == 65 and row[0] == ENCODING.eot_token and torch.tensor(row).max() <= 256
               for row in rows)
    assert rows == [mixture.row(random.Random(i), 65) for i in range(300)]
    text = "".join(map(ENCODING.decode, rows))
    for sign in ("Question: Where does", "Who has the", " + ", " * ", "upper ", "reverse ", "spell ",
                 "repeat ", "lambda x:"):
        assert sign in text
    starts = [text[i + len(tasks.EOT):][:9] for i in range(len(text)) if text.startswith(tasks.EOT, i)]
    assert sum(s.startswith("Question:") for s in starts) > 50


def test_held_out_text_is_held_out():
    for kind in "prose", "source":
        train, held_out = tasks.library_text(kind)
        assert len(held_out) > 0.02 * len(train)
        assert not {p for p in held_out.split("\n\n") if p} & set(train.split("\n\n"))
        assert (tasks.held_out_rows(kind, "test", ENCODING, 40)
                != tasks.held_out_rows(kind, "valid", ENCODING, 40))


def test_facts_are_many_and_split_by_people():
    valid, test = (tasks.kept_items("facts", split) for split in ("valid", "test"))
    assert len(valid) == len(test) == 96 and not {i.prompt for i in valid} & {i.prompt for i in test}
    assert all(item.check(item.answer) for item in valid + test)


def test_unknown_task_is_named():
    with pytest.raises(ValueError, match="unknown task 'poetry'; the tasks are math, code, instruct"):
        tasks.task_items("poetry", "train", 1)


def test_a_python_without_sources_is_told(monkeypatch):
    tasks.library_text.cache_clear()
    monkeypatch.setattr(tasks.sysconfig, "get_paths", lambda: {"stdlib": "/nowhere"})
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    for kind in "source", "prose":
        with pytest.raises(ValueError, match=f"ships no {kind} to learn from"):
            tasks.library_text(kind)
    tasks.library_text.cache_clear()


# Tasks from files

def written(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    tasks.file_items.cache_clear()
    tasks.task_items.cache_clear()
    return str(path)


def test_rows_of_every_kind_become_items(tmp_path):
    """The prompt that the model sees, the answer that it learns, and what counts as right."""
    one, two, three, four, five = map(tasks.item_of, (
        {"instruction": "Say yes.", "input": "", "output": "yes"},
        {"instruction": "Add.", "input": "1 2", "output": "3"}, {"prompt": "a b", "completion": "c\n"},
        {"question": "Who?", "answer": ["The Beatles", "Ringo"]},
        {"question": "How many?", "answer": "2 * 600 = 1200.\n#### 1,200"}))
    assert one.prompt == "### Instruction:\nSay yes.\n### Response:\n"
    assert one.answer == "yes" and not one.check
    assert two.prompt == "### Instruction:\nAdd.\n1 2\n### Response:\n"
    assert (three.prompt, three.answer, three.check) == ("a b", "c", None)
    assert four.prompt + four.answer == "Question: Who?\nAnswer: The Beatles"
    assert all(map(four.check, ("The Beatles", " beatles.", "RINGO")))
    assert not any(map(four.check, ("Beatle", "", "Ringo Starr")))
    assert five.check("so it is #### 1200") and five.check("#### 1,200.0")
    assert not any(map(five.check, ("1200", "#### 12", "#### 1200 or so", "####")))


@given(answer=st.text(st.sampled_from("ab ,.'!-ABthe"), min_size=1, max_size=12))
def test_exact_match_forgives_case_punctuation_articles_and_blanks_alone(answer):
    same = tasks.normalised
    assert same(answer) == same(f" The {answer.upper()}! ") == same(same(answer))
    assert same(answer + " zebra") != same(answer)


@pytest.mark.parametrize("row", ["{", "[1]", '"text"', "12", "[" * 100_000, {"question": "Who?"},
                                 {"prompt": "a", "answer": "b"},
                                 {"question": "Who?", "answer": []}, {"question": "Who?", "answer": [1]},
                                 {"prompt": " ", "completion": "b"}, {"instruction": None, "output": "b"},
                                 {"prompt": "a", "completion": "\ud83d"}])
def test_bad_rows_are_named_by_line_or_counted_and_skipped(tmp_path, capsys, row):
    good = {"prompt": "a", "completion": "b"}
    path = written(tmp_path / "x.jsonl", good, row, good, row, "")
    with pytest.raises(ValueError, match=r"x.jsonl, line 2: .*\(2 bad rows in all; --skip-bad"):
        tasks.file_items(path)
    assert [item.where for item in tasks.file_items(path, skip_bad=True)] == [f"{path}, line 1",
                                                                              f"{path}, line 3"]
    assert "2 bad rows left out" in capsys.readouterr().out


def test_a_file_with_one_answer_that_cannot_be_checked_goes_by_likelihood(tmp_path):
    rows = [{"question": "Who?", "answer": "Ann"}, {"prompt": "a", "completion": "b"}]
    assert all(item.check is None for item in tasks.file_items(written(tmp_path / "x.jsonl", *rows)))


@given(count=st.integers(10, 3000))
def test_a_files_splits_are_disjoint_and_in_its_order(count, tmp_path_factory):
    path = written(tmp_path_factory.mktemp("splits") / "x.jsonl",
                   *({"prompt": str(i), "completion": "b"} for i in range(count)))
    parts = [[int(item.prompt) for item in tasks.task_items(path, split, 9999)]
             for split in ("train", "valid", "test")]
    assert sum(parts, []) == list(range(count))
    assert len(parts[1]) == len(parts[2]) == min(200, count // 10)


def test_a_file_of_too_few_items_is_refused(tmp_path):
    with pytest.raises(ValueError, match="3 items; it takes 10"):
        tasks.task_items(written(tmp_path / "x.jsonl", *[{"prompt": "a", "completion": "b"}] * 3), "train", 5)


def test_real_files_have_no_bad_row():
    data = pathlib.Path(__file__).parent.parent.parent / "shared" / "data"
    if not data.exists():
        pytest.skip("the data is not here")
    counts = {name: len(tasks.file_items(str(data / f"{name}.jsonl")))
              for name in ("gsm8k_test", "webquestions_test", "instruct", "trivia")}
    assert counts == {"gsm8k_test": 1319, "webquestions_test": 2032, "instruct": 1100, "trivia": 24715}
    assert all(item.check for item in tasks.file_items(str(data / "gsm8k_test.jsonl")))

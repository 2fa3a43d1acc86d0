"""The text: every item's own answer passes its check, splits do not leak, model output is never executed."""
import random
import sys
import time

import pytest
import torch
from hypothesis import given, strategies as st

import tasks
from model import GPTConfig

ENCODING = tasks.byte_encoding()
LENGTH = GPTConfig().block_size


@given(st.text())
def test_bytes_decode_to_what_was_encoded(text):
    text = text.encode("utf8", "ignore").decode()
    assert ENCODING.decode(ENCODING.encode_ordinary(text)) == text
    assert ENCODING.encode_ordinary(text) == list(text.encode())
    assert ENCODING.eot_token == 256 and ENCODING.n_vocab == GPTConfig().vocab_size


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

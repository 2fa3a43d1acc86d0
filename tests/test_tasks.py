"""tasks.py: every item's own answer passes its check, splits do not leak, and what a model writes is
never executed."""
import random
import sys
import time

import pytest
import torch
from hypothesis import given, strategies as st

import tasks
from model import GPTConfig

ENCODING = tasks.get_encoding("bytes")
LENGTH = GPTConfig().block_size


# ------------------------------------------------------------------------------------------------
# Tokens

@given(st.text())
def test_bytes_decode_to_what_was_encoded(text):
    text = text.encode("utf8", "ignore").decode()
    assert ENCODING.decode(ENCODING.encode_ordinary(text)) == text
    assert ENCODING.encode_ordinary(text) == list(text.encode())
    assert ENCODING.eot_token == 256 and ENCODING.n_vocab == GPTConfig().vocab_size


def test_a_vocabulary_that_is_not_there_is_named(monkeypatch):
    def fail(name):
        raise ConnectionError
    assert tasks.get_encoding("bytes") is ENCODING
    monkeypatch.setattr(tasks.tiktoken, "get_encoding", fail)
    with pytest.raises(ValueError, match="vocabulary of gpt2.*TIKTOKEN_CACHE_DIR"):
        tasks.get_encoding("gpt2")


def test_a_fingerprint_sees_every_text_and_where_it_ends():
    others = [["ab", "c"], ["a", "bc"], ["abc"], ["abd"], ["ab", "c", ""], ["c", "ab"]]
    assert len({tasks.fingerprint(texts) for texts in others}) == len(others)
    assert tasks.fingerprint(iter(["ab", "c"])) == tasks.fingerprint(["ab", "c"])


# ------------------------------------------------------------------------------------------------
# The target tasks

@pytest.mark.parametrize("task", tasks.MAKERS)
def test_right_answers_pass_and_no_prompt_is_in_two_splits(task):
    """Other items' answers do not pass, and everything fits the context."""
    items = {split: tasks.task_items(task, split, 200) for split in tasks.SPLITS}
    prompts = {split: {item.prompt for item in items[split]} for split in items}
    assert not prompts["train"] & (prompts["test"] | prompts["valid"])
    assert not prompts["test"] & prompts["valid"]
    for item in items["train"]:
        assert item.check(item.answer) and item.check(item.answer + "\n") and not item.check("")
        assert len(ENCODING.encode_ordinary(item.prompt + item.answer)) + 2 <= LENGTH + 1
    shifted = items["train"][1:] + items["train"][:1]
    passed = sum(item.check(other.answer) for item, other in zip(items["train"], shifted))
    assert passed < 40
    assert tasks.task_items(task, "train", 50) == tasks.task_items(task, "train", 200)[:50]


def test_checks_by_hand():
    math_item, code_item = tasks.math_item(random.Random(1)), tasks.code_item(random.Random(1))
    number = math_item.answer.split()[-1]
    assert math_item.check(f"whatever #### {number}")
    assert not math_item.check(number) and not math_item.check("#### 999")
    source = code_item.answer.removeprefix("lambda x: ")
    assert code_item.check(f"lambda x: 0 + ({source})")
    assert not code_item.check(f"lambda x: ({source}) + 1")
    assert not code_item.check(f"lambda y: {source}") and not code_item.check("x")
    items = tasks.task_items("instruct", "train", 200)
    item = next(item for item in items if "word that starts" in item.prompt)
    letter, sign = item.answer[0], item.answer[-1]
    assert item.check(f"{letter}abc{sign}"), "any word that keeps the constraint is right"
    for wrong in f"x{letter}{sign}", f"{letter}abc", f"{letter}ab {letter}cd{sign}", sign:
        assert not item.check(wrong)


@pytest.mark.parametrize("text, number", [
    ("so #### 12", 12), ("#### -1,234.5\n", -1234.5), ("####7", 7), ("#### 1 #### 2", 2),
    ("12", None), ("#### 12 pens", None), ("####", None), ("", None)])
def test_a_final_number_stands_after_four_hashes(text, number):
    assert tasks.final_number(text) == number


@given(st.integers(-50, 50),
       st.lists(st.tuples(st.sampled_from("+-*"), st.integers(0, 9)), max_size=4))
def test_arithmetic_is_pythons(x, operations):
    source = "x"
    for sign, n in operations:
        source = f"({source}) {sign} {n}"
    assert tasks.run_arithmetic(f"lambda x: {source}", x) == eval(source)


@pytest.mark.parametrize("source", [
    "9**9**9", "999999999 * 999999999", "lambda x: x << 10**9", "(" * 150 + "1", "-" * 199 + "1",
    "x" * 10**6, "lambda x: " + "9*" * 90 + "9", "__import__('os').system('true')",
    "lambda x, y=1: x", "lambda: 1", "x if x else x", "[x for x in x]", "x / 0", "1.5", "True",
    "x @ x", "x.real", "print(x)", "\x00", "lambda x: (x := 3)", "", "lambda x:", "'a' * 9", "\ud800"])
def test_hostile_answers_are_wrong_at_once(source):
    began = time.time()
    assert tasks.run_arithmetic(source, 3) is None
    assert time.time() - began < 1


def test_an_unknown_task_is_named():
    with pytest.raises(ValueError, match="unknown task 'poetry'; the tasks are math, code, instruct"):
        tasks.task_items("poetry", "train", 1)


def test_a_batchs_targets_are_the_responses_alone():
    """Rows <|endoftext|> prompt answer newline, side by side; -100 is no target, and an answer of
    several lines ends with <|endoftext|> instead."""
    items = [tasks.exact("ab", "c"), tasks.exact("d", "e\nf")]
    rows = [tasks.response_row(item, ENCODING) for item in items]
    assert rows == [([256, *b"abc\n"], 3), ([256, *b"de\nf", 256], 2)]
    x, y = tasks.response_batch(rows)
    assert x.tolist() == [[256, *b"abc", 0], [256, *b"de\nf"]]
    assert y.tolist() == [[-100, -100, *b"c\n", -100], [-100, *b"e\nf", 256]]


# ------------------------------------------------------------------------------------------------
# What the foundation is trained on, and must keep

def test_pretraining_rows_are_full_and_reach_every_kind_of_document():
    """They start with <|endoftext|>, and repeat by seed."""
    mixture = tasks.PretrainingMixture(ENCODING)
    rows = [mixture.row(random.Random(i), 65) for i in range(300)]
    assert all(len(row) == 65 and row[0] == ENCODING.eot_token and torch.tensor(row).max() <= 256
               for row in rows)
    assert rows == [mixture.row(random.Random(i), 65) for i in range(300)]
    text = "".join(map(ENCODING.decode, rows))
    for sign in ("Question: Where does", "Who has the", " + ", " * ", "upper ", "reverse ", "spell ",
                 "repeat ", "lambda x:"):
        assert sign in text
    starts = [text[i + len(tasks.EOT):][:9] for i in range(len(text))
              if text.startswith(tasks.EOT, i)]
    assert sum(start.startswith("Question:") for start in starts) > 50


@pytest.mark.parametrize("kind", tasks.LIBRARY)
def test_held_out_text_is_held_out(kind):
    """No paragraph of it stands in the training text, nor in the other split's rows."""
    train, held_out = tasks.library_text(kind)
    assert len(held_out) > 0.02 * len(train)
    assert not {p for p in held_out.split("\n\n") if p} & set(train.split("\n\n"))
    valid, test = (tasks.held_out_rows(held_out, split, ENCODING, 40) for split in ("valid", "test"))
    assert len(valid) == len(test) == 256 and valid != test
    assert all(len(row) == 40 and row[0] == ENCODING.eot_token for row in valid + test)


@given(st.text("ab\n", max_size=400), st.integers(2, 20))
def test_held_out_rows_start_lines_and_do_not_overlap(text, length):
    """Every second row is for "valid", the others for "test"; at most as many as asked for."""
    valid, test = (tasks.held_out_rows(text, split, ENCODING, length, 10 ** 6)
                   for split in ("valid", "test"))
    assert 0 <= len(valid) - len(test) <= 1
    end, lines = 0, text.splitlines(keepends=True)
    starts = {sum(map(len, lines[:i])) for i in range(len(lines))}
    for i in range(len(valid) + len(test)):
        row = ENCODING.decode((test if i % 2 else valid)[i // 2][1:])
        assert len(row) == length - 1
        end = next(start for start in sorted(starts) if start >= end
                   and text.startswith(row, start)) + len(row)
    assert tasks.held_out_rows(text, "valid", ENCODING, length, 1) == valid[:1]


def test_facts_are_many_and_split_by_people():
    valid, test = (tasks.kept_items("facts", split) for split in ("valid", "test"))
    assert len(valid) == len(test) == 96 and not {i.prompt for i in valid} & {i.prompt for i in test}
    assert all(item.check(item.answer) for item in valid + test)


@pytest.mark.parametrize("kind", tasks.KINDS)
def test_a_model_that_answers_right_has_kept_all(kind):
    """Its own answer passes the check of every kept item; no task trains what it must keep."""
    assert all(item.check(item.answer) for item in tasks.kept_items(kind, "valid", 50))
    assert all(set(kinds) < set(tasks.KINDS) for kinds in tasks.KEPT.values())


def test_a_python_without_sources_is_told(monkeypatch):
    tasks.library_text.cache_clear()
    monkeypatch.setattr(tasks.sysconfig, "get_paths", lambda: {"stdlib": "/nowhere"})
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    for kind in tasks.LIBRARY:
        with pytest.raises(ValueError, match=f"ships no {kind} to learn from"):
            tasks.library_text(kind)
    tasks.library_text.cache_clear()

"""Users' own files: rows of every kind become items, bad rows are named, splits do not overlap, and
documents of a text file are told apart."""
import json
import pathlib
import random

import pytest
import tiktoken
from hypothesis import given, settings, strategies as st

import tasks
import train
from extras.user_data import (TextFiles, drop_long_items, evaluation_items, file_items,
                              item_from_row, load_items, normalize_answer, read_text)
from micro import PRETRAIN
from model import GPTConfig

ENCODING = tasks.get_encoding("bytes")
OTHER = tiktoken.Encoding("other", pat_str=r"\n|[^\n]+", special_tokens={tasks.EOT: 257},
                          mergeable_ranks={**{bytes([i]): i for i in range(256)}, b"ab": 256})


def written(path, *rows):
    """The path of a JSONL file of these rows; a string is a line as it is."""
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("".join(line + "\n" for line in lines))
    file_items.cache_clear()
    return str(path)


def pairs(count):
    return [{"prompt": str(i), "completion": "b"} for i in range(count)]


# ------------------------------------------------------------------------------------------------
# Rows

def test_rows_of_every_kind_become_items():
    """The prompt that the model sees, the answer that it learns, and what counts as right."""
    one, two, three, four, five = map(item_from_row, (
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
    same = normalize_answer
    assert same(answer) == same(f" The {answer.upper()}! ") == same(same(answer))
    assert same(answer + " zebra") != same(answer)


@pytest.mark.parametrize("row", [
    "{", "[1]", '"text"', "12", "[" * 100_000, {"question": "Who?"}, {"prompt": "a", "answer": "b"},
    {"question": "Who?", "answer": []}, {"question": "Who?", "answer": [1]},
    {"prompt": " ", "completion": "b"}, {"instruction": None, "output": "b"},
    {"prompt": "a", "completion": "\ud83d"}])
def test_bad_rows_are_named_by_line_or_counted_and_skipped(tmp_path, capsys, row):
    good = {"prompt": "a", "completion": "b"}
    path = written(tmp_path / "x.jsonl", good, row, good, row, "")
    with pytest.raises(ValueError, match=r"x.jsonl, line 2: .*\(2 bad rows in all; --skip-bad"):
        file_items(path)
    found = [item.where for item in file_items(path, skip_bad=True)]
    assert found == [f"{path}, line 1", f"{path}, line 3"]
    assert "2 bad rows left out" in capsys.readouterr().out


def test_a_file_with_one_answer_that_cannot_be_checked_goes_by_likelihood(tmp_path):
    rows = [{"question": "Who?", "answer": "Ann"}, {"prompt": "a", "completion": "b"}]
    assert all(item.check is None for item in file_items(written(tmp_path / "x.jsonl", *rows)))


@settings(max_examples=20)
@given(count=st.integers(10, 3000))
def test_a_files_splits_are_disjoint_and_in_its_order(count, tmp_path_factory):
    path = written(tmp_path_factory.mktemp("splits") / "x.jsonl", *pairs(count))
    parts = [[int(item.prompt) for item in load_items(path, split, 9999)]
             for split in ("train", "valid", "test")]
    assert sum(parts, []) == list(range(count))
    assert len(parts[1]) == len(parts[2]) == min(tasks.HELD_OUT, count // 10)
    assert [item.prompt for item in load_items(path, "train", 3)] == ["0", "1", "2"]


def test_a_file_of_too_few_items_is_refused(tmp_path):
    with pytest.raises(ValueError, match="x.jsonl has 3 items; at least 10"):
        load_items(written(tmp_path / "x.jsonl", *pairs(3)), "train", 5)


def test_a_task_without_a_file_is_one_that_is_made():
    assert load_items("math", "test", 5) == tasks.task_items("math", "test", 5)
    with pytest.raises(ValueError, match="unknown task 'poetry'"):
        load_items("poetry", "test", 5)


def test_items_that_do_not_fit_the_context_are_named_or_left_out(tmp_path, capsys):
    """<|endoftext|> prompt answer newline may have one token more than the context."""
    rows = [{"prompt": "a" * length, "completion": "b"} for length in (5, 6, 4, 9)]
    items = file_items(written(tmp_path / "x.jsonl", *rows))
    with pytest.raises(ValueError, match=r"x.jsonl, line 2: 9 tokens do not fit the context of 7 \(2 "):
        drop_long_items(items, ENCODING, 7)
    kept, tokens = drop_long_items(items, ENCODING, 7, skip_bad=True)
    assert [len(item.prompt) for item in kept] == [5, 4]
    assert tokens == [tasks.response_row(item, ENCODING) for item in kept]
    assert "2 of 4 items do not fit the context of 7" in capsys.readouterr().out
    with pytest.raises(ValueError, match="context of 2"):
        drop_long_items(items, ENCODING, 2, skip_bad=True)


def test_a_users_files_replace_what_is_evaluated(tmp_path):
    """The target, and all that is to be kept; without files, a task's own."""
    own = evaluation_items("code", "test", 7)
    assert list(own) == ["target", *tasks.KEPT["code"]]
    assert {name: len(items) for name, items in own.items() if name != "facts"} == {
        "target": 7, "lookup": 7, "sums": 7, "words": 7}
    target = written(tmp_path / "t.jsonl", *pairs(30))
    kept, text = written(tmp_path / "k.jsonl", *pairs(12)), tmp_path / "prose.txt"
    text.write_text("some text")
    items = evaluation_items("code", "test", 20, target, [kept, str(text)], config=GPTConfig())
    assert {name: len(chosen) for name, chosen in items.items()} == {"target": 20, "k": 12}
    with pytest.raises(ValueError, match="each needs a name of its own"):
        evaluation_items("code", "test", 20, None, [kept, kept])
    with pytest.raises(FileNotFoundError):  # before any work
        evaluation_items("code", "test", 20, None, [f"{text}.txt"])


# ------------------------------------------------------------------------------------------------
# Text

def test_bytes_that_are_no_text_are_replaced(tmp_path):
    (tmp_path / "x.txt").write_bytes(b"ab\xffc")
    assert read_text(tmp_path / "x.txt") == "ab\ufffdc"


@given(st.lists(st.text("ab\n", min_size=1), min_size=1, max_size=5))
def test_documents_of_a_text_file_are_told_apart(tmp_path_factory, documents):
    """<|endoftext|> in a file is that token, not its thirteen letters."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "text.txt").write_text(tasks.EOT.join(documents))
    for encoding in ENCODING, OTHER:
        tokens = TextFiles([folder / "text.txt"], encoding).chunks.tokens
        assert encoding.decode(tokens) == tasks.EOT.join(documents)
        assert (tokens == encoding.eot_token).sum() == len(documents) - 1


def test_a_long_line_is_not_cut_within_endoftext(tmp_path):
    (tmp_path / "x.txt").write_text("a" * 995 + tasks.EOT + "b" * 20)
    tokens = TextFiles([tmp_path / "x.txt"], ENCODING).chunks.tokens.tolist()
    assert tokens == [97] * 995 + [ENCODING.eot_token] + [98] * 20


def test_a_row_of_text_starts_with_a_line_and_a_text_that_is_too_short_is_refused(tmp_path):
    (tmp_path / "x.txt").write_text("ab\ncde\n\nf\n" * 20)
    text = TextFiles([tmp_path / "x.txt"], ENCODING)
    for seed in range(50):
        row = text.row(random.Random(seed), 12)
        assert len(row) == 12 and row[0] == ENCODING.eot_token
        assert ENCODING.decode(row[1:]).startswith(("ab\n", "cde\n", "\nf\n", "f\n"))
    (tmp_path / "empty.txt").write_text("")
    for file, size in ("x", 200), ("empty", 0):
        with pytest.raises(ValueError, match=f"a text of {size} tokens is too short for rows of 299"):
            TextFiles([tmp_path / f"{file}.txt"], ENCODING).row(random.Random(0), 300)


def test_rows_of_a_single_long_line_start_everywhere_in_it(tmp_path):
    (tmp_path / "x.txt").write_text("".join(f"{i:9} " for i in range(1000)))
    text = TextFiles([tmp_path / "x.txt"], ENCODING)
    firsts = {ENCODING.decode(text.row(random.Random(seed), 11)[1:]) for seed in range(200)}
    assert firsts == {f"{i:9} " for i in range(0, 1000, 100)}


def test_a_foundation_is_made_again_when_its_text_changes(tmp_path, capsys):
    text = tmp_path / "x.txt"
    text.write_text("some words\n" * 99)
    command = ["pretrain", *PRETRAIN.split(), "--data", str(text), "--out", str(tmp_path)]
    for more, answer in ("", "written"), ("", "is up to date"), ("more", "written"):
        text.write_text(text.read_text() + more)
        train.main(command)
        assert capsys.readouterr().out.endswith(f"foundation.pt {answer}\n")


def test_real_files_have_no_bad_row():
    data = pathlib.Path(__file__).parents[3] / "shared" / "data"
    if not data.exists():
        pytest.skip("the data is not here")
    counts = {name: len(file_items(str(data / f"{name}.jsonl")))
              for name in ("gsm8k_test", "webquestions_test", "instruct", "trivia")}
    assert counts == {"gsm8k_test": 1319, "webquestions_test": 2032, "instruct": 1100, "trivia": 24715}
    assert all(item.check for item in file_items(str(data / "gsm8k_test.jsonl")))

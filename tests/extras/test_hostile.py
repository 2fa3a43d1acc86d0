"""Broken and hostile files, answers and command lines: each is taken as what it is or refused in
one line, soon, in little memory, and nothing in it is executed.

The suite draws a sample of the generated cases; the long tests draw thousands:
python -m pytest tests/extras/test_hostile.py -m slow -s
"""
import collections
import contextlib
import functools
import io
import json
import os
import pathlib
import random
import re
import shutil
import signal
import time

import pytest
import torch
from hypothesis import given, settings, strategies as st

import calibrate
import eval as evaluation
import tasks
import train
from extras.cli import command
from extras.files import (cached_json, load, load_adapter, load_foundation, save,
                          save_resume_state)
from extras.published import read_published
from extras.user_data import file_items, item_from_row, read_text
from micro import (ADAPT, CALIBRATE, PRETRAIN, STAGES, adapt, one_mixture, out,  # noqa: F401
                   write_jsonl)

seeds = st.integers(0, 2 ** 32)


def peak_memory(reset=False):
    """The most that this process had since the last reset, in MB; 0 where no system says so."""
    try:
        if reset:
            pathlib.Path("/proc/self/clear_refs").write_text("5")
        status = pathlib.Path("/proc/self/status").read_text()
        return int(re.search(r"VmHWM:\s*(\d+)", status)[1]) / 1024
    except OSError:
        return 0


@contextlib.contextmanager
def bounded(seconds=5, megabytes=400):
    """What happens here takes less processor time and memory than that, and does not block."""
    def stop(*_):
        raise AssertionError(f"not done after {10 * seconds} s")
    began, before = time.process_time(), peak_memory(reset=True)
    handler = signal.signal(signal.SIGALRM, stop)
    signal.alarm(10 * seconds)  # other processes may need the machine, too
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
    assert time.process_time() - began < seconds
    assert peak_memory() - before < megabytes


def outcome(path, read, right):
    """"refused" in one line that names the file, or "loaded" what is right."""
    with bounded():
        try:
            found = read()
        except ValueError as error:
            message = str(error)
            assert path.name in message and "\n" not in message and len(message) < 900
            return "refused"
    assert right(found), path
    return "loaded"


def count_outcomes(name, count, case):
    """Run case(rng) -> outcome for `count` seeds; print and return how many had which."""
    found = collections.Counter(case(random.Random(f"{name} {seed}")) for seed in range(count))
    print(f"\n{name}: {count} cases, {dict(sorted(found.items()))}")
    return found


# ------------------------------------------------------------------------------------------------
# Checkpoints with bytes that are not those that were written

CONTENT = {"kind": "adapter", "settings": {"a": 1, "b": "text"},
           "t": torch.arange(5.), "u": torch.eye(3).double()}


@functools.cache
def whole(folder):
    """The bytes of a checkpoint."""
    save(folder / "whole.pt", CONTENT)
    return (folder / "whole.pt").read_bytes()


def refused_or_right(path, content):
    def right(found):
        return (found.keys() == CONTENT.keys() and found["settings"] == CONTENT["settings"]
                and all(torch.equal(found[name], CONTENT[name]) for name in "tu"))
    path.write_bytes(content)
    return outcome(path, lambda: load(path, "adapter", "python train.py adapt"), right)


def flipped(content, bit):
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


@settings(max_examples=50)
@given(seed=seeds)
def test_every_flipped_bit_is_found(tmp_path_factory, seed):
    """Or changes nothing that is read: there are spare bytes between a zip file's parts."""
    folder = tmp_path_factory.getbasetemp()
    bit = random.Random(seed).randrange(8 * len(whole(folder)))
    refused_or_right(folder / "x.pt", flipped(whole(folder), bit))


@pytest.mark.slow
def test_every_single_flipped_bit_is_found(tmp_path):
    bits = range(8 * len(whole(tmp_path)))
    found = collections.Counter(refused_or_right(tmp_path / "x.pt", flipped(whole(tmp_path), bit))
                                for bit in bits)
    print(f"\nflipped bits: {dict(found)}")
    assert found["refused"] > len(bits) / 2


def mutated(rng, content):
    """Bytes cut, flipped twice, overwritten, inserted, removed, doubled, random."""
    n, where, size = len(content), rng.randrange(len(content)), rng.choice([1, 2, 8, 64, 200])
    before, rest = content[:where], content[where:]
    junk = rng.choice([rng.randbytes(size), bytes(size), b"\xff" * size, before[-size:]])
    return rng.choice([
        before, rest, b"", rng.randbytes(where), content[:-rng.choice([1, 31, 32, 33, 54])],
        flipped(flipped(content, rng.randrange(8 * n)), rng.randrange(8 * n)),
        before + junk + rest[len(junk):], before + junk + rest, before + rest[size:],
        content + rest, content + junk, junk + content])


def broken_checkpoint(folder, rng):
    return refused_or_right(folder / "x.pt", mutated(rng, whole(folder)))


@settings(max_examples=50)
@given(seed=seeds)
def test_broken_checkpoints_are_refused(tmp_path_factory, seed):
    broken_checkpoint(tmp_path_factory.getbasetemp(), random.Random(seed))


@pytest.mark.slow
def test_broken_checkpoints_are_refused_4000_cases(tmp_path):
    count_outcomes("broken checkpoints", 4000, lambda rng: broken_checkpoint(tmp_path, rng))


# ------------------------------------------------------------------------------------------------
# Whole checkpoints with a wrong content

class Bomb:
    """What a hostile checkpoint holds: unpickling it makes a file."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return pathlib.Path.touch, (self.target,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol 4")
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("wrap", [
    lambda bomb: bomb, lambda bomb: {"kind": bomb}, lambda bomb: [bomb] * 2,
    lambda bomb: {"kind": "adapter", "settings": {"x": (bomb,)}},
    lambda bomb: torch.nn.Linear(1, 1)])  # whole modules are code, too
def test_nothing_in_a_file_is_executed(tmp_path, wrap, zipped):
    """Neither in a checkpoint nor in GPT-2's file."""
    bomb, path = tmp_path / "executed", tmp_path / "x.pt"
    for protocol in 0, 2, 4:
        torch.save(wrap(Bomb(bomb)), path, _use_new_zipfile_serialization=zipped,
                   pickle_protocol=protocol)
        with pytest.raises(ValueError, match="x.pt cannot be read"):
            load(path, "adapter", "")
        with pytest.raises(ValueError, match="x.pt cannot be read"):
            read_published(str(path), 0)
    assert not bomb.exists()
    torch.load(path, weights_only=False)  # the bomb works
    assert bomb.exists() or isinstance(wrap(bomb), torch.nn.Module)


def readers(out):
    """{kind: (file, how its user reads it)} of the checkpoints in `out`."""
    adapter = next(out.glob("code/folora-*/adapter.pt"))
    return {"foundation": (out / "foundation.pt", lambda: load_foundation(out, "cpu")),
            "adapter": (adapter, lambda: load_adapter(adapter, out, "cpu"))}


def tensor_dicts(content):
    """All {name: tensor} dicts, at any depth."""
    for value in content.values():
        if isinstance(value, dict):
            yield from tensor_dicts(value)
    if any(map(torch.is_tensor, content.values())):
        yield content


def change(name, to):
    """content -> None: replaces the first tensor whose name ends so by to(tensor), or removes it
    where that is None."""
    def spoil(content):
        tensors, key = next((tensors, key) for tensors in tensor_dicts(content)
                            for key in tensors if key.endswith(name))
        tensors[key] = to(tensors[key])
        if tensors[key] is None:
            del tensors[key]
    return spoil


def configure(**changes):
    return lambda content: content["settings"]["config"].update(changes)


@pytest.mark.parametrize("kind, spoil, reason", [
    ("foundation", change("ln_f.bias", lambda t: None), "Missing key.*ln_f.bias"),
    ("foundation", change("ln_f.bias", lambda t: t[:3]), "size mismatch for transformer.ln_f.bias"),
    ("foundation", lambda content: content["model"].update(x=torch.ones(1)), "Unexpected key.*x"),
    ("foundation", lambda content: content.update(model=None), "TypeError"),
    ("foundation", lambda content: content.update(kind="adapter"), "it is not a foundation"),
    ("foundation", configure(n_layer=10 ** 9), "n_layer is 1000000000; it must be an integer from"),
    ("foundation", configure(n_head=3), "it must be a multiple of heads"),
    ("foundation", configure(colour=1), "TypeError"),
    ("adapter", change("lora_A0", lambda t: None), "KeyError: .*lora_A0"),
    ("adapter", lambda content: content["settings"].update(foundation="x"), "another found"),
    ("adapter", lambda content: content["settings"].update(rank=10 ** 9), "rank is 1000000000"),
    ("adapter", lambda content: content["settings"].pop("scale"), "KeyError: 'scale'")])
def test_what_does_not_fit_is_named_where_it_is_read(out, kind, spoil, reason):
    path, read = readers(out)[kind]
    content = torch.load(path, weights_only=True)
    read()
    spoil(content)
    torch.save(content, path)
    with bounded(), pytest.raises(ValueError, match=f"{path.name} cannot be read .*{reason}"):
        read()


def test_a_vocabulary_too_small_for_its_encoding_is_refused(out):
    """All tensors fit each other, but not the bytes that they are to read."""
    path, read = readers(out)["foundation"]
    content = torch.load(path, weights_only=True)
    configure(vocab_size=99)(content)
    for name in "transformer.wte.weight", "lm_head.weight":
        if name in content["model"]:
            content["model"][name] = content["model"][name][:99].clone()
    save(path, content)
    with pytest.raises(ValueError, match="99 tokens, too few for bytes"):
        read()


def test_a_spoiled_save_of_an_interrupted_run_is_refused(out, monkeypatch):
    def save_and_stop(partial, settings, losses, trained, optimizers):
        trained = {name: p[:, 1:] if "lora_A" in name else p for name, p in trained.items()}
        save_resume_state(partial, settings, losses, trained, optimizers)
        raise KeyboardInterrupt
    monkeypatch.setattr(train, "SAVE_EVERY", -1)
    monkeypatch.setattr(train, "save_resume_state", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        adapt("--seed 5", out)
    with pytest.raises(ValueError, match="adapter.partial cannot be read .*size of tensor a .*; "
                                         "delete it; the same command then starts anew"):
        adapt("--seed 5", out)


# ------------------------------------------------------------------------------------------------
# Things that are not files

THINGS = {"folder": os.mkdir, "dangling link": lambda path: path.symlink_to("no"),
          "loop": lambda path: path.symlink_to(path.name)}
READERS = {"x.pt": lambda path: load(path, "adapter", ""),
           "x.bin": lambda path: read_published(str(path), 0),
           "x.jsonl": lambda path: file_items(str(path)), "x.txt": read_text}


@pytest.mark.parametrize("thing", THINGS)
def test_what_is_not_a_file_is_refused(tmp_path, thing):
    """In one line that names it."""
    for name, read in READERS.items():
        THINGS[thing](tmp_path / name)
        with bounded(), pytest.raises((ValueError, OSError), match=name):
            read(tmp_path / name)
    THINGS[thing](tmp_path / "x.json")
    with bounded(), contextlib.suppress(OSError):  # a folder is in the way of what is written
        assert cached_json(tmp_path / "x.json", {"a": 1}, lambda: {"b": 2})["b"] == 2


def test_a_link_to_a_file_is_a_file(tmp_path):
    save(tmp_path / "y.pt", CONTENT)
    (tmp_path / "x.pt").symlink_to(tmp_path / "y.pt")
    assert load(tmp_path / "x.pt", "adapter", "").keys() == CONTENT.keys()


# ------------------------------------------------------------------------------------------------
# Rows and text

ROWS = [{"question": "Who?", "answer": ["Ann", "Bo"]}, {"prompt": "a", "completion": "b"},
        {"instruction": "Do.", "input": "this", "output": "so #### 12"}]


def hostile_row(rng):
    """Bytes of a line that is no row, or is one in a strange way."""
    row = dict(rng.choice(ROWS))
    key = rng.choice(list(row))
    line, value, depth = json.dumps(row), json.dumps(row[key]), rng.choice([1, 50, 900, 10 ** 5])
    strange = ["\\ud800", "\\u0000", "\\ud83d\\ude00", "é", f"#### {'9' * 5000}x", " " * 999]
    values = [None, 0, True, [], {}, [1], "", " ", [[]], float("nan"), -1e308]
    return rng.choice([
        json.dumps({**row, key: rng.choice(values)}).encode(),
        line.replace(rng.choice("abAWso"), rng.choice(strange)).encode(),
        line.replace(value, rng.choice(["[" * depth + "]" * depth,
                                        '{"a":' * depth + "1" + "}" * depth])).encode(),
        line.replace(value, "9" * rng.choice([1, 400, 4301, 10 ** 5])).encode(),
        line.replace('"' + key, '"x' + key).encode(), line[:rng.randrange(len(line))].encode(),
        line.encode() + b" " * rng.choice([10, 2 ** 20 - len(line), 2 ** 20, 3 * 2 ** 20]),
        mutated(rng, line.encode()), line.encode("utf-16")])


def broken_rows(path, rng):
    """A file with a hostile line between good ones: refused, or every item is text; without the
    bad rows, the good ones are what they were."""
    line, good = hostile_row(rng), [json.dumps(row).encode() for row in ROWS]
    path.write_bytes(b"\n".join([*good[:2], line, good[2]]) + rng.choice([b"", b"\n", b"\r\n\n"]))
    file_items.cache_clear()

    def right(items):
        for item in items:
            assert item.prompt and item.answer and isinstance(item.answer, str)
            item.check and item.check(item.answer)
        return 3 <= len(items) <= 4 + line.count(b"\n")
    found = outcome(path, lambda: file_items(str(path)), right)
    with bounded():
        prompts = [item.prompt for item in file_items(str(path), skip_bad=True)]
    expected = [item_from_row(row).prompt for row in ROWS]
    assert prompts[:2] == expected[:2] and prompts[-1] == expected[2]
    return found


@settings(max_examples=60)
@given(seed=seeds)
def test_broken_rows_are_refused(tmp_path_factory, seed):
    broken_rows(tmp_path_factory.getbasetemp() / "broken.jsonl", random.Random(seed))


@pytest.mark.slow
def test_broken_rows_are_refused_4000_cases(tmp_path):
    path = tmp_path / "x.jsonl"
    found = count_outcomes("broken rows", 4000, lambda rng: broken_rows(path, rng))
    assert min(found["refused"], found["loaded"]) > 500


@settings(max_examples=30)
@given(text=st.binary(max_size=2000) | st.text().map(str.encode), times=st.integers(1, 50))
def test_any_bytes_are_text(tmp_path_factory, text, times):
    path = tmp_path_factory.getbasetemp() / "any.txt"
    path.write_bytes(text * times)
    with bounded():
        rows = tasks.held_out_rows(read_text(path), "valid", tasks.get_encoding("bytes"), 9)
    assert all(len(row) == 9 and max(row) <= 256 for row in rows)


# ------------------------------------------------------------------------------------------------
# Answers

@st.composite
def answers(draw):
    """What a model might write to stall or trick its examiner."""
    atom = st.text(max_size=3) | st.sampled_from([
        "x", "9", "9**9**9", "1<<10**9", "0x" + "f" * 50, "-", "~", "(", ")", "[", "{",
        "lambda x:", "f(", "if", "else", "*", "+", "**", ":=", ",", " ", "\n", "\0", "\x0c", "'",
        '"\""', "#", "\\", "٣", "𝘹", "\ud800", "__import__('os')", "x.x", "x[0]", "await", "1_0",
        "1e9", "1j", "...", "yield", "f'{", "b'", "@", "\ufeff", "#### ", "9" * 60])
    part = draw(st.lists(atom, min_size=1, max_size=12).map("".join))
    text = draw(st.sampled_from([1, 2, 7, 40, 200, 10 ** 4])) * part
    return draw(st.sampled_from(["", "lambda x: ", "#### "])) + draw(
        st.sampled_from([text, text[:200], text[:180]]))


def judge(answer):
    """All checks judge it, soon; what the code task computes is plain arithmetic."""
    with bounded():
        found = tasks.run_arithmetic(answer, 3)
        assert found is None or type(found) is int and abs(found) <= 10 ** 12
        if found is not None:
            code = answer.split("#")[0].strip().removeprefix("lambda")
            assert set(code) <= set("x𝘹0123456789abcdefABCDEFoXO_:+-*() \t\n\f\ufeff\\"), answer
        for make in tasks.MAKERS.values():
            make(random.Random(1)).check(answer)
        item_from_row({"question": "Who?", "answer": "12"}).check(answer)


@pytest.mark.filterwarnings("ignore::SyntaxWarning")
@settings(max_examples=100)
@given(answer=answers())
def test_hostile_answers_are_judged_soon(answer):
    judge(answer)


@pytest.mark.slow
@settings(max_examples=5000)
@given(answer=answers())
def test_hostile_answers_are_judged_soon_5000_cases(answer):
    judge(answer)


def test_a_number_of_300000_digits_is_soon_found_or_not():
    with bounded(2):
        assert tasks.final_number("#### " + "9" * 300_000 + "x") is None
        assert tasks.final_number("#### " + "9," * 300_000) is None
        assert tasks.final_number("#### 12" + " " * 300_000) == 12
        assert tasks.final_number("#### 1" * 300_000) == 1


# ------------------------------------------------------------------------------------------------
# The command line

WORDS = ("-1", "0", "1", "2", "-0.0", "0.5", "nan", "inf", "1e999", "1e-320", "1e30", "9" * 30,
         "9" * 5000, "", " ", "abc", "½", "٢", "1_0", "0x10", "1.5", "/dev/null", "/dev/null/x",
         "/nowhere/x.jsonl", "..", "~", "{dir}", "{file}", "{jsonl}", "{text}", "{pt}",
         "\udcff.jsonl", "x" * 300, "*", "a b", "'", "--", "[1]", "λ", "math", "code",
         "lora", "folora", "full", "calibration-x", "calibration/../x", "peft", "merged", "test",
         "valid", "--steps 0", "--nonsense 1", "--seed '", "--lr nan", "--width 7", "tiny")


def subparsers(parser):
    return parser._subparsers._group_actions[0].choices


def draw_command(rng, names, out):
    """(main, arguments): a command on micro settings, up to three more options and any of WORDS."""
    adapter = next(out.glob("code/folora-*/adapter.pt"))
    commands = subparsers(train.parser())
    main, given, parser = rng.choice([
        (train.main, ["pretrain", *PRETRAIN.split()], commands["pretrain"]),
        (train.main, ["adapt", "--method", rng.choice(["lora", "lora-kl-leading"]), *ADAPT.split()],
         commands["adapt"]),
        (train.main, ["export", "--to", str(out / "to"), "--adapter", str(adapter)],
         commands["export"]),
        (train.main, [], commands["adapt"]),
        (calibrate.main, CALIBRATE.split(), calibrate.parser()),
        (evaluation.main, ["--methods", "lora", *STAGES], evaluation.parser())])
    given = [*given, *(["--out", str(out)] if given else [])]
    for _ in range(rng.randint(0, 3)):
        action = rng.choice([a for a in parser._actions
                             if a.option_strings and a.dest != "compile"])  # takes a minute
        option, word = action.option_strings[-1], rng.choice(WORDS).format(**names)
        if option in STAGES:
            word = f"{STAGES[STAGES.index(option) + 1]} {word}"  # still micro
        more = [word, rng.choice(WORDS).format(**names)][:rng.randint(0, 2)]
        given += [option, *([word] if action.nargs is None else more)]
    return main, rng.sample(given, len(given)) if rng.random() < 0.03 else given


def run_drawn_command(rng, names, out):
    """"done" or "helped", or "refused" with exit status 2 and one line."""
    copy = out.parent / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    main, given = draw_command(rng, names, shutil.copytree(out, copy))
    for cache in file_items, tasks.task_items:
        cache.cache_clear()
    errors = io.TextIOWrapper(io.BytesIO(), "utf8", "backslashreplace")  # as the real one
    output = io.TextIOWrapper(io.BytesIO(), "utf8")
    try:
        with bounded(20, megabytes=2000), contextlib.redirect_stderr(errors), \
                contextlib.redirect_stdout(output):
            command(lambda: main(given))
    except SystemExit as stopped:
        errors.seek(0)
        text = errors.read()
        if stopped.code == 0:
            assert {"-h", "--help"} & {argument.split("=")[0] for argument in given}
            return "helped"
        assert stopped.code == 2, given
        assert text.startswith("error: ") and text.count("\n") == 1, (given, text)
        assert len(text) < 6000
        return "refused"
    except Exception as error:
        raise AssertionError(given) from error
    return "done"


@pytest.fixture
def names(out, tmp_path, monkeypatch):
    """What the drawn commands may name; evaluations are cut short by canned scores."""
    (tmp_path / "x.txt").write_text("a line of text\n" * 50)
    monkeypatch.chdir(tmp_path)
    scores = {"score": 1.0, "n": 1, "wrong": []}
    monkeypatch.setattr(evaluation, "evaluate", lambda *given, **more: {
        "target": scores, "kept": {}, "text": {}, "Avg1": 1.0, "Avg2": 1.0, "GM": 1.0})
    return {"dir": tmp_path, "file": tmp_path / "x", "text": tmp_path / "x.txt",
            "jsonl": write_jsonl(tmp_path / "x.jsonl", *20 * [ROWS[1]]), "pt": out / "proxy.pt"}


def test_any_command_line_is_done_or_refused(out, names):
    found = count_outcomes("command lines", 40, lambda rng: run_drawn_command(rng, names, out))
    assert found["refused"] > 15 and found["done"] > 3


@pytest.mark.slow
def test_any_command_line_is_done_or_refused_2000_cases(out, names):
    count_outcomes("more command lines", 2000, lambda rng: run_drawn_command(rng, names, out))


@pytest.mark.parametrize("parser", [*subparsers(train.parser()).values(), calibrate.parser(),
                                    evaluation.parser()], ids=lambda parser: parser.prog)
def test_help_says_what_every_option_is_and_its_default(parser):
    for action in parser._actions:
        assert action.help, action.option_strings
        text = parser._get_formatter()._expand_help(action)
        if action.option_strings and action.nargs is None and not action.required:
            assert re.search("default|several", text), action.option_strings
        if isinstance(action.default, (int, float, str)) and action.default is not False \
                and action.default != "==SUPPRESS==":
            assert f"(default: {action.default})" in text, action.option_strings

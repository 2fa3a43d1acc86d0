"""Broken and hostile files, model answers and command lines: each is taken as what it is or refused in one
line, soon, in little memory, and nothing in it is executed.

A sample of the generated cases runs with the suite. All of them, and what they came to, in 25 minutes on a
busy core:

    python -m pytest tests/test_hostile.py -m slow -s
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
import zipfile

import pytest
import torch
from hypothesis import given, settings, strategies as st

import bench
import calibrate
import eval as evaluation
import tasks
import train
from model import GPT, GPTConfig, digest, load, read_gpt2, save

PRETRAIN = "--steps 2 --batch 2 --layers 1 --heads 2 --width 8"
CALIBRATE = "--samples 8 --queries 8 --min-unique 0 --min-unique-fours 0 --max-run 200"
ADAPT = "--steps 2 --batch 2 --examples 10 --rank 2"
case_seeds = st.integers(0, 2 ** 32)


def peak(reset=False):
    """The most memory that this process had since the last reset, in MB; 0 where the system does not say."""
    try:
        if reset:
            pathlib.Path("/proc/self/clear_refs").write_text("5")
        return int(re.search(r"VmHWM:\s*(\d+)", pathlib.Path("/proc/self/status").read_text())[1]) / 1024
    except OSError:
        return 0


@contextlib.contextmanager
def bounded(seconds=5, megabytes=400):
    """What happens here takes no longer and no more memory than that."""
    def stop(*_):
        raise AssertionError(f"not done after {seconds} s")
    before, began = peak(reset=True), time.time()
    old = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)
    assert time.time() - began < seconds
    assert peak() - before < megabytes


def outcome(path, read, right):
    """"refused" in one line that names the file, or "loaded" what is right."""
    with bounded():
        try:
            found = read()
        except ValueError as error:
            assert pathlib.Path(path).name in str(error) and "\n" not in str(error) and len(str(error)) < 900
            return "refused"
    assert right(found), path
    return "loaded"


def counted(name, count, case):
    """Run case(rng) -> kind, outcome for `count` seeds; print what they came to."""
    found = collections.Counter(case(random.Random(f"{name} {seed}")) for seed in range(count))
    print(f"\n{name}: {count} cases, {dict(sorted(found.items()))}")
    return found


# ------------------------------------------------------------------------------------------------------------
# Bytes that are not those that were written

CONTENT = {"kind": "adapter", "settings": {"a": 1, "b": "text"},
           "t": torch.arange(5.), "u": torch.eye(3).double()}


def same(found):
    return (found.keys() == CONTENT.keys() and found["settings"] == CONTENT["settings"]
            and all(torch.equal(found[name], CONTENT[name]) for name in "tu"))


@functools.cache
def whole():
    """The bytes of a checkpoint."""
    path = pathlib.Path(f"/tmp/hostile-{os.getpid()}.pt")
    save(path, CONTENT)
    found = path.read_bytes()
    path.unlink()
    return found


def refused_or_right(path, content):
    path.write_bytes(content)
    return outcome(path, lambda: load(path, "adapter", "python train.py adapt"), same)


def flipped(content, bit):
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def test_a_checkpoint_without_its_digest_is_refused(tmp_path):
    assert refused_or_right(tmp_path / "x.pt", whole()[:-32]) == "refused"


def test_a_list_that_holds_itself_is_read_once(tmp_path):
    loop = {"kind": "adapter", "settings": {}}
    loop["loop"] = [loop, loop]
    sealed(tmp_path / "x.pt", loop)
    with bounded():
        assert load(tmp_path / "x.pt", "adapter", "")["loop"][1]["kind"] == "adapter"


@settings(max_examples=100)
@given(bit=st.integers(0, 8 * len(whole()) - 1))
def test_every_flipped_bit_is_found(tmp_path_factory, bit):
    path = tmp_path_factory.getbasetemp() / "flipped.pt"
    assert refused_or_right(path, flipped(whole(), bit)) == "refused"


@pytest.mark.slow
def test_every_flipped_bit_is_found_all_of_them(tmp_path):
    """Each bit of a checkpoint in turn, the digest's own among them."""
    found = collections.Counter(refused_or_right(tmp_path / "x.pt", flipped(whole(), bit))
                                for bit in range(8 * len(whole())))
    print(f"\nflipped bits: {dict(found)}")
    assert found == {"refused": 8 * len(whole())}


def mutated(rng, content):
    """(what was done, bytes): cut at every kind of length, flipped, spliced, overwritten, random."""
    n = len(content)
    lengths = [0, 1, 3, 4, 21, 22, 23, 31, 32, 33, 53, 54, 55, 64, n // 2, n - 1]
    lengths += [max(0, n - less) for less in (55, 54, 33, 32, 31, 22)]
    where, size = rng.randrange(n), rng.choice([1, 2, 8, 64, 200])
    junk = rng.choice([rng.randbytes(size), bytes(size), b"\xff" * size, content[where // 2:][:size]])
    kind = rng.choice(["cut", "cut at any length", "flipped", "overwritten", "inserted", "removed", "twice",
                       "random", "behind it", "before it"])
    return kind, {"cut": content[:rng.choice(lengths)], "cut at any length": content[:where],
                  "flipped": flipped(flipped(content, rng.randrange(8 * n)), rng.randrange(8 * n)),
                  "overwritten": content[:where] + junk + content[where + len(junk):],
                  "inserted": content[:where] + junk + content[where:],
                  "removed": content[:where] + content[where + size:],
                  "twice": content + content[-where:], "random": rng.randbytes(rng.choice(lengths)),
                  "behind it": content + junk, "before it": junk + content}[kind]


def broken_checkpoint(path, rng):
    kind, content = mutated(rng, whole())
    return kind, refused_or_right(path, content) if content != whole() else "loaded"


@settings(max_examples=60)
@given(seed=case_seeds)
def test_broken_checkpoints_are_refused(tmp_path_factory, seed):
    broken_checkpoint(tmp_path_factory.getbasetemp() / "broken.pt", random.Random(seed))


@pytest.mark.slow
def test_broken_checkpoints_are_refused_4000_cases(tmp_path):
    counted("broken checkpoints", 4000, lambda rng: broken_checkpoint(tmp_path / "x.pt", rng))


# ------------------------------------------------------------------------------------------------------------
# Whole files with a hostile content

class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return pathlib.Path.touch, (self.target,)


def sealed(path, content, **options):
    """What `save` would write, of a content that it refuses, or in another format."""
    torch.save(content, path, **options)
    path.write_bytes(path.read_bytes() + digest(path))


def huge(path):
    """A tensor of 10 GB in a few bytes, in every way that a file has for it: {how: write it to path}."""
    def record(**claims):
        def write():
            torch.save({"kind": "adapter", "t": torch.zeros(4)}, path)
            content = bytearray(path.read_bytes())
            at = content.rindex(b"x/data/0") - 46  # its entry in the archive's directory
            assert content[at:at + 4] == b"PK\1\2"
            for offset in claims["offsets"]:
                content[at + offset:at + offset + 4] = (4_000_000_000).to_bytes(4, "little")
            path.write_bytes(bytes(content))
        return write

    def compressed():
        torch.save({"kind": "adapter", "t": torch.zeros(2 ** 25)}, path)
        with zipfile.ZipFile(path) as plain:
            records = {name: plain.read(name) for name in plain.namelist()}
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            for name, data in records.items():
                archive.writestr(name, data)

    def legacy():
        torch.save({"kind": "adapter", "t": torch.zeros(1234)}, path, _use_new_zipfile_serialization=False)
        content = path.read_bytes()
        assert b"M\xd2\x04" in content  # 1234, as a pickle has it
        path.write_bytes(content.replace(b"M\xd2\x04", b"\x8a\x05" + (2_500_000_000).to_bytes(5, "little")))

    def written(content):
        return lambda: sealed(path, {"kind": "adapter", "t": content})
    return {"claimed by the record": record(offsets=[24]), "claimed twice": record(offsets=[20, 24]),
            "compressed": compressed, "in the older format": legacy,
            "strides of 0": written(torch.zeros(1).expand(2_500_000_000)),
            "one storage many times": written(list(torch.zeros(10 ** 6).expand(2500, -1))),
            "without data": written(torch.zeros(2_500_000_000, device="meta")),
            "sparse": written(torch.sparse_coo_tensor([[0]], [1.0], (2_500_000_000,), check_invariants=True)),
            "sparse and small": written(torch.eye(3).to_sparse())}


@pytest.mark.parametrize("how", huge(pathlib.Path("x")))
def test_a_tensor_that_claims_10_gigabytes_takes_none(tmp_path, how):
    path = tmp_path / "x.pt"
    huge(path)[how]()
    with bounded(5, megabytes=100):
        with pytest.raises(ValueError, match="x.pt cannot be read"):
            load(path, "adapter", "")
        with pytest.raises(ValueError, match="x.pt cannot be read"):
            read_gpt2(str(path))


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("wrap", [lambda bomb: bomb, lambda bomb: {"kind": bomb}, lambda bomb: [bomb] * 2,
                                  lambda bomb: {"kind": "adapter", "settings": {"x": (bomb,)}},
                                  lambda bomb: torch.nn.Linear(1, 1).requires_grad_(False)])
@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_in_a_file_is_executed(tmp_path, wrap, zipped, protocol):
    bomb, path = tmp_path / "executed", tmp_path / "x.pt"
    sealed(path, wrap(Bomb(bomb)), _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
    for read in lambda: load(path, "adapter", ""), lambda: read_gpt2(str(path)):
        with pytest.raises(ValueError, match="x.pt cannot be read"):
            read()
    assert not bomb.exists()


@pytest.fixture(scope="module", autouse=True)
def text():
    """The library's text is tokenised once for all runs of these tests."""
    mixture = tasks.PretrainingMixture(tasks.byte_encoding())
    chunks, fingerprint = mixture.chunks, mixture.fingerprint()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks.PretrainingMixture, "chunks", chunks)
        patch.setattr(tasks.PretrainingMixture, "fingerprint", lambda self: fingerprint)
        yield


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """A folder with a micro foundation, its calibration and two adapters."""
    out = tmp_path_factory.mktemp("out")
    train.main(["pretrain", *PRETRAIN.split(), "--out", str(out)])
    calibrate.main(["--task", "code", *CALIBRATE.split(), "--out", str(out)])
    for method in "folora", "full":
        train.main(["adapt", "--method", method, *ADAPT.split(), "--lr", "0.01", "--out", str(out)])
    return out


JUNK = (None, -1, 0, 1, 10 ** 30, 2 ** 40, -0.5, float("nan"), float("inf"), "", "x", "code", [], {}, [[]],
        (), True, torch.zeros(0), torch.ones(3), torch.ones(2, 2, dtype=torch.int8), b"x")


def spoil(rng, content):
    """(what was done): one entry of nested dicts and lists made wrong, in place."""
    while True:
        key = rng.choice(list(content) if isinstance(content, dict) else range(len(content)))
        below = content[key]
        if not isinstance(below, (dict, list)) or not below or rng.random() < 0.1:
            break
        content = below
    ways = ["junk", "removed", "renamed"] if isinstance(content, dict) else ["junk", "removed"]
    if torch.is_tensor(below) and below.numel():
        ways += ["shape", "type", "strides", "sparse", "huge"] * 2
        ways += ["nan", "infinite"] * 3 if below.is_floating_point() else []
    way = rng.choice(ways)
    if way in ("removed", "renamed"):
        del content[key]
        if way == "renamed":
            content[rng.choice([f"{key}x", "", 7, "../x"])] = below
        return way
    if way in ("nan", "infinite"):
        below.view(-1)[rng.randrange(below.numel())] = float("nan" if way == "nan" else "-inf")
        return way
    content[key] = {"junk": lambda: rng.choice(JUNK),
                    "shape": lambda: below[None] if below.dim() < 2 else below[1:],
                    "type": lambda: below.to(rng.choice([torch.float16, torch.int64, torch.complex64])),
                    "strides": lambda: below.flatten()[:1].expand(below.shape),
                    "sparse": lambda: below.to_sparse(),
                    "huge": lambda: below.flatten()[:1].expand(10 ** 10)}[way]()
    return way


def reading_again(out, kind):
    """(file, what to read, its content as comparable values): each kind of checkpoint where it is used."""
    adapter = next(out.glob(f"code/{kind}-*/adapter.pt"), None)
    model, foundation = train.load_foundation(out, "cpu")
    args = train.parser().parse_args(["adapt", "--out", str(out)])
    tensors = {"foundation": lambda: train.load_foundation(out, "cpu")[0].state_dict(),
               "calibration": lambda: flat(train.load_calibration(args, model, foundation)),
               "proxy": lambda: flat(calibrate.proxy(calibrate.parser().parse_args(
                   ["--out", str(out), *CALIBRATE.split()]), model, foundation))}
    path = {"foundation": out / "foundation.pt", "calibration": out / "code" / "calibration.pt",
            "proxy": out / "proxy.pt"}.get(kind, adapter)
    return path, tensors.get(kind, lambda: train.load_adapter(adapter, out, "cpu").state_dict())


def flat(content):
    return {"samples": content["samples"], **{f"{a} {b}": t for key in ("layers", "C_pre", "S_pre")
                                              for a, m in content.get(key, {}).items()
                                              for b, t in (m.items() if isinstance(m, dict) else [(key, m)])}}


def spoilt_checkpoint(out, rng):
    """One of the five kinds, one entry made wrong under a right digest, read where it is used."""
    kind = rng.choice(["foundation", "calibration", "folora", "full"] * 3 + ["proxy"])  # which is made again
    path, read = reading_again(out, kind)
    before, expected, original = path.read_bytes(), read(), torch.load(path, weights_only=True)
    way = spoil(rng, original)
    try:
        sealed(path, original)
        return f"{way}: " + outcome(path, read, lambda found: found.keys() == expected.keys() and all(
            torch.equal(found[name], t) or way in ("junk", "strides") or name == "samples" and way == "shape"
            for name, t in expected.items()))
    finally:
        path.write_bytes(before)


@settings(max_examples=40)
@given(seed=case_seeds)
def test_spoilt_checkpoints_are_refused_where_they_are_read(out, seed):
    spoilt_checkpoint(out, random.Random(seed))


@pytest.mark.slow
def test_spoilt_checkpoints_are_refused_2000_cases(out):
    found = counted("spoilt checkpoints", 2000, lambda rng: spoilt_checkpoint(out, rng))
    for way in "nan", "infinite", "shape", "type", "sparse", "huge":
        assert found[f"{way}: refused"], way


@pytest.mark.parametrize("change, reason", [
    ({"n_layer": 10 ** 9}, "n_layer is 1000000000; it must be a whole number from 1 to 1,000"),
    ({"n_embd": 10 ** 9}, "n_embd is"), ({"n_embd": 2 ** 20}, "has the shape"),
    ({"n_head": 3}, "multiple of heads"), ({"n_head": 2.0}, "n_head is 2.0"),
    ({"vocab_size": 100}, "has the shape"),
    ({"colour": 1}, "TypeError"), ({"encoding": "x"}, "the vocabulary of x")])
def test_a_config_that_does_not_fit_is_named(out, change, reason):
    """Before anything of its size is made."""
    path, read = reading_again(out, "foundation")
    before, content = path.read_bytes(), torch.load(path, weights_only=True)
    content["settings"]["config"].update(change)
    try:
        sealed(path, content)
        with bounded(), pytest.raises(ValueError, match=f"(foundation.pt cannot be read .*|^){reason}"):
            read()
    finally:
        path.write_bytes(before)


@pytest.mark.parametrize("token", [-2, 257])
def test_samples_are_the_models_tokens(out, token):
    path, read = reading_again(out, "calibration")
    before, content = path.read_bytes(), torch.load(path, weights_only=True)
    content["samples"][-1, 0] = token
    try:
        sealed(path, content)
        with pytest.raises(ValueError, match="calibration.pt cannot be read .samples are not rows"):
            read()
    finally:
        path.write_bytes(before)


def test_a_vocabulary_too_small_for_its_encoding_is_refused(out, tmp_path):
    """All tensors fit each other, but not the bytes that they are to read."""
    config = dict(block_size=8, vocab_size=99, n_layer=1, n_head=1, n_embd=8)
    weights = GPT(GPTConfig(**config)).state_dict()
    save(tmp_path / "foundation.pt", {"kind": "foundation", "settings": {"config": config}, "model": weights})
    with pytest.raises(ValueError, match="99 tokens, too few for bytes.*make it again"):
        train.load_foundation(tmp_path, "cpu")


def test_a_folder_in_the_way_is_named_before_the_work(tmp_path):
    (tmp_path / "foundation.pt").mkdir()
    with bounded(), pytest.raises(ValueError, match="foundation.pt is a folder, where a file is to be"):
        train.main(["pretrain", "--steps", "100000", "--out", str(tmp_path)])


@pytest.mark.parametrize("kind, name", [("foundation", "lm_head.weight"), ("folora", "lora_B"),
                                        ("full", "ln_f.bias"), ("calibration", "S_pre")])
def test_one_nan_is_named(out, kind, name):
    """In the message; and `save` would not have written it."""
    path, read = reading_again(out, kind)
    before, content = path.read_bytes(), torch.load(path, weights_only=True)

    def spoil(part):
        for key, value in part.items():
            if isinstance(value, dict):
                spoil(value)
            elif str(key).endswith(name):
                value.view(-1)[0] = float("nan")
    spoil(content)
    try:
        with pytest.raises(ValueError, match=f"{name} holds NaN"):
            save(path, content)
        assert path.read_bytes() == before
        sealed(path, content)
        with pytest.raises(ValueError, match=f"{path.name} cannot be read .*{name} holds NaN"):
            read()
    finally:
        path.write_bytes(before)


@pytest.mark.parametrize("spoil, reason", [
    (lambda p: p.pop("transformer.ln_f.bias"), "transformer.ln_f.bias is missing"),
    (lambda p: p.update({"x": torch.zeros(1)}), "x is unknown"),
    (lambda p: p.update({"transformer.ln_f.bias": torch.zeros(9)}), "transformer.ln_f.bias has the shape"),
    (lambda p: p["transformer.ln_f.bias"].fill_(float("inf")), "ln_f.bias holds NaN")])
def test_a_spoilt_interrupted_run_is_refused(out, tmp_path, monkeypatch, spoil, reason):
    """Saved after the first of two steps; then the saved parameters are changed."""
    command = ["pretrain", *PRETRAIN.split(), "--out", str(tmp_path)]
    partial, real = tmp_path / "foundation.partial", train.save

    def save_and_stop(path, content):
        real(path, content)
        raise KeyboardInterrupt
    monkeypatch.setattr(train, "SAVE_EVERY", -1)
    monkeypatch.setattr(train, "save", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        train.main(command)
    state = torch.load(partial, weights_only=True)
    spoil(state["parameters"])
    sealed(partial, state)
    with pytest.raises(ValueError, match=f"foundation.partial cannot be read .*{reason}.*delete it"):
        train.main(command)


# ------------------------------------------------------------------------------------------------------------
# Things that are not files

THINGS = {"folder": os.mkdir, "pipe": os.mkfifo, "dangling link": lambda path: path.symlink_to("no"),
          "loop": lambda path: path.symlink_to(path.name),
          "endless device": lambda path: path.symlink_to("/dev/zero")}
READERS = {"x.pt": lambda path: load(path, "adapter", ""), "x.bin": lambda path: read_gpt2(str(path)),
           "x.jsonl": lambda path: tasks.file_items(str(path)),
           "x.txt": lambda path: tasks.held_out_rows(str(path), "test", tasks.byte_encoding(), 9)}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("thing", THINGS)
def test_what_is_not_a_file_is_refused(tmp_path, thing, name):
    """And does not block: a pipe that nobody writes to, a device without end."""
    path = tmp_path / name
    THINGS[thing](path)
    with bounded(5), pytest.raises(ValueError, match=f"{name}|pytorch_model.bin"):
        READERS[name](path)
    path = tmp_path / "x.json"
    THINGS[thing](path)
    with bounded(5), contextlib.suppress(OSError):  # a folder is in the way of what is written
        assert evaluation.kept(path, {"a": 1}, lambda: {"b": 2})["b"] == 2


def test_a_link_to_a_file_is_a_file(tmp_path):
    (tmp_path / "y.pt").write_bytes(whole())
    (tmp_path / "x.pt").symlink_to(tmp_path / "y.pt")
    assert same(load(tmp_path / "x.pt", "adapter", ""))


# ------------------------------------------------------------------------------------------------------------
# Rows and text

ROWS = [{"question": "Who?", "answer": ["Ann", "Bo"]}, {"prompt": "a", "completion": "b"},
        {"instruction": "Do.", "input": "this", "output": "so #### 12"}]


def deep(rng, n):
    """A value nested n times."""
    ends = rng.choice([("[", "]"), ('{"a":', "}"), ('{"prompt":[', "]}")])
    return ends[0] * n + "1" + ends[1] * n


def hostile_row(rng):
    """(kind, bytes) of a line that is no row, or is one in a strange way."""
    row = dict(rng.choice(ROWS))
    key = rng.choice(list(row))
    strange = rng.choice(["\\ud800", "\\u0000", "\\ud83d\\ude00", "é", "#### " + "9" * 5000 + "x", " " * 999])
    kind = rng.choice(["value", "text", "deep", "number", "bytes", "utf16", "keys", "long", "cut"])
    if kind == "value":
        row[key] = rng.choice([None, 0, True, [], {}, [1], "", " ", [[]], float("nan"), -1e308])
    line, value = json.dumps(row), json.dumps(row[key])
    return kind, {"text": line.replace(rng.choice("abAWso"), strange).encode(),
                  "deep": line.replace(value, deep(rng, rng.choice([1, 50, 900, 10 ** 5]))).encode(),
                  "number": line.replace(value, "9" * rng.choice([1, 400, 4301, 10 ** 5])).encode(),
                  "bytes": mutated(rng, line.encode())[1], "utf16": line.encode("utf-16"),
                  "keys": line.replace('"' + key, '"x' + key).encode(),
                  "long": line.encode() + b" " * rng.choice([10, 2 ** 20 - len(line), 2 ** 20, 3 * 2 ** 20]),
                  "cut": line[:rng.randrange(len(line))].encode(), "value": line.encode()}[kind]


def broken_rows(path, rng):
    """A file with a hostile line between good ones: refused, or every item is text; without the bad rows the
    good ones are what they were."""
    kind, line = hostile_row(rng)
    good = [json.dumps(row).encode() for row in ROWS]
    path.write_bytes(b"\n".join([*good[:2], line, good[2]]) + rng.choice([b"", b"\n", b"\r\n\n"]))
    tasks.file_items.cache_clear()

    def right(items):
        assert all(item.prompt and item.answer and isinstance(item.answer, str) for item in items)
        for item in items:
            item.check and item.check(item.answer)
        return 3 <= len(items) <= 4 + line.count(b"\n")
    found = outcome(path, lambda: tasks.file_items(str(path)), right)
    with bounded():
        items = tasks.file_items(str(path), skip_bad=True)
    assert [item.prompt for item in items][:2] == [tasks.item_of(row).prompt for row in ROWS[:2]]
    assert items[-1].prompt == tasks.item_of(ROWS[2]).prompt
    return f"{kind}: {found}"


@settings(max_examples=100)
@given(seed=case_seeds)
def test_broken_rows_are_refused(tmp_path_factory, seed):
    broken_rows(tmp_path_factory.getbasetemp() / "broken.jsonl", random.Random(seed))


@pytest.mark.slow
def test_broken_rows_are_refused_4000_cases(tmp_path):
    found = counted("broken rows", 4000, lambda rng: broken_rows(tmp_path / "x.jsonl", rng))
    for kind in "value", "text", "deep", "number", "bytes", "keys", "long", "cut":
        assert found[f"{kind}: refused"], kind


def test_lines_of_100_megabytes(tmp_path):
    """In JSON one after the other in little memory; numbers of the lines behind them are right."""
    path, good = tmp_path / "x.jsonl", json.dumps(ROWS[1]).encode() + b"\n"
    with open(path, "wb") as f:
        f.write(good)
        for _ in range(100):
            f.write(b"x" * 10 ** 6)
        f.write(b"\n" + good)
    with bounded(20, megabytes=50):
        with pytest.raises(ValueError, match=r"x.jsonl, line 2: a row must be shorter than 1,048,576 bytes"):
            tasks.file_items(str(path))
        assert [item.where[-1] for item in tasks.file_items(str(path), skip_bad=True)] == ["1", "3"]
    with bounded(20, megabytes=200):
        assert len(tasks.text_of(path)) == 2 ** 22


@pytest.mark.slow
def test_a_file_of_bad_rows_alone(tmp_path):
    """Ten million of them: counted, not kept."""
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"{\n" * 10 ** 7)
    with bounded(300, megabytes=50), pytest.raises(ValueError, match="line 1: .*10000000 bad rows in all"):
        tasks.file_items(str(path))


@settings(max_examples=30)
@given(text=st.binary(max_size=2000) | st.text().map(str.encode), times=st.integers(1, 50))
def test_any_bytes_are_text(tmp_path_factory, text, times):
    path = tmp_path_factory.getbasetemp() / "any.txt"
    path.write_bytes(text * times)
    tasks.held_out_rows.cache_clear()
    with bounded():
        try:
            rows = tasks.held_out_rows(str(path), "valid", tasks.byte_encoding(), 9)
        except ValueError as error:
            assert path.name in str(error)
            return
        assert all(len(row) == 9 and max(row) <= 256 for row in rows)


# ------------------------------------------------------------------------------------------------------------
# Answers

@st.composite
def answers(draw):
    """What a model might say to stall or trick its examiner."""
    atom = st.text(max_size=3) | st.sampled_from([
        "x", "9", "9**9**9", "1<<10**9", "0x" + "f" * 50, "-", "~", "(", ")", "[", "{", "lambda x:", "f(",
        "if", "else", "*", "+", "**", ":=", ",", " ", "\n", "\0", "\x0c", "'", '"\""', "#", "\\", "٣", "𝘹",
        "\ud800", "__import__('os')", "x.x", "x[0]", "await", "1_0", "1e9", "1j", "...", "yield", "f'{",
        "b'", "@", "\ufeff", "#### ", "9" * 60])
    part = draw(st.lists(atom, min_size=1, max_size=12).map("".join))
    text = draw(st.sampled_from([1, 2, 7, 40, 200, 10 ** 4])) * part
    return draw(st.sampled_from(["", "lambda x: ", "#### "])) + draw(
        st.sampled_from([text, text[:200], text[:180]]))


def test_a_number_is_soon_found_or_not():
    """Of 300,000 digits in no more than time for them."""
    with bounded(2):
        assert tasks.final_number("#### " + "9" * 300_000 + "x") is None
        assert tasks.final_number("#### " + "9," * 300_000) is None
        assert tasks.final_number("#### 12" + " " * 300_000) == 12
        assert tasks.final_number("#### 1" * 300_000) == 1


def hostile_answer(said):
    """The evaluators of all tasks take it for an answer, soon, and execute nothing."""
    with bounded(2):
        found = tasks.run_arithmetic(said, 3)
        assert found is None or type(found) is int and abs(found) <= 10 ** 12
        if found is not None:  # then it is plain arithmetic
            code = said.split("#")[0].strip().removeprefix("lambda")
            assert set(code) <= set("x𝘹0123456789abcdefABCDEFoXO_:+-*() \t\n\f\ufeff\\"), said
        for task in tasks.TASKS:
            tasks.MAKERS[task](random.Random(1)).check(said)
        tasks.item_of({"question": "Who?", "answer": "12"}).check(said)


@settings(max_examples=200)
@given(said=answers())
def test_hostile_answers_are_wrong_and_soon(said):
    hostile_answer(said)


@pytest.mark.slow
@settings(max_examples=5000)
@given(said=answers())
def test_hostile_answers_are_wrong_and_soon_5000_cases(said):
    hostile_answer(said)


# ------------------------------------------------------------------------------------------------------------
# The command line

WORDS = ("-1", "0", "1", "2", "-0.0", "0.5", "nan", "inf", "-inf", "1e999", "1e-320", "1e30", "9" * 30,
         "9" * 5000, "", " ", "abc", "½", "٢", "1_0", "0x10", "1.5", "/dev/null", "/dev/null/x",
         "/nowhere/x.jsonl", "..", "~", "{dir}", "{file}", "{jsonl}", "{text}", "{pipe}.jsonl", "{pt}",
         "\udcff.jsonl", "x" * 300, "*", "a b", "'", "--", "[1]", "λ", "math", "code", "instruct", "lora",
         "folora", "folora-kl", "full", "own", "facts", "calibration-x", "calibration/../x", "peft", "merged",
         "test", "valid", "--steps 0", "--nonsense 1", "--seed '", "--lr nan", "--width 7", "tiny")


def command_line(rng, names, out):
    """(main, arguments): a command on micro settings and up to three more options with any of WORDS."""
    copy = out.parent / "copy"
    stages = ["--pretrain", PRETRAIN, "--calibrate", CALIBRATE, "--adapt", ADAPT]
    adapter = str(copy / "code" / "none" / "adapter.pt")
    main, given, parser = rng.choice([
        (train.main, ["pretrain", *PRETRAIN.split()], "pretrain"),
        (train.main, ["adapt", "--method", rng.choice(["lora", "folora-kl"]), *ADAPT.split()], "adapt"),
        (train.main, ["export", "--to", str(copy / "to"), "--adapter", adapter], "export"),
        (train.main, [], "adapt"), (calibrate.main, CALIBRATE.split(), calibrate.parser()),
        (evaluation.main, ["--methods", "lora", *stages], evaluation.parser()),
        (evaluation.main, [rng.choice(["--compare", "--ablate", "--report"]), "--quick", "--tasks", "code",
                           *stages], evaluation.parser())])
    if isinstance(parser, str):
        parser = train.parser()._subparsers._group_actions[0].choices[parser]
    given = given + (["--out", str(copy)] if given else [])
    for _ in range(rng.randint(0, 3)):
        action = rng.choice([a for a in parser._actions if a.option_strings])
        word = rng.choice(WORDS).format(**names)
        if action.option_strings[-1] in stages:
            word = f"{stages[stages.index(action.option_strings[-1]) + 1]} {word}"  # still micro
        given += [action.option_strings[-1], *([word] if action.nargs is None else
                                               [word, rng.choice(WORDS).format(**names)][:rng.randint(0, 2)])]
    return main, rng.sample(given, len(given)) if rng.random() < 0.03 else given


def fuzzed(rng, names, out):
    """Run one generated command: "done", or "refused" with exit status 2 and one line."""
    main, given = command_line(rng, names, out)
    shutil.rmtree(out.parent / "copy", ignore_errors=True)
    shutil.copytree(out, out.parent / "copy")
    for cache in tasks.file_items, tasks.task_items, tasks.held_out_rows:
        cache.cache_clear()
    said = io.TextIOWrapper(io.BytesIO(), "utf8", "backslashreplace")  # as the real one
    try:
        with bounded(60, megabytes=2000), contextlib.redirect_stderr(said), contextlib.redirect_stdout(
                io.TextIOWrapper(io.BytesIO(), "utf8")):
            train.command(lambda: main(given))
    except SystemExit as stopped:
        said.seek(0)
        said = said.read()
        if stopped.code == 0:
            assert {"-h", "--help"} & {a.split("=")[0] for a in given}
            return "helped"
        assert stopped.code == 2, given
        assert said.startswith("error: ") and said.count("\n") == 1 and len(said) < 6000, (given, said)
        return "refused"
    except Exception as error:
        raise AssertionError(given) from error
    return "done"


@pytest.fixture
def names(out, tmp_path, monkeypatch):
    """What the generated commands may name; and long work is cut short: no workers, canned scores."""
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(ROWS[1]) + "\n" for _ in range(20)))
    (tmp_path / "x.txt").write_text("a line of text\n" * 50)
    os.mkfifo(tmp_path / "pipe.jsonl")
    monkeypatch.chdir(tmp_path)
    scores = {"score": 1.0, "n": 1, "wrong": []}
    monkeypatch.setattr(evaluation, "evaluate", lambda *given, **more: {
        "target": scores, "kept": {}, "text": {}, "Avg1": 1.0, "Avg2": 1.0, "GM": 1.0})

    class Worker:
        exitcode = 0

        def __init__(self, **about):
            self.start = self.join = self.terminate = lambda: None

    monkeypatch.setattr(bench.multiprocessing, "get_context", lambda kind: bench)
    monkeypatch.setattr(bench, "Process", Worker, raising=False)
    monkeypatch.setattr(bench, "CALIBRATIONS", {"small": ("{out}/small", "")})
    monkeypatch.setattr(bench, "step_times", lambda *given: {})
    return {"dir": tmp_path, "file": tmp_path / "x", "jsonl": tmp_path / "x.jsonl",
            "text": tmp_path / "x.txt", "pipe": tmp_path / "pipe", "pt": out / "proxy.pt"}


def test_any_command_line_is_done_or_refused(out, names):
    found = collections.Counter(fuzzed(random.Random(seed), names, out) for seed in range(60))
    assert found["refused"] > 20 and found["done"] > 3


@pytest.mark.slow
def test_any_command_line_is_done_or_refused_2500_cases(out, names):
    counted("command lines", 2500, lambda rng: fuzzed(rng, names, out))


@pytest.mark.parametrize("parser", [*train.parser()._subparsers._group_actions[0].choices.values(),
                                    calibrate.parser(), evaluation.parser()], ids=lambda parser: parser.prog)
def test_help_says_what_every_option_is_and_its_default(parser):
    shown = " ".join(parser.format_help().split())
    for action in parser._actions:
        assert action.help, action.option_strings
        if action.default not in (None, "==SUPPRESS==") and action.default is not False:
            assert f"(default: {action.default})" in parser._get_formatter()._expand_help(action) or \
                f"(default: {action.default})" in shown, action.option_strings
        elif action.option_strings and action.nargs is None and not action.required:
            assert any(word in action.help for word in ("default", "without", "with --report", "several"))

"""Faults: killed, interrupted, out of disk, two at once. Nothing is lost, nothing half-written is believed.

The tests marked slow are left out unless asked for: python -m pytest tests/test_faults.py -m slow -s
"""
import json
import multiprocessing
import os
import pathlib
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time

import pytest
import torch

import calibrate
import eval as evaluation
import model as model_module
import tasks
import train
from test_main import CALIBRATE, PRETRAIN, jsonl

ROOT = pathlib.Path(train.__file__).parent
MAINS = {"train": train.main, "calibrate": calibrate.main, "eval": evaluation.main}
STAGES = {  # a micro model, but enough steps to be killed in
    "pretrain": "train pretrain --batch 2 --layers 1 --heads 2 --width 16 --steps 20 --data {text}",
    "calibrate": f"calibrate --task code {CALIBRATE} --samples 60",
    "adapt": "train adapt --task code --method folora --batch 4 --examples 40 --rank 2 --steps 20 --lr 0.01"}
COMPARE = ["--compare", "--quick", "--tasks", "code", "--pretrain", PRETRAIN, "--calibrate", CALIBRATE,
           "--adapt", "--steps 8 --batch 4 --examples 40 --rank 2"]
KINDS = {"foundation.pt": "foundation", "proxy.pt": "proxy", "calibration.pt": "calibration",
         "adapter.pt": "adapter", "foundation.partial": "partial", "adapter.partial": "partial"}


# Commands in processes of their own. They are forked from one that has all modules: they start at once.

@pytest.fixture(scope="module")
def processes():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "bench", "calibrate", "eval", "train"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        yield context
    for process in multiprocessing.active_children():
        process.kill()


def in_process(arguments, log, before=None, save_every=0.0):
    """Run a command line of MAINS; what it says, and each step of training that it starts, goes to `log`."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout.reconfigure(line_buffering=True)
    os.setpgid(0, 0)  # its workers can be killed with it
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where the tests run in the background
    torch.set_num_threads(1)
    rate, train.SAVE_EVERY = train.learning_rate, save_every

    def learning_rate(step, *more):
        print(f"starts step {step}", flush=True)
        return rate(step, *more)
    train.learning_rate = learning_rate
    if before:
        before()
    print("begins", flush=True)
    train.command(lambda: MAINS[arguments[0]](arguments[1:]))


def start(processes, arguments, out, log=None, **more):
    arguments = arguments.split() if isinstance(arguments, str) else arguments
    process = processes.Process(target=in_process, kwargs=more,
                                args=([*arguments, "--out", str(out)], log or f"{out}.log"))
    process.start()
    return process


def finish(process, status=0, seconds=120):
    process.join(seconds)
    assert process.exitcode == status


def wait_for(log, said, process):
    while not (os.path.exists(log) and said in pathlib.Path(log).read_text()):
        assert process.is_alive(), f"ended before it said {said!r}"
        time.sleep(0.01)


def said(out):
    return pathlib.Path(f"{out}.log").read_text()


def last_line(out):
    return said(out).strip().splitlines()[-1]


def steps_started(text):
    return [int(step) for step in re.findall(r"starts step (\d+)", text)]


def files(out, pattern="*"):
    """{name: bytes} of what stands under `out`; the time of a step and what was printed differ each time."""
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob(pattern))
            if path.is_file() and path.name not in ("log.txt", "step_times.json", "report.md")}


def must_be_whole(out):
    """What stands under a final name can be read."""
    for path in out.rglob("*"):
        if path.name in KINDS:
            model_module.load(path, KINDS[path.name], "")
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.is_file():
            assert path.suffix in (".tmp", ".lock", ".txt", ".bin"), path


@pytest.fixture(scope="module")
def stages(processes, tmp_path_factory):
    """{stage: (a folder just before it, the files after it, its seconds)}, nothing interrupted."""
    folder, found = tmp_path_factory.mktemp("whole"), {}
    text = folder / "text.txt"
    text.write_text("".join(f"{i} and {i + 1}\n" for i in range(9000)))
    for stage, arguments in STAGES.items():
        STAGES[stage] = arguments = arguments.format(text=text)
        before = folder / f"before-{stage}"
        shutil.copytree(folder / "out", before) if found else before.mkdir()
        process = start(processes, arguments, folder / "out", save_every=30)
        wait_for(f"{folder / 'out'}.log", "begins", process)
        began = time.time()
        finish(process)
        found[stage] = before, files(folder / "out"), time.time() - began
    return found


# Killed

def kill_at_random(processes, stages, stage, folder, kills, seed=0):
    """Kill a stage at random moments, start it again; whenever it finishes, compare and begin anew. Returns
    how often it finished."""
    rng, (before, expected, seconds), finished, out = random.Random(f"{stage} {seed}"), stages[stage], 0, None
    while kills or out:
        if not out:
            out, reached = folder / f"{stage}{seed}-{finished}", 0
            shutil.copytree(before, out)
        log = folder / "log"
        log.unlink(missing_ok=True)
        process = start(processes, STAGES[stage], out, log)
        wait_for(log, "begins", process)
        process.join(rng.uniform(0, 1.2 * seconds) if kills else 120)
        if process.is_alive():
            process.kill()
            process.join()
        steps = steps_started(log.read_text())
        assert not steps or steps[0] >= reached, "more than the step at which it was killed is repeated"
        reached = max([reached, *steps])
        must_be_whole(out)
        if process.exitcode == 0:
            found = files(out)  # a kill right before they are removed can leave these two, here or in a run
            assert {name: found[name] for name in found if name in expected or not name.endswith(
                (".lock", ".partial"))} == expected
            finished, out = finished + 1, None
        else:
            assert process.exitcode == -signal.SIGKILL, log.read_text()
            kills -= 1
    return finished


@pytest.mark.parametrize("stage", STAGES)
def test_killed_and_started_again(processes, stages, tmp_path, stage):
    """Saved at each step, killed at random: the end is that of an uninterrupted run, byte for byte, at most
    the step at which it was killed is done again, and nothing is left behind."""
    assert kill_at_random(processes, stages, stage, tmp_path, kills=4)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_killed_and_started_again_40_times(processes, stages, tmp_path, stage):
    """python -m pytest tests/test_faults.py -m slow -s -k 40_times"""
    print(f"\n{stage}: 40 kills, {kill_at_random(processes, stages, stage, tmp_path, 40, 1)} times finished")


def compare_killed_at_random(processes, expected, out, kills):
    """As `kill_at_random` for a comparison of two workers: all its processes die, or one of them."""
    rng, done = random.Random(0), []
    while len(done) < kills:
        process = start(processes, ["eval", *COMPARE, "--workers", "2"], out)
        process.join(rng.uniform(2, 20))
        if not process.is_alive():
            finish(process, 0)
            assert files(out) == expected
            shutil.rmtree(out)
            continue
        who = rng.choice(("all", "parent", "worker"))
        children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        if who == "all":
            os.killpg(process.pid, signal.SIGKILL)
        elif who == "worker" and children:
            os.kill(int(children[-1]), signal.SIGKILL)  # the first child can be Python's resource tracker
        else:
            process.kill()
        process.join(120)
        assert process.exitcode
        done.append(who)
        must_be_whole(out)
    finish(start(processes, ["eval", *COMPARE, "--workers", "2"], out), seconds=300)
    return done


@pytest.fixture(scope="module")
def compared(processes, tmp_path_factory):
    """Files of a comparison that nothing interrupted, by one worker."""
    out = tmp_path_factory.mktemp("comparison") / "out"
    finish(start(processes, ["eval", *COMPARE, "--workers", "1"], out), seconds=500)
    return files(out)


@pytest.mark.slow
def test_comparison_killed_and_started_again(processes, compared, tmp_path):
    """python -m pytest tests/test_faults.py -m slow -s -k comparison_killed"""
    done = compare_killed_at_random(processes, compared, tmp_path / "out", kills=20)
    assert files(tmp_path / "out") == compared
    print("\ncompare: 20 kills,", {who: done.count(who) for who in set(done)})


# Interrupted

@pytest.mark.parametrize("stage", ["pretrain", "adapt"])
def test_ctrl_c_saves_the_step_it_comes_in(processes, stages, tmp_path, stage):
    """Whenever it comes: the step is ended, saved and said; the same command starts with the next one."""
    (before, expected, _), out, rng, first = stages[stage], tmp_path / "out", random.Random(stage), 0
    shutil.copytree(before, out)
    for _ in range(3):
        log = tmp_path / "log"
        log.unlink(missing_ok=True)
        process = start(processes, STAGES[stage], out, log, save_every=1000)
        wait_for(log, f"starts step {first + 2}", process)
        time.sleep(rng.uniform(0, 0.02))
        os.kill(process.pid, signal.SIGINT)
        finish(process, 130)
        steps = steps_started(log.read_text())
        assert steps[0] == first and log.read_text().endswith("stopped; the same command goes on\n")
        first = steps[-1] + 1
    finish(start(processes, STAGES[stage], out))
    assert steps_started(said(out))[0] == first and files(out) == expected


# Nothing can be written

def small_files():
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))


READABLE = all(os.stat(path).st_mode & 5 == 5 for path in (pathlib.Path(sys.prefix, "x")).parents)


def as_nobody():
    if os.geteuid() == 0:
        os.seteuid(65534)


@pytest.mark.parametrize("arguments, file", [
    (f"{STAGES['pretrain']} --seed 1", "foundation.partial"), (f"{STAGES['calibrate']} --seed 1", "proxy.pt"),
    (f"{STAGES['adapt']} --seed 1", "adapter.partial")])
def test_file_size_limit_and_full_disk(processes, stages, tmp_path, arguments, file):
    """One line names the file and the reason, status 2; what was there before is still there, whole."""
    out, text = tmp_path / "out", STAGES["pretrain"].split()[-1]
    shutil.copytree(stages["adapt"][0], out)
    before = files(out)
    finish(start(processes, arguments.format(text=text), out, before=small_files), 2)
    assert re.fullmatch(rf"error: .*{file} cannot be written: .*File too large", last_line(out))
    assert "Traceback" not in said(out) and files(out) == before
    must_be_whole(out)


@pytest.mark.skipif(os.geteuid() == 0 and not READABLE,
                    reason="root may write anywhere, and no other user can read this Python")
def test_read_only_folder(processes, stages):
    """Results in it can be used, new ones are refused in a line; so they are below a file."""
    folder = pathlib.Path(tempfile.mkdtemp())  # pytest's own folders are for root alone
    try:
        shutil.copytree(stages["adapt"][0], folder / "out")
        text = STAGES["pretrain"].split()[-1]
        pretrain = STAGES["pretrain"].replace(text, shutil.copy(text, folder))
        for path in [folder, *folder.rglob("*")]:
            path.chmod(0o555 if path.is_dir() else 0o444)
        log = folder / "log"
        folder.chmod(0o755)
        for arguments, out, status, answer in (
                (STAGES["calibrate"], folder / "out", 0, "calibration.pt is up to date"),
                (STAGES["adapt"], folder / "out", 2, "Permission denied"),
                (f"{pretrain} --seed 1", folder / "out", 2, "Permission denied"),
                (pretrain, folder / "log" / "out", 2, "error: .*Not a directory")):
            finish(start(processes, arguments, out, log, before=as_nobody), status)
            assert re.search(answer, log.read_text().strip().splitlines()[-1])
            assert "Traceback" not in log.read_text()
    finally:
        shutil.rmtree(folder)


# Two at once

@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_do_the_work_once(processes, stages, tmp_path, stage):
    (before, expected, _), out = stages[stage], tmp_path / "out"
    shutil.copytree(before, out)
    for process in [start(processes, STAGES[stage], out) for _ in range(2)]:
        finish(process)
    steps = steps_started(said(out))
    assert steps == sorted(set(steps)) and files(out) == expected
    count = 1 + (stage == "calibrate")  # which makes two files
    assert said(out).count(" written\n") == said(out).count(" is up to date\n") == count, said(out)


def test_who_waits_goes_on_where_a_killed_process_stopped(processes, stages, tmp_path):
    (before, expected, _), out = stages["adapt"], tmp_path / "out"
    shutil.copytree(before, out)
    first = start(processes, STAGES["adapt"], out)
    wait_for(f"{out}.log", "starts step 5", first)
    os.kill(first.pid, signal.SIGSTOP)
    second = start(processes, STAGES["adapt"], out)
    wait_for(f"{out}.log", "waiting for it", second)
    first.kill()
    finish(second)
    steps = steps_started(said(out))
    assert "going on from step" in said(out) and steps[-1] == 19 and len(steps) <= 21
    assert files(out) == expected


def count_up(path, times):
    for _ in range(times):
        with model_module.claimed(path):
            path.write_text(str(int(path.read_text()) + 1))


def write_letters(path, letter, times):
    for i in range(times):
        model_module.write_whole(path, lambda f: f.write(letter * (9000 + i)))


def test_a_claim_is_for_one_process_at_a_time(processes, tmp_path):
    """Four count up a file together: none is lost. Four write another one: it is always of one of them."""
    path, other = tmp_path / "count", tmp_path / "letters"
    path.write_text("0")
    other.write_bytes(b"a")
    running = [processes.Process(target=count_up, args=(path, 100)) for _ in range(4)]
    running += [processes.Process(target=write_letters, args=(other, letter, 30)) for letter in (b"a", b"b")]
    for process in running:
        process.start()
    while any(process.is_alive() for process in running[4:]):
        assert len(set(other.read_bytes())) == 1
    for process in running:
        finish(process)
    assert path.read_text() == "400" and len(list(tmp_path.iterdir())) == 2


def test_a_claim_can_be_refused_and_ends_with_its_process(processes, tmp_path):
    other = processes.Process(target=hold, args=(tmp_path / "x", tmp_path / "held"))
    other.start()
    wait_for(tmp_path / "held", "yes", other)
    with model_module.claimed(tmp_path / "x", wait=False) as mine:
        assert not mine
    other.kill()
    with model_module.claimed(tmp_path / "x") as mine:
        assert mine
    assert [path.name for path in tmp_path.iterdir()] == ["held"]


def hold(path, held):
    with model_module.claimed(path):
        held.write_text("yes")
        time.sleep(60)


@pytest.mark.slow
def test_two_comparisons_do_each_run_once(processes, compared, tmp_path):
    """python -m pytest tests/test_faults.py -m slow -s -k two_comparisons"""
    out = tmp_path / "out"
    for process in [start(processes, ["eval", *COMPARE, "--workers", "1"], out) for _ in range(2)]:
        finish(process, seconds=500)
    done = re.findall(r"^code .* seed \d+", said(out), re.M)
    assert len(done) == len(set(done)) == len(list(out.rglob("result.json")))
    assert files(out) == compared
    print(f"\n{len(done)} runs by two comparisons, each done once, as one worker alone does them")


# Always the same

def own_files(folder):
    """A task and text to be kept; prompts and answers of very different lengths."""
    rng = random.Random(0)
    rows = [{"question": str(i) + "?" * rng.choice((1, 9, 85)), "answer": "b" * rng.choice((1, 20))}
            for i in range(20)]
    (folder / "story.txt").write_text("Once upon a time there was a line.\n" * 99)
    return jsonl(folder / "own.jsonl", *rows), str(folder / "story.txt")


def test_the_same_main_job_twice_gives_the_same_files(processes, stages, tmp_path):
    """Every byte; the three stages are compared where they are killed, too."""
    task, text = own_files(tmp_path)
    options = [f"--{stage}={line[line.index('--'):]}" for stage, line in STAGES.items()]
    options = [option.replace("--task code", "").replace("--method folora", "") for option in options]
    for out in tmp_path / "a", tmp_path / "b":
        arguments = ["eval", "--task", task, "--keep", text, "--methods", "folora-kl", *options]
        finish(start(processes, arguments, out))
    assert files(tmp_path / "a") == files(tmp_path / "b") and len(files(tmp_path / "a")) == 8


def test_scores_do_not_depend_on_the_batch_size(stages, tmp_path):
    """Answers are the same, also where a long prompt leaves little room for one; likelihoods to rounding."""
    (tmp_path / "foundation.pt").write_bytes(stages["adapt"][1]["foundation.pt"])
    model, _ = train.load_foundation(tmp_path, "cpu")
    items = tasks.file_items(own_files(tmp_path)[0])
    answers = [evaluation.answers(model, items, batch) for batch in (1, 3, 200)]
    assert answers[0] == answers[1] == answers[2] and len({len(said) for said in answers[0]}) > 1
    alone = [evaluation.answers(model, [item, max(items, key=lambda i: len(i.answer))])[0] for item in items]
    assert alone == answers[0]
    for batch in 1, 3:
        found = evaluation.likelihood(model, items, batch)["nats"]
        assert found == pytest.approx(evaluation.likelihood(model, items)["nats"], rel=1e-5)


def test_data_order_depends_on_row_order_and_seed_alone(stages, tmp_path):
    """Not on the file's name or its blank lines; with rows in another order, the same places are drawn."""
    (tmp_path / "foundation.pt").write_bytes(stages["adapt"][1]["foundation.pt"])
    config = train.load_foundation(tmp_path, "cpu")[0].config
    rows = [json.dumps({"prompt": f"{i} ->", "completion": f"{i}"}) for i in range(40)]

    def drawn(name, lines, seed):
        (tmp_path / name).write_text("".join(lines))
        args = train.parser().parse_args(["adapt", "--task", str(tmp_path / name), "--seed", str(seed)])
        items = tasks.task_items(args.task, "train", args.examples)
        batch = train.batches(args, items, train.method_called("lora"), None, config)
        return [batch(step)[0].tolist() for step in (0, 1)]
    whole = drawn("a.jsonl", [f"{row}\n" for row in rows], 3)
    assert whole == drawn("b.jsonl", [f"{row}\r\n\n" for row in rows], 3)
    assert whole != drawn("a2.jsonl", [f"{row}\n" for row in rows], 4)
    turned = rows[31::-1] + rows[32:]  # the last fifth is held out
    turned = drawn("c.jsonl", [f"{row}\n" for row in turned], 3)

    def numbers(batch):
        return [int("".join(chr(t) for t in row[1:] if t < 256).split()[0]) for row in batch]
    assert [31 - i for i in numbers(turned[0])] == numbers(whole[0])


# Memory

ENCODINGS = ["bytes", pytest.param("gpt2", marks=pytest.mark.skipif(
    not os.environ.get("TIKTOKEN_CACHE_DIR"), reason="needs GPT-2's vocabulary"))]


def text_files(folder, encoding, *texts):
    """TextFiles of these texts, tokenised."""
    names = [folder / f"{i}.txt" for i in range(len(texts))]
    for name, text in zip(names, texts):
        name.write_bytes(text.encode() if isinstance(text, str) else text)
    found = tasks.TextFiles(names, tasks.encoding_called(encoding), folder)
    model_module.write_whole(found.path, found.write)
    return found


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_rows_of_text_files_start_lines_and_reach_all_of_them(tmp_path, monkeypatch, encoding):
    """Each row is <|endoftext|> and a stretch of text from the start of a line; pieces change nothing."""
    lines, decode = [f"line {i}\n" for i in range(30)], tasks.encoding_called(encoding).decode
    texts = "".join(lines[:20]), "".join(lines[20:])
    found, rng = text_files(tmp_path, encoding, *texts), random.Random(0)
    whole, starts = "<|endoftext|>" + "<|endoftext|>".join(texts), set()
    for _ in range(2000):
        row = found.row(rng, 12)
        assert len(row) == 12 and row[0] == found.eot
        said = decode(row[1:])
        assert said in whole and said.splitlines(keepends=True)[0] in lines, said
        starts.add(said.splitlines(keepends=True)[0])
    assert starts == set(lines[:27 if encoding == "gpt2" else 29])  # behind them are no eleven tokens
    tokens = found.path.read_bytes()
    monkeypatch.setattr(tasks.TextFiles, "PIECE", 40)
    assert text_files(tmp_path, encoding, *texts).path.read_bytes() == tokens


def test_text_files_at_their_edges(tmp_path):
    """One row exactly; a line that never ends; bytes that are no text; too little, nothing, not a file."""
    rng, eot = random.Random(0), 256
    assert text_files(tmp_path, "bytes", "abc\n").row(rng, 5) == [eot, *b"abc\n"]
    with pytest.raises(ValueError, match="data has 5 tokens; a row takes 6"):
        text_files(tmp_path, "bytes", "abc\n").row(rng, 6)
    endless = text_files(tmp_path, "bytes", "".join(map(chr, range(33, 127))) * 2000)
    assert len({endless.row(rng, 9)[1] for _ in range(300)}) > 80
    odd = text_files(tmp_path, "bytes", b"\xff\xfe\n" * 9)
    assert set(odd.row(rng, 20)) <= {eot, *"\N{REPLACEMENT CHARACTER}\n".encode()}
    (tmp_path / "empty.txt").touch()
    for name in "empty.txt", "missing.txt", "":
        with pytest.raises(ValueError, match=f"data names .*{name}, which is missing, empty or not a file"):
            tasks.TextFiles([tmp_path / "0.txt", tmp_path / name], tasks.byte_encoding(), tmp_path)


def test_foundation_from_text_files(processes, stages, tmp_path):
    """Made again when the text changes, and only then; the vocabulary is the encoding's."""
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text("some words\n" * 99)
    command = f"train pretrain --batch 2 --layers 1 --heads 2 --width 16 --steps 2 --data {text}"
    for change, answer in ("", "written"), ("", "is up to date"), ("more", "written"):
        text.write_text(text.read_text() + change)
        finish(start(processes, command, out))
        assert last_line(out).endswith(f"foundation.pt {answer}")
    if os.environ.get("TIKTOKEN_CACHE_DIR"):
        finish(start(processes, f"{command} --encoding gpt2", out))
        assert train.load_foundation(out, "cpu")[0].config.vocab_size == 50257
    text.write_text("short\n")
    finish(start(processes, command, tmp_path / "other"), 2)
    assert last_line(tmp_path / "other") == ("error: data has 7 tokens; a row takes 129: give more text, or "
                                             "a smaller --context")


def status(key):
    """Mebibytes of this process's VmData, VmRSS or VmHWM."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) >> 10 for line in lines if line.startswith(key))


def little_memory():
    most = (status("VmData") + 60) << 20  # training a micro model takes some 40 MB
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))


def pretrain_on(processes, folder, megabytes):
    """Train on so much text, the second half of it one line, with 60 MB of memory; returns its tokens'
    bytes."""
    with open(folder / "big.txt", "w") as f:
        for i in range(megabytes << 14):
            line = f"{i:10} stands at the start of a line of sixty-four characters"[:63]
            f.write(line + "\n "[i >> 13 >= megabytes])
    command = f"train pretrain --batch 2 --layers 1 --width 16 --heads 2 --steps 20 --data {folder}/big.txt"
    finish(start(processes, command, folder / "out", before=little_memory, save_every=30), seconds=500)
    (folder / "big.txt").unlink()
    return next((folder / "out").glob("tokens-*.bin")).stat().st_size


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux")
def test_text_larger_than_memory(processes, tmp_path):
    assert pretrain_on(processes, tmp_path, 40) > 80 << 20


@pytest.mark.slow
def test_text_much_larger_than_memory(processes, tmp_path):
    """python -m pytest tests/test_faults.py -m slow -s -k much_larger"""
    size = pretrain_on(processes, tmp_path, 1000)
    print(f"\n{size / 2e6:,.0f} MB of text, {size / 1e6:,.0f} MB of tokens, 60 MB of memory")


def grow(out, runs, report):
    import bench
    args = evaluation.parser().parse_args(["--adapt", COMPARE[-1], "--out", str(out)])
    study, rss = bench.Study(args, ("code",)), []
    for i in range(runs):
        study.do(("code", ("lora", "folora", "folora-kl", "full", "replay")[i % 5], i // 5, 7, ()))
        rss.append(status("VmRSS"))
    report.write_text(json.dumps(rss))


@pytest.mark.slow
@pytest.mark.parametrize("runs", [50])
def test_memory_over_many_runs_of_a_comparison(processes, stages, tmp_path, runs):
    """python -m pytest tests/test_faults.py -m slow -s -k many_runs"""
    out = tmp_path / "out"
    shutil.copytree(stages["adapt"][0], out)
    process = processes.Process(target=grow, args=(out, runs, tmp_path / "rss"))
    process.start()
    finish(process, seconds=600)
    rss = json.loads((tmp_path / "rss").read_text())
    print(f"\nMB after runs 1, 10, 20, …: {rss[0]}, {rss[9::10]}")
    assert rss[-1] - rss[9] < 10

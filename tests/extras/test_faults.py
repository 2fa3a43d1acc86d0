"""Faults: killed, interrupted, out of disk, two at once. Nothing is lost or read half-written.

The suite draws a few random moments; the long tests draw many:
python -m pytest tests/extras/test_faults.py -m slow -s
"""
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

import calibrate
import train
from extras.cli import command
from extras.files import atomic_write, file_lock, load
from micro import ADAPT, CALIBRATE

ROOT = pathlib.Path(train.__file__).parent
MAINS = {"train": train.main, "calibrate": calibrate.main}
STAGES = {  # small, but with enough steps to be killed in
    "pretrain": "train pretrain --batch 2 --layers 1 --heads 2 --width 16 --steps 20 --data TEXT",
    "calibrate": f"calibrate --task code {CALIBRATE} --samples 30",
    "adapt": f"train adapt --task code --method folora {ADAPT} --steps 20"}
KINDS = {"foundation.pt": "foundation", "proxy.pt": "proxy", "calibration.pt": "calibration",
         "adapter.pt": "adapter", "foundation.partial": "partial", "adapter.partial": "partial"}


# ------------------------------------------------------------------------------------------------
# Commands in processes of their own, forked from one that has all modules: they start at once

@pytest.fixture(scope="module")
def processes():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "calibrate", "train"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'tests'}")
        yield context
    for process in multiprocessing.active_children():
        process.kill()


def run_command(arguments, log, before, save_every):
    """Run a command of MAINS; its output and each step of training that it starts go to `log`."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout.reconfigure(line_buffering=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also if the tests ignore it
    rate, train.SAVE_EVERY = train.rate_factor, save_every

    def rate_factor(step, *more):
        print(f"starts step {step}", flush=True)
        return rate(step, *more)
    train.rate_factor = rate_factor
    before()
    print("begins", flush=True)
    command(lambda: MAINS[arguments[0]](arguments[1:]))


def start(processes, arguments, out, log=None, before=int, save_every=0):
    """A process that runs this command line with --out `out`."""
    process = processes.Process(target=run_command, args=(
        [*arguments.split(), "--out", str(out)], log or f"{out}.log", before, save_every))
    process.start()
    return process


def finish(process, status=0, seconds=300):
    process.join(seconds)
    assert process.exitcode == status


def wait_for(log, text, process):
    while not (os.path.exists(log) and text in pathlib.Path(log).read_text()):
        assert process.is_alive(), f"ended before it printed {text!r}"
        time.sleep(0.01)


def printed(out):
    return pathlib.Path(f"{out}.log").read_text()


def steps_started(text):
    return [int(step) for step in re.findall(r"starts step (\d+)", text)]


def files(out):
    """{name: bytes} of all files under `out`."""
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*"))
            if path.is_file()}


def assert_whole(out):
    """Whatever has a final name can be read."""
    for path in out.rglob("*"):
        if path.name in KINDS:
            load(path, KINDS[path.name], "")
        elif path.is_file():
            assert path.suffix in (".tmp", ".lock"), path


@pytest.fixture(scope="module")
def stages(processes, tmp_path_factory):
    """{stage: (its command, a folder as it was before, the files after it, its seconds)}, of stages
    that nothing interrupted."""
    folder, found = tmp_path_factory.mktemp("whole"), {}
    (folder / "out").mkdir()
    (folder / "text.txt").write_text("".join(f"{i} and {i + 1}\n" for i in range(9000)))
    for stage, arguments in STAGES.items():
        arguments = arguments.replace("TEXT", str(folder / "text.txt"))
        before = shutil.copytree(folder / "out", folder / f"before-{stage}")
        process = start(processes, arguments, folder / "out", save_every=30)
        wait_for(f"{folder / 'out'}.log", "begins", process)
        began = time.time()
        finish(process)
        found[stage] = arguments, before, files(folder / "out"), time.time() - began
    return found


# ------------------------------------------------------------------------------------------------
# Killed or interrupted

def stop_at_random(processes, stages, stage, folder, stops, seed=0):
    """Kill a stage, or press Ctrl-C, at random moments and start it again; whenever it finishes,
    compare its files and begin anew. Returns how often it finished."""
    arguments, before, expected, seconds = stages[stage]
    rng, finished, out = random.Random(f"{stage} {seed}"), 0, None
    while stops or out:
        if not out:
            out, reached = shutil.copytree(before, folder / f"{stage}{seed}-{finished}"), 0
        log = folder / "log"
        log.unlink(missing_ok=True)
        process = start(processes, arguments, out, log)
        wait_for(log, "begins", process)
        process.join(rng.uniform(0, 1.2 * seconds) if stops else 120)
        sent = rng.choice((signal.SIGKILL, signal.SIGINT))
        if process.is_alive():
            os.kill(process.pid, sent)
            process.join(120)
        steps = steps_started(log.read_text())
        assert not steps or steps[0] >= reached, "no step but the stopped one is repeated"
        reached = max([reached, *steps])
        assert_whole(out)
        if process.exitcode == 0:
            found = files(out)  # a kill just before the end can leave these two
            assert {name: content for name, content in found.items() if name in expected
                    or not name.endswith((".lock", ".partial"))} == expected
            finished, out = finished + 1, None
        else:
            assert process.exitcode == (130 if sent == signal.SIGINT else -sent), log.read_text()
            if sent == signal.SIGINT:
                assert log.read_text().endswith("stopped; the same command continues from the last "
                                                "save\n")
            stops -= 1
    return finished


@pytest.mark.parametrize("stage", STAGES)
def test_stopped_and_started_again(processes, stages, tmp_path, stage):
    """Saved at each step, stopped at random: the files are those of an uninterrupted run, byte for
    byte, only the step at which it was stopped is repeated, and nothing is left behind."""
    assert stop_at_random(processes, stages, stage, tmp_path, stops=2)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_stopped_and_started_again_40_times(processes, stages, tmp_path, stage):
    finished = stop_at_random(processes, stages, stage, tmp_path, stops=40, seed=1)
    print(f"\n{stage}: stopped 40 times, finished {finished} times")


# ------------------------------------------------------------------------------------------------
# Nothing can be written

def small_files():
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))


def as_nobody():
    if os.geteuid() == 0:
        os.seteuid(65534)


@pytest.mark.parametrize("stage, file", [("pretrain", "foundation.partial"),
                                         ("calibrate", "proxy.pt"), ("adapt", "adapter.partial")])
def test_a_file_size_limit_stands_for_a_full_disk(processes, stages, tmp_path, stage, file):
    """One line names the file and the reason, status 2; what was there before is whole."""
    out = shutil.copytree(stages["adapt"][1], tmp_path / "out")
    finish(start(processes, f"{stages[stage][0]} --seed 1", out, before=small_files), 2)
    error = printed(out).strip().splitlines()[-1]
    assert re.fullmatch(rf"error: .*{file} cannot be written: .*File too large", error)
    assert "Traceback" not in printed(out) and files(out) == files(stages["adapt"][1])


@pytest.mark.skipif(os.geteuid() == 0 and not all(path.stat().st_mode & 5 == 5 for path in
                                                  pathlib.Path(sys.prefix, "x").parents),
                    reason="root may write anywhere, and no other user can read this Python")
def test_a_read_only_folder(processes, stages):
    """Its results can be used, new ones are refused in one line; so are those below a file."""
    folder = pathlib.Path(tempfile.mkdtemp())  # pytest's own folders are for root alone
    (pretrain, before, *_), log = stages["adapt"], folder / "log"
    text = stages["pretrain"][0].split()[-1]
    pretrain = stages["pretrain"][0].replace(text, shutil.copy(text, folder))
    try:
        out = shutil.copytree(before, folder / "out")
        for path in [out, *out.rglob("*"), folder / "text.txt"]:
            path.chmod(0o555 if path.is_dir() else 0o444)
        folder.chmod(0o755)
        for arguments, out, status, answer in (
                (stages["calibrate"][0], folder / "out", 0, "calibration.pt is up to date"),
                (stages["adapt"][0], folder / "out", 2, "Permission denied"),
                (f"{pretrain} --seed 1", folder / "out", 2, "Permission denied"),
                (pretrain, folder / "log" / "out", 2, "error: .*Not a directory")):
            finish(start(processes, arguments, out, log, before=as_nobody), status)
            assert re.search(answer, log.read_text().strip().splitlines()[-1])
            assert "Traceback" not in log.read_text()
    finally:
        shutil.rmtree(folder)


# ------------------------------------------------------------------------------------------------
# Two at once

@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_do_the_work_once(processes, stages, tmp_path, stage):
    arguments, before, expected, _ = stages[stage]
    out = shutil.copytree(before, tmp_path / "out")
    for process in [start(processes, arguments, out) for _ in range(2)]:
        finish(process)
    steps, count = steps_started(printed(out)), 1 + (stage == "calibrate")  # which makes two files
    assert steps == sorted(set(steps)) and files(out) == expected
    assert printed(out).count(" written\n") == printed(out).count(" is up to date\n") == count


def test_who_waits_continues_where_a_killed_process_stopped(processes, stages, tmp_path):
    arguments, before, expected, _ = stages["adapt"]
    out = shutil.copytree(before, tmp_path / "out")
    first = start(processes, arguments, out)
    wait_for(f"{out}.log", "starts step 5", first)
    os.kill(first.pid, signal.SIGSTOP)
    second = start(processes, arguments, out)
    wait_for(f"{out}.log", "waiting for it", second)
    first.kill()
    finish(second)
    steps = steps_started(printed(out))
    assert "continuing after step" in printed(out) and steps[-1] == 19 and len(steps) <= 21
    assert files(out) == expected


def count_up(path, times):
    for _ in range(times):
        with file_lock(path):
            path.write_text(str(int(path.read_text()) + 1))


def write_letters(path, letter, times):
    for i in range(times):
        atomic_write(path, lambda f: f.write(letter * (9000 + i)))


def test_a_lock_is_for_one_process_at_a_time(processes, tmp_path):
    """Four count up a file together: no count is lost. Two write another one: it is always wholly
    of one of them."""
    path, other = tmp_path / "count", tmp_path / "letters"
    path.write_text("0")
    other.write_bytes(b"a")
    running = [*(processes.Process(target=count_up, args=(path, 50)) for _ in range(4)),
               *(processes.Process(target=write_letters, args=(other, letter, 20))
                 for letter in (b"a", b"b"))]
    for process in running:
        process.start()
    while any(process.is_alive() for process in running[4:]):
        assert len(set(other.read_bytes())) == 1
    for process in running:
        finish(process)
    assert path.read_text() == "200" and len(list(tmp_path.iterdir())) == 2


def hold(path, held):
    with file_lock(path):
        held.write_text("yes")
        time.sleep(60)


def test_a_lock_can_be_refused_and_ends_with_its_process(processes, tmp_path):
    other = processes.Process(target=hold, args=(tmp_path / "x", tmp_path / "held"))
    other.start()
    wait_for(tmp_path / "held", "yes", other)
    with file_lock(tmp_path / "x", wait=False) as locked:
        assert not locked
    other.kill()
    with file_lock(tmp_path / "x") as locked:
        assert locked
    assert [path.name for path in tmp_path.iterdir()] == ["held"]

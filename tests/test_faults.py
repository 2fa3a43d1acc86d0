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

import numpy as np
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
    "calibrate": f"calibrate --task code {CALIBRATE} --samples 100",
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
        began = time.time()
        finish(start(processes, arguments, folder / "out", save_every=30))
        found[stage] = before, files(folder / "out"), time.time() - began
        print(stage, time.time()-began)
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
            assert files(out) == expected
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

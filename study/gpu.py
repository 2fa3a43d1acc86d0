"""Everything that only a GPU can show, in order of worth, within a number of minutes.

Each step is one or more subprocesses. Its result, or why it failed or was skipped, is written to
gpu.json at once; the same command later does only what has no result yet.
"""
import json
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time

import torch

import train
from extras.tables import markdown
from extras.files import load, read_cached_json, write_json
from extras.machine import describe, pick_device
from study.speed import MICRO, ROWS

ROOT = pathlib.Path(train.__file__).parent


class Runner:
    """Runs one step's subprocesses until its deadline."""

    def __init__(self, out, rehearse, deadline):
        self.out, self.rehearse, self.deadline = out, rehearse, deadline
        self.job = out / "main-job"  # the main job's results serve later steps
        self.env = {**os.environ, "FOLORA_TEST_CUDA": "1"}
        if rehearse:
            self.env |= {"CUDA_VISIBLE_DEVICES": "", "TORCH_COMPILE_DISABLE": "1"}

    def __call__(self, *command, statuses=(0,)):
        """What `python *command` prints; ValueError if it fails or takes too long."""
        process = subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, env=self.env,
                                   text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                   start_new_session=True)
        try:
            output, _ = process.communicate(timeout=max(1, self.deadline - time.time()))
        except subprocess.TimeoutExpired:
            raise ValueError(f"{command[:3]} did not finish in its time") from None
        finally:
            if process.poll() is None:  # its workers too
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
        if process.returncode not in statuses:
            raise ValueError(f"exit status {process.returncode}: {output[-2000:]}")
        return output

    def options(self, stage):
        """A stage's options: none, or micro sizes in a rehearsal."""
        return shlex.split(MICRO[f"--{stage}"]) if self.rehearse else []


# ------------------------------------------------------------------------------------------------
# The steps: each takes a Runner and returns what is written to gpu.json

def cuda_tests(run):
    output = run("-m", "pytest", "-m", "cuda", "-v", "-rf", "-p", "no:cacheprovider",
                 "tests/test_cuda.py", statuses=(0, 1))
    found = dict(re.findall(r"::(\S+) (PASSED|FAILED|SKIPPED|ERROR)", output))
    if not found:
        raise ValueError(f"pytest collected no test: {output[-2000:]}")
    failed = "FAILED" in found.values() or "ERROR" in found.values()
    return {**found, "output": output[-6000:]} if failed else found


def speed_row(row):
    def step(run):
        path = run.out / f"speed-{row}.json"
        run("-m", "study", "speed", "--only", row, "--out", run.out, "--json", path,
            *(["--rehearse"] if run.rehearse else []))
        return json.loads(path.read_text())
    return step


def quick_comparison(run):
    out, micro = run.out / "comparison", []
    if run.rehearse:
        micro = ["--tasks", "code", "--methods", "lora", "folora", "--workers", "2",
                 *(part for pair in MICRO.items() for part in pair)]
    run("-m", "study", "compare", "--quick", "--out", out, *micro)
    return json.loads((out / "report.json").read_text())


def adapting(run, *launcher, steps=200, options=()):
    """{"seconds", "losses"} of `train.py adapt` in a process of its own."""
    for stage, command in ("pretrain", ["train.py", "pretrain"]), ("calibrate", ["calibrate.py"]):
        run(*command, "--out", run.job, *run.options(stage))  # up to date after the main job
    command = ["adapt", "--task", "code", "--method", "folora", "--lr", "0.008", "--seed", "11",
               "--out", str(run.job), *run.options("adapt"), *options, "--steps", str(steps)]
    path = train.run_folder(train.parser().parse_args(command)) / "adapter.pt"
    path.unlink(missing_ok=True)
    began = time.time()
    run(*launcher, "train.py", *command)
    return {"seconds": time.time() - began, "losses": load(path, "adapter", "")["losses"]}


def difference(a, b):
    """Of two runs: the largest difference between their losses, in nats."""
    return max(abs(x - y) for x, y in zip(a["losses"], b["losses"], strict=True))


def torchrun(run):
    """One process under torchrun: NCCL on a GPU, Gloo on a CPU."""
    alone = adapting(run)
    joined = adapting(run, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1")
    return {"alone, s": alone["seconds"], "torchrun, s": joined["seconds"],
            "largest difference of losses": difference(alone, joined)}


def compiled(run):
    """Seconds per step with and without --compile, from runs of two lengths; and what it costs."""
    short, long = (200, 1000) if not run.rehearse else (4, 8)
    found = {name: [adapting(run, steps=n, options=options) for n in (short, long)]
             for name, options in (("plain", []), ("compiled", ["--compile"]))}
    return {**{f"{name}, s per step": (b["seconds"] - a["seconds"]) / (long - short)
               for name, (a, b) in found.items()},
            "more before the first step, s": found["compiled"][0]["seconds"]
            - found["plain"][0]["seconds"],
            "largest difference of losses": difference(found["plain"][0], found["compiled"][0])}


STEPS = {  # name: (seconds it may take, function)
    "tests": (180, cuda_tests),
    "main-job": (150, speed_row("main-job")),
    **{f"speed {row}": (90, speed_row(row)) for row in ROWS
       if row not in ("main-job", "memory", "growth")},
    "speed memory": (60, speed_row("memory")),
    "comparison": (420, quick_comparison),
    "torchrun": (90, torchrun),
    "compile": (240, compiled),
    "speed growth": (240, speed_row("growth")),
}


def gpu(args):
    """Do the steps; each is given up after twice its usual time."""
    if args.rehearse:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif not torch.cuda.is_available():
        raise ValueError("no GPU is visible; --rehearse tries every step on the CPU")
    began, out = time.time(), pathlib.Path(args.out).absolute()
    identity = {"machine": describe(pick_device()), "torch": torch.__version__,
                "rehearsal": args.rehearse}
    steps = (read_cached_json(out / "gpu.json", identity) or {"steps": {}})["steps"]
    for name in args.only or STEPS:
        usual, step = STEPS[name]
        left = began + 60 * args.minutes - time.time()
        if "result" in steps.get(name, {}) and not args.only:
            continue
        if left < usual and not args.rehearse:
            steps[name] = {"skipped": f"may take {usual} s, {left:.0f} s were left"}
        else:
            print(f"{name} ... ({left:.0f} s left)", flush=True)
            start = time.time()
            try:
                found = {"result": step(Runner(out, args.rehearse, start + min(left, 2 * usual)))}
            except Exception as error:  # recorded; the next step goes on
                found = {"failed": f"{type(error).__name__}: {error}"}
            steps[name] = {"seconds": round(time.time() - start, 1), **found}
        write_json(out / "gpu.json", {"identity": identity, "steps": steps})
    rows = [[name, f"{found.get('seconds', 0):.0f}",
             "done" if "result" in found else " ".join(list(found.values())[-1].split())[-90:]]
            for name, found in steps.items()]
    print(f"\n{identity['machine']}\n\n{markdown(['step', 's', ''], rows)}\n\n"
          f"{out / 'gpu.json'} written")
    if args.rehearse and any("failed" in found for found in steps.values()):
        raise ValueError("the rehearsal failed; see above")

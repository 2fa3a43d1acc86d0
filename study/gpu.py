"""Everything that only a GPU can show, in order of worth, within a number of minutes.

Each step runs in processes of its own, so that none holds memory which a later one needs. Its
result, or why it failed or was skipped, is written to OUT/gpu/gpu.json at once; the same command
later does only what has no result yet.
"""
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import torch

import train
from extras.files import load, read_cached_json, write_json
from extras.machine import describe_machine, pick_device
from extras.tables import markdown
from study.speed import MICRO

ROOT = pathlib.Path(train.__file__).parent.absolute()


class Runner:
    """Runs one step's subprocesses until its deadline."""

    def __init__(self, out, rehearse, deadline):
        self.out, self.rehearse, self.deadline = out, rehearse, deadline
        self.job = out / "main-job"  # the main job's results serve later steps
        self.env = {**os.environ, "FOLORA_TEST_CUDA": "1",
                    "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}  # what --compile costs at first
        if rehearse:
            self.env |= {"CUDA_VISIBLE_DEVICES": "", "TORCH_COMPILE_DISABLE": "1"}

    def __call__(self, *arguments, statuses=(0,)):
        """What `python *arguments` prints; ValueError if it fails or takes too long."""
        process = subprocess.Popen([sys.executable, *map(str, arguments)], cwd=ROOT, env=self.env,
                                   text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                   start_new_session=True)
        try:
            output, _ = process.communicate(timeout=max(1, self.deadline - time.time()))
        except subprocess.TimeoutExpired:
            raise ValueError(f"{arguments[:3]} did not finish in its time") from None
        finally:
            if process.poll() is None:
                stop(process)
        if process.returncode not in statuses:
            raise ValueError(f"exit status {process.returncode}: {output[-2000:]}")
        return output


def stop(process):
    """End a process and its workers. torchrun's are in groups of their own, which it ends itself
    when it is asked to; nothing more is read, as a worker may hold the pipe open."""
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    process.stdout.close()


# ------------------------------------------------------------------------------------------------
# The steps: each takes a Runner and returns what is written to gpu.json

def cuda_tests(run):
    """{test: "PASSED" or "SKIPPED"}; a rehearsal runs the same tests' CPU variants."""
    chosen = "not cuda" if run.rehearse else "cuda"
    output = run("-m", "pytest", "-m", chosen, "-v", "-rf", "--tb=short", "-p", "no:cacheprovider",
                 "tests/test_cuda.py", statuses=(0, 1))
    found = dict(re.findall(r"::(\S+) (PASSED|FAILED|SKIPPED|ERROR)", output))
    if not {"PASSED"} <= {*found.values()} <= {"PASSED", "SKIPPED"}:  # what an older torch lacks
        wrong = {name: status for name, status in found.items() if status != "PASSED"}
        raise ValueError(f"{wrong or 'no test'} of {len(found)}: {output[-6000:]}")
    return found


def speed_row(run, row):
    path = run.out / f"speed-{row}.json"
    run("-m", "study", "speed", "--only", row, "--out", run.out, "--json", path,
        *(["--rehearse"] if run.rehearse else []))
    return json.loads(path.read_text())


def quick_comparison(run):
    micro = ["--tasks", "code", "--arms", "lora r8", "--workers", "1",
             *(part for pair in MICRO.items() for part in pair)] if run.rehearse else []
    run("-m", "study", "compare", "--quick", "--out", run.out / "comparison", *micro)
    return json.loads((run.out / "comparison" / "results.json").read_text())


def adapting(run, *launcher, options=()):
    """(seconds, losses) of 400 steps of FoLoRA, made anew in a process of its own."""
    if not (run.job / "code/calibration.pt").exists():
        speed_row(run, "main-job")
    micro = MICRO["--adapt"].split() if run.rehearse else []
    arguments = ["adapt", "--task", "code", "--method", "folora", "--lr", "0.008", "--seed", "11",
                 "--out", str(run.job), *micro, *options]
    path = train.run_folder(train.parser().parse_args(arguments)) / "adapter.pt"
    path.unlink(missing_ok=True)
    began = time.time()
    run(*launcher, "train.py", *arguments)
    return time.time() - began, load(path, "adapter", "")["losses"]


def beside_plain(run, *launcher, **options):
    """Seconds of a run so launched, or with these options, and of a plain one; how far their losses
    differ, nats."""
    (seconds, found), (plain, expected) = adapting(run, *launcher, **options), adapting(run)
    return {"s": seconds, "s plain": plain,
            "losses differ by": max(abs(a - b) for a, b in zip(found, expected, strict=True))}


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1",
            "--nproc_per_node=1")  # one process: NCCL on a GPU, Gloo on a CPU
STEPS = {  # name: (seconds it usually takes at most, function)
    "tests": (180, cuda_tests),
    **{f"speed {row}": (seconds, lambda run, row=row: speed_row(run, row)) for row, seconds in {
        "main-job": 150, "sadam": 60, "adapt": 90, "sampling": 150, "moments": 60, "eigen": 180,
        "memory": 60}.items()},
    "comparison": (420, quick_comparison),
    "torchrun": (90, lambda run: beside_plain(run, *TORCHRUN)),
    "compile": (300, lambda run: beside_plain(run, options=["--compile"]))}


def attempt(name, out, rehearse, left):
    """Do a step within `left` seconds and twice its usual time; returns its entry in gpu.json."""
    usual, step = STEPS[name]
    if left < usual and not rehearse:
        return {"skipped": f"may take {usual} s, {left:.0f} s were left"}
    print(f"{name} ... ({left:.0f} s left)", flush=True)
    began = time.time()
    deadline = began + (left if rehearse else min(left, 2 * usual))
    try:
        found = {"result": step(Runner(out, rehearse, deadline))}
    except Exception as error:  # recorded; the next step goes on
        found = {"failed": f"{type(error).__name__}: {error}"}
    return {"seconds": round(time.time() - began, 1), **found}


def outcome(found):
    """A cell of the table: done, with the references that were missing; or the end of an error."""
    if "result" not in found:
        return " ".join(list(found.values())[-1].split())[-90:]
    missing = set(re.findall(r'"skipped: (needs [^"]+)', json.dumps(found["result"])))
    return ", ".join(["done", *sorted(missing)])


def gpu(args):
    """Do the steps that have no result yet, or args.only; print what became of all of them."""
    if not args.rehearse and not torch.cuda.is_available():
        raise ValueError("no GPU is visible; --rehearse tries every step on the CPU")
    began, folder = time.time(), "rehearsal" if args.rehearse else "gpu"
    path = pathlib.Path(args.out).absolute() / folder / "gpu.json"
    machine = "a rehearsal on a CPU" if args.rehearse else describe_machine(pick_device())
    identity = {"machine": machine, "torch": torch.__version__}
    earlier = read_cached_json(path, identity)
    if path.exists() and not earlier:
        raise ValueError(f"{path} is not of {machine} with torch {torch.__version__}; move it away "
                         "or choose another --out")
    steps = earlier["steps"] if earlier else {}
    for name in args.only or STEPS:
        if args.only or "result" not in steps.get(name, {}):
            left = began + 60 * args.minutes - time.time()
            found = attempt(name, path.parent, args.rehearse, left)
            if "result" in found or "result" not in steps.get(name, {}):
                steps[name] = found
            write_json(path, {"identity": identity, "steps": steps})
    rows = [[name, f"{found.get('seconds', 0):.0f}", outcome(found)]
            for name, found in steps.items()]
    print(f"\n{machine}\n\n{markdown(['step', 's', ''], rows)}\n\n{path} written")
    failed = [name for name, found in steps.items() if "failed" in found]
    if failed:
        raise ValueError(f"failed: {', '.join(failed)}; {path} says why")

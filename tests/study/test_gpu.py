"""`python -m study gpu`: every step in a rehearsal on the CPU; what is recorded, what done again."""
import json
import pathlib
import re
import subprocess
import time

import pytest

import calibrate
import train
from extras import cli
from study import __main__ as command, gpu, speed


def call(out, *arguments):
    command.main(["gpu", "--out", str(out), *arguments])


def written(out):
    return json.loads((out / "rehearsal" / "gpu.json").read_text())["steps"]


def run_inside(self, *arguments, statuses=(0,)):
    """Runner.__call__ without the seconds that each process takes to import torch: the same
    arguments, in this process; processes of pytest and torchrun as they are."""
    kind, *rest = map(str, arguments)
    if kind == "-m" and rest[0] == "study":
        return command.main(rest[1:])
    if kind == "train.py":
        return train.main(rest)
    return real_call(self, *arguments, statuses=statuses)


real_call = gpu.Runner.__call__


def main_job_inside(sizes):
    """The main job's files, as `time_main_job` leaves them; that has a test of its own."""
    job = ["--out", f"{sizes.out}/main-job"]
    train.main(["pretrain", *job, *speed.MICRO["--pretrain"].split()])
    calibrate.main(["--task", "code", *job, *speed.MICRO["--calibrate"].split()])
    return [1.0], [50.0]


def test_every_step_is_rehearsed(tmp_path, monkeypatch, capfd):
    """And a second call finds nothing to do. Of the tests for a GPU two run: the suite runs all
    CPU variants anyway."""
    monkeypatch.setenv("FOLORA_PRECISION", "float32")  # so that threads hardly matter to the losses
    monkeypatch.setattr("torch._dynamo.config.disable", True)  # as TORCH_COMPILE_DISABLE=1 there
    monkeypatch.setattr(gpu.Runner, "__call__", run_inside)
    monkeypatch.setitem(speed.ROWS, "main-job", (main_job_inside, speed.ROWS["main-job"][1]))
    monkeypatch.setenv("PYTEST_ADDOPTS", "-k 'float64 or waits_only'")
    call(tmp_path, "--rehearse")
    steps = written(tmp_path)
    assert list(steps) == list(gpu.STEPS) and all("result" in found for found in steps.values())
    assert "PASSED" in steps["tests"]["result"].values()
    for name in "torchrun", "compile":
        found = steps[name]["result"]
        assert found["losses differ by"] < 1e-6
        assert found["s"] > 0 and found["s plain"] > 0
    line = steps["speed memory"]["result"]["lines"][0]
    assert line["median"].endswith("MB")
    capfd.readouterr()
    monkeypatch.setattr(gpu, "attempt", None)  # would fail if it were called
    call(tmp_path, "--rehearse")
    assert len(re.findall(r"\| +done", capfd.readouterr().out)) == len(gpu.STEPS)


@pytest.fixture
def small_steps(monkeypatch):
    """Three steps; what they did, in order. The second fails until `broken` is emptied."""
    done, broken = [], ["b"]

    def step(name):
        def run(runner):
            done.append(name)
            if name in broken:
                raise RuntimeError("CUDA error:\n out of memory")
            return {"lines": [{"median": "skipped: needs scipy"}]}
        return run
    monkeypatch.setattr(gpu, "STEPS", {name: (60, step(name)) for name in "abc"})
    return done, broken


def test_a_step_that_fails_is_recorded_and_the_others_go_on(tmp_path, small_steps, capfd):
    done, broken = small_steps
    with pytest.raises(ValueError, match="failed: b; .*gpu.json says why"):
        call(tmp_path, "--rehearse")
    steps, printed = written(tmp_path), capfd.readouterr().out
    assert done == ["a", "b", "c"] and "result" in steps["a"] and "result" in steps["c"]
    assert steps["b"]["failed"] == "RuntimeError: CUDA error:\n out of memory"
    assert re.search(r"\| b +\| +0 \| +RuntimeError: CUDA error: out of memory \|", printed)
    assert re.search(r"\| a +\| +0 \| +done, needs scipy \|", printed)
    done.clear(), broken.clear()
    call(tmp_path, "--rehearse")  # only what has no result
    assert done == ["b"] and "result" in written(tmp_path)["b"]


def test_results_are_written_as_soon_as_they_are_there(tmp_path, monkeypatch):
    """Whatever ends the command, Ctrl-C for example, the steps before it keep their results."""
    def stopped(runner):
        raise KeyboardInterrupt
    monkeypatch.setattr(gpu, "STEPS", {"a": (60, lambda runner: 7), "b": (60, stopped)})
    with pytest.raises(KeyboardInterrupt):
        call(tmp_path, "--rehearse")
    assert written(tmp_path)["a"]["result"] == 7 and "b" not in written(tmp_path)


def test_a_step_that_may_take_longer_than_is_left_is_skipped(tmp_path, small_steps):
    assert gpu.attempt("a", tmp_path, False, 59) == {"skipped": "may take 60 s, 59 s were left"}
    assert not small_steps[0]
    assert "result" in gpu.attempt("a", tmp_path, False, 61)


def test_results_of_another_machine_are_not_overwritten(tmp_path, small_steps):
    small_steps[1].clear()
    call(tmp_path, "--rehearse")
    path = tmp_path / "rehearsal" / "gpu.json"
    path.write_text(path.read_text().replace("a rehearsal on a CPU", "NVIDIA H100"))
    before = path.read_text()
    with pytest.raises(ValueError, match="gpu.json is not of a rehearsal on a CPU with torch"):
        call(tmp_path, "--rehearse")
    assert path.read_text() == before


def test_no_gpu_is_one_clear_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.command(lambda: call(tmp_path))
    assert stopped.value.code == 2
    assert capsys.readouterr().err == ("error: no GPU is visible; --rehearse tries every step on "
                                       "the CPU\n")
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------
# Subprocesses

def runner(tmp_path, seconds):
    return gpu.Runner(tmp_path, True, time.time() + seconds)


def test_what_a_process_prints_or_why_it_failed(tmp_path, monkeypatch):
    """Started in the project's folder, wherever the command was; without a GPU in a rehearsal."""
    monkeypatch.chdir(tmp_path)
    code = "import os; print(os.path.exists('train.py'), [os.environ['CUDA_VISIBLE_DEVICES']])"
    assert runner(tmp_path, 60)("-c", code) == "True ['']\n"
    with pytest.raises(ValueError, match="exit status 3: no such thing"):
        runner(tmp_path, 60)("-c", "import sys; print('no such thing'); sys.exit(3)")
    assert runner(tmp_path, 60)("-c", "import sys; sys.exit(1)", statuses=(0, 1)) == ""


@pytest.mark.parametrize("on_term", ["signal.SIG_DFL", "signal.SIG_IGN"])
def test_a_process_that_takes_too_long_is_ended_with_its_workers(tmp_path, on_term, monkeypatch):
    """Also one that holds the pipe open, and one that does not end when it is asked to."""
    worker = tmp_path / "worker"
    code = (f"import os, signal, sys, time; signal.signal(signal.SIGTERM, {on_term}); "
            f"pid = os.fork(); pid and open({str(worker)!r}, 'w').write(str(pid)); time.sleep(60)")
    wait = subprocess.Popen.wait
    monkeypatch.setattr(subprocess.Popen, "wait",
                        lambda self, timeout=None: wait(self, timeout and min(timeout, 0.5)))
    began = time.time()
    with pytest.raises(ValueError, match="did not finish in its time"):
        runner(tmp_path, 3)("-c", code)
    status = pathlib.Path(f"/proc/{worker.read_text()}/status")
    while status.exists() and "State:\tZ" not in status.read_text():  # Z: ended, nobody asks for it
        assert time.time() - began < 30
        time.sleep(0.1)


def test_cuda_tests_that_fail_or_do_not_run_are_a_failure(tmp_path, monkeypatch):
    def printed(output):
        monkeypatch.setattr(gpu.Runner, "__call__", lambda *_, **__: output)
        return gpu.cuda_tests(runner(tmp_path, 60))

    assert printed("t.py::a[cuda] PASSED [ 50%]\nt.py::b[cuda] PASSED [100%]") == {
        "a[cuda]": "PASSED", "b[cuda]": "PASSED"}
    with pytest.raises(ValueError, match=r"{'b\[cuda\]': 'FAILED'} of 2"):
        printed("t.py::a[cuda] PASSED [ 50%]\nt.py::b[cuda] FAILED [100%]")
    with pytest.raises(ValueError, match="SKIPPED"):
        printed("t.py::a[cuda] SKIPPED (needs a GPU) [100%]")
    with pytest.raises(ValueError, match="no test of 0: No module named pytest"):
        printed("No module named pytest")

"""Precision and progress are chosen in one place: no bfloat16 anywhere under float32, and a line that
says how long a stage still takes."""
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import calibrate
import train
from extras import machine
from extras.machine import (Progress, all_gather, all_reduce_sum, autocast, describe_machine,
                            native_bf16, precision, rank_and_world, set_precision, shard, tf32)
from micro import CALIBRATE, PRETRAIN, adapt

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def chosen_anew(monkeypatch):
    """Each test chooses; afterwards what was chosen before holds again."""
    monkeypatch.delenv("FOLORA_PRECISION", raising=False)
    monkeypatch.setattr(machine, "chosen", "auto")


# ------------------------------------------------------------------------------------------------
# Precision

@pytest.mark.parametrize("native, auto", [(True, "bfloat16"), (False, "float32")])
def test_auto_is_bfloat16_exactly_where_it_is_native(monkeypatch, native, auto):
    """float32 and bfloat16 are what they say on any machine; None is auto."""
    monkeypatch.setattr(machine, "native_bf16", lambda device: native)
    for choice, expected in (("auto", auto), (None, auto), ("float32", "float32"),
                             ("bfloat16", "bfloat16")):
        set_precision(choice)
        assert precision(CPU) == expected and describe_machine(CPU).endswith(expected)
        with autocast(CPU):
            product = torch.ones(2, 2) @ torch.ones(2, 2)
        assert product.dtype == getattr(torch, expected)


def test_the_environment_is_the_default_and_an_option_overrides_it(monkeypatch):
    monkeypatch.setenv("FOLORA_PRECISION", "float32")
    set_precision()
    assert precision(CPU) == "float32"
    set_precision("bfloat16")
    assert precision(CPU) == "bfloat16"
    monkeypatch.setenv("FOLORA_PRECISION", "")
    set_precision()
    assert machine.chosen == "auto"


def test_an_unknown_precision_is_refused_and_changes_nothing(monkeypatch):
    set_precision("float32")
    with pytest.raises(ValueError, match="precision is 'half'; it must be one of auto, float32, bf"):
        set_precision("half")
    monkeypatch.setenv("FOLORA_PRECISION", "bf16")
    with pytest.raises(ValueError, match="precision is 'bf16'"):
        set_precision()
    assert precision(CPU) == "float32"


@pytest.mark.parametrize("kind, inside", [("cuda", "high"), ("cpu", "highest")])
def test_tf32_is_for_training_on_a_gpu_alone(kind, inside):
    """Afterwards float32 is what it was, also after an error."""
    with pytest.raises(KeyboardInterrupt), tf32(torch.device(kind)):
        assert torch.get_float32_matmul_precision() == inside
        raise KeyboardInterrupt
    assert torch.get_float32_matmul_precision() == "highest"


class Dtypes(TorchDispatchMode):
    """Collects the types of all tensors that any operation reads or makes, in backward passes too,
    and the least precision that float32 products were allowed."""

    def __init__(self):
        super().__init__()
        self.found, self.products = set(), set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = tree_leaves((args, kwargs, result))
        self.found |= {t.dtype for t in tensors if torch.is_tensor(t)}
        self.found |= {t for t in tensors if isinstance(t, torch.dtype)}
        self.products.add(torch.get_float32_matmul_precision())
        return result


@pytest.mark.parametrize("choice", ["float32", "bfloat16"])
def test_float32_means_that_no_operation_of_training_is_in_bfloat16(tmp_path, monkeypatch, choice):
    """Pretraining with Muon, then adapting with SAdam and with a KL penalty, also on a machine whose
    auto would be bfloat16. The other choice shows that the test sees bfloat16 where it is used."""
    monkeypatch.setattr(machine, "native_bf16", lambda device: True)
    used = ["--precision", choice, "--out", str(tmp_path)]
    with Dtypes() as pretraining:
        train.main(["pretrain", *PRETRAIN.split(), "--steps", "1", *used])
    calibrate.main(["--task", "code", *CALIBRATE.split(), *used])
    with Dtypes() as adapting:
        for method in "folora", "lora-kl-leading":
            adapt(f"--method {method} --steps 1 --precision {choice}", tmp_path)
    for seen in pretraining, adapting:
        assert (torch.bfloat16 in seen.found) == (choice == "bfloat16")
        assert torch.float16 not in seen.found and torch.float32 in seen.found
        assert seen.products == {"highest"}


# ------------------------------------------------------------------------------------------------
# One process is a group of its own

def test_a_single_process_keeps_all_rows_and_sums():
    rows, t = [1, 2, 3], torch.ones(2)
    all_reduce_sum([t])
    assert rank_and_world() == (0, 1) and shard(rows) == rows and all_gather(rows) == rows
    assert t.tolist() == [1, 1]


# ------------------------------------------------------------------------------------------------
# Progress

@pytest.fixture
def clock(monkeypatch):
    """A clock that moves only when it is told to."""
    class Clock:
        now = 1000.0
    monkeypatch.setattr(machine.time, "time", lambda: Clock.now)
    return Clock


def seconds_of_lines(clock, capsys, progress, rate, seconds, first=0):
    """Run at `rate` per second, called ten times a second: [(second, what was printed)]."""
    began, lines = clock.now, []
    for tenth in range(10 * seconds + 1):
        clock.now = began + tenth / 10
        progress(first + rate * tenth / 10, f"at {tenth / 10:g}")
        printed = capsys.readouterr().out
        lines += [(tenth / 10, printed)] if printed else []
    return lines


def test_a_log_has_a_first_line_soon_and_then_one_every_ten_seconds(clock, capsys):
    lines = seconds_of_lines(clock, capsys, Progress("training", 400), 10, 40)
    assert [second for second, _ in lines] == [5, 15, 25, 35, 40]
    assert lines[0][1] == "  training  12%  at 5  35 s left of 40 s\n"
    assert lines[1][1] == "  training  38%  at 15  25 s left of 40 s\n"
    assert lines[-1][1] == "  training 100%  at 40  40 s\n"


def test_a_terminal_rewrites_one_line_twice_a_second(clock, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    lines = seconds_of_lines(clock, capsys, Progress("training", 40), 10, 4)
    assert [second for second, _ in lines] == [1, 1.5, 2, 2.5, 3, 3.5, 4]
    assert all(text.startswith("\r\033[K  training") for _, text in lines)
    assert [text.count("\n") for _, text in lines] == [0, 0, 0, 0, 0, 0, 1]


def test_a_short_stage_prints_nothing(clock, capsys):
    assert seconds_of_lines(clock, capsys, Progress("answering", 10), 10, 1) == []


def test_a_resumed_stage_is_timed_from_where_it_began(clock, capsys):
    """Half was done before: 40 of 400 steps a second, of which 200 are left, take 5 seconds."""
    lines = seconds_of_lines(clock, capsys, Progress("training", 400, first=2), 40, 5, first=200)
    assert lines[0] == (2, "  training  70%  at 2  3 s left of 5 s\n")
    assert lines[-1] == (5, "  training 100%  at 5  5 s\n")


def test_a_stage_without_a_step_done_says_nothing_yet(clock, capsys):
    progress = Progress("solving", 10)
    for _ in range(3):
        clock.now += 60
        progress(0)
    assert capsys.readouterr().out == ""
    progress(1)
    assert capsys.readouterr().out == "  solving  10%    1620 s left of 1800 s\n"


GROWTH = """
import torch
from extras.machine import limit_shape_caches
if {limited}:
    limit_shape_caches()
W = torch.randn(576, 576)
def grown(shapes):
    for tokens in shapes:
        x = torch.randn(tokens, 576, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            torch.nn.functional.linear(x, W).sum().backward()
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1])
first = grown([999])  # the largest
print(grown(range(700, 999)) - first)
"""


@pytest.mark.skipif(sys.platform != "linux" or not native_bf16(CPU),
                    reason="needs Linux and a CPU with bf16 instructions")
def test_new_shapes_of_batches_do_not_fill_the_memory(monkeypatch):
    """300 lengths of a batch: without the limit a product keeps more than a megabyte of each."""
    for cache in "ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY":
        monkeypatch.delenv(cache, raising=False)  # as an earlier test's command may have set it
    grown = {limited: int(subprocess.run([sys.executable, "-c", GROWTH.format(limited=limited)],
                                         capture_output=True, text=True, check=True).stdout)
             for limited in (False, True)}  # pages
    assert 0 < grown[True] < grown[False] / 2

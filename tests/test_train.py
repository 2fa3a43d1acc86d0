"""Training: the loop, exact resumption, what each method adds to it, and what a user gets wrong."""
import dataclasses
import functools
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

import calibrate
import train
from extras import machine
from extras.baselines import METHODS, oplora_protected
from extras.cli import command
from extras.files import fingerprint, load, load_adapter, load_calibration, load_foundation
from extras.moments import forward_hooks
from extras.user_data import load_items
from micro import (ADAPT, CALIBRATE, FOLDER, PRETRAIN, adapt, error_line,  # noqa: F401
                   lora_parameters, one_mixture, out)
from model import GPT, GPTConfig, LoRALinear, block_linears

ROOT = Path(train.__file__).parent
X = torch.arange(96)[None]  # one row of tokens


def adapter(path):
    return load(path, "adapter", "")


@pytest.fixture
def any_precision(monkeypatch):
    """The precision that a test chooses ends with it."""
    monkeypatch.setattr(machine, "chosen", machine.chosen)


# ------------------------------------------------------------------------------------------------
# The loop

def test_the_rate_by_hand():
    """Up over the warm-up, then down to zero along a line or a cosine."""
    line = [train.rate_factor(step, 6, 2, "linear") for step in range(6)]
    assert line == [0.5, 1, 1, 0.75, 0.5, 0.25]
    assert train.rate_factor(4, 6, 2, "cosine") == pytest.approx(0.5)


def test_loop_by_hand(monkeypatch):
    """Plain SGD on one weight w, with loss log(1 + e^-w) and penalty w²: each step's loss before it,
    the clipped gradient, the scheduled rate."""
    class Toy(torch.nn.Module):  # two tokens; the feature of token 0 is (w, 0)
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.tensor(3.0))
            self.lm_head = torch.nn.Linear(2, 2, bias=False)
            self.lm_head.weight = torch.nn.Parameter(torch.eye(2), requires_grad=False)

        def features(self, x, pos, cache, only, lengths):
            return (self.w * torch.tensor([[[1.0, 0.0]]]).expand(*x.shape, 2))[only]

    monkeypatch.setattr(machine, "chosen", "float32")
    model, w, expected = Toy(), 3.0, []
    optimizer = torch.optim.SGD([model.w], lr=0.5)
    zero = torch.zeros(2, 1, dtype=torch.long)
    losses = train.training_loop(model, [optimizer], lambda step: (zero, zero), {"steps": 5}, None,
                                 "linear", warmup=0.4, penalty=lambda step: model.w ** 2)
    for rate in (0.5, 1, 1, 2 / 3, 1 / 3):
        expected.append(math.log(1 + math.exp(-w)) + w ** 2)
        gradient = 2 * w - 1 / (1 + math.exp(w))
        w -= 0.5 * rate * max(-1, min(1, gradient))
    assert losses == pytest.approx(expected, rel=1e-5)
    assert model.w.item() == pytest.approx(w, rel=1e-5)


def test_the_same_command_gives_the_same_weights(out, tmp_path):
    train.main(["pretrain", *PRETRAIN.split(), "--out", str(tmp_path / "again")])
    a, b = (load(folder / "foundation.pt", "foundation", "") for folder in (out, tmp_path / "again"))
    assert fingerprint(a["model"]) == fingerprint(b["model"]) and a["losses"] == b["losses"]


@pytest.mark.parametrize("stage, options", [
    ("pretrain", PRETRAIN), ("adapt", f"--task code --method folora --lr 0.006 {ADAPT}"),
    ("adapt", f"--task code --method folora-pull-back {ADAPT}")])
def test_an_interrupted_run_continues_exactly(out, monkeypatch, capsys, stage, options):
    """Stopped right after a save, twice: every weight and loss is that of an uninterrupted run, and
    no step is done twice."""
    arguments = [stage, *options.split(), "--seed", "3", "--out", str(out)]
    file = train.main(arguments) or out / "foundation.pt"
    whole = torch.load(file, weights_only=True)
    file.unlink()
    steps, rate, save = [], train.rate_factor, train.save_resume_state

    def counted(step, *more):
        steps.append(step)
        return rate(step, *more)

    def save_and_stop(*state):
        save(*state)
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "SAVE_EVERY", -1)
    monkeypatch.setattr(train, "rate_factor", counted)
    with monkeypatch.context() as patch:
        patch.setattr(train, "save_resume_state", save_and_stop)
        for done in 1, 2:
            with pytest.raises(KeyboardInterrupt):
                train.main(arguments)
            assert not file.exists() and list(file.parent.glob("*.partial")) and len(steps) == done
    train.main(arguments)
    assert "continuing after step 2 of an interrupted run" in capsys.readouterr().out
    resumed = torch.load(file, weights_only=True)
    tensors = "model" if stage == "pretrain" else "changed"
    assert resumed["losses"] == whole["losses"] and not list(file.parent.glob("*.partial"))
    assert fingerprint(resumed[tensors]) == fingerprint(whole[tensors])
    assert steps == list(range(len(whole["losses"])))


def test_other_settings_do_not_continue_an_interrupted_run(out, monkeypatch):
    def save_and_stop(*state):
        save(*state)
        raise KeyboardInterrupt
    save, arguments = train.save_resume_state, ["pretrain", *PRETRAIN.split(), "--out", str(out),
                                               "--seed"]
    monkeypatch.setattr(train, "SAVE_EVERY", -1)
    monkeypatch.setattr(train, "save_resume_state", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        train.main([*arguments, "1"])
    monkeypatch.setattr(train, "SAVE_EVERY", 30)
    train.main([*arguments, "2"])
    resumed = load(out / "foundation.pt", "foundation", "")
    (out / "foundation.pt").unlink()
    train.main([*arguments, "2"])
    assert load(out / "foundation.pt", "foundation", "")["losses"] == resumed["losses"]


def test_a_loss_that_is_not_finite_stops_the_run(out, capsys):
    printed = error_line(capsys, train.main,
                         f"adapt --task code --method lora --lr 1e30 {ADAPT} --out {out}")
    assert "loss or gradient is not finite at step 2; try a smaller --lr than 1e+30" in printed


class Spoiled(torch.autograd.Function):
    """Multiplies the values by one factor, and their gradients by another."""

    @staticmethod
    def forward(ctx, x, forwards, backwards):
        ctx.backwards = backwards
        return x * forwards

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.backwards, None, None


@pytest.mark.parametrize("forwards, backwards", [(math.nan, 1), (math.inf, 1), (1, math.nan)])
def test_the_last_save_before_a_loss_that_is_not_finite_is_kept(tmp_path, monkeypatch, forwards,
                                                                backwards):
    """One layer gives NaN or infinity from step 6 on: the run stops there, with the state saved
    after step 5."""
    monkeypatch.setattr(train, "SAVE_EVERY", -1)
    torch.manual_seed(0)
    model, batches = GPT(GPTConfig(16, 257, 3, 2, 8)), []

    def spoil(layer, inputs, output):
        return Spoiled.apply(output, *((forwards, backwards) if len(batches) > 5 else (1, 1)))

    def batch(step):
        batches.append(step)
        return torch.arange(32).view(2, 16), torch.arange(32).view(2, 16)

    model.transformer.h[1].mlp.c_fc.register_forward_hook(spoil)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with pytest.raises(ValueError, match="not finite at step 6; try a smaller --lr than 0.01"):
        train.training_loop(model, [optimizer], batch, {"steps": 10, "lr": 0.01},
                            tmp_path / "x.partial")
    assert len(load(tmp_path / "x.partial", "partial", "")["losses"]) == 5


def test_weights_that_are_not_finite_are_not_saved(out, capsys):
    """The last step takes the weights to infinity, and no loss comes after it: nothing is written."""
    command = f"adapt --task code --method full --lr 1e39 {ADAPT} --steps 1 --out {out}"
    assert "holds NaN or infinity" in error_line(capsys, train.main, command)
    assert not list(out.glob("code/full*/adapter.pt"))


# ------------------------------------------------------------------------------------------------
# Settings, precision, names

def test_a_stage_whose_settings_changed_is_done_again(out, capsys):
    """Other queries: foundation and samples stay, the calibration and what used it are redone, plain
    LoRA is not."""
    adapt("--method lora", out)
    capsys.readouterr()
    train.main(["pretrain", *PRETRAIN.split(), "--out", str(out)])
    calibrate.main(f"--task code {CALIBRATE} --queries 9 --out {out}".split())
    for method in "lora", "folora":
        adapt(f"--method {method}", out)
    printed = capsys.readouterr().out
    for file in "foundation.pt", "proxy.pt", f"lora-lr0.016-seed0{FOLDER}/adapter.pt":
        assert f"{file} is up to date" in printed
    for file in "calibration.pt", f"folora-lr0.016-seed0{FOLDER}/adapter.pt":
        assert f"{file} written" in printed


@pytest.mark.parametrize("stage", ["pretrain", "adapt"])
def test_another_precision_makes_a_stage_again(out, capsys, monkeypatch, any_precision, stage):
    """It is printed at the start, and the environment variable chooses it too."""
    options = PRETRAIN if stage == "pretrain" else f"--task code --method folora {ADAPT}"
    arguments = [stage, *options.split(), "--out", str(out), "--precision"]
    train.main([*arguments, "float32"])
    capsys.readouterr()
    path = train.main([*arguments, "bfloat16"]) or out / "foundation.pt"
    printed = capsys.readouterr().out
    assert f"{path} written" in printed and ", bfloat16\n" in printed
    assert load(path, path.stem, "")["settings"]["precision"] == "bfloat16"
    monkeypatch.setenv("FOLORA_PRECISION", "bfloat16")
    train.main(arguments[:-1])
    assert f"{path} is up to date" in capsys.readouterr().out
    monkeypatch.setenv("FOLORA_PRECISION", "float32")
    train.main(arguments[:-1])
    printed = capsys.readouterr().out
    assert f"{path} written" in printed and ", float32\n" in printed


def test_bfloat16_agrees_with_float32(out, any_precision):
    """Loss, gradients and a run's losses: the same to 1 %, 5 % and 1 %; weights and logits stay
    float32."""
    torch.manual_seed(0)
    x, found = torch.randint(257, (8, 64)), {}
    for precision in "float32", "bfloat16":
        machine.set_precision(precision)
        model = load_foundation(out, "cpu")[0].requires_grad_(True)
        loss = train.loss_of(model, x[:, :-1], x[:, 1:])
        loss.backward()
        assert loss.dtype == torch.float32
        assert all(p.grad.dtype == torch.float32 for p in model.parameters())
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        path = adapt("--method lora-kl-leading", out)
        found[precision] = loss.item(), gradient, adapter(path)["losses"]
    (loss, gradient, losses), (loss16, gradient16, losses16) = found.values()
    assert loss16 != loss and loss16 == pytest.approx(loss, rel=0.01)
    assert (gradient16 - gradient).norm() < 0.05 * gradient.norm()
    assert losses16 == pytest.approx(losses, rel=0.01)


def test_a_run_is_named_by_what_is_not_at_its_default():
    """Rate and seed always; other options in the order of ADAPT; no two settings in one folder."""
    def name(arguments):
        args = train.parser().parse_args(f"adapt --lr 0.01 {arguments}".split())
        return str(train.run_folder(args))
    assert name("--task math --method lora") == "out/math/lora-lr0.01-seed0"
    assert name("--method folora --seed 3 --tau 0.5 --s-min 0 --rank 4 --out x") == \
        "x/code/folora-lr0.01-seed3-rank4-smin0.0-tau0.5"
    assert name("--method lora --calibration other").endswith("-seed0-calibrationother")
    assert name("--method folora --basis-dtype bfloat16").endswith("-seed0-basisdtypebfloat16")
    assert name("--task some/own.jsonl --method lora") == "out/own/lora-lr0.01-seed0"


# ------------------------------------------------------------------------------------------------
# adapt

def test_a_caller_may_run_the_steps_itself(out):
    """What `loop` gets, and that its losses are saved; the file has nothing else besides."""
    given = {}

    def loop(model, optimizers, batch, settings, partial, penalty, parts):
        given.update(locals())
        return train.training_loop(model, optimizers, batch, settings, partial, penalty=penalty,
                                   parts=parts)[:2]
    path = adapt("--method lora-kl --accumulate 2 --seed 4", out, loop=loop)
    saved = adapter(path)
    assert saved.keys() == {"kind", "settings", "changed", "losses"} and len(saved["losses"]) == 2
    assert given["settings"] == saved["settings"] and given["parts"] == 2
    assert given["partial"] == path.with_name("adapter.partial") and len(given["optimizers"]) == 1
    assert given["penalty"](0) is not None and [len(t) for t in given["batch"](0)] == [4, 4]


@pytest.mark.parametrize("method", ["full", "sadam-full", "folora-truncated", "lora-null-v2",
                                    "oplora", "replay"])
def test_what_adapt_wrote_is_the_model_it_trained(out, method):
    """Full weights, a frozen A, protected directions: the file gives back the trained model's
    logits."""
    trained = []

    def loop(model, *more, **options):
        trained.append(model)
        return train.training_loop(model, *more, **options)
    # by default it protects 16 directions, all that these layers have
    oplora = dataclasses.replace(METHODS["oplora"],
                                 protected=functools.partial(oplora_protected, k=4))
    path = adapt(f"--method {method} --scale 2", out, {**METHODS, "oplora": oplora}, loop=loop)
    model, base = load_adapter(path, out, "cpu"), load_foundation(out, "cpu")[0]
    assert torch.allclose(model(X), trained[0](X), atol=1e-5)
    assert not torch.allclose(model(X), base(X), atol=1e-4)
    assert model.state_dict().keys() == base.state_dict().keys()
    unmerged = load_adapter(path, out, "cpu", merge=False)
    assert torch.allclose(unmerged(X), model(X), atol=1e-5)


@pytest.mark.parametrize("method", ["lora-kl", "lora-kl-leading"])
def test_penalty_is_measured_on_the_samples_themselves(out, method):
    """μ/2 times the sum over layers of Tr(S ΔW C ΔWᵀ), S from every sample one by one; zero where
    training starts."""
    given = {}

    def loop(model, optimizers, *more, penalty, parts):
        given.update(model=model, penalty=penalty)
        return []
    path = adapt(f"--method {method} --mu 3", out, loop=loop)
    model, penalty = given["model"], given["penalty"]
    assert abs(penalty(0)) < 1e-6
    with torch.no_grad():
        for name, p in lora_parameters(model).items():
            p += torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name)))
    args = train.parser().parse_args(["adapt", "--task", "code", "--out", str(out)])
    base, foundation = load_foundation(out, "cpu")
    calibration = load_calibration(args, foundation)
    assert adapter(path)["settings"]["measured"] == calibration["settings"]
    layers, outputs, tokens = block_linears(base), {}, 0
    S = dict.fromkeys(layers, 0)

    def keep(name, output):
        output.retain_grad()
        outputs[name] = output
    for sample in calibration["samples"].tolist():
        row = torch.tensor([256, *(t for t in sample if t >= 0)])
        with forward_hooks(layers, keep, outputs=True):
            logits = base(row[None, :-1])[0]
        cross_entropy(logits, row[1:], reduction="sum").backward()
        tokens += len(row) - 1
        for name, output in outputs.items():
            S[name] += output.grad[0].T @ output.grad[0]
    expected = 0
    for name, layer in block_linears(model, LoRALinear).items():
        dW = layer.to_linear(learned=True).weight - layer.to_linear(learned=False).weight
        C_pre = calibration["layers"][name]["C_pre"].float()  # compared in test_calibrate
        expected += 3 / 2 * (S[name] / tokens @ dW @ C_pre @ dW.T).trace()
    assert penalty(0).item() == pytest.approx(expected.item(), rel=1e-3)


def test_penalty_enters_the_loss(out):
    """With μ = 0 the run is plain LoRA's; with a large μ the losses differ from the second on."""
    plain, none, large = (adapter(adapt(f"--lr 0.01 --method {options}", out))["losses"]
                          for options in ("lora", "lora-kl --mu 0", "lora-kl --mu 1000"))
    assert plain == none and plain[0] == large[0] and plain[1:] != large[1:]


def test_batches_depend_on_row_order_and_seed_alone(tmp_path):
    """Not on the file's name or its blank lines; with rows in another order, the same places are
    drawn."""
    rows = [json.dumps({"prompt": f"{i} ->", "completion": f"{i}"}) for i in range(40)]

    def drawn(name, lines, seed):
        (tmp_path / name).write_text("".join(lines))
        args = train.parser().parse_args(["adapt", "--task", str(tmp_path / name),
                                          "--seed", str(seed)])
        items = load_items(args.task, "train", args.examples)
        batch = train.task_batches(args, items, GPTConfig())
        return [batch(step)[0].tolist() for step in (0, 1)]

    whole = drawn("a.jsonl", [f"{row}\n" for row in rows], 3)
    assert whole == drawn("b.jsonl", [f"{row}\r\n\n" for row in rows], 3)
    assert whole != drawn("a2.jsonl", [f"{row}\n" for row in rows], 4)
    reordered = drawn("c.jsonl", [f"{row}\n" for row in rows[31::-1] + rows[32:]], 3)

    def numbers(batch):  # the last fifth, from 32 on, is held out
        return [int("".join(chr(t) for t in row[1:] if t < 256).split()[0]) for row in batch]
    assert [31 - i for i in numbers(reordered[0])] == numbers(whole[0])


@pytest.mark.parametrize("stage", ["pretrain", "adapt --task code --method folora"])
def test_compiled_blocks_take_the_same_steps(out, monkeypatch, stage):
    """--compile; here without the compiler's back end, which takes a minute."""
    blocks, compile_, losses = [], torch.nn.Module.compile, []

    def without_back_end(block, dynamic):
        blocks.append(block)
        compile_(block, dynamic=dynamic, backend="eager")

    monkeypatch.setattr(torch.nn.Module, "compile", without_back_end)
    for options in "", "--compile":
        more = PRETRAIN if stage == "pretrain" else ADAPT
        path = train.main(f"{stage} {more} --seed 7 {options} --out {out}".split())
        path = path or out / "foundation.pt"
        losses.append(load(path, path.stem, "")["losses"])
        path.unlink()
    assert len(blocks) == 1 and losses[0] == pytest.approx(losses[1], rel=1e-3)


# ------------------------------------------------------------------------------------------------
# What a user gets wrong

@pytest.mark.parametrize("arguments, answer", [
    ("adapt --task poetry", "unknown task 'poetry'; the tasks are math, code, instruct"),
    ("adapt --method magic", "argument --method: invalid choice: 'magic'"),
    ("adapt --method lora --rank 17", "rank is 17; a layer of"),
    ("adapt --method folora --rank 0", "rank is 0; a layer of"),
    ("adapt --method folora --lam 0", "lam is 0.0; λ must be a positive number"),
    ("adapt --method folora --basis-dtype int8", "argument --basis-dtype: invalid choice: 'int8'"),
    ("adapt --method lora --lam -2", "argument --lam: '-2' is not a number of 0 or more"),
    ("adapt --method folora --s-min 1.5", "s_min is 1.5; the smallest gate must lie in [0, 1]"),
    ("adapt --method folora --s-min nan", "argument --s-min: 'nan' is not a number of 0 or more"),
    ("adapt --method folora --tau 0", "tau is 0.0; the damping must be a positive number"),
    ("adapt --method lora --tau nan", "'nan' is not a number"),
    ("adapt --method folora --calibration other", "other.pt is missing; make it with: python"),
    ("adapt --method replay --out /nowhere", "foundation.pt is missing"),
    ("adapt --method lora --scale 0", "scale is 0.0; κ must be a positive number"),
    ("adapt --method lora --seed 9223372036854775808", "is not a number of 0 or more"),
    ("adapt --method lora --lr -1", "argument --lr: '-1' is not a number of 0 or more"),
    ("adapt --method lora --steps 0", "'0' is not a number of 1 or more"),
    ("adapt --method lora --batch 99 --examples 8", "batch is 99; it must not exceed the 8 training"),
    ("adapt --method lora --precision fp8", "argument --precision: invalid choice: 'fp8'"),
    ("adapt --method oplora --lr 1", "oplora protects 16 directions of transformer.h.0.attn.c_attn"),
    ("adapt --task math --method folora",
     "calibration.pt is missing; make it with: python calibrate.py --task math"),
    ("pretrain --width 10 --heads 4", "width is 10; it must be a multiple of heads"),
    ("pretrain --batch 2 --accumulate 3", "a batch of 2 rows cannot be split into 3 parts"),
    ("pretrain --nonsense", "unrecognized arguments: --nonsense"), ("", "arguments are required"),
    ("adapt --out /nowhere --method lora",
     "foundation.pt is missing; make it with: python train.py pretrain --out /nowhere")])
def test_a_users_mistake_is_one_line(out, capsys, arguments, answer):
    """And nothing is lost, nothing half-written."""
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    more = "" if "--out" in arguments or not arguments else f" --out {out}"
    more += " --rank 2" if arguments.startswith("adapt") and "--rank" not in arguments else ""
    assert answer in error_line(capsys, train.main, arguments + more)
    after = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    assert after == before


def test_a_bad_environment_variable_is_named(out, capsys, monkeypatch):
    monkeypatch.setenv("FOLORA_PRECISION", "fp8")
    printed = error_line(capsys, train.main, f"adapt --method lora --out {out}")
    assert "precision is 'fp8'; it must be one of auto, float32, bfloat16" in printed


def test_memory_that_is_not_there_is_one_line(capsys):
    """And an error of the program stays a traceback."""
    assert "memory" in error_line(capsys, lambda arguments: torch.empty(10 ** 17), "")
    with pytest.raises(RuntimeError, match="shapes"):
        command(lambda: torch.ones(2) @ torch.ones(3, 3))


def test_ctrl_c_says_what_comes_next(capsys):
    def interrupted():
        raise KeyboardInterrupt
    with pytest.raises(SystemExit) as stopped:
        command(interrupted)
    assert stopped.value.code == 130
    assert capsys.readouterr().err == "stopped; the same command continues from the last save\n"


def test_train_py_is_a_command(tmp_path):
    """In a process of its own, from another folder."""
    done = subprocess.run([sys.executable, ROOT / "train.py", "adapt", "--out", "nowhere"],
                          capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: nowhere/foundation.pt is missing; make it with: python")

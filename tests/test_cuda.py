"""What holds on a GPU: the same numbers as on the CPU, within bounds, and no needless waiting.

Every test also runs with device "cpu", so that its code is known to work before there is a GPU;
FOLORA_TEST_CUDA=1 python -m pytest -m cuda tests/test_cuda.py runs those that need one.
"""
import contextlib
import copy
import functools
import linecache
import pathlib
import random
import warnings

import pytest
import torch

import calibrate
import model as model_module
import tasks
import train
from extras import machine
from extras.baselines import METHODS, kl_penalty, protect
from extras.grouped import GroupedSAdam
from folora import generalized_eigh, null_space_start, solve_layer, spectral_gate
from matrices import EPS, close, cond, eye, gamma_error, normal, rotation
from micro import lora_parameters
from model import (GPT, GPTConfig, add_lora, block_linears, filter_top_k_top_p, generate,
                   merge_lora)

CONFIG = GPTConfig(128, 257, 2, 2, 32)
# A training step waits for the GPU in these lines alone: to bring the batch there, to find the
# positions that have a target, and to see that loss and gradient are finite.
WAITS = ("(t.to(device) for t in batch(step))", "x = x[only]", "y[counted]", "loss.item()",
         "norm.item()", "run_backward(")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request, monkeypatch):
    """Where the test computes; in float32, also in training, unless it says otherwise."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU, and FOLORA_TEST_CUDA=1 to see it")
    monkeypatch.setattr(machine, "chosen", "float32")
    return torch.device(request.param)


def foundation():
    """A GPT on the CPU, with weights so large that its logits differ."""
    torch.manual_seed(0)
    model = GPT(CONFIG)
    with torch.no_grad():
        for linear in block_linears(model).values():
            linear.weight *= 3
    return model.eval()


def token_rows(count=24):
    rng = random.Random(1)
    return [[rng.randrange(256) for _ in range(rng.randint(3, 100))] for _ in range(count)]


@functools.cache
def code_batch(step):
    """(x, y) on the CPU: 8 items of the code task."""
    items, encoding = tasks.task_items("code", "train", 64), tasks.get_encoding("bytes")
    chosen = random.Random(step).sample(items, 8)
    return tasks.response_batch([tasks.response_row(item, encoding) for item in chosen])


def adapting(device):
    """(model, [SAdam]) with FoLoRA's start, bases and gates, all computed on the CPU."""
    model, spectral = foundation(), {}
    C_pre = calibrate.second_moments(model, token_rows())
    C_task = calibrate.second_moments(model, code_batch(0)[0].tolist())
    for name, layer in add_lora(model, 4).items():
        m = solve_layer(C_pre[name], C_task[name])
        layer.init_from(*null_space_start(layer.weight, m["C_pre"], 4))
        spectral[layer.lora_A] = m["basis"].to(device), spectral_gate(m["eigvals"]).to(device)
    model.to(device)
    trained = lora_parameters(model).values()
    return model, [GroupedSAdam(trained, spectral, lr=8e-3)]


def pretraining(device):
    model = foundation().to(device)
    return model, train.pretraining_optimizers(model, 1e-3, 5e-3)


def curve(setup, device, partial=None, batch=code_batch, steps=20):
    model, optimizers = setup(device)
    return train.training_loop(model, optimizers, batch, {"steps": steps, "lr": 0}, partial)


# ------------------------------------------------------------------------------------------------
# The same numbers

@functools.cache
def cpu_curve(setup):
    return curve(setup, torch.device("cpu"))


@pytest.mark.parametrize("setup", [adapting, pretraining])
@pytest.mark.parametrize("kind, bound", [("float32", 1e-3), ("tf32", 1e-2),
                                         ("bfloat16", 0.02)])
def test_loss_curve(device, setup, kind, bound, monkeypatch):
    """20 steps, each loss within so many nats of the CPU's in float32: about ten times what
    rounding like this costs on a CPU (weights moved by one rounding, 6e-8: up to 1.7e-4)."""
    expected = cpu_curve(setup)
    if kind == "bfloat16":
        monkeypatch.setattr(machine, "chosen", kind)
    if kind == "float32":
        monkeypatch.setattr(train, "tf32", contextlib.nullcontext)
    found = curve(setup, device)
    assert expected[-1] < expected[0] - 0.2
    assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) < bound


def test_resumed_from_a_saved_state(device, tmp_path, monkeypatch):
    """Interrupted on the CPU and continued here, and the other way round: as if never interrupted.
    SAdam's, Muon's and fused AdamW's moments come along."""
    monkeypatch.setattr(train, "SAVE_EVERY", 0)
    monkeypatch.setattr(train, "tf32", contextlib.nullcontext)

    def stopping(step):
        if step == 5:
            raise KeyboardInterrupt
        return code_batch(step)

    for setup in adapting, pretraining:
        whole = curve(setup, torch.device("cpu"), steps=10)  # the rates depend on the steps
        for first, second in (torch.device("cpu"), device), (device, torch.device("cpu")):
            partial = tmp_path / "run.partial"
            with pytest.raises(KeyboardInterrupt):
                curve(setup, first, partial, stopping, steps=10)
            saved = torch.load(partial, weights_only=True)
            assert len(saved["losses"]) == 5
            found = curve(setup, second, partial, steps=10)
            assert found[:5] == saved["losses"]
            assert max(abs(a - b) for a, b in zip(found, whole, strict=True)) < 1e-4
            partial.unlink()


def test_sadam_in_float64(device):
    """50 steps on the same gradients, with a full and a truncated basis and without any."""
    def steps(device):
        randn = normal(0)
        params = [torch.nn.Parameter(randn(4, 12).to(device)) for _ in range(3)]
        spectral = {p: (rotation(12, 1)[:, :k], torch.linspace(1, 0.3, k).double())
                    for p, k in zip(params, (12, 5))}
        optimizer = GroupedSAdam(params, spectral, lr=0.01, weight_decay=0.1)
        for _ in range(50):
            for p in params:
                p.grad = randn(4, 12).to(device)
            optimizer.step()
        return [p.detach().cpu() for p in params]

    for found, expected in zip(steps(device), steps("cpu"), strict=True):
        assert close(found, expected, 1e-10)


@pytest.mark.parametrize("moments_device", [None, "cpu"])
def test_moments(device, moments_device):
    """Of inputs and of gradients, in float32 and summed in float64, against a float64 model."""
    for measure in calibrate.second_moments, calibrate.gradient_moments:
        expected = measure(foundation().double(), token_rows())
        found = measure(foundation().to(device), token_rows(), moments_device=moments_device)
        assert found.keys() == expected.keys()
        for name, C in found.items():
            assert close(C.cpu(), expected[name], 1e-5)


def test_eigenproblem(device):
    n, X = 96, normal(0)(96, 300)
    C, H = X @ X.T / 300, rotation(n, 1) * torch.logspace(-3, 1, n).double() @ rotation(n, 1).T
    eigvals, basis = (t.cpu() for t in generalized_eigh(C.to(device), H.to(device)))
    assert (eigvals - generalized_eigh(C, H)[0]).abs().max() <= gamma_error(C, H)
    assert (basis.T @ H @ basis - eye(n)).abs().max() <= n * EPS * cond(H)
    assert (C @ basis - H @ basis * eigvals).norm() <= 100 * n * EPS * C.norm() * basis.norm()


def test_every_start_leaves_the_layer_as_it_was(device):
    """And merging does: W_res + κBA = W0. The penalty of no change is zero."""
    randn = normal(0)
    moments = [X @ X.T / 50 for X in (randn(32, 50), randn(32, 50))]
    m = {key: t.to(device) for key, t in solve_layer(*moments).items()}
    for method in METHODS.values():
        if method.start:
            model = foundation().to(device)
            layer = next(iter(add_lora(model, 4, scale=2.0).values()))
            W0 = layer.weight.clone()
            layer.init_from(*method.start(W0, r=4, scale=2.0, generator=torch.Generator(), **m))
            if method.protected:
                protect(layer, *method.protected(W0))
            S = torch.eye(len(W0), device=device)
            assert abs(kl_penalty(*layer.delta_factors(), S, m["C_pre"].float()).item()) < 1e-6
            merge_lora(model)
            assert close(next(iter(block_linears(model).values())).weight, W0, 1e-5)


# ------------------------------------------------------------------------------------------------
# Text and losses

@pytest.mark.parametrize("lengths", [(9,) * 6, (3, 9, 1, 30, 9, 12)])
def test_greedy_text_is_equal_token_by_token(device, lengths):
    """With and without prompts of equal length. No two logits are so close that rounding could
    choose between them."""
    prompts, model = [row[:n] for row, n in zip([[7] * 30] * 6, lengths)], foundation()
    prompts = [[256, i, *p][:len(p)] for i, p in enumerate(prompts)]
    expected = generate(model, prompts, 40)
    for prompt, tokens in zip(prompts, expected):
        logits = model(torch.tensor([prompt + tokens[:-1]]))[0, len(prompt) - 1:]
        best = logits.topk(2).values
        assert (best[:, 0] - best[:, 1]).min() > 1e-4
    assert generate(model.to(device), prompts, 40) == expected


def test_sampled_text_follows_from_the_seed(device):
    """With a decoding setting for each row; and the filters agree with the CPU's."""
    model = foundation().to(device)
    logits = 3 * torch.randn(40, 257)
    decoding = calibrate.draw_decoding(random.Random(0), 40, model)
    kept = filter_top_k_top_p(logits.to(device), *decoding).cpu()
    expected = filter_top_k_top_p(logits, *(t.cpu() for t in decoding))
    both = kept.isfinite() & expected.isfinite()
    assert torch.allclose(kept[both], expected[both]) and not both.all()
    # rounding may decide whether a token at the edge of top-p stays
    assert (kept.isfinite() != expected.isfinite()).sum() <= 2
    texts = [generate(model, [[256]] * 40, 30, [256], decoding, 8,
                      torch.Generator(device).manual_seed(seed)) for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]
    assert min(map(len, texts[0])) >= 8


def test_loss_over_a_large_vocabulary(device, monkeypatch):
    """In parts, with all gradients, against all logits at once on the CPU; in float32."""
    monkeypatch.setattr(machine, "chosen", "float32")
    torch.manual_seed(0)
    model, x = GPT(GPTConfig(24, 1000, 1, 2, 16)), torch.randint(1000, (8, 24))
    y = x.roll(-1, 1).masked_fill(torch.arange(24) < 3, -100)

    def gradients(device):
        moved = copy.deepcopy(model).to(device)
        loss = train.loss_of(moved, x.to(device), y.to(device))
        (2 * loss).backward()
        return [t.cpu() for t in (loss.detach(), *(p.grad for p in moved.parameters()))]

    expected = gradients("cpu")
    monkeypatch.setattr(train, "MOST_LOGITS", 50_000)
    for found, right in zip(gradients(device), expected, strict=True):
        assert close(found, right, 1e-5)


# ------------------------------------------------------------------------------------------------
# Waiting

@contextlib.contextmanager
def waits(device):
    """Yields a list, filled at the end: the lines of code in which the CPU waited for the GPU."""
    lines = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield lines
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    lines += [linecache.getline(w.filename, w.lineno).strip() for w in caught
              if "called a synchronizing" in str(w.message)]


def test_a_training_step_waits_only_where_it_must(device):
    model, optimizers = adapting(device)
    batches = [code_batch(step) for step in range(3)]
    settings = {"steps": 3, "lr": 0}
    train.training_loop(model, optimizers, batches.__getitem__, settings, None)  # warms up
    with waits(device) as lines:
        train.training_loop(model, optimizers, batches.__getitem__, settings, None)
    assert not [line for line in lines if not any(code in line for code in WAITS)], lines
    assert bool(lines) == (device.type == "cuda")  # the list is made at all


def test_the_optimizers_never_wait(device):
    for setup in adapting, pretraining:
        model, optimizers = setup(device)
        x, y = (t.to(device) for t in code_batch(0))
        train.loss_of(model, x, y).backward()
        for optimizer in optimizers:
            optimizer.step()  # warms up
            before = copy.deepcopy([p.detach() for p in model.parameters()])
            with waits(device) as lines:
                optimizer.step()
            assert not lines
            assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters()))


def test_the_named_waits_are_lines_of_the_code():
    code = "".join(pathlib.Path(module.__file__).read_text() for module in
                   (train, model_module, torch.autograd.graph))
    assert all(wait in code for wait in WAITS)

"""Calibration: the samples that stand for the pretraining text, what is measured on them, and the
command that writes both."""
import itertools
import math
import re

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.nn.functional import cross_entropy

import calibrate
import tasks
import train
from extras import moments
from extras.files import load, load_foundation
from extras.moments import forward_hooks
from micro import CALIBRATE, PRETRAIN, error_line, one_mixture, out  # noqa: F401 (fixtures)
from model import GPT, GPTConfig, block_linears

LIMITS = dict(min_tokens=4, max_run=5, min_unique=0.3, unique_from=10, min_unique_fours=0.5,
              fours_from=12)


def tiny_model():
    torch.manual_seed(0)
    return GPT(GPTConfig(block_size=16, vocab_size=20, n_layer=2, n_head=2, n_embd=8)).eval()


# ------------------------------------------------------------------------------------------------
# Sample and filter

@pytest.mark.parametrize("tokens, reason", [
    ([1, 2, 3], "too short"),
    ([1, 2, 3, 4], None),
    ([7, 1, 1, 1, 1, 1, 2], "run of one token"),
    ([7, 1, 1, 1, 1, 2, 1], None),
    ([1, 2] * 5, "few unique tokens"),
    ([1, 2] * 4, None),                           # too short for the share to count
    ([1, 2, 3, 4, 5] * 3, "few unique 4-grams"),  # 5 of 12
    ([1, 2, 3, 4] * 2 + [5, 6, 7, 8], None)])
def test_filters_by_hand(tokens, reason):
    assert calibrate.rejection(tokens, set(), LIMITS) == reason


def test_an_exact_duplicate_is_rejected():
    seen = set()
    assert calibrate.rejection([1, 2, 3, 4], seen, LIMITS) is None
    assert calibrate.rejection([1, 2, 3, 4], seen, LIMITS) == "duplicate"
    assert calibrate.rejection([1, 2, 3, 5], seen, LIMITS) is None


def test_samples_repeat_by_seed_and_pass_the_filters(capsys):
    a, b, c = (calibrate.sample_proxy(tiny_model(), 30, 0, LIMITS, 3, 10, seed=seed, batch=20)
               for seed in (1, 1, 2))
    assert a == b != c and len(a) == 30
    assert re.match(r"  accepted 30 samples, rejected [1-9]", capsys.readouterr().out)
    for tokens in a:
        assert calibrate.rejection(tokens, set(), LIMITS) is None and 0 not in tokens


def test_samples_begin_with_the_given_texts_in_turn():
    """A start of another length changes nothing about the rest of its own row's filters."""
    starts, model = [[], [7, 8], [9]], tiny_model()
    found = calibrate.sample_proxy(model, 30, 0, LIMITS, 3, 10, starts=starts)
    second, third = ([t for t in found if t[:len(start)] == start] for start in starts[1:])
    assert len(second) >= 8 and len(third) >= 8 and all(len(t) <= 12 for t in found)
    plain = calibrate.sample_proxy(model, 30, 0, LIMITS, 3, 10)
    assert sum(t[:2] == [7, 8] for t in plain) < 3 and sum(t[0] == 9 for t in plain) < 6


def test_too_few_samples_end_with_the_reasons():
    with pytest.raises(ValueError, match=r"only 0 of 10 samples passed the filters in 55 tries "
                                         r".*'too short'.*--samples"):
        calibrate.sample_proxy(tiny_model(), 10, 0, {**LIMITS, "min_tokens": 99}, 3, 10, batch=20)


def test_decoding_settings_are_drawn_by_their_shares():
    """0.7 plain, 0.2 with top-p, 0.1 hot with both limits; no limit on k is the vocabulary."""
    model, rng = tiny_model(), calibrate.random.Random(0)
    temperature, top_p, top_k = calibrate.draw_decoding(rng, 10_000, model)
    for chosen, share in ((top_p == 1, 0.7), (top_p == 0.95, 0.2), (top_k == 50, 0.1)):
        assert chosen.double().mean() == pytest.approx(share, abs=0.02)
    assert ((temperature == 1.2) == (top_k == 50)).all() and set(top_k.tolist()) == {20, 50}


# ------------------------------------------------------------------------------------------------
# Measure

token_rows = st.lists(st.lists(st.integers(0, 19), min_size=2, max_size=16), min_size=1, max_size=9)


@pytest.mark.parametrize("measure", [calibrate.second_moments, calibrate.gradient_moments])
@settings(max_examples=25)
@given(rows=token_rows, batch=st.integers(1, 9), seed=st.integers(0, 9))
def test_moments_do_not_depend_on_batches_order_or_padding(measure, rows, batch, seed):
    model = tiny_model()
    alone = measure(model, rows, batch=1)  # one row at a time needs no padding
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    together = measure(model, [rows[i] for i in order], batch)
    assert alone.keys() == block_linears(model).keys()
    for name, C in alone.items():
        assert torch.allclose(C, together[name], rtol=1e-4, atol=1e-6 * C.abs().max())


def test_second_moments_are_those_of_the_layers_inputs():
    """Against the definition, on the first layer, whose input is LayerNorm of the embeddings."""
    model, rows = tiny_model(), [[1, 2, 3], [4, 5, 6, 7, 8]]
    wte, wpe, ln_1 = model.transformer.wte, model.transformer.wpe, model.transformer.h[0].ln_1
    x = torch.cat([ln_1(wte(torch.tensor(r)) + wpe.weight[:len(r)]) for r in rows]).double()
    measured = calibrate.second_moments(model, rows)["transformer.h.0.attn.c_attn"]
    assert torch.allclose(measured, x.T @ x / 8, rtol=1e-5, atol=1e-6)


def test_gradient_moments_are_those_of_the_loss_at_the_layers_outputs():
    """Against the definition, every layer: rows one by one, their summed loss, autograd's own
    gradients at the outputs."""
    model, rows, outputs = tiny_model(), [[1, 2, 3], [4, 5, 6, 7, 8]], {}

    def keep(name, output):
        output.retain_grad()
        outputs[name] = output

    expected = dict.fromkeys(block_linears(model), 0)
    for row in rows:
        with forward_hooks(block_linears(model), keep, outputs=True):
            logits = model(torch.tensor([row[:-1]]))[0]
        cross_entropy(logits, torch.tensor(row[1:]), reduction="sum").backward()
        for name, output in outputs.items():
            delta = output.grad[0].double()
            expected[name] = expected[name] + delta.T @ delta / 6  # tokens that have a next one
    for name, S in calibrate.gradient_moments(model, rows).items():
        assert torch.allclose(S, expected[name], rtol=1e-3, atol=1e-5 * expected[name].abs().max())


@pytest.mark.parametrize("measure", [calibrate.second_moments, calibrate.gradient_moments])
def test_sums_in_host_memory_are_the_same(measure, monkeypatch):
    """With moments_device no sum is on the model's device; here both are the CPU, so what was asked
    for is compared."""
    asked, rows = [], [[1, 2, 3], [4, 5, 6, 7, 8]]

    class Noted(calibrate.SecondMoment):
        def __init__(self, d, device):
            asked.append(device)
            super().__init__(d, device)

    for module in calibrate, moments:
        monkeypatch.setattr(module, "SecondMoment", Noted)
    a, b = (measure(tiny_model(), rows, moments_device=where) for where in (None, "cpu"))
    assert asked[0] == torch.device("cpu") and set(map(type, asked)) == {torch.device, str}
    assert all(torch.equal(C, b[name]) for name, C in a.items())


def test_hooks_are_gone_also_after_an_error():
    model = tiny_model()
    calibrate.second_moments(model, [[1, 2]])
    calibrate.gradient_moments(model, [[1, 2]])
    for measure in calibrate.second_moments, calibrate.gradient_moments:
        with pytest.raises(ValueError, match="context of 16"):
            measure(model, [[1] * 99])
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_a_moment_that_is_not_finite_is_refused():
    model = tiny_model()
    with torch.no_grad():
        model.transformer.h[1].ln_2.weight.fill_(math.inf)
    with pytest.raises(ValueError, match="second moment is not finite"):
        calibrate.second_moments(model, [[1, 2, 3]])


def test_too_little_text_is_said(capsys):
    """Fewer tokens than the widest layer has inputs, 32, give a singular moment."""
    calibrate.second_moments(tiny_model(), [[1] * 15])
    assert "fewer tokens than the widest layer" in capsys.readouterr().out
    calibrate.second_moments(tiny_model(), [[1] * 15] * 3)
    assert "fewer tokens" not in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------
# The command

def saved(path):
    return torch.load(path, weights_only=True)


def test_samples_and_their_moments_serve_every_task(out, capsys):
    """A second task takes both from proxy.pt; other samples make both files again."""
    calibrate.main(f"--task math {CALIBRATE} --out {out}".split())
    assert "proxy.pt is up to date" in capsys.readouterr().out
    proxy, code, math = map(saved, (out / "proxy.pt", out / "code" / "calibration.pt",
                                    out / "math" / "calibration.pt"))
    for name, C_pre in proxy["C_pre"].items():
        for task in code, math:
            assert torch.equal(C_pre, task["layers"][name]["C_pre"])
            assert torch.equal(proxy["S_pre"][name], task["layers"][name]["S_pre"])
        assert not torch.equal(code["layers"][name]["C_task"], math["layers"][name]["C_task"])
    assert torch.equal(proxy["samples"], math["samples"]) and len(proxy["samples"]) == 20
    calibrate.main(f"--task math {CALIBRATE} --samples 10 --out {out}".split())
    printed = capsys.readouterr().out
    assert "proxy.pt written" in printed and "calibration.pt written" in printed
    assert len(saved(out / "math" / "calibration.pt")["samples"]) == 10


def test_the_files_hold_what_the_functions_measure(out):
    """C_pre and C_task on whole rows that begin with <|endoftext|>, S_pre on the first samples."""
    calibrate.main(f"--task code {CALIBRATE} --fisher-samples 5 --out {out}".split())
    proxy, task = saved(out / "proxy.pt"), saved(out / "code" / "calibration.pt")
    model, encoding = load_foundation(out, "cpu")[0], tasks.get_encoding("bytes")
    rows = [[256, *(t for t in row if t >= 0)] for row in proxy["samples"].tolist()]
    prompts = [[256, *encoding.encode_ordinary(item.prompt)][:128]
               for item in tasks.task_items("code", "train", 8)]
    C_pre = calibrate.second_moments(model, [row[:128] for row in rows])
    C_task = calibrate.second_moments(model, prompts)
    S_pre = calibrate.gradient_moments(model, rows[:5])
    for name in C_pre:
        assert torch.allclose(proxy["C_pre"][name], C_pre[name], rtol=1e-6)
        assert torch.allclose(proxy["S_pre"][name], S_pre[name], rtol=1e-6, atol=1e-12)
        assert torch.allclose(task["layers"][name]["C_task"], C_task[name], rtol=1e-6)


def test_a_sample_may_be_as_long_as_the_context(out):
    """--max-new 0, the default, is the model's context; other numbers are limits."""
    calibrate.main(f"--task code {CALIBRATE} --out {out}".split())
    assert saved(out / "proxy.pt")["samples"].shape == (20, 128)
    calibrate.main(f"--task code {CALIBRATE} --max-new 40 --out {out}".split())
    assert saved(out / "proxy.pt")["samples"].shape == (20, 40)


def test_texts_from_elsewhere_have_files_of_their_own(out):
    """What a caller gives is measured; the foundation's own calibration stays, and a
    run's settings say which one it used."""
    own, text = saved(out / "code" / "calibration.pt"), "Some text of somebody else. "
    rows = [list((text[i:] + text * 9).encode()) for i in range(20)]  # longer than the context
    args = calibrate.parser().parse_args(
        f"--task code {CALIBRATE} --name calibration-x --out {out}".split())
    calibrate.calibrate(args, "elsewhere", rows)
    proxy, x = saved(out / "proxy-x.pt"), saved(out / "code" / "calibration-x.pt")
    assert proxy["settings"]["source"] == x["settings"]["source"] == "elsewhere"
    assert proxy["samples"].tolist() == [row[:128] for row in rows]
    assert saved(out / "code" / "calibration.pt")["settings"] == own["settings"]
    for name, m in x["layers"].items():
        assert torch.equal(m["C_task"], own["layers"][name]["C_task"])
        assert not torch.equal(m["C_pre"], own["layers"][name]["C_pre"])
    path = train.main(f"adapt --task code --method folora --steps 1 --rank 2 --calibration "
                      f"calibration-x --out {out}".split())
    assert load(path, "adapter", "")["settings"]["measured"] == x["settings"]


def test_a_calibration_of_another_foundation_is_refused(out, capsys):
    train.main(["pretrain", *PRETRAIN.split(), "--seed", "5", "--out", str(out)])
    printed = error_line(capsys, train.main, f"adapt --task code --method folora --out {out}")
    assert ("calibration.pt belongs to another foundation; make it again with: "
            "python calibrate.py --task code") in printed


@pytest.mark.parametrize("arguments, answer", [
    ("--task poetry", "unknown task 'poetry'"),
    ("--name calibration/../x", "name is 'calibration/../x'; it must be like calibration"),
    ("--samples 0", "'0' is not a number of 1 or more"), ("--max-new 999", "999 new ones do not"),
    ("--moments-device cuda", "argument --moments-device: invalid choice: 'cuda'"),
    ("--samples 5 --min-tokens 500", "only 0 of 5 samples passed the filters")])
def test_a_users_mistake_is_one_line(out, capsys, arguments, answer):
    assert answer in error_line(capsys, calibrate.main, f"{arguments} --out {out}")


# ------------------------------------------------------------------------------------------------
# The claim behind it

@given(vocabulary=st.integers(2, 3), length=st.integers(1, 4), alpha=st.floats(0.01, 0.9),
       eta=st.floats(0, 1), seed=st.integers(0, 10**6))
def test_own_samples_stand_for_the_data(vocabulary, length, alpha, eta, seed):
    """Theorem 3.1: logits within η of the log of the α-smoothed conditionals give
    KL(P_data‖P_θ) <= T(-log(1-α) + 2η). By enumeration of every text of `length` tokens."""
    generator = torch.Generator().manual_seed(seed)
    data, model, kl = {}, {}, 0.0
    for context in (c for n in range(length) for c in itertools.product(range(vocabulary), repeat=n)):
        p = torch.rand(vocabulary, generator=generator, dtype=torch.float64) ** 4
        data[context] = p / p.sum()
        noise = eta * (2 * torch.rand(vocabulary, generator=generator, dtype=torch.float64) - 1)
        smoothed = (1 - alpha) * data[context] + alpha / vocabulary
        model[context] = (smoothed.log() + noise).softmax(0)
    for text in itertools.product(range(vocabulary), repeat=length):
        P, Q = (math.prod(d[text[:t]][text[t]].item() for t in range(length)) for d in (data, model))
        kl += P * math.log(P / Q) if P else 0
    assert -1e-12 <= kl <= length * (-math.log(1 - alpha) + 2 * eta) + 1e-12


def test_sampling_is_finished_once(monkeypatch):
    """Also where more is drawn than is missing, since some are rejected."""
    told = []
    monkeypatch.setattr(calibrate, "Progress", lambda title, total: told.append)
    calibrate.sample_proxy(tiny_model(), 30, 0, LIMITS, 3, 10, batch=20)
    assert told[-1] == 30 and max(told[:-1]) < 30

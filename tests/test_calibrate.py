"""Calibration: the samples that stand for the pretraining text, and the one pass that measures them."""
import itertools
import math

import pytest
import torch
from hypothesis import given, strategies as st

import calibrate
from model import GPT, GPTConfig, block_linears

LIMITS = dict(min_tokens=4, max_run=5, min_unique=0.3, unique_from=10, min_unique_fours=0.5, fours_from=12)


def micro():
    torch.manual_seed(0)
    return GPT(GPTConfig(block_size=16, vocab_size=20, n_layer=2, n_head=2, n_embd=8)).eval()


@pytest.mark.parametrize("tokens, reason", [
    ([1, 2, 3], "too short"),
    ([1, 2, 3, 4], None),
    ([7, 1, 1, 1, 1, 1, 2], "run of one token"),
    ([7, 1, 1, 1, 1, 2, 1], None),
    ([1, 2] * 5, "few unique tokens"),
    ([1, 2] * 4, None),                       # too short for the ratio to count
    ([1, 2, 3, 4, 5] * 3, "few unique 4-grams"),  # 5 of 12
    ([1, 2, 3, 4] * 2 + [5, 6, 7, 8], None)])
def test_filters_by_hand(tokens, reason):
    assert calibrate.rejection(tokens, set(), LIMITS) == reason


def test_an_exact_duplicate_is_rejected():
    seen = set()
    assert calibrate.rejection([1, 2, 3, 4], seen, LIMITS) is None
    assert calibrate.rejection([1, 2, 3, 4], seen, LIMITS) == "duplicate"
    assert calibrate.rejection([1, 2, 3, 5], seen, LIMITS) is None


def test_longest_run():
    assert [calibrate.longest_run(t) for t in ([], [5], [7, 7, 7, 2], [1, 2, 2])] == [0, 1, 3, 2]


def test_samples_repeat_by_seed_and_pass_the_filters():
    a, rejected = calibrate.sample_proxy(micro(), 30, 0, LIMITS, 3, 10, seed=1, batch=20)
    b, _ = calibrate.sample_proxy(micro(), 30, 0, LIMITS, 3, 10, seed=1, batch=20)
    c, _ = calibrate.sample_proxy(micro(), 30, 0, LIMITS, 3, 10, seed=2, batch=20)
    assert a == b != c and len(a) == 30
    assert all(calibrate.rejection(tokens, set(), LIMITS) is None and 0 not in tokens for tokens in a)


def test_too_few_samples_end_with_the_reasons():
    with pytest.raises(ValueError, match=r"only 0 of 10 samples passed the filters in 50 tries "
                                         r".*'too short'.*--samples"):
        calibrate.sample_proxy(micro(), 10, 0, {**LIMITS, "min_tokens": 99}, 3, 10, batch=20)


rows_of_any_length = st.lists(st.lists(st.integers(0, 19), min_size=1, max_size=16), min_size=1, max_size=9)


@given(rows=rows_of_any_length, batch=st.integers(1, 9), seed=st.integers(0, 9))
def test_moments_do_not_depend_on_batches_order_or_padding(rows, batch, seed):
    model = micro()
    alone = calibrate.second_moments(model, rows, batch=1)  # one row at a time needs no padding
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    together = calibrate.second_moments(model, [rows[i] for i in order], batch)
    assert alone.keys() == block_linears(model).keys()
    for name in alone:
        assert torch.allclose(alone[name], together[name], rtol=1e-4, atol=1e-6 * alone[name].abs().max())


@pytest.mark.parametrize("gradients", [False, True])
def test_sums_in_the_machines_own_memory_are_the_same(gradients, monkeypatch):
    """With sums_on no sum is on the model's device; here both are the CPU, so the choice is looked at."""
    asked, rows = [], [[1, 2, 3], [4, 5, 6, 7, 8]]

    class Noted(calibrate.SecondMoment):
        def __init__(self, d, device):
            asked.append(device)
            super().__init__(d, device)

    monkeypatch.setattr(calibrate, "SecondMoment", Noted)
    found = [calibrate.second_moments(micro(), rows, sums_on=where, gradients=gradients)
             for where in (None, "cpu")]
    assert set(map(type, asked)) == {torch.device, str}
    assert all(torch.equal(C, found[1][name]) for name, C in found[0].items())


def test_moments_are_those_of_the_layers_inputs():
    """Against the definition, on the first layer, whose input is known: LayerNorm of the embeddings."""
    model, rows = micro(), [[1, 2, 3], [4, 5, 6, 7, 8]]
    wte, wpe, ln_1 = model.transformer.wte, model.transformer.wpe, model.transformer.h[0].ln_1
    x = torch.cat([ln_1(wte(torch.tensor(r)) + wpe.weight[:len(r)]) for r in rows]).double()
    measured = calibrate.second_moments(model, rows)["transformer.h.0.attn.c_attn"]
    assert torch.allclose(measured, x.T @ x / 8, rtol=1e-5, atol=1e-6)


def test_hooks_are_gone_also_after_an_error():
    model = micro()
    calibrate.second_moments(model, [[1, 2]])
    with pytest.raises(ValueError):
        calibrate.second_moments(model, [[1] * 99])  # longer than the context
    assert not any(layer._forward_pre_hooks for layer in block_linears(model).values())


def test_a_moment_that_is_not_finite_names_its_layer():
    model = micro()
    with torch.no_grad():
        model.transformer.h[1].ln_2.weight.fill_(math.inf)
    with pytest.raises(ValueError, match=r"transformer\.h\.1\.mlp\.c_fc: second moment is not finite"):
        calibrate.second_moments(model, [[1, 2, 3]])


@given(vocabulary=st.integers(2, 3), length=st.integers(1, 4), alpha=st.floats(0.01, 0.9),
       eta=st.floats(0, 1), seed=st.integers(0, 10**6))
def test_own_samples_stand_for_the_data(vocabulary, length, alpha, eta, seed):
    """Theorem 3.1: logits within η of the log of the α-smoothed conditionals give
    KL(P_data‖P_θ) <= T(-log(1-α) + 2η).

    By enumeration of every text of `length` tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    kl = 0.0
    contexts = {c: None for n in range(length) for c in itertools.product(range(vocabulary), repeat=n)}
    data, model = {}, {}
    for c in contexts:
        p = torch.rand(vocabulary, generator=generator, dtype=torch.float64) ** 4
        data[c] = p / p.sum()
        noise = eta * (2 * torch.rand(vocabulary, generator=generator, dtype=torch.float64) - 1)
        model[c] = (((1 - alpha) * data[c] + alpha / vocabulary).log() + noise).softmax(0)
    for text in itertools.product(range(vocabulary), repeat=length):
        P, Q = (math.prod(d[text[:t]][text[t]].item() for t in range(length)) for d in (data, model))
        kl += P * math.log(P / Q) if P else 0
    assert -1e-12 <= kl <= length * (-math.log(1 - alpha) + 2 * eta) + 1e-12

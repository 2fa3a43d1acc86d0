"""The loss over a large vocabulary is the loss: same value, same gradients, part by part."""
import dataclasses

import pytest
import torch
from hypothesis import given, strategies as st
from torch.nn import functional as F

import train
from extras import machine
from extras.machine import autocast
from matrices import close
from model import GPT, GPTConfig

CONFIG = GPTConfig(block_size=24, vocab_size=31, n_layer=2, n_head=2, n_embd=16)


@given(tokens=st.integers(1, 24), rows=st.integers(1, 4), seed=st.integers(0, 99))
def test_the_loss_is_the_mean_over_the_targets_that_count(tokens, rows, seed):
    """Targets of -100 do not."""
    torch.manual_seed(seed % 3)
    model, generator = GPT(CONFIG).eval(), torch.Generator().manual_seed(seed)
    x, y = torch.randint(0, 31, (2, rows, tokens), generator=generator)
    counted = torch.rand(rows, tokens, generator=generator) < 0.5
    counted[0, 0] = True
    y = y.where(counted, torch.tensor(-100))
    with torch.no_grad(), autocast(x.device):
        logits = model(x).float()
        expected = F.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=-100)
        assert train.loss_of(model, x, y).item() == pytest.approx(expected.item(), rel=0.01)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_large_vocabulary_takes_the_loss_in_parts(frozen, precision, monkeypatch):
    """The same loss and gradients as from all logits at once, the output layer trained or not; a
    small batch is not split."""
    monkeypatch.setattr(machine, "chosen", precision)
    torch.manual_seed(0)
    model = GPT(dataclasses.replace(CONFIG, vocab_size=2 ** 12))
    model.lm_head.weight.requires_grad_(not frozen)
    x, rows = torch.randint(2 ** 12, (8, 24)), []
    y = x.roll(-1, 1).masked_fill(torch.arange(24) < 3, -100)
    model.lm_head.register_forward_hook(lambda _, args, out: rows.append(len(out)))
    results = []
    for most in train.MOST_LOGITS, 50 * 2 ** 12 + 7:
        monkeypatch.setattr(train, "MOST_LOGITS", most)
        model.zero_grad()
        loss = train.loss_of(model, x, y)
        (2 * loss).backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
    assert rows == [168, 50, 50, 50, 18, 18, 50, 50, 50]
    for expected, found in zip(*results, strict=True):
        assert close(found, expected, 0.02 if precision == "bfloat16" else 1e-5)
    with torch.no_grad():
        assert train.loss_of(model, x, y).item() == pytest.approx(results[0][0].item(), rel=0.01)
    rows.clear()
    train.loss_of(model, x[:2], y[:2]).backward()
    assert rows == [42]

"""The loss over a large vocabulary is the loss: same value, same gradients, chunk by chunk."""
import dataclasses

import pytest
import torch
from hypothesis import given, strategies as st
from torch.nn.functional import cross_entropy

import train
from extras.chunked_loss import ChunkedCrossEntropy, large_vocab_loss
from extras.machine import autocast
from model import GPT, GPTConfig

CONFIG = GPTConfig(block_size=24, vocab_size=31, n_layer=2, n_head=2, n_embd=16)


@given(n=st.integers(1, 40), vocabulary=st.integers(2, 30), rows=st.integers(1, 50),
       frozen=st.booleans(), seed=st.integers(0, 99))
def test_the_loss_in_chunks_is_the_loss(n, vocabulary, rows, frozen, seed):
    """Value and gradients, however many rows a chunk has, the output layer trained or not."""
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(n, 5, generator=generator, requires_grad=True)
    W = torch.randn(vocabulary, 5, generator=generator, requires_grad=not frozen)
    y = torch.randint(vocabulary, (n,), generator=generator)
    inputs, results = (h,) if frozen else (h, W), []
    for loss in cross_entropy(h @ W.T, y), ChunkedCrossEntropy.apply(h, W, y, rows):
        results.append((loss, *torch.autograd.grad(3 * loss, inputs)))
    for expected, found in zip(*results):
        assert torch.allclose(expected, found, rtol=1e-4, atol=1e-5)


def test_without_gradients_none_is_computed():
    """Only the value, with or without weights that could be trained."""
    h, W, y = torch.randn(9, 5), torch.randn(7, 5, requires_grad=True), torch.arange(9) % 7
    with torch.no_grad():
        loss = large_vocab_loss(h, W, y)
    assert not loss.requires_grad and W.grad is None
    assert torch.allclose(loss, cross_entropy(h @ W.T, y))


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
        expected = cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=-100)
        assert train.loss_of(model, x, y).item() == pytest.approx(expected.item(), rel=0.01)


def test_a_large_vocabulary_takes_the_loss_in_chunks(monkeypatch):
    """The same loss as from all logits at once, with and without gradients; a small batch does not."""
    model = GPT(dataclasses.replace(CONFIG, vocab_size=2 ** 17))
    x = torch.randint(2 ** 17, (8, 24), generator=torch.Generator().manual_seed(0))
    y = x.roll(-1, 1).masked_fill(torch.arange(24) < 3, -100)
    calls, apply = [], ChunkedCrossEntropy.apply
    monkeypatch.setattr(ChunkedCrossEntropy, "apply",
                        lambda *arguments: calls.append(arguments) or apply(*arguments))
    with torch.no_grad():
        logits = model(x)
        expected = cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=-100).item()
        assert train.loss_of(model, x, y).item() == pytest.approx(expected, rel=1e-3)
    train.loss_of(model, x, y).backward()
    assert len(calls) == 2 and model.lm_head.weight.grad.norm() > 0
    train.loss_of(model, x[:1], y[:1]).backward()
    assert len(calls) == 2

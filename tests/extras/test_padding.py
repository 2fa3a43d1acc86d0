"""A CPU leaves padding out: the same loss and gradients, with less to compute."""
import pytest
import torch
from hypothesis import given, strategies as st
from torch.nn.functional import cross_entropy

import train
from extras import machine
from extras.machine import leave_out_padding
from extras.moments import forward_hooks
from model import GPT, GPTConfig, block_linears
from tasks import response_batch
from tiny_llama import tiny

MODELS = {"gpt": lambda: GPT(GPTConfig(32, 31, 2, 2, 12)), "llama": lambda: tiny(vocab=31, std=0.1)}


@pytest.fixture(autouse=True)
def in_float32(monkeypatch):
    monkeypatch.setattr(machine, "chosen", "float32")


def batch(rows, seed=0):
    """x and y of rows of so many tokens, of which so many are the prompt: (tokens, prompt)."""
    generator = torch.Generator().manual_seed(seed)
    return response_batch([(torch.randint(31, (n,), generator=generator).tolist(), min(p, n - 1))
                           for n, p in rows])


@given(rows=st.lists(st.tuples(st.integers(2, 30), st.integers(1, 20)), min_size=1, max_size=5),
       seed=st.integers(0, 99), name=st.sampled_from([*MODELS]))
def test_loss_and_gradients_are_those_with_padding(rows, seed, name):
    torch.manual_seed(seed)
    model, (x, y) = MODELS[name](), batch(rows, seed)
    padded = cross_entropy(model(x).flatten(0, 1), y.flatten(), ignore_index=-100)
    losses = train.loss_of(model, x, y), padded
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
    parameters = [*model.parameters()]
    for a, b in zip(*(torch.autograd.grad(loss, parameters) for loss in losses)):
        assert (a - b).norm() <= 1e-4 * (1e-2 + b.norm())


@pytest.mark.parametrize("second, read", [(21, (2, 24)), (14, (1, 37)), (2, (1, 25))])
def test_padding_is_not_read_where_it_is_more_than_a_fifth(second, read):
    """Rows of 24 inputs and of `second` less one: what the layers' inputs are."""
    model, shapes = MODELS["gpt"](), {}
    with forward_hooks(block_linears(model), lambda name, x: shapes.setdefault(name, x.shape)):
        train.loss_of(model, *batch([(25, 4), (second, 1)]))
    assert shapes["transformer.h.0.attn.c_attn"] == (*read, 12)
    assert shapes["transformer.h.0.mlp.c_proj"] == (*read, 48)


def test_what_is_left():
    x = torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0]])
    y = torch.tensor([[-100, 3, 4, 9], [6, 7, -100, -100]])
    *tensors, lengths = leave_out_padding(x, y)
    assert [t.tolist() for t in tensors] == [
        [[1, 2, 3, 4, 5, 6]], [[-100, 3, 4, 9, 6, 7]], [[0, 1, 2, 3, 0, 1]]]
    assert lengths == [4, 2]

"""E[x xᵀ], what all else is computed from.

The second moment is that of the tokens alone: it does not depend on how they are batched, ordered or
padded, and does not lose small batches after large ones. What cannot be a second moment is refused.
"""
import math

import pytest
import torch
from hypothesis import given, strategies as st

from folora import SecondMoment
from matrices import close, f64, normal, seeds, small


@given(small, st.integers(1, 30), seeds, st.data())
def test_it_does_not_depend_on_batches_or_order(d, tokens, seed, data):
    """C = XᵀX/n, however the tokens are shuffled, batched and shaped."""
    X = normal(seed)(tokens, d)
    order = torch.randperm(tokens, generator=torch.Generator().manual_seed(seed))
    cuts = sorted(data.draw(st.lists(st.integers(0, tokens), max_size=4)))
    moment = SecondMoment(d)
    for batch in X[order].tensor_split(cuts):
        moment.add(batch.reshape(1, -1, d))
    assert moment.tokens == tokens and close(moment.mean(), X.T @ X / tokens)


@given(small, st.lists(st.integers(1, 6), min_size=1, max_size=4), seeds)
def test_padding_enters_neither_the_sum_nor_the_count(d, lengths, seed):
    """Whatever the padding holds."""
    randn = normal(seed)
    texts = [randn(length, d) for length in lengths]
    x = 1e6 * randn(len(texts), max(lengths) + 1, d)
    mask = torch.arange(x.shape[1]) < torch.tensor(lengths)[:, None]
    for row, text in zip(x, texts):
        row[:len(text)] = text
    moment = SecondMoment(d)
    moment.add(x, mask)
    X = torch.cat(texts)
    assert moment.tokens == len(X) and close(moment.mean(), X.T @ X / len(X))


def test_batches_are_summed_in_float64():
    """float32 activations: 1e8, then 10,000 times 1e-4, which a float32 sum would not notice."""
    moment = SecondMoment(1)
    moment.add(torch.tensor([[1e4]]))
    for _ in range(10_000):
        moment.add(torch.tensor([[1e-2]]))
    assert moment.mean().dtype == torch.float64
    assert moment.mean().item() * 10_001 == pytest.approx(1e8 + 1, rel=1e-12)


@pytest.mark.parametrize("x", [math.nan, math.inf, 1e200, None])
def test_no_tokens_and_numbers_that_are_not_finite_are_refused(x):
    """Also when all tokens are padding, and when finite activations overflow in the product."""
    moment = SecondMoment(2)
    mask = None if x else torch.zeros(1, 3, dtype=torch.bool)
    moment.add(f64([[[x or 0.0] * 2] * 3]), mask)
    with pytest.raises(ValueError, match="not finite" if x else "no tokens"):
        moment.mean()

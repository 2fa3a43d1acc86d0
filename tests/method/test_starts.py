"""App. B.3: where A and B begin.

Whatever the start, the layer begins as exactly the function it was. The paper's start takes the
directions that the base model's text uses least, ours those of most utility per penalty; either way
the frozen weight no longer reads these directions, the adapter reads all of them.
"""
import pytest
import torch
from hypothesis import given, strategies as st

from extras.baselines import leading_start
from folora import forgetting_penalty, generalized_eigh, null_space_start, solve_layer
from matrices import (EPS, adapted, blocks, close, eye, kappas, normal, rotation, second_moment, seeds,
                      spd_pairs, spectral_norm)

both_starts = pytest.mark.parametrize("start", [null_space_start, leading_start])


@both_starts
@given(block=blocks(), scale=kappas)
def test_the_layer_begins_as_exactly_the_function_it_was(start, block, scale):
    """W_res + κB0A0 = W0 for every κ and r, and A0 and B0 have LoRA's shapes."""
    W0, _, X, r, randn = block
    m = solve_layer(second_moment(X), second_moment(randn(len(X), 20)), 0.1)
    A0, B0 = start(W0, r=r, scale=scale, **m)
    assert A0.shape == (r, len(X)) and B0.shape == (len(W0), r)
    layer, x = adapted(W0, A0, B0, scale), randn(7, len(X))
    assert close(layer(x), x @ W0.T + layer.bias)
    assert close(layer.to_linear(learned=True).weight, W0)
    assert close(layer.to_linear(learned=False).weight, W0)


@given(blocks(), st.sampled_from([1.0, 0.5, 4.0]))
def test_the_frozen_weight_no_longer_reads_the_adapters_directions(block, scale):
    """κB0A0 = W0 U Uᵀ, whatever κ: W_res reads nothing of the span of U, the adapter all of it."""
    W0, _, X, r, _ = block
    starts = (null_space_start(W0, second_moment(X), r, scale),
              leading_start(W0, rotation(len(X), 0), r, scale))
    for A0, B0 in starts:
        assert close(A0 @ A0.T, eye(r))
        assert close(scale * B0 @ A0, W0 @ A0.T @ A0)
        assert (adapted(W0, A0, B0, scale).weight @ A0.T).norm() <= 1e-13 * W0.norm()


@given(spd_pairs(), seeds, st.data())
def test_the_null_space_start_is_what_the_base_models_text_uses_least(pair, seed, data):
    """Tr(A0 C_pre A0ᵀ) is the sum of the r smallest eigenvalues, the least of all r-frames."""
    _, C_pre, _ = pair
    n, randn = len(C_pre), normal(seed)
    r = data.draw(st.integers(1, n))
    A0, _ = null_space_start(randn(n + 1, n), C_pre, r)
    used, error = forgetting_penalty(A0, C_pre), 10 * n * EPS * spectral_norm(C_pre)
    assert close(A0 @ A0.T, eye(r))
    assert (used - torch.linalg.eigvalsh(C_pre)[:r].sum()).abs() <= r * error
    assert used <= forgetting_penalty(rotation(n, seed)[:r], C_pre) + r * error


@given(blocks())
def test_the_null_space_start_does_not_see_the_base_models_text(block):
    """A0 X_pre = 0 when X_pre leaves out at least r dimensions: the premise of Eq. 4."""
    W0, _, X, r, _ = block
    A0, _ = null_space_start(W0, second_moment(X), r)
    assert (A0 @ X).norm() <= 1e-13 * X.norm()


@given(spd_pairs(), seeds, st.data())
def test_the_leading_start_spans_the_leading_directions(pair, seed, data):
    """A0's rows are orthonormal and span v_1, ..., v_r."""
    C, _, H = pair
    n = len(H)
    r = data.draw(st.integers(1, n))
    _, V = generalized_eigh(C, H)
    A0, _ = leading_start(normal(seed)(n, n), V, r)
    assert close(A0 @ A0.T, eye(r))
    top = V[:, :r]
    assert spectral_norm(top - A0.T @ A0 @ top) <= 10 * n * EPS * spectral_norm(top)

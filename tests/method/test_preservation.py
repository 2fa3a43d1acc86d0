"""Eq. 1-4: why a small penalty means that little is forgotten.

An update that the base model's inputs do not see leaves the block exactly as it was, whatever the
size. Otherwise the penalty is the mean squared movement of A's outputs: it bounds how far the block's
outputs drift, to first order how far the loss changes, and all along training with A and B both moving.
"""
import math

import torch
from hypothesis import given, settings, strategies as st
from torch.nn.functional import cross_entropy, softplus

from extras.baselines import leading_start
from folora import SAdam, forgetting_penalty, null_space_start, solve_layer, spectral_gate
from matrices import adapted, blocks, close, second_moment, spectral_norm


@given(blocks())
def test_the_penalty_is_the_mean_squared_movement_of_the_outputs(block):
    """R(ΔA) at τ = 0 is ‖ΔA X_pre‖² / tokens, X_pre the inputs that C_pre was measured on (Eq. 6)."""
    _, _, X, r, randn = block
    dA = randn(r, len(X))
    R, moved = forgetting_penalty(dA, second_moment(X)), (dA @ X).norm() ** 2 / X.shape[1]
    assert (R - moved).abs() <= 1e-13 * (dA.norm() * X.norm()) ** 2


@given(blocks(), st.sampled_from([1e-3, 1.0, 1e3]))
def test_updates_in_the_null_space_preserve_the_block_exactly(block, size):
    """ΔA C_pre = 0 leaves σ(WX + b) as it was, however large the step (Eq. 1-3)."""
    W0, b, X, r, randn = block
    A0, _ = null_space_start(W0, second_moment(X), r)
    dW = size * randn(len(W0), r) @ randn(r, r) @ A0
    before, after = softplus(W0 @ X + b), softplus((W0 + dW) @ X + b)
    assert (after - before).norm() <= 1e-13 * (before.norm() + dW.norm() * X.norm())


@given(blocks())
def test_drift_is_linear_in_the_step_and_its_remainder_quadratic(block):
    """f(W+hΔW) - f(W) = h J_σ(Z)[ΔW X] + O(h²): half of h halves the drift, quarters the rest
    (Eq. 2)."""
    W0, b, X, r, randn = block
    dW = randn(len(W0), r) @ randn(r, len(X))
    dW /= (dW @ X).abs().max()
    first_order = torch.sigmoid(W0 @ X + b) * (dW @ X)  # σ = softplus: σ' = sigmoid, σ'' nowhere 0

    def drift(h):
        before, after = ((W0 + t * dW) @ X + b for t in (0, h))
        return softplus(after, threshold=100) - softplus(before, threshold=100)

    h = 0.01
    assert abs(math.log2(drift(h).norm() / drift(h / 2).norm()) - 1) < 0.02
    remainder, halved = (drift(t) - t * first_order for t in (h, h / 2))
    assert abs(math.log2(remainder.norm() / halved.norm()) - 2) < 0.02
    # |σ'| <= 1, so the penalty bounds the drift itself
    bound = forgetting_penalty(dW, second_moment(X)) * X.shape[1]
    assert drift(1).norm() ** 2 <= bound + 1e-13 * (dW.norm() * X.norm()) ** 2


@given(blocks())
def test_from_the_null_space_only_the_step_of_A_reaches_the_base_models_text(block):
    """With A0 X_pre = 0, ΔW X_pre = (B0+ΔB) ΔA X_pre, of norm at most ‖B0+ΔB‖₂ ‖ΔA X_pre‖_F (Eq. 4)."""
    W0, _, X, r, randn = block
    A0, B0 = null_space_start(W0, second_moment(X), r)
    dA, dB = randn(r, len(X)), randn(len(W0), r)
    moved = ((B0 + dB) @ (A0 + dA) - B0 @ A0) @ X
    size = (B0 + dB).norm() * (1 + dA.norm()) * X.norm()
    assert (moved - (B0 + dB) @ dA @ X).norm() <= 1e-13 * size
    assert moved.norm() <= spectral_norm(B0 + dB) * (dA @ X).norm() + 1e-13 * size


@settings(max_examples=50)
@given(blocks(), st.booleans(), st.sampled_from([1e-3, 0.1]), st.sampled_from([1.0, 0.5, 4.0]))
def test_the_drift_stays_within_its_bound_after_every_step_of_training(block, in_null_space, lr, scale):
    """Eq. 4 with B trained too, and from a start that the base model's text may see:
    ‖ΔW X_pre‖_F <= κ (‖B0+ΔB‖₂ ‖ΔA X_pre‖_F + ‖ΔB A0 X_pre‖_F). The first factor is at most
    √(c·tokens) Σ_k ‖ΔA_k‖_H over the steps, c = tr(C_pre)/d_in; the last term is 0 in the null space."""
    W0, _, X, r, randn = block
    inputs, targets = randn(len(X), 20), randn(len(W0), 20)
    m = solve_layer(second_moment(X), second_moment(inputs))
    A0, B0 = (null_space_start if in_null_space else leading_start)(W0, r=r, scale=scale, **m)
    layer = adapted(W0, A0, B0, scale)
    A, B = layer.lora_A, layer.lora_B
    spectral = {A: (m["basis"], spectral_gate(m["eigvals"]))}
    optimizer, unit = SAdam([A, B], spectral, lr=lr), second_moment(X).diagonal().mean()
    size, cost = 1e-12 * (W0.norm() + scale * B0.norm() * A0.norm()) * X.norm(), 0
    for _ in range(6):
        before = A.detach().clone()
        optimizer.zero_grad()
        (layer(inputs.T) - targets.T).square().mean().backward()
        optimizer.step()
        with torch.no_grad():
            drift = (layer(X.T) - layer.bias).T - W0 @ X
            dA, dB = A - A0, B - B0
            seen = (dB @ A0 @ X).norm()
            bound = spectral_norm(B) * (dA @ X).norm() + seen
            cost += forgetting_penalty(A - before, m["H"]).sqrt()
            size_now = size + 1e-12 * scale * B.norm() * A.norm() * X.norm()
            assert drift.norm() <= scale * bound + size_now
            assert (dA @ X).norm() <= (X.shape[1] * unit).sqrt() * cost * (1 + 1e-9)
            assert not in_null_space or seen <= 1e-12 * dB.norm() * X.norm()
    assert drift.norm() > 0


@given(blocks(), st.booleans())
def test_the_penalty_bounds_the_first_order_change_of_the_loss(block, one_token):
    """|<∇_W L, ΔW>| = |E[δᵀΔW x]| <= √E‖δ‖² √E‖ΔW x‖², δ = dL/d(Wx); equal for one token and
    ΔW = δxᵀ."""
    W0, b, X, _, randn = block
    X = X[:, :1] if one_token else X
    head, tokens = randn(5, len(W0)), X.shape[1]
    targets = torch.arange(tokens) % 5
    W, shift = W0.clone().requires_grad_(), torch.zeros(len(W0), tokens).double().requires_grad_()
    cross_entropy((head @ torch.tanh(W @ X + shift + b)).T, targets).backward()  # mean over tokens
    delta = shift.grad * tokens  # (d_out, tokens), of each token's own loss
    dW = delta @ X.T if one_token else randn(*W.shape)
    change, size = (W.grad * dW).sum(), delta.norm() * dW.norm() * X.norm() / tokens
    assert (change - (delta * (dW @ X)).sum() / tokens).abs() <= 1e-13 * size
    squared_bound = delta.norm() ** 2 / tokens * forgetting_penalty(dW, second_moment(X))
    assert change ** 2 <= squared_bound + 1e-13 * size ** 2
    assert not one_token or close(change ** 2, squared_bound, 1e-10)

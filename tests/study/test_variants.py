"""The parts that the ablations exchange, and the candidates' formulas."""
import pytest
import torch
from hypothesis import given, strategies as st

import train
from extras import baselines
from folora import SAdam, forgetting_penalty, solve_layer
from matrices import adapted, blocks, close, normal, second_moment, seeds
from study import variants
from study.variants import METHODS


class OneLayer(torch.nn.Module):
    """What a loop sees of a model: one adapter."""

    block_prefix = ""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer


def one_step(monkeypatch, block, loop, change, steps=1, lr=0.5):
    """The layer after `loop`, in which each step adds change() to A and B, and its basis and gate."""
    W0, _, X, r, randn = block
    m = solve_layer(second_moment(X), second_moment(randn(len(X), 20)), 0.1)
    layer = adapted(W0, randn(r, len(X)), randn(len(W0), r))
    model, spectral = OneLayer(layer), {layer.lora_A: baselines.sadam(m, 1.0, 0.3)}
    optimizer = SAdam([layer.lora_A, layer.lora_B], spectral, lr=lr)

    def training_loop(model, optimizers, *_, after=None, **__):
        for step in range(1, steps + 1):
            with torch.no_grad():
                for p in layer.lora_A, layer.lora_B:
                    p += change(p)
            if after:
                after(step)
        return []
    monkeypatch.setattr(train, "training_loop", training_loop)
    loop(model, [optimizer], None, {}, None)
    return layer, optimizer, m


def test_variants_extend_the_methods_without_changing_them():
    assert {**METHODS, **baselines.METHODS} == METHODS
    assert not variants.FINISHES.keys() & baselines.METHODS.keys()


def test_an_even_gate_has_the_mean_of_foloras():
    moments = {"basis": torch.eye(3), "eigvals": torch.tensor([9.0, 1.0, 0.0])}
    _, gate = variants.even_gate(moments, 1.0, 0.3)
    assert torch.allclose(gate, torch.full((3,), (0.9 + 0.5 + 0.3) / 3))


@given(block=blocks())
def test_pull_back_by_the_formula(block):
    """One step: ΔB loses a share, here 1/4, ΔA that share times 1 - s̃ in the basis' coordinates; in
    H's inner product, so ΔA's forgetting penalty falls."""
    with pytest.MonkeyPatch.context() as patch:
        randn = normal(5)
        changes = []

        def change(p):
            changes.append(randn(*p.shape))
            return changes[-1]

        def loop(model, optimizers, *_):
            train.training_loop(model, after=baselines.pull_back(model, optimizers[0], 16 / block[3]),
                                optimizers=optimizers)
        layer, _, m = one_step(patch, block, loop, change)
    (dA, dB), share = changes, 0.25
    V, gate = baselines.sadam(m, 1.0, 0.3)
    expected = dA - share * (dA @ m["H"] @ V * (1 - gate)) @ V.T  # V⁻ᵀ = HV
    found = layer.lora_A - layer.lora_A0
    size = 1 + dA.norm() * m["H"].norm() * V.norm() ** 2
    assert (found - expected).norm() <= 1e-8 * size
    assert close(layer.lora_B - layer.lora_B0, (1 - share) * dB, 1e-9)
    assert forgetting_penalty(found, m["H"]) <= forgetting_penalty(dA, m["H"]) * (1 + 1e-9)


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 6), seeds)
def test_compression_is_nearest_in_the_metric(d_out, d_in, rank, seed):
    """No other ΔW of this rank is nearer; a ΔW of this rank stays what it is."""
    randn = normal(seed)
    dW, C = randn(d_out, d_in), second_moment(randn(d_in, 20))
    H = C / C.diagonal().mean() + 0.01 * torch.eye(d_in)
    near = variants.compressed(rank)(dW, C)
    assert torch.linalg.matrix_rank(near, rtol=1e-9) <= rank
    error = forgetting_penalty(dW - near, H)
    for _ in range(5):
        other = near + 0.1 * randn(d_out, rank) @ randn(rank, d_in)
        U, S, Vh = torch.linalg.svd(other, full_matrices=False)
        other = (U[:, :rank] * S[:rank]) @ Vh[:rank]
        assert error <= forgetting_penalty(dW - other, H) * (1 + 1e-9) + 1e-20
    low = randn(d_out, rank) @ randn(rank, d_in)
    assert close(variants.compressed(rank)(low, C), low, 1e-9)

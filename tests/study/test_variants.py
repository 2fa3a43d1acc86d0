"""The parts that the ablations exchange, and the candidates' formulas."""
import torch
from hypothesis import given, strategies as st

from extras import baselines
from folora import SAdam, forgetting_penalty
from matrices import close, normal, second_moment, seeds
from study import variants
from study.variants import METHODS


def test_variants_extend_the_methods_without_changing_them():
    assert {**METHODS, **baselines.METHODS} == METHODS
    assert not variants.FINISHES.keys() & baselines.METHODS.keys()


def test_an_even_gate_has_the_mean_of_foloras():
    moments = {"basis": torch.eye(3), "eigvals": torch.tensor([9.0, 1.0, 0.0])}
    _, gate = variants.even_gate(moments, 1.0, 0.3)
    assert torch.allclose(gate, torch.full((3,), (0.9 + 0.5 + 0.3) / 3))


def test_pulling_back_one_factor_leaves_the_other_to_sadam():
    """With a basis (A) or without (B): its parameter moves as PullBack's or as SAdam's."""
    def trained(kind, spectral):
        p = torch.nn.Parameter(normal(0)(3, 4))
        optimizer = kind([p], {p: spectral} if spectral else None, lr=0.1)
        optimizer.strength = 2
        for seed in range(3):
            p.grad = normal(seed)(3, 4)
            optimizer.step()
        return p.detach()

    for spectral in (torch.eye(4).double(), torch.full((4,), 0.4)), None:
        both, neither = trained(baselines.PullBack, spectral), trained(SAdam, spectral)
        A, B = trained(variants.PullBackA, spectral), trained(variants.PullBackB, spectral)
        assert not torch.allclose(both, neither)
        assert torch.equal(A, both if spectral else neither)
        assert torch.equal(B, neither if spectral else both)


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

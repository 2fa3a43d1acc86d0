"""The parts that the ablations exchange."""
import torch
from hypothesis import given, strategies as st

from extras import baselines
from study import variants
from study.variants import ABLATIONS, ALIASES, BASELINES, COMPARED, METHODS


def test_variants_extend_the_methods_without_changing_them():
    assert {**METHODS, **baselines.METHODS} == METHODS
    named = {method for group in ABLATIONS.values() for method, _ in group.values()}
    assert named | set(COMPARED) | set(BASELINES) <= set(METHODS)
    assert set(ALIASES.values()) <= set(METHODS) and not set(ALIASES) & set(METHODS)
    assert not set(METHODS) - set(baselines.METHODS) & set(baselines.METHODS)


@given(st.integers(2, 12), st.integers(1, 12), st.integers(0, 99))
def test_few_directions_keep_the_trace_and_the_leading_ones(d, k, seed):
    """Tr(C) and the k leading eigenvalues stay, all others become one; with k >= d nothing changes."""
    X = torch.randn(2 * d, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    C = X.T @ X
    S, simplified = variants.few_directions(2 * C, C, k)
    assert torch.allclose(S, 2 * simplified)
    assert torch.allclose(simplified.trace(), C.trace())
    before, after = torch.linalg.eigvalsh(C), torch.linalg.eigvalsh(simplified)
    assert torch.allclose(before[-k:], after[-k:])
    rest = after[:max(0, d - k)]
    assert torch.allclose(rest, before[:len(rest)].mean().expand(len(rest)))


def test_an_even_gate_has_the_mean_of_foloras():
    moments = {"basis": torch.eye(3), "eigvals": torch.tensor([9.0, 1.0, 0.0])}
    _, gate = variants.even_gate(moments, 1.0, 0.3)
    assert torch.allclose(gate, torch.full((3,), (0.9 + 0.5 + 0.3) / 3))

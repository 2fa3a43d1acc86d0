"""Muon by hand takes torch.optim.Muon's steps, in the dtype that it is given."""
import pytest
import torch
from hypothesis import given, strategies as st

from extras.muon import Muon, newton_schulz, pretraining_optimizers
from model import GPT, GPTConfig

SHAPES = [(24, 8), (8, 8), (32, 8), (8, 32), (8, 8)]


def some_matrices():
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def steps(params, optimizer, numbers=range(5)):
    """Steps on gradients that depend on the matrices; returns these."""
    for number in numbers:
        generator = torch.Generator().manual_seed(number)
        for p in params:
            p.grad = p.detach() ** 3 + torch.randn(p.shape, generator=generator)
        optimizer.step()
    return [p.detach() for p in params]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.0, "momentum": 0.5}])
def test_the_steps_of_torch_to_the_rounding_of_bfloat16(dtype, options):
    a, b, start = some_matrices(), some_matrices(), some_matrices()
    own = steps(a, Muon(a, lr=0.1, dtype=dtype, **options))
    reference = steps(b, torch.optim.Muon(b, lr=0.1, **options))
    for p, q, p0 in zip(own, reference, start):
        assert (p - q).norm() < 0.03 * (q - p0).norm()


def test_in_float32_the_steps_of_torch_made_to_iterate_in_float32(monkeypatch):
    a, b = some_matrices(), some_matrices()
    own = steps(a, Muon(a, lr=0.1))
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)  # how torch.optim.Muon begins
        reference = steps(b, torch.optim.Muon(b, lr=0.1))
    for p, q in zip(own, reference):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-4)


@given(m=st.integers(1, 12), n=st.integers(1, 12), seed=st.integers(0, 10 ** 6),
       log_scale=st.floats(-5, 5))
def test_newton_schulz_keeps_singular_vectors_and_brings_values_near_one(m, n, seed, log_scale):
    """From singular values between a tenth of the largest and the largest, at any scale."""
    generator = torch.Generator().manual_seed(seed)
    G = torch.randn(3, m, n, generator=generator, dtype=torch.float64)
    U, s, Vh = torch.linalg.svd(G, full_matrices=False)
    values = torch.linspace(0.1, 1, s.shape[-1], dtype=s.dtype) * 10 ** log_scale
    direction = newton_schulz(U * values @ Vh, torch.float64)
    assert direction.shape == G.shape
    D = U.mT @ direction @ Vh.mT  # diagonal, where the singular vectors are kept
    d = D.diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(D, torch.diag_embed(d), rtol=0, atol=1e-9)
    assert 0.65 < d.min() and d.max() < 1.25


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_products_are_of_the_dtype_that_is_given(monkeypatch, dtype):
    seen, baddbmm, params = set(), torch.baddbmm, some_matrices()

    def watched(*tensors, **options):
        seen.update(t.dtype for t in tensors)
        return baddbmm(*tensors, **options)
    monkeypatch.setattr(torch, "baddbmm", watched)
    steps(params, Muon(params, lr=0.1, dtype=dtype))
    assert seen == {dtype} and all(p.dtype == torch.float32 for p in params)


def test_a_matrix_without_a_gradient_stays():
    params = some_matrices()
    optimizer, before = Muon(params, lr=0.1), [p.detach().clone() for p in params]
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    assert [torch.equal(p, q) for p, q in zip(params, before)] == [False, True, True, True, True]


def test_it_goes_on_bit_for_bit_from_what_was_saved(tmp_path):
    """The state holds tensors alone, so that weights_only reads it."""
    whole, first = some_matrices(), some_matrices()
    steps(whole, Muon(whole, lr=0.1), range(6))
    before = Muon(first, lr=0.1)
    steps(first, before, range(3))
    torch.save(before.state_dict(), tmp_path / "muon.pt")
    again = Muon(first, lr=0.1)
    again.load_state_dict(torch.load(tmp_path / "muon.pt", weights_only=True))
    steps(first, again, range(3, 6))
    assert all(torch.equal(p, q) for p, q in zip(first, whole))


@pytest.mark.parametrize("muon_lr, kinds", [(0.02, [Muon, torch.optim.AdamW]),
                                            (0, [torch.optim.AdamW])])
def test_every_parameter_has_one_optimizer(muon_lr, kinds):
    model = GPT(GPTConfig(8, 20, 1, 2, 4))
    optimizers = pretraining_optimizers(model, 1e-3, muon_lr)
    params = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    assert [type(o) for o in optimizers] == kinds
    assert {id(p) for p in params} == {id(p) for p in model.parameters()}
    assert len(params) == len(list(model.parameters()))

"""Eq. 22: how much of its step each direction may take.

The gate is max(γ/(γ + λ), s_min): one half where γ = λ, never below s_min, never above 1,
and monotone in γ, λ and s_min. Where the task's text is the base model's own, no direction gets more
than half of its step.
"""
import math

import pytest
import torch
from hypothesis import given, strategies as st

from folora import damped, generalized_eigh, normalise, spectral_gate
from matrices import close, f64, gamma_error, spd_pairs

gammas = st.lists(st.floats(0, 1e6), min_size=1, max_size=8).map(sorted).map(f64)
lams, floors = st.floats(1e-3, 1e3), st.floats(0, 0.999)


@given(gammas, lams, floors)
def test_the_gate_is_equation_22(gamma, lam, s_min):
    """s̃ = max(γ/(γ+λ), s_min), in [s_min, 1), and 1/2 where γ = λ."""
    gate = spectral_gate(gamma, lam, s_min)
    expected = [max(g / (g + lam), s_min) for g in gamma.tolist()]
    assert gate.tolist() == pytest.approx(expected, rel=1e-14)
    assert (s_min <= gate).all() and (gate < 1).all()
    assert spectral_gate(f64([lam]), lam, s_min=0).item() == 0.5


@given(gammas, lams, floors, st.floats(1, 10), st.floats(0, 1))
def test_the_gate_rises_with_gamma_and_s_min_and_falls_with_lambda(gamma, lam, s_min, factor, share):
    gate = spectral_gate(gamma, lam, s_min)
    assert (gate.diff() >= 0).all()
    assert (spectral_gate(gamma, lam * factor, s_min) <= gate).all()
    assert (spectral_gate(gamma, lam, s_min * share) <= gate).all()


def test_the_gate_by_hand():
    """The paper's λ = 1, s_min = 0.3 are the defaults; γ just below 0 is rounding and gets the gate
    of 0."""
    gamma = f64([3.0, 1.0, 0.25, 0.0, -1e-12])
    assert close(spectral_gate(gamma), f64([0.75, 0.5, 0.3, 0.3, 0.3]))
    assert spectral_gate(f64([-2e-9]), lam=1e-9, s_min=0).item() == 0
    assert torch.equal(spectral_gate(gamma, s_min=1), torch.ones(5).double())


@given(spd_pairs(), st.sampled_from([1.0, 0.1, 1e-2]))
def test_the_gate_is_at_most_half_where_the_task_is_the_base_models_own_text(pair, tau):
    """C_task = C_pre gives γ = c/(c + τ) < 1 for the eigenvalues c of C_pre, so no gate above 1/2 at
    λ = 1."""
    C, _ = normalise(pair[1], pair[1])
    gamma, _ = generalized_eigh(C, damped(C, tau))
    c = torch.linalg.eigvalsh(C).flip(0)
    assert (gamma - c / (c + tau)).abs().max() <= gamma_error(C, damped(C, tau))
    assert (spectral_gate(gamma) <= 0.5).all()


@pytest.mark.parametrize("name, value", [
    ("lam", 0.0), ("lam", -1.0), ("lam", math.nan), ("lam", math.inf),
    ("s_min", -0.1), ("s_min", 1.1), ("s_min", math.nan)])
def test_a_lambda_or_s_min_out_of_range_is_refused_by_name(name, value):
    """λ > 0 and 0 <= s_min <= 1."""
    with pytest.raises(ValueError, match=name):
        spectral_gate(torch.ones(2), **{name: value})

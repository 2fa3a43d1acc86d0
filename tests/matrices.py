"""Random matrices for the properties of the method, all float64, and the errors they are allowed.

Eigenvectors are never compared entry by entry. Residuals are judged against norms times n·eps, in the
manner of LAPACK's own tests; what passes through H⁻¹, against a bound with the condition number of H
in it. How the pairs are drawn bounds that number: H = C_pre + τ·mean(diag C_pre)·I has
cond(H) <= 1 + n/τ <= 24001.
"""
import functools
import math

import torch
from hypothesis import strategies as st

from folora import SecondMoment
from model import LoRALinear

EPS = torch.finfo(torch.float64).eps
seeds = st.integers(0, 2 ** 31 - 1)
small = st.integers(1, 6)
scales = st.sampled_from([1.0, 1e-6, 1e6])
kappas = st.sampled_from([1.0, 0.5, 4.0, 1e-3])
log_eigvals = st.floats(-3, 3) | st.sampled_from([-math.inf, -1.0, 0.0, 1.0])  # base 10; zero, repeats


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


def eye(n):
    return torch.eye(n, dtype=torch.float64)


def normal(seed):
    """randn(*shape) in float64, with a generator of its own."""
    generator = torch.Generator().manual_seed(seed)
    return functools.partial(torch.randn, generator=generator, dtype=torch.float64)


def rotation(n, seed):
    """A random orthogonal matrix (n, n)."""
    return torch.linalg.qr(normal(seed)(n, n))[0]


def invertible(n, seed):
    """A random matrix (n, n), not orthogonal, with a condition number of at most 9."""
    return rotation(n, seed) * torch.linspace(1 / 3, 3, n).double() @ rotation(n, seed + 1)


@st.composite
def moments(draw, n):
    """A second moment (n, n): positive semidefinite, not zero, its eigenvalues and scale far apart."""
    logs = [draw(st.floats(-3, 3)), *draw(st.lists(log_eigvals, min_size=n - 1, max_size=n - 1))]
    Q = rotation(n, draw(seeds))
    C = draw(scales) * (Q * 10 ** f64(logs) @ Q.T)
    return (C + C.T) / 2


@st.composite
def spd_pairs(draw):
    """(C_task, C_pre, H): H = C_pre damped by τ of its mean diagonal; C_task is drawn like C_pre, or
    is C_pre, or zero."""
    n = draw(small | st.sampled_from([7, 8, 24]))
    C_pre, tau = draw(moments(n)), draw(st.sampled_from([1.0, 0.1, 1e-2, 1e-3]))
    C_task = draw(moments(n) | moments(n) | st.sampled_from([C_pre, torch.zeros_like(C_pre)]))
    return C_task, C_pre, C_pre + tau * C_pre.diagonal().mean() * eye(n)


@st.composite
def blocks(draw):
    """(W0, b, X_pre, r, randn): a block and its inputs, as columns, which leave out at least r
    dimensions."""
    d_out, null, rank = draw(small), draw(small), draw(small)
    seed, r = draw(seeds), draw(st.integers(1, min(null, d_out)))
    randn, d_in = normal(seed), null + rank
    X_pre = rotation(d_in, seed)[:, :rank] @ randn(rank, 3 * d_in)
    return randn(d_out, d_in) / d_in ** 0.5, randn(d_out, 1), X_pre, r, randn


@st.composite
def decomposed(draw):
    """(W0, U, s, V): W0 (d_out, d_in) = U diag(s) Vᵀ, s ascending, each twice the one before."""
    d_out, d_in, scale = draw(small), draw(small), draw(scales)
    m, seed = min(d_out, d_in), draw(seeds)
    U, V = rotation(d_out, seed)[:, :m], rotation(d_in, seed + 1)[:, :m]
    s = scale * 2.0 ** torch.arange(m)
    return U * s @ V.T, U, s.double(), V


@st.composite
def measured(draw):
    """(W0, X_pre, X_task, randn): a layer and its inputs, as columns; X_pre may leave out dimensions."""
    d_out, d_in, seed = draw(small), draw(small), draw(seeds)
    randn, used = normal(seed), draw(st.integers(1, d_in))
    X_pre = rotation(d_in, seed)[:, :used] @ randn(used, 20)
    return randn(d_out, d_in), X_pre, randn(d_in, 20), randn


def spectral_norm(C):
    return torch.linalg.matrix_norm(C, 2)


def cond(H):
    return torch.linalg.cond(H, 2)


def gamma_error(C, H):
    """Bounds the error of γ: whitening by H errs by n·eps·cond(H) of ‖C‖ ‖H⁻¹‖ >= γ_1."""
    return 10 * len(H) * EPS * cond(H) * spectral_norm(C) * spectral_norm(torch.linalg.inv(H))


def close(actual, expected, tol=1e-12):
    return (actual - expected).norm() <= tol * expected.norm()


def second_moment(X):
    """E[x xᵀ] of the inputs X (d_in, tokens)."""
    moment = SecondMoment(len(X))
    moment.add(X.T)
    return moment.mean()


def adapted(W0, A0, B0, scale=1.0):
    """The layer W0 with a LoRA that started at A0, B0."""
    linear = torch.nn.Linear(*W0.T.shape, dtype=torch.float64)
    linear.weight = torch.nn.Parameter(W0.clone(), requires_grad=False)
    layer = LoRALinear(linear, len(A0), scale)
    layer.init_from(A0, B0)
    return layer

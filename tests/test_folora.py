"""The claims of folora.py, as properties in float64. Equation numbers are the paper's (arXiv 2606.00132).

Eigenvectors are never compared entry by entry. Residuals are judged against norms times n·eps, in the manner
of LAPACK's own tests; what passes through H⁻¹, against a bound with the condition number of H in it. How the
pairs are drawn bounds that number: H = C_pre + τ·mean(diag C_pre)·I has cond(H) <= 1 + n/τ <= 24001.
"""
import functools
import io
import math

import pytest
import torch
from hypothesis import given, strategies as st
from torch.nn.functional import cross_entropy, softplus

from bench import evenly_gated, one_sided, penalty_alone, ungated, utility_alone
from folora import (METHODS, SAdam, SecondMoment, corda_start, damped, forgetting_penalty, generalized_eigh,
                    kaiming_start, leading_start, lora_null_start, method_called, milora_start, normalise,
                    null_space_start, oplora_protected, pissa_start, rayleigh_quotient, sadam, sc_lora_start,
                    solve_layer, spectral_gate, task_utility, truncated, two_sided_penalty, whiten)
from model import LoRALinear

EPS = torch.finfo(torch.float64).eps
seeds = st.integers(0, 2**31 - 1)
small = st.integers(1, 6)
scales = st.sampled_from([1.0, 1e-6, 1e6])
log_eigvals = st.floats(-3, 3) | st.sampled_from([-math.inf, -1.0, 0.0, 1.0])  # base 10; zero, repeats


# ------------------------------------------------------------------------------------------------------------
# Random matrices

def f64(values):
    return torch.tensor(values, dtype=torch.float64)


def normal(seed):
    """randn(*shape) in float64, with a generator of its own."""
    return functools.partial(torch.randn, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(n, seed):
    """A random orthogonal matrix (n, n)."""
    return torch.linalg.qr(normal(seed)(n, n))[0]


def invertible(n, seed):
    """A random matrix (n, n), not orthogonal, with condition number at most 9."""
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
    """(C_task, C_pre, H): H = C_pre damped by τ of its mean diagonal; C_task of its own, C_pre, or zero."""
    n = draw(small | st.sampled_from([7, 8, 24]))
    C_pre, tau = draw(moments(n)), draw(st.sampled_from([1.0, 0.1, 1e-2, 1e-3]))
    C_task = draw(moments(n) | moments(n) | st.sampled_from([C_pre, torch.zeros_like(C_pre)]))
    return C_task, C_pre, C_pre + tau * C_pre.diagonal().mean() * torch.eye(n)


@st.composite
def blocks(draw):
    """(W0, b, X_pre, r, randn): a block; its inputs, as columns, leave out r dimensions or more."""
    d_out, null, rank = draw(small), draw(small), draw(small)
    seed, r = draw(seeds), draw(st.integers(1, min(null, d_out)))
    randn, d_in = normal(seed), null + rank
    X_pre = rotation(d_in, seed)[:, :rank] @ randn(rank, 3 * d_in)
    return randn(d_out, d_in) / d_in**0.5, randn(d_out, 1), X_pre, r, randn


@st.composite
def decomposed(draw):
    """(W0, U, s, V): W0 (d_out, d_in) = U diag(s) Vᵀ, s ascending, each twice the one before."""
    d_out, d_in, scale = draw(small), draw(small), draw(scales)
    m, seed = min(d_out, d_in), draw(seeds)
    U, V, s = rotation(d_out, seed)[:, :m], rotation(d_in, seed + 1)[:, :m], scale * 2.0 ** torch.arange(m)
    return U * s @ V.T, U, s.double(), V


@st.composite
def measured(draw):
    """(W0, X_pre, X_task, randn): a layer, its inputs as columns; X_pre may leave out dimensions."""
    d_out, d_in, seed = draw(small), draw(small), draw(seeds)
    randn, used = normal(seed), draw(st.integers(1, d_in))
    return randn(d_out, d_in), rotation(d_in, seed)[:, :used] @ randn(used, 20), randn(d_in, 20), randn


def spectral_norm(C):
    return torch.linalg.matrix_norm(C, 2)


def cond(H):
    return torch.linalg.cond(H, 2)


def gamma_error(C, H):
    """Bounds the error of γ by any route: whitening by H errs by n·eps·cond(H) of ‖C‖ ‖H⁻¹‖ >= γ_1."""
    return 10 * len(H) * EPS * cond(H) * spectral_norm(C) * spectral_norm(torch.linalg.inv(H))


def close(actual, expected, tol=1e-12):
    return (actual - expected).norm() <= tol * expected.norm()


def second_moment(X):
    """C_pre of the inputs X (d_in, tokens)."""
    moment = SecondMoment(len(X))
    moment.add(X.T)
    return moment.mean()


# ------------------------------------------------------------------------------------------------------------
# The generalized eigenproblem (Eq. 17)

@given(spd_pairs())
def test_eigenpairs_satisfy_their_equation(pair):
    """C_task V = H V diag(γ), γ descending (Eq. 17)."""
    C, _, H = pair
    gamma, V = generalized_eigh(C, H)
    # whitening errs by eps ‖C‖ ‖L⁻¹‖², L carries it back: relative to ‖C‖ and ‖V‖ = ‖L⁻¹‖, eps √cond(H)
    bound = 10 * len(H) * EPS * cond(H).sqrt() * spectral_norm(C) * spectral_norm(V)
    assert spectral_norm(C @ V - H @ V * gamma) <= bound
    assert (gamma.diff() <= 0).all()


@given(spd_pairs())
def test_basis_diagonalises_both_metrics(pair):
    """VᵀHV = I and VᵀC_task V = diag(γ) (Eq. 17), hence V⁻¹ = VᵀH."""
    C, _, H = pair
    gamma, V = generalized_eigh(C, H)
    n, eye = len(H), torch.eye(len(H)).double()
    assert spectral_norm(V.T @ H @ V - eye) <= 10 * n * EPS * cond(H)
    assert spectral_norm(V @ V.T @ H - eye) <= 10 * n * EPS * cond(H) ** 1.5  # it is V (VᵀHV - I) V⁻¹
    assert spectral_norm(V.T @ C @ V - gamma.diag()) <= gamma_error(C, H)


@given(spd_pairs())
def test_eigenvalues_agree_with_the_papers_whitening(pair):
    """γ are the eigenvalues of H^-½ C_task H^-½, as the paper whitens, and sum to tr(H⁻¹C_task)."""
    C, _, H = pair
    gamma, _ = generalized_eigh(C, H)
    h, Q = torch.linalg.eigh(H)
    root = Q * h.rsqrt() @ Q.T
    error = gamma_error(C, H)
    assert (gamma - torch.linalg.eigvalsh(root @ C @ root).flip(0)).abs().max() <= error
    assert (gamma.sum() - torch.linalg.solve(H, C).trace()).abs() <= len(H) * error
    assert gamma[-1] >= -error


def spectrum(n, digits, kind):
    """n eigenvalues from 1 down to 10^-digits: evenly in between, all but one the least, or three values
    repeated."""
    logs = {"even": torch.linspace(0, -digits, n), "one": torch.full((n,), -float(digits)),
            "repeated": -digits / 2 * (torch.arange(n) % 3)}[kind].double()
    logs[0] = 0
    return 10 ** logs


def hard_pair(n, digits, kind, rank, scales, seed):
    """(C_task of that rank, H with a condition number of 10^digits), each at a scale of its own."""
    Q, U = rotation(n, seed), rotation(n, seed + 1)
    H, C = Q * spectrum(n, digits, kind) @ Q.T, U[:, :rank] * spectrum(n, 4, "even")[:rank] @ U[:, :rank].T
    return scales[0] * (C + C.T) / 2, scales[1] * (H + H.T) / 2


def judged(C, H):
    """Solve the pair; hold residual and H-orthogonality, both over n eps as in LAPACK's own tests, to 1 and
    cond(H), or raise tau as the refusal says. Scales are taken out of the norms by powers of two, exactly."""
    n, eye = len(H), torch.eye(len(H)).double()
    try:
        gamma, V = generalized_eigh(C, H)
    except ValueError as error:
        more = float(str(error).split(": ")[1].split()[0])
        return judged(C, H + more * eye)[0], "after the refusal"
    c, h = (2.0 ** (2 * round(math.log2(X.abs().max()) / 2)) for X in (C, H))
    C, H, V, gamma = C / c, H / h, V * h ** 0.5, gamma / c * h
    size = spectral_norm(C) + gamma.abs().max() * spectral_norm(H)
    residual = spectral_norm(C @ V - H @ V * gamma) / (size * spectral_norm(V) * n * EPS)
    orthogonality = spectral_norm(V.T @ H @ V - eye) / (n * EPS * cond(H))
    assert residual <= 1 and orthogonality <= 2 and spectral_norm(V.T @ H @ V - eye) <= 0.01 * n
    assert (gamma.diff() <= 0).all()
    return (residual.item(), orthogonality.item()), "at once"


@given(n=st.sampled_from([1, 2, 3, 8, 24, 64]), digits=st.integers(0, 14), seed=seeds, share=st.floats(0, 1),
       kind=st.sampled_from(["even", "one", "repeated"]),
       scales=st.sampled_from([(1, 1), (1e150, 1e150), (1e-150, 1e-150), (1e-150, 1e150), (1e100, 1e-150)]))
def test_hard_pairs_are_solved_or_refused_with_a_tau_that_works(n, digits, seed, share, kind, scales):
    """Condition numbers to 1e14, zero and repeated eigenvalues, scales to 1e±150."""
    judged(*hard_pair(n, digits, kind, max(1, round(share * n)), scales, seed))


@pytest.mark.parametrize("digits", [16, 18, math.inf])
@pytest.mark.parametrize("scale", [1, 1e150, 1e-150])
@pytest.mark.parametrize("n", [3, 64])
def test_a_singular_H_is_refused_with_a_tau_that_works(n, digits, scale):
    C, H = hard_pair(n, digits if math.isfinite(digits) else 1, "repeated", n, (scale, scale), 0)
    H = H if math.isfinite(digits) else H - torch.linalg.eigvalsh(H)[0] * torch.eye(n).double()
    assert judged(C, H)[1] == "after the refusal"


@pytest.mark.slow
@pytest.mark.parametrize("n", [512, 1024, 3072])
@pytest.mark.parametrize("digits", [2, 8, 14])
def test_hard_pairs_of_real_size(n, digits):
    """GPT-2's widest layer reads 3072 inputs. 30 minutes on a busy core: -m slow -s"""
    for kind in ("even", "repeated") if n < 3072 else ("even",):
        print(f"\nn {n}, cond 1e{digits}, {kind}: (residual, orthogonality), how:",
              judged(*hard_pair(n, digits, kind, n // 2, (1, 1), 0)))


def test_scales_too_far_apart_are_refused():
    with pytest.raises(ValueError, match="γ overflows"):
        generalized_eigh(1e200 * torch.eye(3).double(), 1e-150 * torch.eye(3).double())


@given(spd_pairs())
def test_tf32_never_reaches_the_eigenproblem(pair):
    """All of it is float64, whatever is allowed for float32, and bit for bit the same."""
    C, C_pre, _ = pair
    plain = solve_layer(C_pre.float(), C.float())
    torch.set_float32_matmul_precision("medium")
    try:
        again = solve_layer(C_pre.float(), C.float())
    finally:
        torch.set_float32_matmul_precision("highest")
    assert all(t.dtype == torch.float64 and torch.equal(plain[key], t) for key, t in again.items())


def test_eigenpairs_by_hand():
    """H = [1 1; 1 2] has L = [1 0; 1 1]; C_task = L diag(3, 1) Lᵀ: γ = (3, 1) and V = ±L⁻ᵀ = ±[1 -1; 0 1]."""
    H, C = torch.tensor([[1.0, 1.0], [1.0, 2.0]]), torch.tensor([[3.0, 3.0], [3.0, 4.0]])
    gamma, V = generalized_eigh(C, H)
    assert gamma.dtype == V.dtype == torch.float64
    assert close(gamma, torch.tensor([3.0, 1.0]))
    assert close(V * V[[0, 1], [0, 1]].sign(), torch.tensor([[1.0, -1.0], [0.0, 1.0]]))


@given(spd_pairs())
def test_whitening_is_symmetric(pair):
    """M = L⁻¹ C L⁻ᵀ is symmetric to the bit, and L M Lᵀ = C."""
    C, _, H = pair
    L = torch.linalg.cholesky(H)
    M = whiten(C, L)
    assert torch.equal(M, M.T)
    assert spectral_norm(L @ M @ L.T - C) <= 10 * len(H) * EPS * cond(H) * spectral_norm(C)


# ------------------------------------------------------------------------------------------------------------
# The order of directions: Rayleigh quotients (Eq. 5-17)

@given(spd_pairs(), seeds)
def test_rayleigh_quotient_is_gamma_on_the_basis_and_between_its_ends_elsewhere(pair, seed):
    """ρ(v_i) = γ_i, and γ_min <= ρ(x) <= γ_max for every x (Eq. 17)."""
    C, _, H = pair
    gamma, V = generalized_eigh(C, H)
    error = gamma_error(C, H)
    assert (rayleigh_quotient(V.T, C, H) - gamma).abs().max() <= error
    rho = rayleigh_quotient(normal(seed)(50, len(H)), C, H)
    assert rho.shape == (50,)
    assert gamma[-1] - error <= rho.min() and rho.max() <= gamma[0] + error


@given(spd_pairs(), seeds, st.data())
def test_top_k_span_is_the_best_of_all_subspaces(pair, seed, data):
    """ρ fills [γ_k, γ_1] over the top k's span; no other k-span has a larger minimum (Courant-Fischer)."""
    C, _, H = pair
    gamma, V = generalized_eigh(C, H)
    n, error = len(H), gamma_error(C, H)
    k = data.draw(st.integers(1, n))
    rho = rayleigh_quotient(normal(seed)(50, k) @ V[:, :k].T, C, H)
    assert gamma[k - 1] - error <= rho.min() and rho.max() <= gamma[0] + error
    top, _ = generalized_eigh(V[:, :k].T @ C @ V[:, :k], V[:, :k].T @ H @ V[:, :k])
    assert (top - gamma[:k]).abs().max() <= error  # attained: within the span nothing else is stationary
    S = rotation(n, seed)[:, :k]
    other, _ = generalized_eigh(S.T @ C @ S, S.T @ H @ S)
    assert other[-1] <= gamma[k - 1] + error


@given(spd_pairs(), st.floats(1e-3, 1e3))
def test_gamma_scales_with_the_task(pair, c):
    """C_task -> c C_task gives γ -> cγ; H -> cH gives γ -> γ/c (Eq. 17)."""
    C, _, H = pair
    gamma, _ = generalized_eigh(C, H)
    error = 2 * gamma_error(C, H)
    assert (generalized_eigh(c * C, H)[0] / c - gamma).abs().max() <= error
    assert (generalized_eigh(C, c * H)[0] * c - gamma).abs().max() <= error


@given(spd_pairs(), seeds)
def test_gamma_does_not_depend_on_the_coordinates(pair, seed):
    """A congruence of both, C -> TᵀCT and H -> TᵀHT, leaves γ alone, and ρ(T⁻¹x) is the old ρ(x)."""
    C, _, H = pair
    n, T = len(H), invertible(len(H), seed)
    C2, H2 = T.T @ C @ T, T.T @ H @ T
    error = gamma_error(C, H) + gamma_error(C2, H2)
    assert (generalized_eigh(C2, H2)[0] - generalized_eigh(C, H)[0]).abs().max() <= error
    x = normal(seed)(n)
    assert (rayleigh_quotient(torch.linalg.solve(T, x), C2, H2) - rayleigh_quotient(x, C, H)).abs() <= error


@given(spd_pairs(), small, seeds)
def test_penalty_and_utility_are_their_traces(pair, r, seed):
    """R(ΔA) = Tr(ΔA H ΔAᵀ) = Tr(ΔA C_pre ΔAᵀ) + τ‖ΔA‖² (Eq. 6), U(ΔA) = Tr(ΔA C_task ΔAᵀ)."""
    C, C_pre, H = pair
    dA = normal(seed)(r, len(H))
    size = 10 * len(H) * EPS * dA.norm() ** 2
    assert (forgetting_penalty(dA, H) - (dA @ H @ dA.T).trace()).abs() <= size * spectral_norm(H)
    assert (task_utility(dA, C) - (dA @ C @ dA.T).trace()).abs() <= size * spectral_norm(C)
    tau = 0.1 * spectral_norm(C_pre).item()
    parts = forgetting_penalty(dA, C_pre) + tau * dA.norm() ** 2
    assert (forgetting_penalty(dA, damped(C_pre, tau)) - parts).abs() <= size * spectral_norm(H)


def test_one_sided_counts_all_outputs_alike_at_the_same_mean():
    C_pre = torch.eye(3).double()
    S, C = one_sided(f64([[1.0, 0.5], [0.5, 3.0]]), C_pre)
    assert close(S, 2 * torch.eye(2).double()) and C is C_pre


@given(spd_pairs(), small, small, seeds)
def test_two_sided_penalty_is_eq_6_where_all_outputs_count_alike(pair, d_out, k, seed):
    """½ Tr(S ΔW H ΔWᵀ) of a product: half of R(PG) for S = I, and of its part along S's root otherwise."""
    _, _, H = pair
    P, G, root = normal(seed)(d_out, k), normal(seed + 1)(k, len(H)), normal(seed + 2)(d_out, d_out)
    size = 1e-13 * P.norm() ** 2 * G.norm() ** 2 * H.norm()
    one_sided = two_sided_penalty(P, G, torch.eye(d_out).double(), H)
    assert (one_sided - forgetting_penalty(P @ G, H) / 2).abs() <= size
    both = two_sided_penalty(P, G, root.T @ root, H)
    assert (both - forgetting_penalty(root @ P @ G, H) / 2).abs() <= size * root.norm() ** 2


@given(small, st.integers(2, 6), seeds)
def test_two_sided_penalty_is_the_kl_divergence_to_second_order(d_in, classes, seed):
    """One softmax layer p(Wx): E[δδᵀ] over the model's own labels is diag(p) - ppᵀ, and
    KL(p_W ‖ p_{W + εΔ}) / ε² tends to ½ Tr(S Δ xxᵀ Δᵀ)."""
    randn = normal(seed)
    W, x, P, G, size = randn(classes, d_in), randn(d_in), randn(classes, 2), randn(2, d_in), 1e-4
    log_p, log_q = (torch.log_softmax(weight @ x, 0) for weight in (W, W + size * P @ G))
    p = log_p.exp()
    expected = two_sided_penalty(P, G, torch.diag(p) - torch.outer(p, p), torch.outer(x, x))
    moved = (P @ G @ x).norm()
    kl = (p * (log_p - log_q)).sum()
    assert (kl / size**2 - expected).abs() <= 1e-7 + size * (moved**3 + moved**2)


@given(spd_pairs(), small, seeds)
def test_rank_one_update_is_judged_by_its_direction_alone(pair, r, seed):
    """U(uvᵀ) / R(uvᵀ) = ρ(v): u cancels (Eq. 5-17)."""
    C, _, H = pair
    randn = normal(seed)
    u, v = randn(r, 1), randn(1, len(H))
    ratio = task_utility(u * v, C) / forgetting_penalty(u * v, H)
    assert (ratio - rayleigh_quotient(v[0], C, H)).abs() <= gamma_error(C, H)


# ------------------------------------------------------------------------------------------------------------
# The gate (Eq. 22) and the units

gammas = st.lists(st.floats(0, 1e6), min_size=1, max_size=8).map(sorted).map(f64)
lams, floors = st.floats(1e-3, 1e3), st.floats(0, 0.999)


@given(gammas, lams, floors)
def test_gate_is_eq_22(gamma, lam, s_min):
    """s̃ = max(γ/(γ+λ), s_min), in [s_min, 1), and 1/2 at the break-even γ = λ (Eq. 22)."""
    gate = spectral_gate(gamma, lam, s_min)
    assert gate.tolist() == pytest.approx([max(g / (g + lam), s_min) for g in gamma.tolist()], rel=1e-14)
    assert (s_min <= gate).all() and (gate < 1).all()
    assert spectral_gate(f64([lam]), lam, s_min=0).item() == 0.5


@given(gammas, lams, floors, st.floats(1, 10), st.floats(0, 1))
def test_gate_is_monotone(gamma, lam, s_min, factor, share):
    """The gate rises with γ and s_min and falls with λ (Eq. 22)."""
    gate = spectral_gate(gamma, lam, s_min)
    assert (gate.diff() >= 0).all()
    assert (spectral_gate(gamma, lam * factor, s_min) <= gate).all()
    assert (spectral_gate(gamma, lam, s_min * share) <= gate).all()


def test_gate_by_hand():
    """The paper's λ = 1, s_min = 0.3 are the defaults; γ just below 0 is rounding and gets the gate of 0."""
    gamma = f64([3.0, 1.0, 0.25, 0.0, -1e-12])
    assert close(spectral_gate(gamma), f64([0.75, 0.5, 0.3, 0.3, 0.3]))
    assert spectral_gate(f64([-2e-9]), lam=1e-9, s_min=0).item() == 0
    assert torch.equal(spectral_gate(gamma, s_min=1), torch.ones(5).double())


@given(spd_pairs(), st.sampled_from([1.0, 0.1, 1e-2]))
def test_gate_is_at_most_half_where_the_task_is_the_pretraining_text(pair, tau):
    """C_task = C_pre gives γ = c/(c+τ) < 1 for the eigenvalues c of C_pre, so no gate above 1/2 at λ = 1."""
    C, _ = normalise(pair[1], pair[1])
    gamma, _ = generalized_eigh(C, damped(C, tau))
    c = torch.linalg.eigvalsh(C).flip(0)
    assert (gamma - c / (c + tau)).abs().max() <= gamma_error(C, damped(C, tau))
    assert (spectral_gate(gamma) <= 0.5).all()


@given(spd_pairs(), st.sampled_from([1.0, 0.1, 1e-2]))
def test_normalising_leaves_gamma_alone(pair, tau):
    """Dividing C_pre, C_task by c = tr(C_pre)/d_in, with τ for H in place of cτ, does not change γ."""
    C, C_pre, _ = pair
    c = C_pre.trace().item() / len(C_pre)
    C_pre1, C1 = normalise(C_pre, C)
    assert C_pre1.trace().item() == pytest.approx(len(C_pre))
    H = damped(C_pre, c * tau)
    error = 2 * gamma_error(C, H)
    assert (generalized_eigh(C1, damped(C_pre1, tau))[0] - generalized_eigh(C, H)[0]).abs().max() <= error


@given(spd_pairs(), st.floats(1e-3, 1e3))
def test_normalising_takes_the_units_away(pair, unit):
    """x -> unit·x changes neither normalised moment."""
    C, C_pre, _ = pair
    for scaled, plain in zip(normalise(unit**2 * C_pre, unit**2 * C), normalise(C_pre, C)):
        assert close(scaled, plain, 1e-14)


@given(spd_pairs(), st.sampled_from([1.0, 0.1, 1e-2]), st.sampled_from([1.0, 1e-3, 1e3]))
def test_a_solved_layer_holds_all_that_a_method_asks_for(pair, tau, unit):
    """From raw moments, in any units: C_pre of mean diagonal 1, C_task over the same scalar, H = C_pre + τI,
    and their eigenpairs (Eq. 17)."""
    C, raw, _ = pair
    m = solve_layer(unit**2 * raw, unit**2 * C, tau)
    H, V, n, c, eye = m["H"], m["basis"], len(C), raw.diagonal().mean(), torch.eye(len(C)).double()
    assert close(m["C_pre"], raw / c) and close(m["C_task"], C / c) and close(H, raw / c + tau * eye)
    assert spectral_norm(V.T @ H @ V - eye) <= 10 * n * EPS * cond(H)
    assert spectral_norm(V.T @ m["C_task"] @ V - m["eigvals"].diag()) <= gamma_error(C / c, H)
    assert (m["eigvals"].diff() <= 0).all()


# ------------------------------------------------------------------------------------------------------------
# First-order preservation (Eq. 1-4)

@given(blocks())
def test_penalty_is_the_mean_squared_movement_of_the_outputs(block):
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
    """f(W+hΔW) - f(W) = h J_σ(Z)[ΔW X] + O(h²): half of h halves the drift, quarters the rest (Eq. 2)."""
    W0, b, X, r, randn = block
    dW = randn(len(W0), r) @ randn(r, len(X))
    dW /= (dW @ X).abs().max()
    first_order = torch.sigmoid(W0 @ X + b) * (dW @ X)  # σ = softplus: σ' = sigmoid, and σ'' is nowhere 0

    def drift(h):
        return softplus((W0 + h * dW) @ X + b, threshold=100) - softplus(W0 @ X + b, threshold=100)

    h = 0.01
    assert abs(math.log2(drift(h).norm() / drift(h / 2).norm()) - 1) < 0.02
    remainder, halved = (drift(t) - t * first_order for t in (h, h / 2))
    assert abs(math.log2(remainder.norm() / halved.norm()) - 2) < 0.02
    bound = forgetting_penalty(dW, second_moment(X)) * X.shape[1]  # |σ'| <= 1: of the drift itself
    assert drift(1).norm() ** 2 <= bound + 1e-13 * (dW.norm() * X.norm()) ** 2


@given(blocks())
def test_only_the_step_of_A_reaches_the_pretraining_text(block):
    """With A0 X_pre = 0, ΔW X_pre = (B0+ΔB) ΔA X_pre, of norm at most ‖B0+ΔB‖₂ ‖ΔA X_pre‖_F (Eq. 4)."""
    W0, _, X, r, randn = block
    A0, B0 = null_space_start(W0, second_moment(X), r)
    dA, dB = randn(r, len(X)), randn(len(W0), r)
    moved = ((B0 + dB) @ (A0 + dA) - B0 @ A0) @ X
    size = (B0 + dB).norm() * (1 + dA.norm()) * X.norm()
    assert (moved - (B0 + dB) @ dA @ X).norm() <= 1e-13 * size
    assert moved.norm() <= spectral_norm(B0 + dB) * (dA @ X).norm() + 1e-13 * size


@given(blocks(), st.booleans())
def test_penalty_bounds_the_first_order_change_of_the_loss(block, one_token):
    """|<∇_W L, ΔW>| = |E[δᵀΔW x]| <= √E‖δ‖² √E‖ΔW x‖², δ = dL/d(Wx); equal for one token and ΔW = δxᵀ."""
    W0, b, X, _, randn = block
    X = X[:, :1] if one_token else X
    head, tokens = randn(5, len(W0)), X.shape[1]
    targets = torch.arange(tokens) % 5
    W, shift = W0.clone().requires_grad_(), torch.zeros(len(W0), tokens).double().requires_grad_()
    cross_entropy((head @ torch.tanh(W @ X + shift + b)).T, targets).backward()  # the mean over tokens
    delta = shift.grad * tokens                                                  # (d_out, tokens), per token
    dW = delta @ X.T if one_token else randn(*W.shape)
    change, size = (W.grad * dW).sum(), delta.norm() * dW.norm() * X.norm() / tokens
    assert (change - (delta * (dW @ X)).sum() / tokens).abs() <= 1e-13 * size
    squared_bound = delta.norm() ** 2 / tokens * forgetting_penalty(dW, second_moment(X))
    assert change**2 <= squared_bound + 1e-13 * size**2
    assert not one_token or close(change**2, squared_bound, 1e-10)


# ------------------------------------------------------------------------------------------------------------
# Where to start (App. B.3)

def adapted(W0, A0, B0, scale):
    """The layer W0 with a LoRA that started at A0, B0."""
    linear = torch.nn.Linear(*W0.T.shape, dtype=torch.float64)
    linear.weight = torch.nn.Parameter(W0.clone(), requires_grad=False)
    layer = LoRALinear(linear, len(A0), scale)
    layer.start(A0, B0)
    return layer


# every way to start among METHODS, under the name of the first method that has it
STARTS = {method.start: name for name, method in reversed(METHODS.items()) if method.start}
kappas = st.sampled_from([1.0, 0.5, 4.0, 1e-3])


@pytest.mark.parametrize("name", STARTS.values())
@given(block=blocks(), scale=kappas)
def test_every_start_leaves_the_layer_as_it_was(name, block, scale):
    """W_res + κB0A0 = W0 for every method, κ and r, and A0 and B0 have LoRA's shapes."""
    W0, _, X, r, randn = block
    m = solve_layer(second_moment(X), second_moment(randn(len(X), 20)), 0.1)
    A0, B0 = METHODS[name].start(W0, r=r, scale=scale, generator=torch.Generator().manual_seed(0), **m)
    assert A0.shape == (r, len(X)) and B0.shape == (len(W0), r)
    layer = adapted(W0, A0, B0, scale)
    x = randn(7, len(X))
    assert close(layer(x), x @ W0.T + layer.bias)
    assert close(layer.plain(merged=True).weight, W0) and close(layer.plain(merged=False).weight, W0)


@pytest.mark.parametrize("name", STARTS.values())
@given(block=blocks(), scale=kappas, k=st.none() | st.integers(0, 3))
def test_merged_is_unmerged_whatever_was_learnt(name, block, scale, k):
    """`plain(merged=True)` computes what the layer does after A and B moved, with protected directions or
    without."""
    W0, _, X, r, randn = block
    m = solve_layer(second_moment(X), second_moment(randn(len(X), 20)), 0.1)
    pair = METHODS[name].start(W0, r=r, scale=scale, generator=torch.Generator().manual_seed(0), **m)
    layer = adapted(W0, *pair, scale)
    if k is not None:
        layer.protect(*oplora_protected(W0, k))
    with torch.no_grad():
        for p in layer.lora_A, layer.lora_B:
            p += randn(*p.shape)
    x, merged = randn(7, len(X)), layer.plain(merged=True)
    assert type(merged) is torch.nn.Linear and merged.bias is layer.bias
    assert close(layer(x), merged(x), 1e-10)
    P, G = layer.change()
    dW = merged.weight - layer.plain(merged=False).weight
    assert (P @ G - dW).norm() <= 1e-12 * (merged.weight.norm() + P.norm() * G.norm())


@given(blocks(), kappas, st.integers(0, 3))
def test_a_protected_layer_starts_as_it_was(block, scale, k):
    """OPLoRA starts from B0 = 0, of which no direction needs protection."""
    W0, _, X, r, randn = block
    pair = METHODS["oplora"].start(W0, r=r, scale=scale, generator=torch.Generator().manual_seed(0))
    layer = adapted(W0, *pair, scale)
    layer.protect(*oplora_protected(W0, k))
    x = randn(7, len(X))
    assert close(layer(x), x @ W0.T + layer.bias) and close(layer.plain(merged=True).weight, W0)


@given(blocks(), st.sampled_from([1.0, 0.5, 4.0]))
def test_projection_starts_take_their_directions_out_of_the_frozen_weight(block, scale):
    """κB0A0 = W0 U Uᵀ, whatever κ: W_res reads nothing of the span of U, the adapter all of it (App. B.3)."""
    W0, _, X, r, _ = block
    C_pre = second_moment(X)
    for A0, B0 in (null_space_start(W0, C_pre, r, scale), leading_start(W0, rotation(len(X), 0), r, scale)):
        assert close(A0 @ A0.T, torch.eye(r).double())
        assert close(scale * B0 @ A0, W0 @ A0.T @ A0)
        assert (adapted(W0, A0, B0, scale).weight @ A0.T).norm() <= 1e-13 * W0.norm()


@given(spd_pairs(), seeds, st.data())
def test_null_space_start_is_used_least_by_the_pretraining_text(pair, seed, data):
    """Tr(A0 C_pre A0ᵀ) is the sum of the r smallest eigenvalues, the least of all r-frames (App. B.3)."""
    _, C_pre, _ = pair
    n, randn = len(C_pre), normal(seed)
    r = data.draw(st.integers(1, n))
    A0, _ = null_space_start(randn(n + 1, n), C_pre, r)
    used, error = forgetting_penalty(A0, C_pre), 10 * n * EPS * spectral_norm(C_pre)
    assert close(A0 @ A0.T, torch.eye(r).double())
    assert (used - torch.linalg.eigvalsh(C_pre)[:r].sum()).abs() <= r * error
    assert used <= forgetting_penalty(rotation(n, seed)[:r], C_pre) + r * error


@given(blocks())
def test_null_space_start_does_not_see_the_pretraining_text(block):
    """A0 X_pre = 0 when X_pre leaves out at least r dimensions: the premise of Eq. 4."""
    W0, _, X, r, _ = block
    A0, _ = null_space_start(W0, second_moment(X), r)
    assert (A0 @ X).norm() <= 1e-13 * X.norm()


@given(spd_pairs(), seeds, st.data())
def test_leading_start_spans_the_leading_directions(pair, seed, data):
    """A0's rows are orthonormal and span v_1, ..., v_r."""
    C, _, H = pair
    n = len(H)
    r = data.draw(st.integers(1, n))
    _, V = generalized_eigh(C, H)
    A0, _ = leading_start(normal(seed)(n, n), V, r)
    assert close(A0 @ A0.T, torch.eye(r).double())
    top = V[:, :r]
    assert spectral_norm(top - A0.T @ A0 @ top) <= 10 * n * EPS * spectral_norm(top)


def test_kaiming_start_is_loras():
    """A0 is uniform in ±1/√d_in, drawn from the generator; B0 = 0; both in the dtype of W0."""
    W0, r, d_in = torch.zeros(64, 100).double(), 64, 100
    A0, B0 = kaiming_start(W0, r, generator=torch.Generator().manual_seed(0))
    bound = d_in**-0.5
    assert A0.dtype == B0.dtype == torch.float64 and not B0.any()
    assert 0.99 * bound < A0.max() <= bound and -bound <= A0.min() < -0.99 * bound
    assert abs(A0.mean()) < 0.05 * bound and A0.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
    for seed, same in (0, True), (1, False):
        again, _ = kaiming_start(W0, r, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(again, A0) == same


@pytest.mark.parametrize("name", STARTS.values())
@pytest.mark.parametrize("r", [0, -1, 4, 5])
def test_starts_refuse_an_impossible_rank(name, r):
    """r is at least 1 and at most min(d_out, d_in)."""
    W0, C = torch.ones(3, 4).double(), torch.eye(4).double()
    with pytest.raises(ValueError, match=f"rank is {r}"):
        METHODS[name].start(W0, r=r, scale=1.0, generator=None, **solve_layer(C, C))


# ------------------------------------------------------------------------------------------------------------
# What it is compared with: starts from an SVD, and protected directions

def ranks(data, W0):
    return data.draw(st.integers(1, min(W0.shape)))


def evenly_split(A0, B0, scale):
    """Whether B0 and A0 carry the same singular values, one direction a row and column."""
    S = A0 @ A0.T
    return (S - scale**2 * B0.T @ B0).norm() <= 1e-12 * S.norm() and close(S, S.diagonal().diag())


@given(decomposed(), kappas, st.data())
def test_pissa_takes_the_largest_components_and_milora_the_smallest(parts, scale, data):
    """κB0A0 = U_r diag(s_r) V_rᵀ, of the largest r (PiSSA) or the smallest (MiLoRA) of known components."""
    W0, U, s, V = parts
    r = ranks(data, W0)
    for start, chosen in (pissa_start, slice(len(s) - r, None)), (milora_start, slice(r)):
        A0, B0 = start(W0, r, scale)
        component = U[:, chosen] * s[chosen] @ V[:, chosen].T
        assert (scale * B0 @ A0 - component).norm() <= 1e-13 * W0.norm()
        assert evenly_split(A0, B0, scale)


@given(measured(), st.data())
def test_pissa_and_milora_share_a_weight_between_them(layer, data):
    """Of any W0, PiSSA's part of rank r and MiLoRA's of the remaining rank add up to W0; PiSSA's has the r
    largest eigenvalues of W0ᵀW0 for its squared norm, the most that any r components have."""
    W0, *_ = layer
    r, m = ranks(data, W0), min(W0.shape)
    energies = torch.linalg.eigvalsh(W0.T @ W0)  # ascending
    A0, B0 = pissa_start(W0, r)
    top = B0 @ A0
    assert (top.norm() ** 2 - energies[-r:].sum()).abs() <= 1e-12 * W0.norm() ** 2
    assert ((W0 - top).norm() ** 2 - energies[:-r].sum()).abs() <= 1e-12 * W0.norm() ** 2
    A1, B1 = milora_start(W0, m - r) if r < m else (W0[:1] * 0, W0[:, :1] * 0)
    assert close(top + B1 @ A1, W0)


@given(decomposed(), kappas, st.integers(1, 6), seeds, st.data())
def test_corda_takes_what_the_pretraining_text_reads_least(parts, scale, used, seed, data):
    """κB0A0 C = the r smallest components of W0 C, C = C_pre + 0.01·mean diag(C_pre)·I: here known ones."""
    W0_C, U, s, V = parts
    r, d_in = ranks(data, W0_C), len(V)
    C_pre = second_moment(rotation(d_in, seed)[:, :used] @ normal(seed)(min(used, d_in), 20))
    C = damped(C_pre, 0.01 * C_pre.diagonal().mean().item())
    W0 = torch.linalg.solve(C, W0_C.T).T
    A0, B0 = corda_start(W0, C_pre, r, scale)
    error = 100 * EPS * cond(C) * W0_C.norm()
    assert (scale * B0 @ A0 @ C - U[:, :r] * s[:r] @ V[:, :r].T).norm() <= error
    for factor in A0 @ C @ C @ A0.T, scale**2 * B0.T @ B0:  # the smaller component comes last
        assert (factor - s[:r].flip(0).diag()).norm() <= error


@given(measured(), kappas, st.data())
def test_corda_agrees_with_a_direct_decomposition(layer, scale, data):
    """κB0A0 C carries the r smallest of the singular values of W0 C, and leaves W_res C the others."""
    W0, X, _, _ = layer
    r, C_pre = ranks(data, W0), second_moment(X)
    C = damped(C_pre, 0.01 * C_pre.diagonal().mean().item())
    A0, B0 = corda_start(W0, C_pre, r, scale)
    S, m = torch.linalg.svdvals(W0 @ C), min(W0.shape)
    taken, rest = (torch.linalg.svdvals(W @ C) for W in (scale * B0 @ A0, W0 - scale * B0 @ A0))
    error = 100 * EPS * cond(C) * S[0]
    assert (taken[:r] - S[m - r:]).abs().max() <= error and (taken[r:] <= error).all()
    assert (rest[:m - r] - S[:m - r]).abs().sum() <= m * error and (rest[m - r:] <= error).all()


@given(decomposed(), kappas, seeds, st.data())
def test_lora_null_is_the_null_space_start_split_evenly(parts, scale, seed, data):
    """κB0A0 = W0 U⊥U⊥ᵀ, for known eigenvectors U⊥ of C_pre; in it B0 and A0 share the singular values."""
    W0, _, s, V = parts
    r, n = ranks(data, W0), len(V)
    Q, unit = rotation(n, seed), data.draw(scales)
    C_pre = unit * (Q * 2.0 ** torch.arange(n) @ Q.T)
    A0, B0 = lora_null_start(W0, C_pre, r, scale)
    product = scale * B0 @ A0
    assert (product - W0 @ Q[:, :r] @ Q[:, :r].T).norm() <= 1e-11 * W0.norm()
    A1, B1 = null_space_start(W0, C_pre, r, scale)
    assert (product - scale * B1 @ A1).norm() <= 1e-12 * W0.norm()
    size = A0.norm() ** 2
    assert (A0 @ A0.T - scale**2 * B0.T @ B0).norm() <= 1e-12 * size
    S = torch.linalg.svdvals(W0 @ Q[:, :r])
    assert (A0.norm() ** 2 - S.sum()).abs() <= 1e-11 * W0.norm()


@given(measured(), kappas, st.floats(0, 1), st.data())
def test_sc_lora_spans_the_outputs_that_the_task_has_more_of(layer, scale, beta, data):
    """κB0 = Q orthonormal, A0 = QᵀW0; Tr(Qᵀ[(1-β)S_task - βS_pre]Q) is the most that any Q reaches, S the
    second moments of the layer's actual outputs."""
    W0, X, Y, randn = layer
    r = ranks(data, W0)
    A0, B0 = sc_lora_start(W0, second_moment(X), second_moment(Y), r, scale, beta)
    Q = scale * B0
    assert close(Q.T @ Q, torch.eye(r).double()) and (A0 - Q.T @ W0).norm() <= 1e-13 * W0.norm()
    S_pre, S_task = second_moment(W0 @ X), second_moment(W0 @ Y)
    S = (1 - beta) * S_task - beta * S_pre
    reached, error = (Q.T @ S @ Q).trace(), 1e-12 * (S_pre.norm() + S_task.norm())
    assert (reached - torch.linalg.eigvalsh(S)[-r:].sum()).abs() <= error
    other = torch.linalg.qr(randn(len(W0), r))[0]
    assert reached >= (other.T @ S @ other).trace() - error


def test_sc_lora_weighs_both_texts_alike():
    """Three outputs, used 1, 2.2 and 3.5 by the task, 0, 1.1 and 3 by the pretraining text: β = 1/2, the
    default, picks the second, a larger β the first, a smaller one the third."""
    C_task, C_pre = torch.diag(f64([1.0, 2.2, 3.5])), torch.diag(f64([0.0, 1.1, 3.0]))
    for options, picked in ({"beta": 0.6}, 0), ({}, 1), ({"beta": 0.3}, 2):
        _, B0 = sc_lora_start(torch.eye(3).double(), C_pre, C_task, 1, **options)
        assert close(B0.abs(), torch.eye(3).double()[:, [picked]])


@given(measured(), kappas, st.integers(0, 6), st.data())
def test_oplora_keeps_the_leading_singular_triples(layer, scale, k, data):
    """For any A and B, ΔW V_k = 0 and U_kᵀΔW = 0, hence (W0 + ΔW)V_k = U_kS_k and (W0 + ΔW)ᵀU_k = V_kS_k."""
    W0, *_, randn = layer
    r, (d_out, d_in) = ranks(data, W0), W0.shape
    U, V = oplora_protected(W0, k)
    k = min(k, d_out, d_in)
    S = torch.linalg.svdvals(W0)[:k]
    assert U.shape == (d_out, k) and V.shape == (d_in, k)
    A, B = randn(r, d_in), randn(d_out, r)
    adapter = adapted(W0, randn(r, d_in), torch.zeros(d_out, r).double(), scale)
    adapter.protect(U, V)
    with torch.no_grad():
        adapter.lora_A.copy_(A)
        adapter.lora_B.copy_(B)
    W = adapter.plain(merged=True).weight.detach()
    size = 1e-12 * (W0.norm() + scale * A.norm() * B.norm())
    assert ((W - W0) @ V).norm() <= size and (U.T @ (W - W0)).norm() <= size
    assert (W @ V - U * S).norm() <= size and (W.T @ U - V * S).norm() <= size
    assert (adapter(V.T) - adapter.bias - S[:, None] * U.T).norm() <= size
    left, right = torch.eye(d_out) - U @ U.T, torch.eye(d_in) - V @ V.T
    assert (W - W0 - scale * left @ B @ A @ right).norm() <= size, "and all else is free"


# ------------------------------------------------------------------------------------------------------------
# The optimizer (Eq. 18-24)

def smooth_loss(A, seed=0):
    """Some loss of A (r, d_in) whose gradient changes along the way."""
    randn = normal(seed)
    return ((A @ randn(A.shape[1], 4) + randn(A.shape[0], 4)).sin()).sum()


def train(optimizer, parameters, steps, loss=smooth_loss):
    for _ in range(steps):
        optimizer.zero_grad()
        sum(loss(p) for p in parameters).backward()
        optimizer.step()


def run_sadam(A0, V, gate, steps=5, loss=smooth_loss, **options):
    """A after some steps of SAdam from A0."""
    A = A0.clone().requires_grad_()
    train(SAdam([A], {A: (V, gate)}, **options), [A], steps, loss)
    return A.detach()


options = st.fixed_dictionaries({"lr": st.sampled_from([1e-3, 0.1]), "eps": st.sampled_from([1e-8, 1e-2]),
                                 "betas": st.sampled_from([(0.9, 0.999), (0.5, 0.9)]),
                                 "weight_decay": st.sampled_from([0.0, 0.1])})


@given(small, small, seeds, options, st.booleans())
def test_sadam_without_a_basis_is_adamw(r, d, seed, options, identity):
    """No spectral entry, or V = I with gate 1, is torch.optim.AdamW to rounding, weight decay included."""
    A0 = normal(seed)(r, d)
    A, A_ref = A0.clone().requires_grad_(), A0.clone().requires_grad_()
    spectral = {A: (torch.eye(d).double(), torch.ones(d).double())} if identity else None
    train(SAdam([A], spectral, **options), [A], 5)
    train(torch.optim.AdamW([A_ref], **options), [A_ref], 5)
    assert not torch.equal(A, A0) and close(A, A_ref)


@given(small, small, seeds, options)
def test_sadam_is_adam_on_the_coordinates_with_a_rate_for_each(r, d, seed, options):
    """With A = Ā Vᵀ, SAdam is Adam on Ā, column i at learning rate η s̃_i: the step is gated (Eq. 18-24)."""
    options = {**options, "weight_decay": 0.0}  # AdamW would gate the decay too
    A0, V, gate = normal(seed)(r, d), invertible(d, seed), torch.linspace(0, 1, d).double()
    columns = [c.clone().requires_grad_() for c in torch.linalg.solve(V, A0.T)]  # of Ā = A V⁻ᵀ, (r,) each
    groups = [{"params": [c], "lr": options["lr"] * s.item()} for c, s in zip(columns, gate)]
    reference = torch.optim.AdamW(groups, **options)
    for _ in range(5):
        reference.zero_grad()
        smooth_loss(torch.stack(columns, dim=1) @ V.T).backward()
        reference.step()
    assert close(run_sadam(A0, V, gate, **options), torch.stack(columns, dim=1).detach() @ V.T, 1e-10)


@given(small, small, seeds, st.sampled_from([1e-6, 1.0, 1e6]))
def test_first_step_is_the_gate_whatever_the_gradients_size(r, d, seed, size):
    """ΔA V⁻ᵀ = -η sign(GV) s̃ at ε = 0: Adam forgets the gradient's size, a gate on it included (Eq. 22)."""
    randn = normal(seed)
    A0, G, V = randn(r, d), size * randn(r, d), invertible(d, seed)
    gate = torch.linspace(0.3, 1, d).double()
    A = run_sadam(A0, V, gate, 1, lambda A: (G * A).sum(), lr=0.01, eps=0.0)
    assert close(torch.linalg.solve(V, (A - A0).T).T, -0.01 * (G @ V).sign() * gate, 1e-10)


@given(small, small, seeds, st.floats(0, 1))
def test_constant_gate_scales_every_step(r, d, seed, c):
    """Under one sequence of gradients a gate c everywhere is c times the ungated path, 0 freezes (Eq. 22)."""
    A0, V, ones = normal(seed)(r, d), invertible(d, seed), torch.ones(d).double()

    def path(gate):
        randn = normal(seed + 1)
        return run_sadam(A0, V, gate, 5, lambda A: (randn(r, d) * A).sum(), lr=0.1) - A0

    full = path(ones)
    assert full.norm() > 0 and (path(c * ones) - c * full).norm() <= 1e-13 * (A0.norm() + full.norm())
    assert not path(0 * ones).any()


@given(small, small, seeds, options, st.data())
def test_truncated_basis_is_a_gate_of_zero_on_the_rest(r, d, seed, options, data):
    """k columns of V move A in their span alone, as all of V with a gate of 0 on the others (App. D)."""
    A0, V, k = normal(seed)(r, d), invertible(d, seed), data.draw(st.integers(0, d))
    gate = torch.linspace(0.3, 1, d).double()
    A = run_sadam(A0, V[:, :k], gate[:k], **options)
    assert close(A, run_sadam(A0, V, gate * (torch.arange(d) < k), **options))
    moved = run_sadam(A0, V[:, :k], gate[:k], **{**options, "weight_decay": 0.0}) - A0
    Q, _ = torch.linalg.qr(V[:, :k])
    assert (moved - moved @ Q @ Q.T).norm() <= 1e-13 * A0.norm()
    assert k == 0 or moved.norm() > 0


@given(small, small, seeds, st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=1, max_size=4))
def test_matrices_that_step_together_step_as_each_alone(r, d, seed, present):
    """Those of one shape share their products. One without a gradient, and without a basis, does not matter
    to the others."""
    draw, gates = normal(seed), [torch.linspace(0.3, 1, d).double() * f for f in (1.0, 0.9, 0.8)]
    starts, bases = [draw(r, d) for _ in range(4)], [draw(d, d) for _ in range(3)]
    together, alone = ([A.clone().requires_grad_() for A in starts] for _ in range(2))
    spectral = [dict(zip(some, zip(bases, gates))) for some in (together, alone)]  # the last has none
    optimizers = [SAdam(together, spectral[0], lr=0.1, weight_decay=0.1)]
    optimizers += [SAdam([A], {A: spectral[1][A]} if A in spectral[1] else {}, lr=0.1, weight_decay=0.1)
                   for A in alone]
    for step in present:
        for A, B, there in zip(together, alone, step):
            A.grad = B.grad = draw(r, d) if there else None
        for optimizer in optimizers:
            optimizer.step()
    assert all(close(A, B, 1e-12) for A, B in zip(together, alone))


@given(small, small, seeds, st.lists(st.integers(-4, 4), min_size=6, max_size=6))
def test_bases_in_bfloat16_take_the_same_steps_to_its_rounding(r, d, seed, exponents):
    """Bases, and what is multiplied by them, have 8 bits; moments and parameters keep theirs."""
    A0, gate = normal(seed)(r, d), torch.linspace(0.3, 1, d).double()
    V = torch.eye(d)[torch.randperm(d)] * 2.0 ** torch.tensor(exponents[:d])  # exact in 8 bits
    A = A0.clone().requires_grad_()
    optimizer = SAdam([A], {A: (V, gate)}, held_in=torch.bfloat16, lr=1e-2)
    train(optimizer, [A], 5)
    moved, expected = A.detach() - A0, run_sadam(A0, V, gate, lr=1e-2) - A0
    assert 0 < (moved - expected).norm() <= 0.05 * expected.norm() or torch.equal(moved, expected)
    assert [V.dtype for _, V, _ in optimizer.stacks] == [torch.bfloat16]
    assert {t.dtype for t in (A, *list(optimizer.state[A].values())[1:])} == {torch.float64}


@given(small, small, seeds, st.lists(st.sampled_from([-1.0, 1.0]), min_size=6, max_size=6))
def test_signs_of_the_basis_do_not_matter(r, d, seed, signs):
    """Eigenvectors are known up to sign; V -> V diag(±1) changes nothing."""
    A0, V, gate = normal(seed)(r, d), invertible(d, seed), torch.linspace(0, 1, d).double()
    assert close(run_sadam(A0, V * f64(signs[:d]), gate, lr=0.1), run_sadam(A0, V, gate, lr=0.1))


@given(small, small, seeds, st.booleans())
def test_zero_gradient_only_decays(r, d, seed, gated):
    """No gradient, no step: A stays to the bit, or with decay shrinks by 1 - η·decay, gated or not."""
    A0, gate = normal(seed)(r, d), torch.linspace(0, 1, d).double()
    for decay in 0.0, 0.5:
        A = A0.clone().requires_grad_()
        spectral = {A: (invertible(d, seed), gate)} if gated else None
        optimizer = SAdam([A], spectral, lr=0.1, weight_decay=decay)
        A.grad = torch.zeros_like(A)
        optimizer.step()
        assert torch.equal(A, A0 * (1 - 0.1 * decay))


@given(small, small, seeds, options)
def test_resuming_is_not_noticed(r, d, seed, options):
    """3 + 3 steps, through a saved state of tensors and plain values, are 6 steps, bit for bit."""
    randn = normal(seed)
    start, V, gate = [randn(r, d), randn(d, r)], invertible(d, seed), torch.linspace(0, 1, d).double()

    def fresh(values):
        A, B = (v.detach().clone().requires_grad_() for v in values)
        return [A, B], SAdam([A, B], {A: (V, gate)}, **options)

    whole, optimizer = fresh(start)
    train(optimizer, whole, 6)
    half, optimizer = fresh(start)
    train(optimizer, half, 3)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    resumed, optimizer = fresh(half)
    optimizer.load_state_dict(torch.load(file, weights_only=True))
    train(optimizer, resumed, 3)
    assert all(torch.equal(p, q) for p, q in zip(whole, resumed))


def test_sadam_keeps_the_ways_of_torch_optimizers():
    """A closure's loss is returned, groups have their own rate, what has no gradient is left alone."""
    A, B, idle = (torch.ones(2, 3).double().requires_grad_() for _ in range(3))
    optimizer = SAdam([{"params": [A, idle]}, {"params": [B], "lr": 0.5}], lr=0.25, eps=0.0)

    def closure():
        loss = (A + B).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 12
    assert close(A, torch.full((2, 3), 0.75)) and close(B, torch.full((2, 3), 0.5)) and (idle == 1).all()


@pytest.mark.parametrize("V, gate", [((3, 3), (4,)), ((4, 3), (4,)), ((2, 2), (2,)), ((4, 4), (3,)),
                                     ((4, 4), (4, 1)), ((3, 4), (4,)), ((4,), (4,)), ((3, 3), (3,))])
def test_sadam_refuses_a_basis_that_does_not_fit(V, gate):
    """A (2, 4) takes a basis (4, k) and a gate (k,), and nothing else; the learning rate is not negative."""
    A = torch.ones(2, 4).requires_grad_()
    with pytest.raises(ValueError, match="basis .* gate"):
        SAdam([A], {A: (torch.ones(V), torch.ones(gate))})
    with pytest.raises(ValueError, match="not among params"):
        SAdam([A], {torch.ones(2, 4): (torch.eye(4), torch.ones(4))})
    for lr in -1e-3, math.nan:
        with pytest.raises(ValueError, match="lr"):
            SAdam([A], lr=lr)


# ------------------------------------------------------------------------------------------------------------
# Second moments

@given(small, st.integers(1, 30), seeds, st.data())
def test_second_moment_does_not_depend_on_batches_or_order(d, tokens, seed, data):
    """C = XᵀX/n, however the tokens are shuffled, batched and shaped."""
    X = normal(seed)(tokens, d)
    order = torch.randperm(tokens, generator=torch.Generator().manual_seed(seed))
    cuts = sorted(data.draw(st.lists(st.integers(0, tokens), max_size=4)))
    moment = SecondMoment(d)
    for batch in X[order].tensor_split(cuts):
        moment.add(batch.reshape(1, -1, d))
    assert moment.tokens == tokens and close(moment.mean(), X.T @ X / tokens)


@given(small, st.lists(st.integers(1, 6), min_size=1, max_size=4), seeds)
def test_second_moment_ignores_padding(d, lengths, seed):
    """Padding enters neither the sum nor the count, whatever it holds."""
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


def test_second_moment_sums_batches_in_float64():
    """float32 activations: 1e8 and 10,000 times 1e-4 after it, which a float32 sum would not notice."""
    moment = SecondMoment(1)
    moment.add(torch.tensor([[1e4]]))
    for _ in range(10_000):
        moment.add(torch.tensor([[1e-2]]))
    assert moment.mean().dtype == torch.float64
    assert moment.mean().item() * 10_001 == pytest.approx(1e8 + 1, rel=1e-12)


# ------------------------------------------------------------------------------------------------------------
# What a user can get wrong: a ValueError names it

@pytest.mark.parametrize("x", [math.nan, math.inf, 1e200, None])
def test_second_moment_refuses_nothing_and_what_is_not_finite(x):
    """No tokens, also when all are padding, and activations that are not finite or overflow."""
    moment = SecondMoment(2)
    moment.add(f64([[[x or 0.0] * 2] * 3]), None if x else torch.zeros(1, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="not finite" if x else "no tokens"):
        moment.mean()


@pytest.mark.parametrize("tau", [0.0, -1.0, math.nan, math.inf])
def test_damping_must_be_positive(tau):
    """τ = 0 would leave a rank-deficient C_pre singular (Eq. 6)."""
    with pytest.raises(ValueError, match="tau"):
        damped(torch.eye(2), tau)


@pytest.mark.parametrize("name, value", [("lam", 0.0), ("lam", -1.0), ("lam", math.nan), ("lam", math.inf),
                                         ("s_min", -0.1), ("s_min", 1.1), ("s_min", math.nan)])
def test_gate_refuses_what_is_out_of_range(name, value):
    """λ > 0 and 0 <= s_min <= 1 (Eq. 22)."""
    with pytest.raises(ValueError, match=name):
        spectral_gate(torch.ones(2), **{name: value})


eye, holed = torch.eye(2), torch.tensor([[1.0, 0.0], [0.0, math.nan]])


@pytest.mark.parametrize("C_task, H, message", [
    (torch.ones(2, 3), eye, "C_task has shape"), (torch.eye(3), eye, "C_task has shape"),
    (torch.ones(3, 2), torch.ones(2, 3), "H has shape"), (eye, torch.ones(2, 3), "must be square"),
    (holed, eye, "C_task holds NaN"), (eye, holed, "H holds NaN"), (eye / 0, eye, "C_task holds NaN or inf"),
    (eye, 0 * eye, "H is not positive definite; use a larger tau"), (eye, -eye, "H is not positive")])
def test_eigensolver_refuses_what_it_cannot_solve(C_task, H, message):
    """C_task and H are finite, square, of one size, and H is positive definite (Eq. 17)."""
    with pytest.raises(ValueError, match=message):
        generalized_eigh(C_task, H)


def test_normalising_refuses_a_dead_layer():
    """A layer whose input was always zero has no scale."""
    with pytest.raises(ValueError, match="C_pre"):
        normalise(torch.zeros(2, 2), torch.eye(2))


# ------------------------------------------------------------------------------------------------------------
# The methods

@given(spd_pairs(), lams, floors)
def test_steps_differ_in_one_thing_each(pair, lam, s_min):
    """In FoLoRA's basis: a gate of 1 (ungated), of its mean (evenly gated), the leading half (truncated)."""
    m = solve_layer(pair[1], pair[0])
    V, gate = sadam(m, lam, s_min)
    assert torch.equal(V, m["basis"]) and torch.equal(gate, spectral_gate(m["eigvals"], lam, s_min))
    for steps, expected in (ungated, torch.ones_like(gate)), (evenly_gated, gate.mean().expand_as(gate)):
        basis, other = steps(m, lam, s_min)
        assert torch.equal(basis, V) and torch.equal(other, expected)
    half, leading = truncated(m, lam, s_min)
    assert half.shape == (len(V), len(V) // 2) and torch.equal(half, V[:, :len(V) // 2])
    assert torch.equal(leading, gate[:len(V) // 2])


@given(spd_pairs(), lams, floors)
def test_steps_that_know_one_moment_alone(pair, lam, s_min):
    """Penalty: VᵀHV = I and γ = vᵀv, one over H. Utility: VᵀV = I and γ = vᵀC_task v. Both gated by γ."""
    m = solve_layer(pair[1], pair[0])
    eye, n = torch.eye(len(m["H"])).double(), len(m["H"])
    for steps, C, H in (penalty_alone, eye, m["H"]), (utility_alone, m["C_task"], eye):
        V, gate = steps(m, lam, s_min)
        assert spectral_norm(V.T @ H @ V - eye) <= 10 * n * EPS * cond(H)
        error, gamma = gamma_error(C, H), (V.T @ C @ V).diagonal()
        assert spectral_norm(V.T @ C @ V - gamma.diag()) <= error and (gamma.diff() <= error).all()
        assert (gate - spectral_gate(gamma, lam, s_min)).abs().max() <= error / lam + EPS


def test_methods_are_known_by_name():
    """LoRA takes no calibration and AdamW's steps, FoLoRA both a calibration and SAdam's."""
    assert not method_called("lora").calibrated and method_called("lora").steps is None
    assert method_called("folora").calibrated and method_called("folora").steps is sadam
    W0, C_pre, C_task = normal(0)(3, 4), torch.diag(f64([1.0, 0.0, 2.0, 3.0])), normal(1)(4, 4)
    m = {"C_pre": C_pre, "C_task": C_task @ C_task.T, "basis": invertible(4, 0), "eigvals": torch.ones(4)}
    for name, start, *moment in (
            ("pissa", pissa_start), ("milora", milora_start), ("corda", corda_start, "C_pre"),
            ("lora-null", lora_null_start, "C_pre"), ("lora-null-v2", lora_null_start, "C_pre"),
            ("sc-lora", sc_lora_start, "C_pre", "C_task"),
            ("folora", null_space_start, "C_pre"), ("folora-top", leading_start, "basis")):
        expected = start(W0, *(m[key] for key in moment), 2, 4.0)
        pair = METHODS[name].start(W0, r=2, scale=4.0, generator=None, **m)
        assert all(torch.equal(a, b) for a, b in zip(pair, expected, strict=True))
    with pytest.raises(ValueError, match="unknown method 'dora'; the methods are full, lora, .*folora"):
        method_called("dora")


def test_methods_ask_for_a_calibration_exactly_if_they_use_it():
    """Without one, a method that says it needs none starts and steps; the others cannot, or replay its
    samples, or penalise the drift on them, and of these LoRA's start needs no directions."""
    for method in METHODS.values():
        uses, directed = method.replay > 0 or method.penalty is not None, False
        try:
            method.start and method.start(torch.eye(3).double(), r=1, scale=1.0, generator=None)
            method.steps and method.steps(None, 1.0, 0.3)
        except TypeError:  # it asked for what only a calibration has
            uses = directed = True
        assert method.calibrated == uses and method.directed == directed

"""Eq. 18-24: Adam in the basis, its steps gated.

SAdam is AdamW wherever the basis and the gate change nothing, and otherwise Adam on the coordinates
A V⁻ᵀ with a rate of its own for each direction. In the forgetting metric H its first step costs at most
η² r Σ s̃², whatever the gradient, and a larger λ or a smaller s_min never makes a step cost more.
"""
import io
import math

import pytest
import torch
from hypothesis import given, strategies as st

from extras.baselines import PullBack
from extras.grouped import GroupedSAdam
from folora import SAdam, forgetting_penalty, generalized_eigh, spectral_gate
from matrices import EPS, close, cond, eye, f64, invertible, normal, seeds, small, spd_pairs

options = st.fixed_dictionaries({
    "lr": st.sampled_from([1e-3, 0.1]), "eps": st.sampled_from([1e-8, 1e-2]),
    "betas": st.sampled_from([(0.9, 0.999), (0.5, 0.9)]),
    "weight_decay": st.sampled_from([0.0, 0.1])})
lams, floors = st.floats(1e-3, 1e3), st.floats(0, 0.999)


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


def steps_on(gradients, V, gate, **options):
    """ΔA of each step of SAdam on a sequence of gradients, exactly: A is set back to 0 in between."""
    A, steps = torch.zeros_like(gradients[0], requires_grad=True), []
    optimizer = SAdam([A], {A: (V, gate)}, **options)
    for gradient in gradients:
        A.grad = gradient
        optimizer.step()
        steps.append(A.detach().clone())
        with torch.no_grad():
            A.zero_()
    return steps


# ------------------------------------------------------------------------------------------------
# It is Adam, in other coordinates

@given(small, small, seeds, options, st.booleans())
def test_without_a_basis_or_with_a_trivial_one_it_is_adamw(r, d, seed, options, identity):
    """No spectral entry, or V = I with gate 1, is torch.optim.AdamW to rounding, weight decay
    included."""
    A0 = normal(seed)(r, d)
    A, A_ref = A0.clone().requires_grad_(), A0.clone().requires_grad_()
    spectral = {A: (eye(d), torch.ones(d).double())} if identity else None
    train(SAdam([A], spectral, **options), [A], 5)
    train(torch.optim.AdamW([A_ref], **options), [A_ref], 5)
    assert not torch.equal(A, A0) and close(A, A_ref)


@given(small, small, seeds, options)
def test_it_is_adam_on_the_coordinates_with_a_rate_for_each(r, d, seed, options):
    """With A = Ā Vᵀ, SAdam is Adam on Ā, column i at learning rate η s̃_i: the *step* is gated."""
    options = {**options, "weight_decay": 0.0}  # AdamW would gate the decay too
    A0, V, gate = normal(seed)(r, d), invertible(d, seed), torch.linspace(0, 1, d).double()
    columns = [c.clone().requires_grad_() for c in torch.linalg.solve(V, A0.T)]  # of Ā = A V⁻ᵀ
    groups = [{"params": [c], "lr": options["lr"] * s.item()} for c, s in zip(columns, gate)]
    reference = torch.optim.AdamW(groups, **options)
    for _ in range(5):
        reference.zero_grad()
        smooth_loss(torch.stack(columns, dim=1) @ V.T).backward()
        reference.step()
    expected = torch.stack(columns, dim=1).detach() @ V.T
    assert close(run_sadam(A0, V, gate, **options), expected, 1e-10)


@given(small, small, seeds, st.lists(st.sampled_from([-1.0, 1.0]), min_size=6, max_size=6))
def test_the_signs_of_the_basis_do_not_matter(r, d, seed, signs):
    """Eigenvectors are known up to sign; V -> V diag(±1) changes nothing."""
    A0, V, gate = normal(seed)(r, d), invertible(d, seed), torch.linspace(0, 1, d).double()
    flipped = run_sadam(A0, V * f64(signs[:d]), gate, lr=0.1)
    assert close(flipped, run_sadam(A0, V, gate, lr=0.1))


# ------------------------------------------------------------------------------------------------
# What the gate does to a step

@given(small, small, seeds, st.sampled_from([1e-6, 1.0, 1e6]))
def test_the_first_step_is_the_gate_whatever_the_gradients_size(r, d, seed, size):
    """ΔA V⁻ᵀ = -η sign(GV) s̃ at ε = 0: Adam forgets the gradient's size, so a gate on the gradient
    would be lost (Eq. 22)."""
    randn = normal(seed)
    A0, G, V = randn(r, d), size * randn(r, d), invertible(d, seed)
    gate = torch.linspace(0.3, 1, d).double()
    A = run_sadam(A0, V, gate, 1, lambda A: (G * A).sum(), lr=0.01, eps=0.0)
    assert close(torch.linalg.solve(V, (A - A0).T).T, -0.01 * (G @ V).sign() * gate, 1e-10)


@given(spd_pairs(), small, seeds, lams, floors, st.sampled_from([1e-3, 1.0]))
def test_the_first_step_costs_at_most_the_rate_and_the_gates_allow(pair, r, seed, lam, s_min, lr):
    """‖ΔA‖²_H = R(ΔA) <= η² r Σ s̃² for any gradient and ε, growing to equality as ε -> 0."""
    C, _, H = pair
    gamma, V = generalized_eigh(C, H)
    gate, G = spectral_gate(gamma, lam, s_min), normal(seed)(r, len(H))
    bound, rounding = lr ** 2 * r * (gate ** 2).sum(), 30 * len(H) * EPS * cond(H)
    least = (G @ V).abs().min().item()  # of the gradient's coordinates, none of which is 0
    costs = [forgetting_penalty(steps_on([G], V, gate, lr=lr, eps=eps)[0], H)
             for eps in (1e3 * least, least, 1e-8 * least, 0.0)]
    assert least > 0 and all(cost <= bound * (1 + rounding) for cost in costs)
    assert all(a <= b * (1 + rounding) for a, b in zip(costs, costs[1:]))
    assert costs[2] >= bound * (1 - 3e-8 - rounding)
    assert costs[3] >= bound * (1 - rounding)


@given(spd_pairs(), small, seeds, lams, floors, st.floats(1, 10), st.floats(0, 1))
def test_a_larger_lambda_or_a_smaller_s_min_never_makes_a_step_cost_more(pair, r, seed, lam, s_min,
                                                                         factor, share):
    """R(ΔA) of every step on the same gradients, not of the first alone."""
    C, _, H = pair
    gamma, V = generalized_eigh(C, H)
    randn = normal(seed)
    gradients = [randn(r, len(H)) for _ in range(4)]

    def costs(lam, s_min):
        steps = steps_on(gradients, V, spectral_gate(gamma, lam, s_min), lr=0.1)
        return torch.stack([forgetting_penalty(step, H) for step in steps])

    most = costs(lam, s_min) * (1 + 30 * len(H) * EPS * cond(H))
    assert (costs(lam * factor, s_min) <= most).all()
    assert (costs(lam, s_min * share) <= most).all()


@given(small, small, seeds, st.floats(0, 1))
def test_a_constant_gate_scales_every_step_and_a_gate_of_zero_freezes(r, d, seed, c):
    """Under one sequence of gradients a gate c everywhere is c times the ungated path (Eq. 22)."""
    A0, V, ones = normal(seed)(r, d), invertible(d, seed), torch.ones(d).double()

    def path(gate):
        randn = normal(seed + 1)
        return run_sadam(A0, V, gate, 5, lambda A: (randn(r, d) * A).sum(), lr=0.1) - A0

    full = path(ones)
    assert full.norm() > 0
    assert (path(c * ones) - c * full).norm() <= 1e-13 * (A0.norm() + full.norm())
    assert not path(0 * ones).any()


@given(small, small, seeds, st.booleans())
def test_a_zero_gradient_only_decays(r, d, seed, gated):
    """No gradient, no step: A stays to the bit, or with decay shrinks by 1 - η·decay, gated or not."""
    A0, gate = normal(seed)(r, d), torch.linspace(0, 1, d).double()
    for decay in 0.0, 0.5:
        A = A0.clone().requires_grad_()
        spectral = {A: (invertible(d, seed), gate)} if gated else None
        optimizer = SAdam([A], spectral, lr=0.1, weight_decay=decay)
        A.grad = torch.zeros_like(A)
        optimizer.step()
        assert torch.equal(A, A0 * (1 - 0.1 * decay))


# ------------------------------------------------------------------------------------------------
# Less memory: part of a basis, or a basis in bfloat16

@given(small, small, seeds, options, st.data())
def test_a_truncated_basis_is_a_gate_of_zero_on_the_rest(r, d, seed, options, data):
    """k columns of V move A in their span alone, as all of V with a gate of 0 on the others (App. D)."""
    A0, V, k = normal(seed)(r, d), invertible(d, seed), data.draw(st.integers(0, d))
    gate = torch.linspace(0.3, 1, d).double()
    A = run_sadam(A0, V[:, :k], gate[:k], **options)
    assert close(A, run_sadam(A0, V, gate * (torch.arange(d) < k), **options))
    moved = run_sadam(A0, V[:, :k], gate[:k], **{**options, "weight_decay": 0.0}) - A0
    Q, _ = torch.linalg.qr(V[:, :k])
    assert (moved - moved @ Q @ Q.T).norm() <= 1e-13 * A0.norm()
    assert k == 0 or moved.norm() > 0


@given(small, small, seeds, st.lists(st.integers(-4, 4), min_size=6, max_size=6))
def test_a_basis_in_bfloat16_takes_the_same_steps_to_its_rounding(r, d, seed, exponents):
    """The basis, and what is multiplied by it, have 8 bits; moments and parameters keep theirs."""
    A0, gate = normal(seed)(r, d), torch.linspace(0.3, 1, d).double()
    order = torch.randperm(d, generator=torch.Generator().manual_seed(seed))
    V = torch.eye(d)[order] * 2.0 ** torch.tensor(exponents[:d])  # exact in 8 bits
    A = A0.clone().requires_grad_()
    optimizer = SAdam([A], {A: (V, gate)}, basis_dtype=torch.bfloat16, lr=1e-2)
    train(optimizer, [A], 5)
    moved, expected = A.detach() - A0, run_sadam(A0, V.double(), gate, lr=1e-2) - A0
    assert 0 < (moved - expected).norm() <= 0.05 * expected.norm() or torch.equal(moved, expected)
    assert optimizer.spectral[A][0].dtype == torch.bfloat16
    state = [t for t in optimizer.state[A].values() if torch.is_tensor(t) and t.dim()]
    assert len(state) == 2 and {t.dtype for t in (A, *state)} == {torch.float64}


# ------------------------------------------------------------------------------------------------
# An optimizer like any other

@given(small, small, seeds, options)
def test_resuming_is_not_noticed(r, d, seed, options):
    """3 + 3 steps, through a saved state of tensors and plain values, are 6 steps, bit for bit."""
    randn = normal(seed)
    start, V = [randn(r, d), randn(d, r)], invertible(d, seed)
    gate = torch.linspace(0, 1, d).double()

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


def test_it_keeps_the_ways_of_torch_optimizers():
    """A closure's loss is returned, groups have their own rate, what has no gradient stays."""
    A, B, idle = (torch.ones(2, 3).double().requires_grad_() for _ in range(3))
    optimizer = SAdam([{"params": [A, idle]}, {"params": [B], "lr": 0.5}], lr=0.25, eps=0.0)

    def closure():
        loss = (A + B).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 12
    assert close(A, torch.full((2, 3), 0.75)) and close(B, torch.full((2, 3), 0.5))
    assert (idle == 1).all()


@given(small, small, seeds)
def test_each_parameter_steps_as_if_it_were_alone(r, d, seed):
    """Several matrices with bases of their own, one without, in one optimizer or each in its own."""
    randn = normal(seed)
    starts = [randn(r, d) for _ in range(3)]
    gates = [torch.linspace(low, 1, d).double() for low in (0.3, 0.6)]
    bases = [invertible(d, seed), invertible(d, seed + 2)[:, :max(1, d // 2)]]
    together, alone = ([A.clone().requires_grad_() for A in starts] for _ in range(2))
    pairs = [(V, gate[:V.shape[1]]) for V, gate in zip(bases, gates)]  # the last has none
    train(SAdam(together, dict(zip(together, pairs)), lr=0.1), together, 3)
    for A, pair in zip(alone, [*pairs, None]):
        train(SAdam([A], {A: pair} if pair else None, lr=0.1), [A], 3)
    assert all(torch.equal(A, B) for A, B in zip(together, alone))


@pytest.mark.parametrize("V, gate", [
    ((3, 3), (4,)), ((4, 3), (4,)), ((2, 2), (2,)), ((4, 4), (3,)), ((4, 4), (4, 1)),
    ((3, 4), (4,)), ((4,), (4,)), ((3, 3), (3,))])
def test_a_basis_that_does_not_fit_is_refused(V, gate):
    """A (2, 4) takes a basis (4, k) and a gate (k,), and nothing else."""
    A = torch.ones(2, 4).requires_grad_()
    with pytest.raises(ValueError, match="basis .* gate"):
        SAdam([A], {A: (torch.ones(V), torch.ones(gate))})


def test_a_basis_for_a_stranger_and_a_negative_rate_are_refused():
    A = torch.ones(2, 4).requires_grad_()
    with pytest.raises(ValueError, match="not among params"):
        SAdam([A], {torch.ones(2, 4): (torch.eye(4), torch.ones(4))})
    for lr in -1e-3, math.nan:
        with pytest.raises(ValueError, match="lr"):
            SAdam([A], lr=lr)


@pytest.mark.parametrize("kind", [GroupedSAdam, PullBack])
@given(small, small, seeds, options)
def test_all_together_take_the_steps_that_each_takes(kind, r, d, seed, options):
    """What a GPU runs, on the CPU: to the bit, with a basis, half of one, none, and no gradient."""
    paths = []
    for update in "update", "update_together":
        randn = normal(seed)
        params = [randn(r, d).requires_grad_() for _ in range(4)]
        spectral = {A: (invertible(d, seed)[:, :k], torch.linspace(0.3, 1, k).double())
                    for A, k in zip(params, (d, max(1, d // 2)))}
        optimizer = kind(params, spectral, **options)
        optimizer.strength = 2.0
        for step in range(4):
            for p in params[:3 if step % 2 else 4]:
                p.grad = randn(r, d)
            if update == "update":
                optimizer.step()
            else:
                with torch.no_grad():
                    optimizer.update_together([p for p in params if p.grad is not None], **options)
            params[3].grad = None
        paths.append(params)
    assert all(torch.equal(p, q) for p, q in zip(*paths))

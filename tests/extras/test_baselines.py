"""All methods in one table: where each starts, how it steps, what it adds to the loss.

Every start leaves the layer as it was, and takes from W0 what its paper says. The KL penalty is the KL
divergence from the base model to second order, exactly so for one softmax layer. Rehearsal has the
share of the loss that its weight says. A method asks for a calibration exactly if something in it
uses one, trains what it says, and moves nothing else.
"""
import argparse
import dataclasses
import functools

import pytest
import torch
from hypothesis import given, settings, strategies as st

import tasks
import train
from calibrate import second_moments
from extras import machine
from extras.baselines import (METHODS, corda_start, default_rate, diagonal, distill_loss,
                              fisher, isotropic, kaiming_start, kl_penalty, kl_term, leading_start,
                              lora_null_start, milora_start, oplora_protected, pissa_start,
                              PullBack, protect, pull_strength, rehearsal_term, replay_loss, sadam,
                              sc_lora_start, truncated)
from folora import (SAdam, damped, forgetting_penalty, null_space_start, solve_layer,
                    spectral_gate)
from matrices import (EPS, adapted, blocks, close, cond, decomposed, eye, f64, invertible, kappas,
                      measured, normal, rotation, scales, second_moment, seeds, small, spd_pairs)
from model import GPT, GPTConfig, add_lora, block_linears, merge_lora
from study.variants import METHODS as WITH_VARIANTS

# every start in the table, under the name of the first method that has it
STARTS = {method.start: name for name, method in reversed(METHODS.items()) if method.start}
every_start = pytest.mark.parametrize("name", STARTS.values())


def start_of(name, W0, m, r, scale=1.0):
    """(A0, B0) of the method's start, called as the training does."""
    generator = torch.Generator().manual_seed(0)
    return METHODS[name].start(W0, r=r, scale=scale, generator=generator, **m)


# ------------------------------------------------------------------------------------------------
# Every start

@every_start
@given(block=blocks(), scale=kappas)
def test_every_start_leaves_the_layer_as_it_was(name, block, scale):
    """W_res + κB0A0 = W0 for every method, κ and r, and A0 and B0 have LoRA's shapes."""
    W0, _, X, r, randn = block
    m = solve_layer(second_moment(X), second_moment(randn(len(X), 20)), 0.1)
    A0, B0 = start_of(name, W0, m, r, scale)
    assert A0.shape == (r, len(X)) and B0.shape == (len(W0), r)
    layer, x = adapted(W0, A0, B0, scale), randn(7, len(X))
    assert close(layer(x), x @ W0.T + layer.bias)
    assert close(layer.to_linear(learned=True).weight, W0)
    assert close(layer.to_linear(learned=False).weight, W0)


@every_start
@given(block=blocks(), scale=kappas, k=st.none() | st.integers(0, 3))
def test_merged_is_unmerged_whatever_was_learned(name, block, scale, k):
    """The merged layer computes what the adapter does after A and B moved, with protected directions
    or without, and `delta_factors` is the difference that it makes."""
    W0, _, X, r, randn = block
    m = solve_layer(second_moment(X), second_moment(randn(len(X), 20)), 0.1)
    layer = adapted(W0, *start_of(name, W0, m, r, scale), scale)
    if k is not None:
        protect(layer, *oplora_protected(W0, k))
    with torch.no_grad():
        for p in layer.lora_A, layer.lora_B:
            p += randn(*p.shape)
    x, merged = randn(7, len(X)), layer.to_linear(learned=True)
    assert type(merged) is torch.nn.Linear and merged.bias is layer.bias
    assert close(layer(x), merged(x), 1e-10)
    P, G = layer.delta_factors()
    dW = merged.weight - layer.to_linear(learned=False).weight
    assert (P @ G - dW).norm() <= 1e-12 * (merged.weight.norm() + P.norm() * G.norm())


# ------------------------------------------------------------------------------------------------
# Each start is its paper's

def ranks(data, W0):
    return data.draw(st.integers(1, min(W0.shape)))


def evenly_split(A0, B0, scale):
    """Whether B0 and A0 carry the same singular values, one direction a row and column."""
    S = A0 @ A0.T
    return ((S - scale ** 2 * B0.T @ B0).norm() <= 1e-12 * S.norm()
            and close(S, S.diagonal().diag()))


def test_lora_starts_from_kaiming_uniform_and_zero():
    """A0 is uniform in ±1/√d_in, drawn from the generator; B0 = 0; both in the dtype of W0."""
    W0, r, d_in = torch.zeros(64, 100).double(), 64, 100
    A0, B0 = kaiming_start(W0, r, generator=torch.Generator().manual_seed(0))
    bound = d_in ** -0.5
    assert A0.dtype == B0.dtype == torch.float64 and not B0.any()
    assert 0.99 * bound < A0.max() <= bound and -bound <= A0.min() < -0.99 * bound
    assert abs(A0.mean()) < 0.05 * bound
    assert A0.std().item() == pytest.approx(bound / 3 ** 0.5, rel=0.05)
    for seed, same in (0, True), (1, False):
        again, _ = kaiming_start(W0, r, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(again, A0) == same


@given(decomposed(), kappas, st.data())
def test_pissa_takes_the_largest_components_and_milora_the_smallest(parts, scale, data):
    """κB0A0 = U_r diag(s_r) V_rᵀ, of the largest r (PiSSA) or the smallest (MiLoRA) of known
    components."""
    W0, U, s, V = parts
    r = ranks(data, W0)
    for start, chosen in (pissa_start, slice(len(s) - r, None)), (milora_start, slice(r)):
        A0, B0 = start(W0, r, scale)
        component = U[:, chosen] * s[chosen] @ V[:, chosen].T
        assert (scale * B0 @ A0 - component).norm() <= 1e-13 * W0.norm()
        assert evenly_split(A0, B0, scale)


@given(measured(), st.data())
def test_pissa_and_milora_share_a_weight_between_them(layer, data):
    """Of any W0, PiSSA's part of rank r and MiLoRA's of the remaining rank add up to W0; PiSSA's has
    the r largest eigenvalues of W0ᵀW0 for its squared norm, the most that any r components have."""
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
def test_corda_takes_what_the_base_models_text_reads_least(parts, scale, used, seed, data):
    """κB0A0 C = the r smallest components of W0 C, C = C_pre + 0.01·mean diag(C_pre)·I: here known
    ones."""
    W0_C, U, s, V = parts
    r, d_in = ranks(data, W0_C), len(V)
    C_pre = second_moment(rotation(d_in, seed)[:, :used] @ normal(seed)(min(used, d_in), 20))
    C = damped(C_pre, 0.01 * C_pre.diagonal().mean().item())
    W0 = torch.linalg.solve(C, W0_C.T).T
    A0, B0 = corda_start(W0, C_pre, r, scale)
    error = 100 * EPS * cond(C) * W0_C.norm()
    assert (scale * B0 @ A0 @ C - U[:, :r] * s[:r] @ V[:, :r].T).norm() <= error
    for factor in A0 @ C @ C @ A0.T, scale ** 2 * B0.T @ B0:  # the smaller component comes last
        assert (factor - s[:r].flip(0).diag()).norm() <= error


@given(measured(), kappas, st.data())
def test_corda_agrees_with_a_direct_decomposition(layer, scale, data):
    """κB0A0 C carries the r smallest of the singular values of W0 C, and leaves W_res C the others."""
    W0, X, _, _ = layer
    r, C_pre = ranks(data, W0), second_moment(X)
    C = damped(C_pre, 0.01 * C_pre.diagonal().mean().item())
    A0, B0 = corda_start(W0, C_pre, r, scale)
    S, m, start = torch.linalg.svdvals(W0 @ C), min(W0.shape), scale * B0 @ A0
    taken, rest = (torch.linalg.svdvals(W @ C) for W in (start, W0 - start))
    error = 100 * EPS * cond(C) * S[0]
    assert (taken[:r] - S[m - r:]).abs().max() <= error and (taken[r:] <= error).all()
    assert (rest[:m - r] - S[:m - r]).abs().sum() <= m * error and (rest[m - r:] <= error).all()


@given(decomposed(), kappas, seeds, st.data())
def test_lora_null_is_the_null_space_start_split_evenly(parts, scale, seed, data):
    """κB0A0 = W0 U⊥U⊥ᵀ, for known eigenvectors U⊥ of C_pre; in it B0 and A0 share the singular
    values."""
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
    assert (A0 @ A0.T - scale ** 2 * B0.T @ B0).norm() <= 1e-12 * size
    S = torch.linalg.svdvals(W0 @ Q[:, :r])
    assert (size - S.sum()).abs() <= 1e-11 * W0.norm()


@given(measured(), kappas, st.floats(0, 1), st.data())
def test_sc_lora_spans_the_outputs_that_the_task_has_more_of(layer, scale, beta, data):
    """κB0 = Q orthonormal, A0 = QᵀW0; Tr(Qᵀ[(1-β)S_task - βS_pre]Q) is the most that any Q reaches,
    S the second moments of the layer's actual outputs."""
    W0, X, Y, randn = layer
    r = ranks(data, W0)
    A0, B0 = sc_lora_start(W0, second_moment(X), second_moment(Y), r, scale, beta)
    Q = scale * B0
    assert close(Q.T @ Q, eye(r)) and (A0 - Q.T @ W0).norm() <= 1e-13 * W0.norm()
    S_pre, S_task = second_moment(W0 @ X), second_moment(W0 @ Y)
    S = (1 - beta) * S_task - beta * S_pre
    reached, error = (Q.T @ S @ Q).trace(), 1e-12 * (S_pre.norm() + S_task.norm())
    assert (reached - torch.linalg.eigvalsh(S)[-r:].sum()).abs() <= error
    other = torch.linalg.qr(randn(len(W0), r))[0]
    assert reached >= (other.T @ S @ other).trace() - error


def test_sc_lora_weighs_both_texts_equally_by_default():
    """Three outputs, used 1, 2.2 and 3.5 by the task, 0, 1.1 and 3 by the base model's text: β = 1/2,
    the default, picks the second, a larger β the first, a smaller one the third."""
    C_task, C_pre = torch.diag(f64([1.0, 2.2, 3.5])), torch.diag(f64([0.0, 1.1, 3.0]))
    for options, picked in ({"beta": 0.6}, 0), ({}, 1), ({"beta": 0.3}, 2):
        _, B0 = sc_lora_start(eye(3), C_pre, C_task, 1, **options)
        assert close(B0.abs(), eye(3)[:, [picked]])


@given(blocks(), kappas, st.integers(0, 3))
def test_a_protected_layer_starts_as_it_was(block, scale, k):
    """OPLoRA starts from B0 = 0, of which no direction needs protection."""
    W0, _, X, r, randn = block
    layer = adapted(W0, *start_of("oplora", W0, {}, r, scale), scale)
    protect(layer, *oplora_protected(W0, k))
    x = randn(7, len(X))
    assert close(layer(x), x @ W0.T + layer.bias)
    assert close(layer.to_linear(learned=True).weight, W0)


@given(measured(), kappas, st.integers(0, 6), st.data())
def test_oplora_keeps_the_leading_singular_triples(layer, scale, k, data):
    """For any A and B, ΔW V_k = 0 and U_kᵀΔW = 0, hence (W0 + ΔW)V_k = U_kS_k and
    (W0 + ΔW)ᵀU_k = V_kS_k."""
    W0, *_, randn = layer
    r, (d_out, d_in) = ranks(data, W0), W0.shape
    U, V = oplora_protected(W0, k)
    k = min(k, d_out, d_in)
    S = torch.linalg.svdvals(W0)[:k]
    assert U.shape == (d_out, k) and V.shape == (d_in, k)
    A, B = randn(r, d_in), randn(d_out, r)
    adapter = adapted(W0, randn(r, d_in), torch.zeros(d_out, r).double(), scale)
    protect(adapter, U, V)
    with torch.no_grad():
        adapter.lora_A.copy_(A)
        adapter.lora_B.copy_(B)
    W = adapter.to_linear(learned=True).weight.detach()
    size = 1e-12 * (W0.norm() + scale * A.norm() * B.norm())
    assert ((W - W0) @ V).norm() <= size and (U.T @ (W - W0)).norm() <= size
    assert (W @ V - U * S).norm() <= size and (W.T @ U - V * S).norm() <= size
    assert (adapter(V.T) - adapter.bias - S[:, None] * U.T).norm() <= size
    left, right = eye(d_out) - U @ U.T, eye(d_in) - V @ V.T
    assert (W - W0 - scale * left @ B @ A @ right).norm() <= size, "and all else is free"


# ------------------------------------------------------------------------------------------------
# The KL penalty

@given(spd_pairs(), small, small, seeds)
def test_the_kl_penalty_is_equation_6_where_all_outputs_count_equally(pair, d_out, k, seed):
    """½ Tr(S ΔW H ΔWᵀ) of a product: half of R(PG) for S = I, and of its part along S's root
    otherwise."""
    _, _, H = pair
    P, G = normal(seed)(d_out, k), normal(seed + 1)(k, len(H))
    root = normal(seed + 2)(d_out, d_out)
    size = 1e-13 * P.norm() ** 2 * G.norm() ** 2 * H.norm()
    one_sided = kl_penalty(P, G, eye(d_out), H)
    assert (one_sided - forgetting_penalty(P @ G, H) / 2).abs() <= size
    both = kl_penalty(P, G, root.T @ root, H)
    assert (both - forgetting_penalty(root @ P @ G, H) / 2).abs() <= size * root.norm() ** 2


@given(small, st.integers(2, 6), seeds)
def test_the_kl_penalty_is_the_kl_divergence_of_small_changes(d_in, classes, seed):
    """One softmax layer p(Wx): E[δδᵀ] over the model's own labels is diag(p) - ppᵀ, and
    KL(p_W ‖ p_{W + εΔ}) / ε² tends to ½ Tr(S Δ xxᵀ Δᵀ)."""
    randn = normal(seed)
    W, x, P, G = randn(classes, d_in), randn(d_in), randn(classes, 2), randn(2, d_in)
    size = 1e-4
    log_p, log_q = (torch.log_softmax(weight @ x, 0) for weight in (W, W + size * P @ G))
    p = log_p.exp()
    expected = kl_penalty(P, G, torch.diag(p) - torch.outer(p, p), torch.outer(x, x))
    moved = (P @ G @ x).norm()
    kl = (p * (log_p - log_q)).sum()
    assert (kl / size ** 2 - expected).abs() <= 1e-7 + size * (moved ** 3 + moved ** 2)


@given(small, st.integers(2, 6), st.integers(1, 8), seeds)
def test_the_kl_penalty_is_the_exact_second_derivative_of_the_kl_divergence(d_in, classes, tokens,
                                                                            seed):
    """A linear layer and a softmax over many tokens, the same prediction p for each (W0 = 0, any
    bias), so that E[δδᵀ ⊗ xxᵀ] is exactly S ⊗ C: with S the second moment of δ = p - onehot(y) over
    the labels y that the model itself draws, the mean KL of W0 + tΔW has a first derivative of 0 and a
    second one of twice the penalty, at t = 0. For one token this holds for any W0."""
    randn = normal(seed)
    X, b, P, G = randn(tokens, d_in), randn(classes), randn(classes, 2), randn(2, d_in)
    W0 = randn(classes, d_in) if tokens == 1 else torch.zeros(classes, d_in).double()
    p = torch.softmax(W0 @ X[0] + b, 0)
    deltas = p - eye(classes)  # one row for each label, drawn with probability p
    S = deltas.T @ (p[:, None] * deltas)
    t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    log_q = torch.log_softmax(X @ (W0 + t * P @ G).T + b, 1)
    kl = (p * (p.log() - log_q)).sum(1).mean()
    first, = torch.autograd.grad(kl, t, create_graph=True)
    second, = torch.autograd.grad(first, t)
    size = 1e-12 * (P.norm() * G.norm() * X.norm()) ** 2
    assert kl.abs() <= 1e-14 and first.abs() <= 1e-14 * P.norm() * G.norm() * X.norm()
    assert (second - 2 * kl_penalty(P, G, S, second_moment(X.T))).abs() <= size


@given(blocks(), st.just(0) | st.floats(1e-6, 10))
def test_a_models_penalty_is_mu_times_the_sum_over_its_layers(block, mu):
    """Zero at the start, since ΔW = 0; then that of ΔW = κ(BA - B0A0); 0 for a method without one."""
    W0, _, X, r, randn = block
    S, C = second_moment(randn(len(W0), 9)), second_moment(X)
    layers = [adapted(W0, *null_space_start(W0, C, r, 0.5), 0.5) for _ in range(2)]
    penalty = kl_term(mu, [(layer, *fisher(S, C)) for layer in layers])
    start = penalty(0)
    expected = 0
    with torch.no_grad():
        for layer in layers:
            layer.lora_A += randn(*layer.lora_A.shape)
            layer.lora_B += randn(*layer.lora_B.shape)
            dW = layer.to_linear(learned=True).weight - W0
            expected = expected + mu * (S @ dW @ C @ dW.T).trace() / 2
    size = mu * sum((torch.cat([layer.lora_A, layer.lora_A0]).norm()
                     * torch.cat([layer.lora_B, layer.lora_B0]).norm()) ** 2 for layer in layers)
    error = 1e-12 * size * S.norm() * C.norm()
    assert start.abs() <= error and (penalty(0) - expected).abs() <= error
    assert kl_term(mu, [])(0) == 0


@given(spd_pairs(), small, small, seeds)
def test_ewc_and_l2_sp_by_their_formulas(pair, d_out, k, seed):
    """EWC: ½ Σ F_ij ΔW_ij² with the diagonal F_ij = S_ii C_jj; L2-SP: a multiple of ‖ΔW‖², which is
    the mean of EWC's over the entries where ΔW is the same everywhere."""
    _, _, C = pair
    S = second_moment(normal(seed)(d_out, 9))
    P, G = normal(seed + 1)(d_out, k), normal(seed + 2)(k, len(C))
    F, dW = torch.outer(S.diagonal(), C.diagonal()), P @ G
    size = 1e-13 * P.norm() ** 2 * G.norm() ** 2 * S.norm() * C.norm()
    assert (kl_penalty(P, G, *diagonal(S, C)) - (F * dW ** 2).sum() / 2).abs() <= size
    assert (kl_penalty(P, G, *isotropic(S, C)) - F.mean() * dW.norm() ** 2 / 2).abs() <= size


# ------------------------------------------------------------------------------------------------
# Rehearsal

SAMPLES = torch.randint(0, 31, (9, 12), generator=torch.Generator().manual_seed(1)).tolist()


def rehearsal(loss, weight=1.0, model=None, rows=4, seed=0):
    return rehearsal_term(loss, weight, SAMPLES, rows, model or micro(), micro(), seed)


def with_lora(randn=None):
    """`micro()` with adapters, at their start or moved from there."""
    model = micro()
    for layer in add_lora(model, 3).values():
        layer.init_from(*kaiming_start(layer.weight, 3))
        with torch.no_grad():
            layer.lora_B += 0 if randn is None else randn(*layer.lora_B.shape).float()
    return model


@pytest.fixture
def bytes_of_31(monkeypatch):
    """<|endoftext|> is the last of `micro()`'s 31 tokens; and in float32 on any CPU."""
    monkeypatch.setattr(machine, "chosen", "float32")
    monkeypatch.setattr(tasks, "get_encoding", lambda name: argparse.Namespace(eot_token=30))


def test_distillation_starts_without_loss_or_gradient(bytes_of_31):
    """Where the model is the base model, KL is zero, and so is its gradient; elsewhere neither is, and
    KL is positive."""
    for model, moved in (with_lora(), False), (with_lora(normal(0)), True):
        loss = rehearsal(distill_loss, model=model)(0)
        loss.backward()
        gradient = sum(p.grad.norm() for n, p in model.named_parameters() if p.grad is not None)
        assert (loss > 1e-3) == moved and (gradient > 1e-3) == moved
        assert moved or abs(loss) < 1e-5


def test_distillation_is_the_kl_from_the_base_model(bytes_of_31):
    """Σ p (log p - log q) per token, over all tokens of the rows that have one before them."""
    model, base = with_lora(normal(0)), micro()
    x, y = rows_of(5, rows=3)
    log_p, log_q = (torch.log_softmax(m(x), -1)[y != -100] for m in (base, model))
    expected = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    found = rehearsal(distill_loss, model=model, rows=3)(5)
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)


def rows_of(step, **options):
    """The batch of a step."""
    seen = []
    rehearsal(lambda model, base, x, y: seen.append((x, y)) or 0, **options)(step)
    return seen[0]


def test_replay_has_the_share_of_the_loss_that_its_weight_says(bytes_of_31):
    """weight × the samples' mean cross-entropy: beside a task loss of the same size, the share is
    weight / (1 + weight), whatever the number of rows and tokens."""
    once, thrice = (rehearsal(replay_loss, weight)(2).item() for weight in (1, 3))
    assert thrice == pytest.approx(3 * once, rel=1e-6)
    x, y = rows_of(2)
    expected = torch.nn.functional.cross_entropy(micro()(x).flatten(0, 1), y.flatten())
    assert once == pytest.approx(expected.item(), rel=1e-5)
    assert once / (once + expected.item()) == pytest.approx(1 / 2, rel=1e-5)


def test_rehearsed_rows_depend_on_the_step_and_the_seed_alone(bytes_of_31):
    """Whole samples after <|endoftext|>, every token of which is a target."""
    (x, y), (again, _), (other, _) = (rows_of(step) for step in (3, 3, 4))
    assert torch.equal(x, again) and not torch.equal(x, other)
    assert not torch.equal(x, rows_of(3, seed=1)[0])
    for inputs, targets in zip(x.tolist(), y.tolist()):
        assert inputs[0] == 30 and targets in SAMPLES and inputs[1:] == targets[:-1]


# ------------------------------------------------------------------------------------------------
# Pulling back

class OneLayer:
    """An adapter, A and B, with random moments and SAdam that is pulled back."""

    def __init__(self, block, lr, strength):
        W0, _, X, self.r, randn = block
        self.m = solve_layer(second_moment(X), second_moment(randn(len(X), 20)), 0.1)
        layer = adapted(W0, randn(self.r, len(X)), randn(len(W0), self.r))
        self.V, self.gate = sadam(self.m, 1.0, 0.3)
        self.A, self.B = layer.lora_A, layer.lora_B
        self.start = self.A.detach().clone(), self.B.detach().clone()
        self.optimizer = PullBack([self.A, self.B], {self.A: (self.V, self.gate)}, lr=lr)
        self.optimizer.strength = strength

    def step(self, gradient_A, gradient_B):
        self.A.grad, self.B.grad = gradient_A.clone(), gradient_B.clone()
        self.optimizer.step()

    def changes(self):
        """(ΔA, ΔB)."""
        return self.A - self.start[0], self.B - self.start[1]


@given(block=blocks())
def test_pulling_back_by_the_formula(block):
    """A step of SAdam, then ΔB loses a share, here 1/4, and ΔA that share times 1 - s̃ in the basis'
    coordinates; in H's inner product, so ΔA's forgetting penalty falls."""
    model, randn = OneLayer(block, lr=0.5, strength=0.5), normal(5)
    A, B = (torch.nn.Parameter(start.clone()) for start in model.start)
    other, V, H = SAdam([A, B], {A: (model.V, model.gate)}, lr=0.5), model.V, model.m["H"]
    for _ in range(3):
        A.grad, B.grad = randn(*A.shape), randn(*B.shape)
        model.step(A.grad, B.grad)
        other.step()
        with torch.no_grad():
            dA, dB = A - model.start[0], B - model.start[1]
            A -= (dA @ H @ V * (1 - model.gate)) @ V.T / 4  # V⁻ᵀ = HV
            B -= dB / 4
            bound = 1e-8 * (1 + dA.norm() * H.norm() * V.norm() ** 2)
            found, found_B = model.changes()
            assert (found - (A - model.start[0])).norm() <= bound
            assert close(found_B, 0.75 * dB, 1e-9)
            assert forgetting_penalty(found, H) <= forgetting_penalty(dA, H) * (1 + 1e-9) + bound


@settings(max_examples=20)
@given(block=blocks())
def test_what_is_pulled_back_stays_bounded(block):
    """Adam's steps all in one direction, the worst case: each number of ΔB approaches η (1 - share) /
    share, below 1 / strength, and a coordinate of ΔA stays below that times s̃ / (1 - s̃)."""
    model = OneLayer(block, lr=0.1, strength=2.5)  # share 1/4, bound 0.4
    gradient = normal(6)(*model.A.shape) @ torch.linalg.inv(model.V)  # no coordinate of it is 0
    for _ in range(60):
        model.step(gradient, torch.ones_like(model.B))
    dA, dB = model.changes()
    assert torch.allclose(dB, torch.full_like(dB, -0.3), atol=1e-3)
    bound = 0.4 * model.gate / (1 - model.gate)
    error = 1e-6 * (1 + dA.norm() * model.m["H"].norm() * model.V.norm())
    assert ((dA @ model.m["H"] @ model.V).abs() <= bound + error).all()


def test_without_strength_nothing_is_pulled_back():
    A, again = (torch.nn.Parameter(normal(0)(3, 4)) for _ in range(2))
    V, gate = invertible(4, 0), torch.rand(4).double()
    for p, kind in (A, PullBack), (again, SAdam):
        optimizer = kind([p], {p: (V, gate)}, lr=0.1)
        optimizer.strength = 0
        for seed in range(5):
            p.grad = normal(seed)(3, 4)
            optimizer.step()
    assert close(A, again, 1e-9)


# ------------------------------------------------------------------------------------------------
# The table

@given(spd_pairs(), st.floats(1e-3, 1e3), st.floats(0, 0.999))
def test_truncated_steps_use_the_leading_half_of_foloras(pair, lam, s_min):
    m = solve_layer(pair[1], pair[0])
    V, gate = sadam(m, lam, s_min)
    assert torch.equal(V, m["basis"])
    assert torch.equal(gate, spectral_gate(m["eigvals"], lam, s_min))
    half, leading = truncated(m, lam, s_min)
    assert half.shape == (len(V), len(V) // 2) and torch.equal(half, V[:, :len(V) // 2])
    assert torch.equal(leading, gate[:len(V) // 2])


def test_lora_and_folora_in_the_table():
    """LoRA takes no calibration and AdamW's steps, FoLoRA both a calibration and SAdam's."""
    lora, folora = METHODS["lora"], METHODS["folora"]
    assert not lora.needs_calibration and lora.steps is None
    assert folora.needs_calibration and folora.steps is sadam


def test_each_method_starts_where_its_name_says():
    W0, C_pre, C_task = normal(0)(3, 4), torch.diag(f64([1.0, 0.0, 2.0, 3.0])), normal(1)(4, 4)
    m = {"C_pre": C_pre, "C_task": C_task @ C_task.T, "basis": invertible(4, 0),
         "eigvals": torch.ones(4)}
    for name, start, *moments in (
            ("pissa", pissa_start), ("milora", milora_start), ("corda", corda_start, "C_pre"),
            ("lora-null", lora_null_start, "C_pre"), ("lora-null-v2", lora_null_start, "C_pre"),
            ("sc-lora", sc_lora_start, "C_pre", "C_task"), ("folora", null_space_start, "C_pre"),
            ("folora-leading", leading_start, "basis")):
        expected = start(W0, *(m[key] for key in moments), 2, 4.0)
        pair = start_of(name, W0, m, 2, 4.0)
        assert all(torch.equal(a, b) for a, b in zip(pair, expected, strict=True))


@pytest.mark.parametrize("name", WITH_VARIANTS)
def test_a_method_asks_for_a_calibration_exactly_if_it_uses_one(name):
    """Its start and steps are called without moments: those of a method that says it needs none work,
    and of one that says it does, at least one fails. A penalty, and replay, use the calibration's other
    parts."""
    method, uses_moments = WITH_VARIANTS[name], False
    try:
        method.start and method.start(eye(3), r=1, scale=1.0, generator=None)
        method.steps and method.steps({}, 1.0, 0.3)
    except (TypeError, KeyError):  # an argument, or an entry, that only a calibration gives
        uses_moments = True
    assert method.needs_moments == uses_moments
    others = method.rehearsal is not None or method.penalty is not None
    assert method.needs_calibration == (uses_moments or others)


# ------------------------------------------------------------------------------------------------
# Every method on a model, variants included

CONFIG = GPTConfig(block_size=24, vocab_size=31, n_layer=2, n_head=2, n_embd=16)
every_method = pytest.mark.parametrize("name", WITH_VARIANTS)


def micro():
    """A model whose weights are large enough for its output to depend on everything."""
    torch.manual_seed(0)
    model = GPT(CONFIG)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.3)
    return model.eval()


@functools.cache
def layer_moments():
    """{layer: {C_pre, C_task}} of `micro()` on random rows."""
    generator = torch.Generator().manual_seed(0)
    texts = torch.randint(0, 31, (2, 40, 12), generator=generator).tolist()
    C_pre, C_task = (second_moments(micro(), rows) for rows in texts)
    return {name: {"C_pre": C_pre[name], "C_task": C_task[name]} for name in C_pre}


def started(name):
    """(model ready for the method, SAdam's bases and gates, {name: trained parameter})."""
    model, method = micro(), WITH_VARIANTS[name]
    args = argparse.Namespace(method=name, rank=3, scale=0.5, tau=0.01, lam=1.0, s_min=0.3)
    if method.protected:  # the 16 directions that it protects are all that these layers have
        protected = functools.partial(oplora_protected, k=4)
        method = dataclasses.replace(method, protected=protected)
    layers = add_lora(model, args.rank, args.scale) if method.start else block_linears(model)
    if not method.start:
        model.requires_grad_(method.steps is None)
    spectral, generator = {}, torch.Generator().manual_seed(0)
    for layer_name, layer in layers.items():
        moments = layer_moments()[layer_name] if method.needs_calibration else None
        spectral |= train.start_layer(layer_name, layer, method, moments, args, generator)
    return model, spectral, {n: p for n, p in model.named_parameters() if p.requires_grad}


@every_method
def test_every_method_starts_as_the_foundation(name):
    """Before the first step the logits are the foundation's, and merged weights are its weights."""
    model = started(name)[0]
    x = torch.randint(0, 31, (4, 20), generator=torch.Generator().manual_seed(1))
    assert torch.allclose(model(x), micro()(x), atol=1e-3)
    merge_lora(model)
    pairs = zip(model.state_dict().values(), micro().state_dict().values(), strict=True)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in pairs)


@every_method
def test_every_method_trains_what_it_says(name):
    """A and B, or B alone, or without an adapter every parameter, or with SAdam every matrix of the
    blocks; with a basis and a gate of its width for each A, or each matrix."""
    method, (model, spectral, trained) = WITH_VARIANTS[name], started(name)
    matrices = {f"{layer}.weight" for layer in block_linears(micro())}
    factors = {n for n, _ in model.named_parameters() if n.endswith((".lora_A", ".lora_B"))}
    if name == "full":
        assert trained.keys() == {n for n, _ in micro().named_parameters()}
    elif name.startswith("sadam-full"):
        assert trained.keys() == matrices
    elif name == "lora-null-v2":
        assert trained.keys() == {n for n in factors if n.endswith("lora_B")}
    else:
        assert trained.keys() == factors and len(factors) == 2 * len(matrices)
    stepped = {n for n, p in trained.items() if p in spectral}
    assert len(stepped) == len(spectral)
    with_basis = {n for n in trained if not n.endswith("lora_B")}
    assert stepped == (with_basis if method.steps else set())
    for p, (V, gate) in spectral.items():
        width = p.shape[1] // 2 if name.endswith("-truncated") else p.shape[1]
        assert V.shape == (p.shape[1], width) and gate.shape == (width,)
        assert (gate > 0).all() and (gate <= 1).all()


@every_method
def test_every_method_moves_what_it_trains_and_nothing_else(name):
    """Two steps: each trained parameter moved, all others are what they were, to the bit."""
    model, spectral, trained = started(name)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    optimizer = SAdam(trained.values(), spectral, lr=1e-3)
    x = torch.arange(24)[None]
    for _ in range(2):  # B0 = 0 gives A its first gradient in the second
        optimizer.zero_grad()
        train.loss_of(model, x, (x + 1) % 31).backward()
        optimizer.step()
    moved = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    assert moved - {"lm_head.weight"} == trained.keys()  # tied to the embedding


def test_default_rates_fall_with_an_adapters_rank_and_a_models_width():
    """The table's own at rank 8 on the small foundation and narrower ones; full weights have no
    rank. A rank of 0 is refused elsewhere. Pulling back takes back the same share at each width."""
    folora, full = METHODS["folora"], METHODS["full"]
    assert default_rate(folora, 8, 16) == folora.lr and default_rate(folora, 32, 96) == 2e-3
    assert default_rate(folora, 32, 768) == 2.5e-4 and default_rate(full, 8, 240) == 1e-4
    assert pull_strength(5, 32, 96) == 5 and pull_strength(5, 8, 16) == 1.25
    assert pull_strength(10, 32, 576) == 60
    rates = [default_rate(folora, rank, 96) for rank in (0, 1, 2, 4, 8, 16, 32, 64)]
    assert rates[0] == rates[1] and rates[1:] == sorted(rates[1:], reverse=True)
    assert {default_rate(full, rank, 96) for rank in (0, 8, 32)} == {full.lr}

"""All methods in one table: how each differs from LoRA in where it starts, how it steps, and what
it adds to the loss. Singular value decompositions are in float64."""
import copy
import math
import random
from dataclasses import dataclass
from typing import Callable

import torch
from torch.nn import functional as F

import tasks
from extras.grouped import GroupedSAdam
from extras.machine import autocast
from folora import damped, null_space_start, projection_start, spectral_gate
from model import LoRALinear


# ------------------------------------------------------------------------------------------------
# Other starts, called like those in folora.py: keywords in, (A0 (r, d_in), B0 (d_out, r)) out

def kaiming_start(W0, r, generator=None, **_):
    """LoRA (arXiv 2106.09685): A0 Kaiming-uniform (a = √5, so bound 1/√d_in), B0 = 0."""
    d_out, d_in = W0.shape
    A = (torch.rand(r, d_in, generator=generator).to(W0) * 2 - 1) / math.sqrt(d_in)
    return A, W0.new_zeros(d_out, r)


def svd(W, chosen=slice(None)):
    """(U, S descending, Vᵀ) of W, in float64: all its components, or those chosen."""
    U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    return U[:, chosen], S[chosen], Vh[chosen]


def even_split(W0, U, S, Vh, scale):
    """B0 = U√S/κ, A0 = √S Vᵀ: κB0A0 = USVᵀ, the chosen part of the decomposed matrix."""
    return (S.sqrt()[:, None] * Vh).to(W0), (U * S.sqrt() / scale).to(W0)


def leading_start(W0, basis, r, scale=1.0, **_):
    """Ours: the span of the r generalized eigenvectors of highest γ, most utility per penalty."""
    return projection_start(W0, torch.linalg.qr(basis[:, :r]).Q, scale)


def pissa_start(W0, r, scale=1.0, **_):
    """PiSSA (arXiv 2404.02948): κB0A0 = the r largest singular components of W0."""
    return even_split(W0, *svd(W0, slice(r)), scale)


def milora_start(W0, r, scale=1.0, **_):
    """MiLoRA (arXiv 2406.09044): κB0A0 = the r smallest singular components of W0."""
    return even_split(W0, *svd(W0, slice(-r, None)), scale)


def corda_start(W0, C_pre, r, scale=1.0, damping=0.01, **_):
    """CorDA, knowledge-preserved (arXiv 2406.05223): κB0A0 = the r smallest components of W0 C,
    times C⁻¹, with C = C_pre + damping · mean diag(C_pre) · I. The unit of C_pre decides how B0 and
    A0 share them."""
    C = damped(C_pre, damping * C_pre.diagonal().mean())
    U, S, Vh = svd(W0.double() @ C, slice(-r, None))
    return even_split(W0, U, S, torch.linalg.solve(C, Vh.T).T, scale)  # C is symmetric


def lora_null_start(W0, C_pre, r, scale=1.0, **_):
    """LoRA-Null (arXiv 2503.02659): κB0A0 = W0 U⊥U⊥ᵀ, U⊥ the r eigenvectors of C_pre with the
    smallest eigenvalues: `null_space_start`, split evenly between B0 and A0."""
    A0, B0 = null_space_start(W0, C_pre, r)
    U, S, Vh = svd(B0)
    return even_split(W0, U, S, Vh @ A0.double(), scale)


def sc_lora_start(W0, C_pre, C_task, r, scale=1.0, beta=0.5, **_):
    """SC-LoRA (arXiv 2505.23724): B0 = Q/κ, A0 = QᵀW0, Q the r leading eigenvectors of the outputs'
    (1 - β) S_task - β S_pre, where outputs W0 x have the second moment S = W0 C W0ᵀ."""
    W = W0.double()
    Q = torch.linalg.eigh(W @ ((1 - beta) * C_task - beta * C_pre) @ W.T)[1][:, -r:]  # ascending
    return (Q.T @ W).to(W0), (Q / scale).to(W0)


def oplora_protected(W0, k=16):
    """OPLoRA (arXiv 2510.13003): (U_k (d_out, k), V_k (d_in, k)), the k leading singular vectors of
    W0, which the layer may not use."""
    U, _, Vh = svd(W0, slice(k))
    return U.to(W0), Vh.T.to(W0)


class ProtectedLinear(LoRALinear):
    """An adapter that learns ΔW = (I - UUᵀ) BA (I - VVᵀ), orthonormal columns U, V."""

    def factors(self):
        A, B = super().factors()
        return A - (A @ self.lora_V) @ self.lora_V.T, B - self.lora_U @ (self.lora_U.T @ B)


def protect(layer, U, V):
    """Make an adapter that starts with B0 = 0 a ProtectedLinear."""
    layer.__class__ = ProtectedLinear
    layer.register_buffer("lora_U", U), layer.register_buffer("lora_V", V)


# ------------------------------------------------------------------------------------------------
# Steps in a basis: m is the layer's `solve_layer`

def sadam(m, lam, s_min):
    """FoLoRA's steps: the generalized eigenvectors and the gate."""
    return m["basis"], spectral_gate(m["eigvals"], lam, s_min)


def truncated(m, lam, s_min):
    """The leading half of the basis (App. D): the other directions never move."""
    basis, gate = sadam(m, lam, s_min)
    return basis[:, :len(gate) // 2], gate[:len(gate) // 2]


# ------------------------------------------------------------------------------------------------
# Added to the loss: a penalty on ΔW

def kl_penalty(P, G, S, C):
    """½ Tr(S ΔW C ΔWᵀ) of ΔW = PG, P (d_out, k), G (k, d_in), in O(k d²): a scalar.

    Eq. 6 asks how far outputs move. With S = E[δδᵀ], δ the loss's gradient at these outputs, it
    also asks how much the model depends on them. On the model's own samples C ⊗ S is its Fisher
    information in the K-FAC approximation (arXiv 1503.05671), and the sum over layers estimates the
    KL divergence of the adapted from the base model in nats per token, to second order. As a
    penalty against forgetting: Ritter et al., arXiv 1805.07810.
    """
    return ((P.T @ S @ P) * (G @ C @ G.T)).sum() / 2


def fisher(S_pre, C_pre):
    """K-FAC's own S and C, unchanged."""
    return S_pre, C_pre


def diagonal(S_pre, C_pre):
    """EWC (arXiv 1612.00796): the diagonal alone of the same K-FAC estimate of the Fisher."""
    return S_pre.diagonal().diag(), C_pre.diagonal().diag()


def isotropic(S_pre, C_pre):
    """L2-SP (arXiv 1802.01483): a multiple of ‖ΔW‖², scaled so that S and C keep their means."""
    return tuple(M.diagonal().mean() * torch.eye(len(M)).to(M) for M in (S_pre, C_pre))


def kl_term(mu, layers):
    """step -> μ × estimated KL from the base model (nats/token); layers: [(adapter, S, C)]."""
    return lambda step: mu * sum(kl_penalty(*layer.delta_factors(), S, C) for layer, S, C in layers)


# ------------------------------------------------------------------------------------------------
# Added to the loss: base-model samples, so that the task's share of it is 1 / (1 + weight)

def replay_loss(model, base, x, y):
    """Self-synthesized rehearsal (arXiv 2403.01244): cross-entropy of the samples' own tokens, in
    nats per token."""
    counted = y != -100
    return F.cross_entropy(model(x, only=counted).float(), y[counted])


def distill_loss(model, base, x, y):
    """Learning without Forgetting (arXiv 1606.09282): KL(base ‖ model) in nats per token of the
    samples. Its gradient is zero at the start."""
    with torch.no_grad():
        target = base(x, only=y != -100).float().log_softmax(-1)
    found = model(x, only=y != -100).float().log_softmax(-1)
    return F.kl_div(found, target, log_target=True, reduction="batchmean")


def unpadded(samples):
    """Token lists of samples (N, longest) padded with -1, as calibrate.py writes them."""
    return [[t for t in row if t >= 0] for row in samples.tolist()]


def rehearsal_term(loss, weight, samples, rows, model, base, seed):
    """step -> weight × loss (nats/token) on rows of base-model samples (token lists without
    <|endoftext|>), drawn by the step alone. base: the model as it started, for distill_loss."""
    eot, most = tasks.get_encoding(model.config.encoding).eot_token, model.config.block_size + 1

    def term(step):
        chosen = random.Random(f"rehearse {seed} {step}").choices(samples, k=rows)
        targets = [([eot, *tokens][:most], 1) for tokens in chosen]  # every token is one
        x, y = (t.to(model.lm_head.weight.device) for t in tasks.response_batch(targets))
        with autocast(x.device):
            return weight * loss(model, base, x, y)
    return term


def added_loss(method, model, layers, calibration, args):
    """step -> what the method adds to the task's loss. The model, as it starts, is still the base
    model; layers is {name: LoRALinear}."""
    penalised = []
    for name, layer in layers.items() if method.penalty else ():
        S, C = (calibration["layers"][name][key].to(layer.weight) for key in ("S_pre", "C_pre"))
        penalised.append((layer, *method.penalty(S, C)))
    penalty = kl_term(args.mu, penalised)
    if not method.rehearsal:
        return penalty
    samples = unpadded(calibration["samples"])
    base = copy.deepcopy(model).requires_grad_(False) if method.rehearsal is distill_loss else None
    rehearsal = rehearsal_term(method.rehearsal, args.rehearsal, samples, max(1, args.batch // 4),
                               model, base, args.seed)
    return lambda step: penalty(step) + rehearsal(step)


# ------------------------------------------------------------------------------------------------
# After each step

class PullBack(GroupedSAdam):
    """Ours: SAdam with decoupled decay towards the start. After each step B's change ΔB shrinks by
    the share η · strength, and A's change, in the basis, by that times 1 - gate: least where the
    gate is open. Adam's steps are at most about η, so the entries of ΔB stay below about
    1 / strength. `strength` is an attribute, to be set before the first step."""

    def gated(self, step, gate, state, lr):
        learned = state.setdefault("learned", torch.zeros_like(step))  # ΔB, or ΔA in the basis
        share = lr * self.strength * (1 if gate is None else 1 - gate)
        move = (learned + super().gated(step, gate, state, lr)) * (1 - share) - learned
        learned += move
        return move


# ------------------------------------------------------------------------------------------------
# The table

@dataclass(frozen=True)
class Method:
    start: Callable | None = kaiming_start     # None: the full weights W0 are trained
    steps: Callable | None = None              # (m, lam, s_min) -> (basis, gate); None: Adam's
    penalty: Callable | None = None            # (S_pre, C_pre) -> (S, C) of the KL penalty
    rehearsal: Callable | None = None          # replay_loss or distill_loss
    optimizer: type = GroupedSAdam             # or PullBack
    train_A: bool = True
    protected: Callable | None = None          # W0 -> (U_k, V_k), directions ΔW may not use
    needs_moments: bool = False                # start or steps use the layer's `solve_layer`
    lr: float = 5.7e-3                         # default rate at rank 8, see `default_rate`
    source: str = "ours"

    @property
    def needs_calibration(self):
        """For its start or steps, its penalty, or the samples it rehearses."""
        return bool(self.needs_moments or self.penalty or self.rehearsal)


WIDTH = 96  # of the models on which rates and strengths were found
# Default rates: in sweeps of 200 steps at rank 8 each reached 80 % of LoRA's best validation score
# on all three tasks, where any rate did (otherwise 8e-3); here √2 smaller, as there are 400 steps.
# How folora-pull-back's was set: docs/results.md.
METHODS = {
    "full": Method(None, lr=2.5e-4, source="-"),
    "lora": Method(source="2106.09685"),
    "pissa": Method(pissa_start, lr=2e-3, source="2404.02948"),
    "milora": Method(milora_start, lr=2.8e-3, source="2406.09044"),
    "corda": Method(corda_start, needs_moments=True, lr=4e-3, source="2406.05223"),
    "lora-null": Method(lora_null_start, needs_moments=True, source="2503.02659"),
    "lora-null-v2": Method(lora_null_start, train_A=False, needs_moments=True, lr=4.5e-2,
                           source="2503.02659"),
    "sc-lora": Method(sc_lora_start, needs_moments=True, lr=2e-3, source="2505.23724"),
    "oplora": Method(protected=oplora_protected, source="2510.13003"),
    "l2-sp": Method(penalty=isotropic, source="1802.01483"),
    "ewc": Method(penalty=diagonal, lr=1.1e-2, source="1612.00796"),
    "distill": Method(rehearsal=distill_loss, lr=1.1e-2, source="1606.09282"),
    "replay": Method(rehearsal=replay_loss, lr=1.1e-2, source="2403.01244"),
    "folora": Method(null_space_start, sadam, needs_moments=True, source="the paper"),
    "folora-truncated": Method(null_space_start, truncated, needs_moments=True, lr=1.1e-2,
                               source="the paper, App. D"),
    "sadam-full": Method(None, sadam, needs_moments=True, lr=5e-4, source="the paper, App. D"),
    "sadam-full-truncated": Method(None, truncated, needs_moments=True, lr=5e-4,
                                   source="both of App. D"),
    "folora-pull-back": Method(null_space_start, sadam, optimizer=PullBack, needs_moments=True,
                               lr=2.3e-2),
    "folora-leading": Method(leading_start, sadam, needs_moments=True, lr=8e-3),
    "folora-replay": Method(null_space_start, sadam, rehearsal=replay_loss, needs_moments=True,
                            lr=1.1e-2),
    "lora-kl": Method(penalty=fisher, lr=1.1e-2, source="1805.07810"),
    "lora-kl-leading": Method(leading_start, penalty=fisher, needs_moments=True, lr=1.1e-2),
    "lora-kl-leading-replay": Method(leading_start, penalty=fisher, rehearsal=replay_loss,
                                     needs_moments=True),
}


def default_rate(method, rank, width):
    """The method's own rate, found at rank 8 on models WIDTH wide. Adapters of higher rank learn at
    lower rates: in the sweeps of docs/results.md by rank^-¾ for FoLoRA, by rank^-½ for LoRA; all
    take ¾ here. So do wider models, by 1 / width: docs/pretrained.md."""
    by_rank = (8 / max(1, rank)) ** 0.75 if method.start else 1
    return float(f"{method.lr * by_rank * min(1, WIDTH / width):.2g}")


def pull_strength(pull, rank, width):
    """PullBack's strength, `pull` at rank 32 on models WIDTH wide. Higher ranks need more of it;
    on wider models, where rates are lower, it takes back the same share a step."""
    return pull * rank / 32 * max(1, width / WIDTH)

"""FoLoRA, the method: low-rank fine-tuning that steers its updates away from what the base model uses.

Foundation-Preserving LoRA, arXiv 2606.00132; equation numbers are the paper's.
Pure functions, then one optimizer.

A linear layer W0 (d_out, d_in) reads inputs x (d_in,). Text that the base model wrote itself says how
strongly it uses each input direction, C_pre = E[x xᵀ]; task queries say how strongly the task uses it,
C_task. Starting where A0 x ≈ 0 on the base model's text (the null-space start), the layer's output moves
there by B ΔA x, so the rows of ΔA should lie where C_task is large and C_pre is small:

    forgetting penalty   R(ΔA) = Tr(ΔA H ΔAᵀ),  H = C_pre + τI              (Eq. 6)
    task utility         U(ΔA) = Tr(ΔA C_task ΔAᵀ)
    their trade-off      C_task v = γ H v,      VᵀHV = I, VᵀC_task V = diag(γ)   (Eq. 17)

γ is a direction's utility per unit of penalty. Adam runs in the coordinates V, and each coordinate's *step*
is multiplied by the gate γ/(γ + λ), at least s_min (Eq. 22), so that cheap, useful directions move freely and
costly ones little. At the end stand the methods that FoLoRA is compared with, and ours, `folora-kl`: it
starts in the leading directions and puts a penalty on ΔW into the loss instead of gating the steps.

Units: one scalar a layer, tr(C_pre)/d_in, divides both moments (`normalise`). γ does not change; τ and the
learning rate become free of the activations' units, and λ = 1 is the break-even: a direction as active on
the task as on the base model's own text.
"""
import inspect
import math
from dataclasses import dataclass
from typing import Callable

import torch


# ------------------------------------------------------------------------------------------------------------
# Measuring: how strongly is each input direction used?

class SecondMoment:
    """Streaming uncentred second moment E[x xᵀ] of the tokens added so far, summed in float64.

    Each batch's product is taken in the dtype of x and the sum over batches in float64, so that the rounding
    error does not grow with the number of batches.
    """

    def __init__(self, d_in, device="cpu"):
        self.total = torch.zeros(d_in, d_in, dtype=torch.float64, device=device)
        self.tokens = torch.zeros((), dtype=torch.long, device=device)

    def add(self, x, mask=None):
        """x (..., d_in); mask (...) is False on padding, which never enters."""
        x = x.reshape(-1, x.shape[-1]) if mask is None else x[mask]
        self.total += (x.T @ x).to(self.total)
        self.tokens += x.shape[0]

    def mean(self):
        """(d_in, d_in) float64, per token. ValueError when it is empty or not finite."""
        if not self.tokens:
            raise ValueError("second moment of no tokens; give at least one text")
        if not torch.isfinite(self.total).all():
            raise ValueError("second moment is not finite; the activations overflowed or hold NaN")
        return self.total / self.tokens


def normalise(C_pre, C_task):
    """Divide both moments by tr(C_pre)/d_in, the mean square of inputs on pretraining text: dimensionless."""
    mean_square = C_pre.diagonal().mean()
    if not 0 < mean_square < math.inf:
        raise ValueError(f"C_pre has a mean diagonal of {mean_square}; a layer whose input is zero on every "
                         "sample, or not finite, cannot be calibrated")
    return C_pre / mean_square, C_task / mean_square


# ------------------------------------------------------------------------------------------------------------
# The generalized eigenproblem: utility against penalty

def forgetting_penalty(dA, H):
    """R(ΔA) = Tr(ΔA H ΔAᵀ) for dA (r, d_in), H (d_in, d_in): a scalar (Eq. 6)."""
    return ((dA @ H) * dA).sum()


def two_sided_penalty(P, G, S, C):
    """½ Tr(S ΔW C ΔWᵀ) of ΔW = PG, P (d_out, k), G (k, d_in), in O(k d²): a scalar.

    Eq. 6 asks how far outputs move. With S = E[δδᵀ] of the loss's gradients δ at these outputs it is also
    asked how much the model depends on them. On the model's own text C ⊗ S is its Fisher information in
    K-FAC's approximation (arXiv 1503.05671), and this is the KL divergence of the adapted model from the
    base model in nats per token, to second order and layer by layer. As a penalty against forgetting: Ritter
    et al., arXiv 1805.07810.
    """
    return ((P.T @ S @ P) * (G @ C @ G.T)).sum() / 2


def task_utility(dA, C_task):
    """U(ΔA) = Tr(ΔA C_task ΔAᵀ) for dA (r, d_in), C_task (d_in, d_in): a scalar."""
    return ((dA @ C_task) * dA).sum()


def rayleigh_quotient(v, C_task, H):
    """ρ(v) = vᵀC_task v / vᵀHv, the utility per unit penalty of each direction in v (..., d_in) -> (...)."""
    return ((v @ C_task) * v).sum(-1) / ((v @ H) * v).sum(-1)


def damped(C_pre, tau):
    """H = C_pre + τI (Eq. 6), for normalised C_pre: τ is relative to the mean square of the layer's input."""
    if not 0 < tau < math.inf:
        raise ValueError(f"tau is {tau}; the damping must be a positive number, for example 0.01")
    return C_pre + tau * torch.eye(len(C_pre), dtype=C_pre.dtype, device=C_pre.device)


def whiten(C, L):
    """L⁻¹ C L⁻ᵀ for symmetric C and lower triangular L, by two triangular solves; exactly symmetric."""
    half = torch.linalg.solve_triangular(L, C, upper=False)
    M = torch.linalg.solve_triangular(L, half.T, upper=False)
    return (M + M.T) / 2


def generalized_eigh(C_task, H):
    """Solve C_task v = γ H v for symmetric (d, d) C_task and H, H positive definite, in float64 (Eq. 17).

    With H = LLᵀ the problem is the symmetric one of M = L⁻¹ C_task L⁻ᵀ = QΓQᵀ, and V = L⁻ᵀQ. (The paper
    whitens with H^-½: the same eigenvectors up to sign, and neither Adam nor the gate sees the sign.)

    Returns (eigvals (d,) descending, basis (d, d) with the eigenvectors as columns):
    VᵀHV = I, VᵀC_task V = diag(γ).
    V is *not* orthogonal: a gradient goes into the basis with V, a parameter with V⁻¹ = VᵀH.
    Rounding errs by d eps cond(H) in VᵀHV. ValueError says which τ would do where that is more than 1 %.
    """
    C_task, H = C_task.double(), H.double()
    for name, C in ("C_task", C_task), ("H", H):
        if C.dim() != 2 or C.shape != H.T.shape:
            raise ValueError(f"{name} has shape {tuple(C.shape)}; "
                             "C_task and H must be square and of one size")
        if not torch.isfinite(C).all():
            raise ValueError(f"{name} holds NaN or infinity")
    L, failed = torch.linalg.cholesky_ex(H)
    if not failed:
        M = whiten(C_task, L)
        if not torch.isfinite(M).all():
            raise ValueError("C_task is so much larger than H that γ overflows; use a larger tau")
        eigvals, Q = torch.linalg.eigh(M)
        basis = torch.linalg.solve_triangular(L.T, Q, upper=True)
        failed = not (basis.T @ H @ basis - torch.eye(len(H)).to(H)).abs().max() <= 0.01
    if failed:
        e = torch.linalg.eigvalsh(H)
        more = 200 * len(H) * torch.finfo(H.dtype).eps * e.abs().max() - e[0].clamp(max=0)
        raise ValueError("H is not positive definite; use a larger tau (H = C_pre + tau I): "
                         f"{more:.2g} more will do")
    return eigvals.flip(0), basis.flip(1)


def solve_layer(C_pre, C_task, tau=0.01):
    """A layer's directions from its raw second moments (d_in, d_in): the normalised C_pre and C_task,
    H = C_pre + τI, eigvals (d_in,) and basis (d_in, d_in), all float64."""
    C_pre, C_task = normalise(C_pre.double(), C_task.double())
    H = damped(C_pre, tau)
    eigvals, basis = generalized_eigh(C_task, H)
    return {"C_pre": C_pre, "C_task": C_task, "H": H, "eigvals": eigvals, "basis": basis}


def spectral_gate(eigvals, lam=1.0, s_min=0.3):
    """s̃ = max(γ/(γ + λ), s_min) in [s_min, 1]: how much of Adam's step each direction takes (Eq. 22)."""
    if not 0 < lam < math.inf:
        raise ValueError(f"lam is {lam}; λ must be a positive number, "
                         "1 is the break-even of utility and penalty")
    if not 0 <= s_min <= 1:
        raise ValueError(f"s_min is {s_min}; the smallest gate must lie in [0, 1]")
    eigvals = eigvals.clamp(min=0)  # C_task is positive semidefinite: what is negative is rounding
    return (eigvals / (eigvals + lam)).clamp(min=s_min)


# ------------------------------------------------------------------------------------------------------------
# Where to start. Each start returns A0 (r, d_in), B0 (d_out, r); the layer then freezes
# W_res = W0 - κB0A0, so that it begins as exactly the function it was. Called by keywords, it takes what it
# needs and lets the others' be.

def check_rank(r, W0):
    if not 1 <= r <= min(W0.shape):
        raise ValueError(f"rank is {r}; a layer of {tuple(W0.shape)} takes 1 to {min(W0.shape)}")


def kaiming_start(W0, r, generator=None, **_):
    """LoRA's: A0 Kaiming-uniform (a = √5, so bound 1/√d_in), B0 = 0."""
    check_rank(r, W0)
    d_out, d_in = W0.shape
    A = (torch.rand(r, d_in, generator=generator).to(W0) * 2 - 1) / math.sqrt(d_in)
    return A, W0.new_zeros(d_out, r)


def projection_start(W0, U, scale=1.0):
    """A0 = Uᵀ, B0 = W0 U/κ for orthonormal columns U (d_in, r): κB0A0 is W0 restricted to the span of U."""
    return U.T.to(W0).contiguous(), (W0 @ U.to(W0)) / scale


def null_space_start(W0, C_pre, r, scale=1.0, **_):
    """The paper's (App. B.3): U = the r eigenvectors of C_pre of smallest eigenvalue, so A0 X_pre ≈ 0."""
    check_rank(r, W0)
    _, U = torch.linalg.eigh(C_pre.double())  # ascending
    return projection_start(W0, U[:, :r], scale)


def leading_start(W0, basis, r, scale=1.0, **_):
    """Ours: U spans the r leading generalized eigenvectors, the directions of highest utility per penalty."""
    check_rank(r, W0)
    U, _ = torch.linalg.qr(basis[:, :r].double())
    return projection_start(W0, U, scale)


# ------------------------------------------------------------------------------------------------------------
# The optimizer

class SAdam(torch.optim.Optimizer):
    """Adam whose steps for some matrices are taken, and gated, in a basis of their own (Eq. 18-24);
    AdamW for the rest.

    params:    parameters or parameter groups, as for any torch optimizer.
    spectral:  {A: (basis V (d_in, k), gate s̃ (k,))} for the LoRA factors A (r, d_in), or full weights
               (d_out, d_in), that get the gated step; k < d_in moves A in those k directions alone.
               Without any entry this is `torch.optim.AdamW`.
    held_in:   dtype of the bases, and so of the two products with them; moments and parameters keep theirs.
               torch.bfloat16 takes half of float32's memory.
    lr, betas, eps, weight_decay (decoupled): as for AdamW.
    """

    def __init__(self, params, spectral=None, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0,
                 held_in=None):
        if not lr >= 0:
            raise ValueError(f"lr is {lr}; the learning rate must not be negative")
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))
        spectral, known = spectral or {}, {p for group in self.param_groups for p in group["params"]}
        for A, (V, gate) in spectral.items():
            if A not in known:
                raise ValueError(f"spectral holds a parameter of shape {tuple(A.shape)} not among params")
            if A.dim() != 2 or V.dim() != 2 or len(V) != A.shape[1] or gate.shape != V.shape[1:]:
                raise ValueError(f"basis {tuple(V.shape)} and gate {tuple(gate.shape)} do not fit a "
                                 f"parameter of shape {tuple(A.shape)}; "
                                 "they must be (d_in, k) and (k,)")
        # [(matrices of one shape, their bases (n, d_in, k), their gates (n, 1, k))]
        self.stacks = []
        for group in self.param_groups:
            alike = {}
            for p in group["params"]:
                if p in spectral:
                    alike.setdefault((p.shape, p.dtype, p.device, spectral[p][0].shape), []).append(p)
            for same in alike.values():
                V = torch.stack([spectral[p][0].to(p.device, held_in or p.dtype) for p in same])
                self.stacks.append((same, V, torch.stack([spectral[p][1].to(p) for p in same])[:, None]))

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._update(params, **{k: group[k] for k in ("lr", "betas", "eps", "weight_decay")})
        return loss

    def _in_bases(self, tensors, product):
        """`tensors`, one a parameter, with product(t, V, gate) for those of matrices that have a basis."""
        found = dict(tensors)
        for same, V, gate in self.stacks:
            chosen = [i for i, p in enumerate(same) if p in found]
            if chosen:
                if len(chosen) < len(same):
                    V, gate = V[chosen], gate[chosen]
                done = product(torch.stack([found[same[i]] for i in chosen]), V, gate)
                found.update(zip((same[i] for i in chosen), done.unbind()))
        return list(found.values())

    def _update(self, params, lr, betas, eps, weight_decay):
        """Each line is for all params at once, products for those of one shape (@ on stacks), the rest as
        torch._foreach: a GPU takes longer to be asked for one of these small things than to do it."""
        g = self._in_bases(((p, p.grad) for p in params),             # A = Ā Vᵀ, hence Ḡ = G V
                           lambda G, V, gate: (G.to(V) @ V).to(G))
        for p, g_p in zip(params, g):
            if not self.state[p]:
                self.state[p].update(step=0, exp_avg=torch.zeros_like(g_p), exp_avg_sq=torch.zeros_like(g_p))
            self.state[p]["step"] += 1
        t, m, v = ([self.state[p][key] for p in params] for key in ("step", "exp_avg", "exp_avg_sq"))
        torch._foreach_lerp_(m, g, 1 - betas[0])                      # m <- β₁ m + (1 - β₁) g
        torch._foreach_lerp_(v, torch._foreach_mul(g, g), 1 - betas[1])
        m_hat = torch._foreach_div(m, [1 - betas[0] ** n for n in t])
        v_hat = torch._foreach_div(v, [1 - betas[1] ** n for n in t])
        root = torch._foreach_add(torch._foreach_sqrt(v_hat), eps)
        step = torch._foreach_div(torch._foreach_mul(m_hat, -lr), root)  # -η m̂/(√v̂ + ε)
        # the gate is for the step: Adam would bring a gated gradient back to full size
        step = self._in_bases(zip(params, step),                      # ΔA = ΔĀ Vᵀ
                              lambda s, V, gate: ((s * gate).to(V) @ V.mT).to(s))
        torch._foreach_mul_(params, 1 - lr * weight_decay)
        torch._foreach_add_(params, step)


# ------------------------------------------------------------------------------------------------------------
# What it is compared with: other places to start, and directions to keep out of. SVDs in float64.

def svd(W):
    """(U, S descending, Vᵀ) of W, in float64."""
    return torch.linalg.svd(W.double(), full_matrices=False)


def even_split(W0, U, S, Vh, scale):
    """B0 = U√S/κ, A0 = √S Vᵀ: κB0A0 is the chosen part of the decomposed matrix."""
    return (S.sqrt()[:, None] * Vh).to(W0), (U * S.sqrt() / scale).to(W0)


def pissa_start(W0, r, scale=1.0, **_):
    """PiSSA (arXiv 2404.02948): κB0A0 = the r largest singular components of W0."""
    check_rank(r, W0)
    U, S, Vh = svd(W0)
    return even_split(W0, U[:, :r], S[:r], Vh[:r], scale)


def milora_start(W0, r, scale=1.0, **_):
    """MiLoRA (arXiv 2406.09044): κB0A0 = the r smallest singular components of W0."""
    check_rank(r, W0)
    U, S, Vh = svd(W0)
    return even_split(W0, U[:, -r:], S[-r:], Vh[-r:], scale)


def corda_start(W0, C_pre, r, scale=1.0, damping=0.01, **_):
    """CorDA, knowledge-preserved (arXiv 2406.05223): κB0A0 = the r smallest components of W0 C, times C⁻¹,
    with C = C_pre + damping · mean diag(C_pre) · I. The unit of C_pre decides how B0 and A0 share them."""
    check_rank(r, W0)
    C = C_pre.double() + damping * C_pre.double().diagonal().mean() * torch.eye(len(C_pre)).to(C_pre)
    U, S, Vh = svd(W0.double() @ C)
    Vh_C_inverse = torch.linalg.solve(C, Vh[-r:].T).T  # C is symmetric
    return even_split(W0, U[:, -r:], S[-r:], Vh_C_inverse, scale)


def lora_null_start(W0, C_pre, r, scale=1.0, **_):
    """LoRA-Null (arXiv 2503.02659): κB0A0 = W0 U⊥U⊥ᵀ, U⊥ the r eigenvectors of C_pre of smallest eigenvalue.
    The same function as `null_space_start`, split evenly between B0 and A0."""
    A0, B0 = null_space_start(W0, C_pre, r)
    U, S, Vh = svd(B0)
    return even_split(W0, U, S, Vh @ A0.double(), scale)


def sc_lora_start(W0, C_pre, C_task, r, scale=1.0, beta=0.5, **_):
    """SC-LoRA (arXiv 2505.23724): B0 = Q/κ, A0 = QᵀW0, Q the r leading eigenvectors of the outputs'
    (1 - β) S_task - β S_pre; an output W0 x has the second moment S = W0 C W0ᵀ."""
    check_rank(r, W0)
    W = W0.double()
    _, Q = torch.linalg.eigh(W @ ((1 - beta) * C_task - beta * C_pre).double() @ W.T)  # ascending
    Q = Q[:, -r:]
    return (Q.T @ W).to(W0), (Q / scale).to(W0)


def oplora_protected(W0, k=16):
    """OPLoRA (arXiv 2510.13003): (U_k (d_out, k), V_k (d_in, k)), the k leading singular vectors of W0.
    The layer then learns ΔW = (I - U_kU_kᵀ) BA (I - V_kV_kᵀ)."""
    U, _, Vh = svd(W0)
    return U[:, :k].to(W0), Vh[:k].T.to(W0)


# ------------------------------------------------------------------------------------------------------------
# The methods, by name: how each differs from LoRA. `m` is the layer's `solve_layer`.

def sadam(m, lam, s_min):
    """FoLoRA's steps: the basis and the gate."""
    return m["basis"], spectral_gate(m["eigvals"], lam, s_min)


def truncated(m, lam, s_min):
    """The leading half of the basis: the other directions never move."""
    basis, gate = sadam(m, lam, s_min)
    return basis[:, :len(gate) // 2], gate[:len(gate) // 2]


def fisher(S_pre, C_pre):
    return S_pre, C_pre


@dataclass(frozen=True)
class Method:
    start: Callable | None = kaiming_start  # (W0, r, scale, generator, **m) -> (A0, B0); None: W0 is trained
    steps: Callable | None = None     # (m, lam, s_min) -> (basis, gate) for A's (or W0's) steps; None: Adam's
    train_A: bool = True
    penalty: Callable | None = None   # (S_pre, C_pre) -> (S, C) of the `two_sided_penalty` in the loss
    replay: float = 0.0               # the foundation's own samples added to a batch, as a share of its rows
    protected: Callable | None = None  # W0 -> (U_k, V_k), directions that ΔW may not touch

    @property
    def directed(self):
        """Whether its start or its steps look at a layer's moments (`solve_layer`)."""
        asks = inspect.signature(self.start).parameters if self.start else {}
        return bool(self.steps or {"C_pre", "C_task", "basis"} & set(asks))

    @property
    def calibrated(self):
        """Whether it needs a calibration: for that, for its penalty, or for samples to replay."""
        return bool(self.directed or self.penalty or self.replay)


METHODS = {
    "full": Method(None),
    "lora": Method(),
    "pissa": Method(pissa_start),
    "milora": Method(milora_start),
    "corda": Method(corda_start),
    "lora-null": Method(lora_null_start),
    "lora-null-v2": Method(lora_null_start, train_A=False),
    "sc-lora": Method(sc_lora_start),
    "oplora": Method(protected=oplora_protected),
    "replay": Method(replay=0.25),
    "folora": Method(null_space_start, sadam),
    "folora-top": Method(leading_start, sadam),
    "folora-kl": Method(leading_start, penalty=fisher),        # ours: the penalty itself, in the loss
    "lora-kl": Method(penalty=fisher),
    "folora-replay": Method(null_space_start, sadam, replay=0.25),
    "folora-kl-replay": Method(leading_start, penalty=fisher, replay=0.25),
    "folora-full": Method(None, sadam),                        # App. D
    "folora-half": Method(null_space_start, truncated),        # App. D
    "folora-full-half": Method(None, truncated),               # both
}


def method_called(name):
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; the methods are {', '.join(METHODS)}")
    return METHODS[name]

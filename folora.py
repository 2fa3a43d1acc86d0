"""FoLoRA, the method: low-rank fine-tuning whose updates avoid what the base model already uses.

Foundation-Preserving LoRA, arXiv 2606.00132; equation numbers are the paper's. Four parts: measure,
solve, start, step.

A linear layer W0 (d_out, d_in) reads inputs x (d_in,). On text that the base model wrote itself,
C_pre = E[x xᵀ] says how strongly each input direction is used; on the task's queries, which are
prompts without answers, C_task says the same. An update ΔA (r, d_in) of LoRA's factor A moves the
layer's output by κB ΔA x, so its rows should lie where C_task is large and C_pre is small:

    forgetting penalty   R(ΔA) = Tr(ΔA H ΔAᵀ),   H = C_pre + τI                        (Eq. 6)
    task utility         U(ΔA) = Tr(ΔA C_task ΔAᵀ)
    their trade-off      C_task v = γ H v,       VᵀHV = I,  VᵀC_task V = diag(γ)       (Eq. 17)

γ is the utility of a direction per unit of penalty. Adam runs in the coordinates ΔĀ of ΔA = ΔĀVᵀ,
where R = ‖ΔĀ‖²: every direction costs the same. The gate γ/(γ + λ), at least s_min, multiplies each
coordinate's *step* (Eq. 22): directions that the task uses move freely, the others little.

Units: one scalar per layer, tr(C_pre)/d_in, divides both moments (`normalise`), so that τ, γ and
the learning rate do not depend on the activations' units. With λ = 1 a direction that is as active
on the task as on the base model's own text takes about half a step.
"""
import math

import torch


# ------------------------------------------------------------------------------------------------
# Measure: how strongly is each input direction used?

class SecondMoment:
    """Streaming uncentred second moment E[x xᵀ] over all tokens added so far.

    Each batch's product is taken in the dtype of x and summed in float64, so the rounding error
    does not grow with the number of batches.
    """

    def __init__(self, d_in, device="cpu"):
        self.total = torch.zeros(d_in, d_in, dtype=torch.float64, device=device)
        self.tokens = torch.zeros((), dtype=torch.long, device=device)  # a tensor, for all_reduce

    def add(self, x, mask=None):
        """x (..., d_in); mask (...) is False on padding, which is left out."""
        x = x.reshape(-1, x.shape[-1]) if mask is None else x[mask]
        self.total += (x.T @ x).to(self.total)
        self.tokens += x.shape[0]

    def mean(self):
        """(d_in, d_in) float64, per token. ValueError if it is empty or not finite."""
        if not self.tokens:
            raise ValueError("second moment of no tokens; give at least one text")
        if not torch.isfinite(self.total).all():
            raise ValueError("second moment is not finite; the activations overflowed or hold NaN")
        return self.total / self.tokens


def normalise(C_pre, C_task):
    """Divide both by tr(C_pre)/d_in: an input component's mean square on the base model's text."""
    mean_square = C_pre.diagonal().mean()
    if not 0 < mean_square < math.inf:
        raise ValueError(f"C_pre has a mean diagonal of {mean_square}; a layer whose input is zero "
                         "on every sample, or not finite, cannot be calibrated")
    return C_pre / mean_square, C_task / mean_square


# ------------------------------------------------------------------------------------------------
# Solve: penalty, utility, and the directions that trade one for the other. Training never computes
# R or U: they act through V and γ alone.

def forgetting_penalty(dA, H):
    """R(ΔA) = Tr(ΔA H ΔAᵀ) for dA (r, d_in), H (d_in, d_in): a scalar (Eq. 6)."""
    return ((dA @ H) * dA).sum()


def task_utility(dA, C_task):
    """U(ΔA) = Tr(ΔA C_task ΔAᵀ) for dA (r, d_in), C_task (d_in, d_in): a scalar."""
    return ((dA @ C_task) * dA).sum()


def rayleigh_quotient(v, C_task, H):
    """ρ(v) = vᵀC_task v / vᵀHv: utility per penalty of each direction v (..., d_in) -> (...)."""
    return ((v @ C_task) * v).sum(-1) / ((v @ H) * v).sum(-1)


def damped(C_pre, tau):
    """H = C_pre + τI (Eq. 6). For a normalised C_pre, τ is relative to its mean diagonal."""
    if not 0 < tau < math.inf:
        raise ValueError(f"tau is {tau}; the damping must be a positive number, for example 0.01")
    return C_pre + tau * torch.eye(len(C_pre), dtype=C_pre.dtype, device=C_pre.device)


def whiten(C, L):
    """L⁻¹ C L⁻ᵀ for symmetric C and lower triangular L, by two triangular solves; symmetrised."""
    half = torch.linalg.solve_triangular(L, C, upper=False)
    M = torch.linalg.solve_triangular(L, half.T, upper=False)
    return (M + M.T) / 2


def generalized_eigh(C_task, H):
    """Solve C_task v = γ H v in float64, for symmetric (d, d) C_task, positive definite H (Eq. 17).

    With H = LLᵀ this is the symmetric problem of M = L⁻¹ C_task L⁻ᵀ = QΓQᵀ, and V = L⁻ᵀQ. (The
    paper whitens with H^-½. For distinct γ that gives the same V up to signs, which neither Adam
    nor the gate sees; within equal γ a rotation is free.)

    Returns (eigvals (d,) descending, basis (d, d) with the eigenvectors as columns):
    VᵀHV = I and VᵀC_task V = diag(γ).
    V is *not* orthogonal: gradients enter the basis as Ḡ = G V, parameters as Ā = A V⁻ᵀ = A H V.
    If VᵀHV misses I by more than 1 % (rounding: about d · eps · cond(H)), ValueError says how much
    larger τ must be.
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
        eigvals, Q = torch.linalg.eigh(M)  # ascending
        basis = torch.linalg.solve_triangular(L.T, Q, upper=True)
        error = (basis.T @ H @ basis - torch.eye(len(H)).to(H)).abs().max()
        failed = not error <= 0.01  # or NaN
    if failed:
        e = torch.linalg.eigvalsh(H)  # with `more` added, d · eps · cond(H) is at most 0.5 %
        more = 200 * len(H) * torch.finfo(H.dtype).eps * e.abs().max() - e[0].clamp(max=0)
        raise ValueError("H is not positive definite, or nearly singular; use a larger tau "
                         f"(H = C_pre + tau I): {more:.2g} more will do")
    return eigvals.flip(0), basis.flip(1)


def solve_layer(C_pre, C_task, tau=0.01):
    """Solve one layer, given its raw second moments (d_in, d_in).

    Returns a dict of the normalised C_pre and C_task, H = C_pre + τI, eigvals (d_in,) and
    basis (d_in, d_in), all float64.
    """
    C_pre, C_task = normalise(C_pre.double(), C_task.double())
    H = damped(C_pre, tau)
    eigvals, basis = generalized_eigh(C_task, H)
    return {"C_pre": C_pre, "C_task": C_task, "H": H, "eigvals": eigvals, "basis": basis}


def spectral_gate(eigvals, lam=1.0, s_min=0.3):
    """s̃ = max(γ/(γ + λ), s_min): the share of Adam's step that a direction takes (Eq. 22)."""
    if not 0 < lam < math.inf:
        raise ValueError(f"lam is {lam}; λ must be a positive number, "
                         "1 halves the step where utility equals penalty")
    if not 0 <= s_min <= 1:
        raise ValueError(f"s_min is {s_min}; the smallest gate must lie in [0, 1]")
    eigvals = eigvals.clamp(min=0)  # C_task is positive semidefinite: below 0 is rounding
    return (eigvals / (eigvals + lam)).clamp(min=s_min)


# ------------------------------------------------------------------------------------------------
# Start: where A and B begin. Each start returns A0 (r, d_in), B0 (d_out, r); the layer then freezes
# W_res = W0 - κB0A0, so that it begins as exactly the function it was. All starts, those of
# extras/baselines.py too, are called with the same keywords; unused ones land in `**_`.

def projection_start(W0, U, scale=1.0):
    """A0 = Uᵀ, B0 = W0 U/κ for orthonormal columns U (d_in, r): κB0A0 = W0UUᵀ."""
    return U.T.to(W0).contiguous(), (W0 @ U.to(W0)) / scale


def null_space_start(W0, C_pre, r, scale=1.0, **_):
    """The paper's start (App. B.3): the r eigenvectors of C_pre with the smallest eigenvalues.

    B's steps alone move the output by κ ΔB A0 x. On the base model's text A0 x is as small as for
    any r orthonormal rows, and zero only if C_pre has a null space of dimension r.
    """
    _, U = torch.linalg.eigh(C_pre.double())  # ascending
    return projection_start(W0, U[:, :r], scale)


# ------------------------------------------------------------------------------------------------
# Step: Adam in the basis

class SAdam(torch.optim.Optimizer):
    """Spectral-gated Adam (Eq. 18-24) for the matrices that have a basis; AdamW for all others.

    params:       parameters or parameter groups, as for any torch optimizer.
    spectral:     {A: (basis V (d_in, k), gate s̃ (k,))} for LoRA factors A (r, d_in), or for full
                  weights (d_out, d_in). With k < d_in, A moves in those k directions alone.
                  Without any entry this is `torch.optim.AdamW`.
    basis_dtype:  dtype in which the bases are kept; default: each parameter's own.
    lr, betas, eps, weight_decay (decoupled): as for AdamW.
    """

    def __init__(self, params, spectral=None, lr=1e-3, betas=(0.9, 0.999), eps=1e-8,
                 weight_decay=0.0, basis_dtype=None):
        if not lr >= 0:
            raise ValueError(f"lr is {lr}; the learning rate must not be negative")
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))
        known = {p for group in self.param_groups for p in group["params"]}
        self.spectral, copies = {}, {}
        for A, (V, gate) in (spectral or {}).items():
            if A not in known:
                raise ValueError(f"spectral holds a parameter of shape {tuple(A.shape)} "
                                 "that is not among params")
            if A.dim() != 2 or V.dim() != 2 or len(V) != A.shape[1] or gate.shape != V.shape[1:]:
                raise ValueError(f"basis {tuple(V.shape)} and gate {tuple(gate.shape)} do not fit "
                                 f"a parameter of shape {tuple(A.shape)}; "
                                 "they must be (d_in, k) and (k,)")
            place = V.data_ptr(), V.shape, V.stride()  # parameters with one basis share its copy
            if place not in copies:
                copies[place] = V.to(A.device, basis_dtype or A.dtype)
            self.spectral[A] = copies[place], gate.to(A)

    @torch.no_grad()
    def step(self, closure=None):
        """One step for every parameter that has a gradient; returns closure()'s loss, if given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            self.update_all(params, **{key: group[key] for key in
                                       ("lr", "betas", "eps", "weight_decay")})
        return loss

    def update_all(self, params, **options):
        """One parameter after the other; extras/grouped.py batches them on a GPU."""
        for p in params:
            self.update(p, **options)

    def update(self, p, lr, betas, eps, weight_decay):
        """Take one parameter into its basis, do Adam's step there, gate it, and take it back."""
        V, gate = self.spectral.get(p, (None, None))
        g = p.grad if V is None else p.grad @ V.to(p)     # Ḡ = G V, since A = Ā Vᵀ
        state = self.next_state(p, g)
        m, v = state["exp_avg"], state["exp_avg_sq"]
        m.lerp_(g, 1 - betas[0])                          # m <- β₁ m + (1 - β₁) Ḡ
        v.lerp_(g * g, 1 - betas[1])                      # v <- β₂ v + (1 - β₂) Ḡ²
        m_hat = m / (1 - betas[0] ** state["step"])
        v_hat = v / (1 - betas[1] ** state["step"])
        step = m_hat * -lr / (v_hat.sqrt() + eps)         # Adam's step, -η m̂ / (√v̂ + ε)
        step = self.gated(step, gate, state, lr)          # ΔĀ = s̃ ⊙ Adam's step
        if V is not None:
            step = step @ V.T.to(step)                    # ΔA = ΔĀ Vᵀ
        p.mul_(1 - lr * weight_decay)
        p.add_(step)

    def next_state(self, p, g):
        """The parameter's state, zeros before its first step, with this step counted."""
        state = self.state[p]
        if not state:
            state.update(step=0, exp_avg=torch.zeros_like(g), exp_avg_sq=torch.zeros_like(g))
        state["step"] += 1
        return state

    def gated(self, step, gate, state, lr):
        """Adam's step in the basis, times the gate, if there is one. Gating the *gradient* would do
        nothing: Adam divides constant factors out. (state and lr are for subclasses.)"""
        return step if gate is None else step * gate

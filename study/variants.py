"""Variants of FoLoRA and of the baselines' settings, for the study alone: `Method`s, and `FINISHES`
of what was learned."""
from dataclasses import replace

import torch

from extras import baselines
from extras.baselines import Method, PullBack, sadam
from folora import SAdam, damped, generalized_eigh, normalise, null_space_start, spectral_gate


# ------------------------------------------------------------------------------------------------
# Steps: (layer moments m, λ, s_min) -> (basis, gate), as `baselines.sadam`

def ungated(m, lam, s_min):
    """FoLoRA's coordinates without the gate."""
    return m["basis"], torch.ones_like(m["eigvals"])


def even_gate(m, lam, s_min):
    """FoLoRA's coordinates with a gate of the same mean, equal in all directions."""
    gate = spectral_gate(m["eigvals"], lam, s_min)
    return m["basis"], gate.mean().expand_as(gate)


def penalty_only(m, lam, s_min):
    """The directions of H alone: with C_task = I, γ is one over the penalty."""
    eigvals, basis = generalized_eigh(torch.eye(len(m["H"])).to(m["H"]), m["H"])
    return basis, spectral_gate(eigvals, lam, s_min)


def utility_only(m, lam, s_min):
    """The directions of C_task alone: with H = I, γ is the utility."""
    eigvals, basis = generalized_eigh(m["C_task"], torch.eye(len(m["H"])).to(m["H"]))
    return basis, spectral_gate(eigvals, lam, s_min)


# ------------------------------------------------------------------------------------------------
# Finishes: (ΔW (d_out, d_in) float64, C_pre) -> the ΔW that is evaluated

def interpolated(share):
    """WiSE-FT (arXiv 2109.01903): on the way from W0 to what was learned."""
    return lambda dW, C_pre: share * dW


def compressed(rank):
    """The ΔW' of this rank that is nearest in the metric H: least Tr((ΔW - ΔW') H (ΔW - ΔW')ᵀ)."""
    def finish(dW, C_pre):
        L = torch.linalg.cholesky(damped(normalise(C_pre, C_pre)[0], 0.01))
        U, S, Vh = torch.linalg.svd(dW @ L, full_matrices=False)
        near = (U[:, :rank] * S[:rank]) @ Vh[:rank]
        return torch.linalg.solve_triangular(L, near, upper=False, left=False)
    return finish


# ------------------------------------------------------------------------------------------------
# Optimizers

class PullBackA(PullBack):
    """B is not pulled back."""

    def gated(self, step, gate, state, lr):
        return (SAdam if gate is None else PullBack).gated(self, step, gate, state, lr)


class PullBackB(PullBack):
    """A is not pulled back."""

    def gated(self, step, gate, state, lr):
        return (PullBack if gate is None else SAdam).gated(self, step, gate, state, lr)


# ------------------------------------------------------------------------------------------------

def null_space(steps=None):
    return Method(null_space_start, steps, needs_moments=True)


FINISHES = {"wise-ft-0.5": interpolated(0.5), "sadam-full-cut32": compressed(32)}
METHODS = {
    **baselines.METHODS,
    "null-adam": null_space(),
    "null-ungated": null_space(ungated),
    "null-even-gate": null_space(even_gate),
    "null-penalty-only": null_space(penalty_only),
    "null-utility-only": null_space(utility_only),
    "kaiming-sadam": Method(steps=sadam, needs_moments=True),
    **{f"folora-pull-back-{part}": replace(baselines.METHODS["folora-pull-back"], optimizer=cls)
       for part, cls in (("A", PullBackA), ("B", PullBackB))},
    # decoupled weight decay towards the start, without FoLoRA's basis and gate
    "lora-pull-back": Method(optimizer=PullBack),
    "null-adam-pull-back": replace(null_space(), optimizer=PullBack),
    "folora-pull-back-distill": replace(baselines.METHODS["folora-pull-back"],
                                        rehearsal=baselines.distill_loss),
    "corda-100": replace(  # C in a unit that makes A0 a tenth and B0 ten times as large
        baselines.METHODS["corda"], start=lambda W0, C_pre, **options: baselines.corda_start(
            W0, 100 * C_pre, **options)),
    "sc-lora-0.8": replace(
        baselines.METHODS["sc-lora"], start=lambda W0, **options: baselines.sc_lora_start(
            W0, beta=0.8, **options)),
    "oplora-3": replace(baselines.METHODS["oplora"],  # of 96 directions, as 128 of 4,096
                        protected=lambda W0: baselines.oplora_protected(W0, 3)),
    "wise-ft-0.5": baselines.METHODS["lora"],
    "sadam-full-cut32": baselines.METHODS["sadam-full"],
}

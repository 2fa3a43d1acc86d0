"""Variants of FoLoRA and of the baselines' settings, for the study alone: `Method`s."""
from dataclasses import replace

import torch

from extras import baselines
from extras.baselines import PullBack, corda_start, oplora_protected, sc_lora_start
from folora import SAdam, generalized_eigh, spectral_gate


# ------------------------------------------------------------------------------------------------
# Steps: (layer moments m, λ, s_min) -> (basis, gate), as `baselines.sadam`

def ungated(m, lam, s_min):
    """FoLoRA's coordinates without the gate."""
    return m["basis"], torch.ones_like(m["eigvals"])


def penalty_only(m, lam, s_min):
    """The directions of H alone: with C_task = I, γ is one over the penalty."""
    eigvals, basis = generalized_eigh(torch.eye(len(m["H"])).to(m["H"]), m["H"])
    return basis, spectral_gate(eigvals, lam, s_min)


def utility_only(m, lam, s_min):
    """The directions of C_task alone: with H = I, γ is the utility."""
    eigvals, basis = generalized_eigh(m["C_task"], torch.eye(len(m["H"])).to(m["H"]))
    return basis, spectral_gate(eigvals, lam, s_min)


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

def like(name, **changes):
    """A row of the methods' table with some parts exchanged."""
    return replace(baselines.METHODS[name], **changes)


SHARES = {"wise-ft-0.5": 0.5}  # of ΔW, which is then evaluated: WiSE-FT, arXiv 2109.01903
METHODS = {
    **baselines.METHODS,
    "null-adam": like("folora", steps=None),
    "null-ungated": like("folora", steps=ungated),
    "null-penalty-only": like("folora", steps=penalty_only),
    "null-utility-only": like("folora", steps=utility_only),
    "folora-pull-back-A": like("folora-pull-back", optimizer=PullBackA),
    "folora-pull-back-B": like("folora-pull-back", optimizer=PullBackB),
    # decoupled weight decay towards the start, without FoLoRA's basis and gate
    "lora-pull-back": like("lora", optimizer=PullBack),
    "null-adam-pull-back": like("folora", steps=None, optimizer=PullBack),
    # C in a unit that makes A0 a tenth and B0 ten times as large
    "corda-100": like("corda", start=lambda W0, C_pre, **m: corda_start(W0, 100 * C_pre, **m)),
    "sc-lora-0.8": like("sc-lora", start=lambda W0, **m: sc_lora_start(W0, beta=0.8, **m)),
    # 3 of 96 directions, as 128 of 4,096
    "oplora-3": like("oplora", protected=lambda W0: oplora_protected(W0, 3)),
    "wise-ft-0.5": like("lora"),
}

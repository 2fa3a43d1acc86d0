"""Variants of FoLoRA and of what trains it, for the study alone: `Method`s, and `TRICKS` that
change the training loop or its result."""
import torch

import train
from extras import baselines
from extras.baselines import Method, sadam
from folora import damped, generalized_eigh, normalise, null_space_start, spectral_gate
from model import LoRALinear, block_linears, lora_parameters


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
# Loops: called like `train.training_loop`. What they change is not saved for resuming, so an
# interrupted run starts again.

def b_rate(share):
    """B's learning rate is `share` of A's."""
    def loop(model, optimizers, batch, settings, partial, **options):
        group, = optimizers[0].param_groups
        slow = [p for name, p in lora_parameters(model).items() if name.endswith("lora_B")]
        group["params"] = [p for p in group["params"] if not any(p is B for B in slow)]
        optimizers[0].add_param_group({"params": slow, "lr": share * group["lr"]})
        return train.training_loop(model, optimizers, batch, settings, None, **options)
    return loop


def averaged(decay):
    """The result is the exponential moving average of A and B over the steps, free of its start's
    share."""
    def loop(model, optimizers, batch, settings, partial, **options):
        means = {p: torch.zeros_like(p) for p in lora_parameters(model).values()}

        @torch.no_grad()
        def after(step):
            for p, mean in means.items():
                mean.lerp_(p, (1 - decay) / (1 - decay ** step))
        losses = train.training_loop(model, optimizers, batch, settings, None, after=after,
                                     **options)
        with torch.no_grad():
            for p, mean in means.items():
                p.copy_(mean)
        return losses
    return loop


class TangentLinear(LoRALinear):
    """W0 + κ(B0 ΔA + ΔB A0): linear in what is learned."""

    def factors(self):
        """([A; A0], κ[B0, B - B0]): B0 A + (B - B0) A0."""
        return (torch.cat([self.lora_A, self.lora_A0]),
                self.scale * torch.cat([self.lora_B0, self.lora_B - self.lora_B0], 1))


def tangent(model, *more, **options):
    for layer in block_linears(model, LoRALinear).values():
        layer.__class__ = TangentLinear
    return train.training_loop(model, *more, **options)


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

def null_space(steps=None):
    return Method(null_space_start, steps, needs_moments=True)


# {name: (method, loop or None, finish or None)}
TRICKS = {
    "wise-ft-0.5": ("lora", None, interpolated(0.5)),
    "sadam-full-cut32": ("sadam-full", None, compressed(32)),
    "folora-b-half": ("folora", b_rate(1 / 2), None),
    "folora-b-quarter": ("folora", b_rate(1 / 4), None),
    "folora-b-eighth": ("folora", b_rate(1 / 8), None),
    "folora-average": ("folora", averaged(0.95), None),
    "folora-tangent": ("folora", tangent, None),
}
METHODS = {
    **baselines.METHODS,
    "null-adam": null_space(),
    "null-ungated": null_space(ungated),
    "null-even-gate": null_space(even_gate),
    "null-penalty-only": null_space(penalty_only),
    "null-utility-only": null_space(utility_only),
    "kaiming-sadam": Method(steps=sadam, needs_moments=True),
    **{name: baselines.METHODS[method] for name, (method, _, _) in TRICKS.items()},
}

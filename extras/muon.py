"""Muon by hand: each matrix moves along its momentum, made orthogonal.

torch.optim.Muon always iterates in bfloat16, which a CPU without bf16 instructions emulates, about
a hundred times slower than float32. Here the caller chooses the dtype.
Sources: Keller Jordan, https://kellerjordan.github.io/posts/muon/; Liu et al., arXiv 2502.16982.
"""
import math

import torch

from model import block_linears


def newton_schulz(G, dtype):
    """About UVᵀ for each G = UΣVᵀ, (count, m, n): X <- aX + b(XXᵀ)X + c(XXᵀ)²X keeps U and V, and
    five such steps bring singular values that are not tiny to 0.7 .. 1.2."""
    a, b, c = 3.4445, -4.7750, 2.0315  # Jordan's: steep at 0, where it matters most
    tall = G.shape[-2] > G.shape[-1]
    X = G.to(dtype)
    X = X / X.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)  # largest singular value <= 1
    for _ in range(5):
        S = X.mT @ X if tall else X @ X.mT  # the smaller Gram matrix: (XXᵀ)X = X(XᵀX)
        S = torch.baddbmm(S, S, S, beta=b, alpha=c)
        X = torch.baddbmm(X, *((X, S) if tall else (S, X)), beta=a)
    return X.to(G.dtype)


class Muon(torch.optim.Optimizer):
    """torch.optim.Muon with a choice of dtype.

    params: matrices (m, n), the hidden layers' weights. Others belong to AdamW.
    dtype:  of the iteration: float32, or bfloat16 where the machine has instructions for it.
    """

    def __init__(self, params, lr, weight_decay=0.1, momentum=0.95, dtype=torch.float32):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault(p.shape, []).append(p)
            for (m, n), params in by_shape.items():  # one batched product, not many small ones
                G = torch.stack([self.nesterov(p, group["momentum"]) for p in params])
                rate = group["lr"] * math.sqrt(max(1, m / n))  # the post's scale for tall matrices
                for p, direction in zip(params, newton_schulz(G, self.dtype)):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(direction, alpha=rate)

    def nesterov(self, p, momentum):
        """The gradient (m, n), moved by `momentum` towards the running mean of gradients."""
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p)
        return p.grad.lerp(state["momentum_buffer"].lerp_(p.grad, 1 - momentum), momentum)


def pretraining_optimizers(model, lr, muon_lr, dtype="float32"):
    """Muon for the blocks' matrices, which learns from fewer tokens; AdamW for the rest, or for all
    where muon_lr is 0."""
    matrices = [linear.weight for linear in block_linears(model).values()] if muon_lr else []
    others = [p for p in model.parameters() if not any(p is matrix for matrix in matrices)]
    adamw = torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    return [Muon(matrices, muon_lr, dtype=getattr(torch, dtype)), adamw] if muon_lr else [adamw]

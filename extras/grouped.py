"""SAdam's steps, batched for a GPU. For matrices this small the launch of a kernel takes longer
than the kernel, so each line of Adam's is one operation on all of them; a CPU runs folora.py's."""
import torch

from folora import SAdam


class GroupedSAdam(SAdam):
    """Takes the steps of `folora.SAdam`, bit for bit, in fewer operations on a GPU."""

    def update_all(self, params, **options):
        update = self.update_together if params and params[0].is_cuda else super().update_all
        update(params, **options)

    def update_together(self, params, lr, betas, eps, weight_decay):
        """`update` of all these parameters at once."""
        bases = [self.spectral.get(p, (None, None)) for p in params]
        gs = [p.grad if V is None else p.grad @ V.to(p) for p, (V, _) in zip(params, bases)]
        states = [self.next_state(p, g) for p, g in zip(params, gs)]
        ms, vs = ([state[key] for state in states] for key in ("exp_avg", "exp_avg_sq"))
        torch._foreach_lerp_(ms, gs, 1 - betas[0])
        torch._foreach_lerp_(vs, torch._foreach_mul(gs, gs), 1 - betas[1])
        steps = torch._foreach_div(ms, [1 - betas[0] ** state["step"] for state in states])
        roots = torch._foreach_div(vs, [1 - betas[1] ** state["step"] for state in states])
        torch._foreach_sqrt_(roots)
        torch._foreach_add_(roots, eps)
        torch._foreach_mul_(steps, -lr)
        torch._foreach_div_(steps, roots)
        steps = [self.gated(step, gate, state, lr)
                 for step, (_, gate), state in zip(steps, bases, states)]
        steps = [step if V is None else step @ V.T.to(step) for step, (V, _) in zip(steps, bases)]
        torch._foreach_mul_(params, 1 - lr * weight_decay)
        torch._foreach_add_(params, steps)

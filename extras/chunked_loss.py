"""Cross-entropy over a large vocabulary without holding all logits at once."""
import torch
from torch.nn import functional as F


class ChunkedCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of targets y (n,) under the logits hWᵀ of features h (n, C), W (vocab, C),
    `rows` positions at a time. The gradients are computed in the forward pass: softmax - onehot(y)
    of the logits, times W for h."""

    @staticmethod
    def forward(ctx, h, W, y, rows):
        device, (wants_h, wants_W, *_) = h.device.type, ctx.needs_input_grad
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else h.dtype
        grad_h, grad_W = torch.empty_like(h), torch.zeros_like(W) if wants_W else None
        low, total = W.to(dtype), 0
        for piece, targets, grad in zip(h.split(rows), y.split(rows), grad_h.split(rows)):
            logits = F.linear(piece.to(dtype), low).float()
            log_sum = logits.logsumexp(-1, keepdim=True)
            total += (log_sum - logits.gather(1, targets[:, None])).sum()
            if wants_h:
                p = logits.sub_(log_sum).exp_()
                p = p.scatter_add_(1, targets[:, None], -torch.ones_like(log_sum))
                p = (p / len(y)).to(dtype)
                grad.copy_(p @ low)
                if wants_W:
                    grad_W += p.T @ piece.to(dtype)
        ctx.save_for_backward(grad_h, grad_W)
        return total / len(y)

    @staticmethod
    def backward(ctx, g):
        return *(t if t is None else g * t for t in ctx.saved_tensors), None, None


def large_vocab_loss(h, W, targets):
    """Mean cross-entropy of targets (n,) from features h (n, C) and output weights W (vocab, C)."""
    rows = 128 if h.device.type == "cpu" else 2048  # what fits a cache; what keeps a GPU busy
    return ChunkedCrossEntropy.apply(h, W if torch.is_grad_enabled() else W.detach(), targets, rows)

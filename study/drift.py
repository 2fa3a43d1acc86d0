"""How far adapters are from the base model on its own text, and where their drift comes from.

    python -m study drift out/code/*/adapter.pt

ΔW = κ(B0 ΔA + ΔB A0 + ΔB ΔA). SAdam's gate and the start price the first part alone.
"""
import pathlib

import torch

import tasks
from extras.baselines import distill_loss, kl_term
from extras.files import load, load_adapter, load_foundation
from extras.machine import pick_device
from extras.tables import markdown
from folora import forgetting_penalty
from model import LoRALinear, block_linears, generate

TEXTS = 16  # that the base model writes anew, for its KL divergence


def own_text(base, seed=0):
    """TEXTS rows of tokens, <|endoftext|> and what the base model writes after it."""
    eot, vocab = tasks.get_encoding(base.config.encoding).eot_token, base.config.vocab_size
    device = base.lm_head.weight.device
    ones, generator = torch.ones(TEXTS, device=device), torch.Generator(device).manual_seed(seed)
    texts = generate(base, [[eot]] * TEXTS, base.config.block_size, (), (ones, ones, vocab * ones),
                     generator=generator)  # plain sampling
    return torch.tensor([[eot] + text for text in texts], device=device)


@torch.inference_mode()
def kl_divergence(base, model, rows):
    """KL(base ‖ model) in nats per token of rows (B, T)."""
    return sum(distill_loss(model, base, chunk[:, :-1], chunk[:, 1:]).item() * len(chunk)
               for chunk in rows.split(4)) / len(rows)


@torch.no_grad()
def estimated_kl(model, proxy):
    """The same as the KL penalty sees it, Σ ½Tr(S ΔW C ΔWᵀ)."""
    layers = ((layer, *(proxy[key][name].to(layer.weight) for key in ("S_pre", "C_pre")))
              for name, layer in block_linears(model, LoRALinear).items())
    return kl_term(1, layers)(0).item()


@torch.no_grad()
def parts_of_drift(model, C_pre):
    """{part of ΔW: Σ over layers of ‖part X_pre‖²_F}, of the whole ΔW, and of W0."""
    found = {}
    for name, layer in block_linears(model, LoRALinear).items():
        A, B, A0, B0, W_res, C = (t.double() for t in (
            layer.lora_A, layer.scale * layer.lora_B, layer.lora_A0, layer.scale * layer.lora_B0,
            layer.weight, C_pre[name].to(layer.weight.device)))
        for part, dW in {"ΔA alone": B0 @ (A - A0), "ΔB alone": (B - B0) @ A0,
                         "their product": (B - B0) @ (A - A0), "ΔW": B @ A - B0 @ A0,
                         "W0": W_res + B0 @ A0}.items():
            found[part] = found.get(part, 0) + forgetting_penalty(dW, C).item()
    return found


def drift(args):
    """Print a row for each adapter: KL divergence from the base model on text that it writes anew,
    and as the KL penalty estimates it, in thousandths of a nat per token; drift in percent of
    ‖W0 X_pre‖_F; and the parts' ‖·‖² over that of ΔW, which add up to 1 but for the products of
    different parts."""
    out, rows = pathlib.Path(args.out), []
    proxy = load(out / "proxy.pt", "proxy", f"python calibrate.py --out {out}")
    device = pick_device()
    base, _ = load_foundation(out, device)
    text = own_text(base)
    for path in map(pathlib.Path, args.adapters):
        model = load_adapter(path, out, device, merge=False)
        if not block_linears(model, LoRALinear):
            raise ValueError(f"{path} holds full weights; only an adapter's ΔW has such parts")
        found = parts_of_drift(model, proxy["C_pre"])
        total, W0 = found.pop("ΔW"), found.pop("W0")
        kls = kl_divergence(base, model, text), estimated_kl(model, proxy)
        rows.append([path.parent.name, *(f"{1000 * kl:.1f}" for kl in kls),
                     f"{100 * (total / W0) ** 0.5:.1f}",
                     *(f"{part / total:.2f}" for part in found.values())])
    print(markdown(["", "KL, mnats", "estimated", "drift, %", *found], rows))

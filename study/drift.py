"""Where an adapter's drift comes from.

    python -m study drift out/code/*/adapter.pt

ΔW = κ(B0 ΔA + ΔB A0 + ΔB ΔA). SAdam's gate and the start price the first part alone. Beside it
stands the estimated KL divergence from the base model.
"""
import pathlib

import torch

from extras.baselines import kl_penalty
from extras.cli import add_common
from extras.files import load, load_adapter
from extras.tables import markdown
from folora import forgetting_penalty
from model import LoRALinear, block_linears


@torch.no_grad()
def estimated_kl(model, proxy):
    """Σ ½Tr(S ΔW C ΔWᵀ): nats per token of the base model's own text."""
    return sum(kl_penalty(*layer.delta_factors(), *(proxy[key][name].to(layer.weight)
                                                    for key in ("S_pre", "C_pre"))).item()
               for name, layer in block_linears(model, LoRALinear).items())


@torch.no_grad()
def parts_of_drift(model, C_pre):
    """{part of ΔW: Σ over layers of ‖part X_pre‖²_F}, of the whole ΔW, and of W0."""
    found = {}
    for name, layer in block_linears(model, LoRALinear).items():
        A, B, A0, B0, W_res, C = (t.double() for t in (
            layer.lora_A, layer.scale * layer.lora_B, layer.lora_A0, layer.scale * layer.lora_B0,
            layer.weight, C_pre[name]))
        for part, dW in {"ΔA alone": B0 @ (A - A0), "ΔB alone": (B - B0) @ A0,
                         "their product": (B - B0) @ (A - A0), "ΔW": B @ A - B0 @ A0,
                         "W0": W_res + B0 @ A0}.items():
            found[part] = found.get(part, 0) + forgetting_penalty(dW, C).item()
    return found


def drift(args):
    """Print a row for each adapter: estimated KL in thousandths of a nat, drift in percent of
    ‖W0 X_pre‖_F, and the parts' ‖·‖² over that of ΔW. They add up to 1 but for the products of
    different parts."""
    out, rows = pathlib.Path(args.out), []
    proxy = load(out / "proxy.pt", "proxy", f"python calibrate.py --out {out}")
    for path in map(pathlib.Path, args.adapters):
        model = load_adapter(path, out, "cpu", merge=False)
        if not block_linears(model, LoRALinear):
            raise ValueError(f"{path} holds full weights; only an adapter's ΔW has such parts")
        found = parts_of_drift(model, proxy["C_pre"])
        total, W0 = found.pop("ΔW"), found.pop("W0")
        percent = 100 * (total / W0) ** 0.5
        rows.append([path.parent.name, f"{1000 * estimated_kl(model, proxy):.1f}", f"{percent:.1f}",
                     *(f"{part / total:.2f}" for part in found.values())])
    print(markdown(["", "KL, mnats", "drift, %", *found], rows))


def add_command(commands):
    p = commands.add_parser("drift", help="where an adapter's drift comes from")
    p.set_defaults(run=drift)
    p.add_argument("adapters", nargs="+", metavar="adapter.pt")
    add_common(p)

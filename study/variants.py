"""Variants of FoLoRA for the ablations: one part replaced or left out at a time.

`METHODS` holds the project's methods and these. A variant is a `Method` like any other, so
`train.adapt(args, methods=METHODS)` trains it.
"""
import torch

from extras import baselines
from extras.baselines import Method, fisher, kaiming_start, sadam
from folora import (check_rank, generalized_eigh, leading_start, null_space_start, projection_start,
                    spectral_gate)


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


def adam_on_matrices(m, lam, s_min):
    """Neither basis nor gate: plain Adam, but on the same matrices as SAdam."""
    return torch.eye(len(m["eigvals"])).to(m["basis"]), torch.ones_like(m["eigvals"])


# ------------------------------------------------------------------------------------------------
# Starts and penalties

def mixed_start(W0, C_pre, basis, r, scale, **_):
    """Half of the rank in the null-space start's directions, half in the leading ones."""
    check_rank(r, W0)
    _, low = torch.linalg.eigh(C_pre)  # ascending
    U, _ = torch.linalg.qr(torch.cat([low[:, :r // 2], basis[:, :r - r // 2]], 1))
    return projection_start(W0, U, scale)


def one_sided(S_pre, C_pre):
    """Isotropic S with the same mean: all outputs count alike, as in Eq. 6."""
    return S_pre.diagonal().mean() * torch.eye(len(S_pre)).to(S_pre), C_pre


def few_directions(S_pre, C_pre, k=16):
    """The k leading eigenvectors of each moment, and the mean eigenvalue for all others: k + 1
    numbers per row would store such a moment."""
    def simplified(C):
        eigvals, U = torch.linalg.eigh(C.double())  # ascending
        eigvals[:-k] = eigvals[:-k].mean()
        return ((U * eigvals) @ U.T).to(C)
    return simplified(S_pre), simplified(C_pre)


def variant(start=kaiming_start, steps=None, **options):
    """A Method whose start or steps read the layer's moments, unless it is told otherwise."""
    return Method(start, steps, **{"needs_moments": True, **options})


METHODS = {
    **baselines.METHODS,
    "null-kl": variant(null_space_start, penalty=fisher),
    "folora-leading-kl": variant(leading_start, sadam, penalty=fisher),
    "lora-kl-leading-one-sided": variant(leading_start, penalty=one_sided),
    "lora-kl-leading-few": variant(leading_start, penalty=few_directions),
    "null-adam": variant(null_space_start),
    "null-frozen": variant(null_space_start, train_A=False),
    "null-ungated": variant(null_space_start, ungated),
    "null-even-gate": variant(null_space_start, even_gate),
    "null-penalty-only": variant(null_space_start, penalty_only),
    "null-utility-only": variant(null_space_start, utility_only),
    "leading-adam": variant(leading_start),
    "leading-frozen": variant(leading_start, train_A=False),
    "mixed-start": variant(mixed_start, sadam),
    "kaiming-sadam": variant(kaiming_start, sadam),
    "full-adam": variant(None, adam_on_matrices),
    "full-ungated": variant(None, ungated),
    "full-penalty-only": variant(None, penalty_only),
}
# {older name: name}: folders of runs under an older name are still found
ALIASES = {**baselines.ALIASES, "folora-top-kl": "folora-leading-kl",
           "folora-one-sided": "lora-kl-leading-one-sided", "folora-kl-few": "lora-kl-leading-few",
           "null-evenly": "null-even-gate", "null-penalty": "null-penalty-only",
           "null-utility": "null-utility-only", "top-adam": "leading-adam",
           "top-frozen": "leading-frozen", "between": "mixed-start",
           "full-penalty": "full-penalty-only"}


# ------------------------------------------------------------------------------------------------
# What is compared with what

FINALISTS = ("sadam-full-truncated", "sadam-full", "lora-kl-leading", "lora-kl", "folora",
             "folora-leading", "folora-replay", "replay", "full")  # these get five seeds
BASELINES = ("lora", "lora-null", "lora-null-v2", "corda", "sc-lora", "milora", "pissa", "oplora",
             "replay", "full")  # the others' methods
COMPARED = (*FINALISTS, "folora-truncated", "lora", "lora-null", "corda", "sc-lora", "milora",
            "pissa", "oplora", "lora-null-v2")
QUICK = ("lora", "lora-null", "replay", "folora", "lora-kl-leading")


def plain(*names):
    """{name: (method, no other options)}"""
    return {name: (name, ()) for name in names}


# {group: {row: (method, options of `train.py adapt`)}}
ABLATIONS = {
    "penalty in the loss": {
        **plain("lora-kl-leading", "lora-kl", "null-kl", "folora-leading-kl",
                "lora-kl-leading-replay", "lora-kl-leading-one-sided", "lora-kl-leading-few"),
        **{f"lora-kl-leading, mu {mu}": ("lora-kl-leading", ("--mu", mu)) for mu in ("1", "10")}},
    "coordinates and gate": plain("folora", "null-adam", "null-ungated", "null-even-gate",
                                  "null-penalty-only", "null-utility-only", "folora-truncated"),
    "start": plain("folora", "folora-leading", "mixed-start", "kaiming-sadam", "leading-adam",
                   "null-frozen", "leading-frozen"),
    "full weights": plain("sadam-full", "full", "full-adam", "full-ungated", "full-penalty-only",
                          "sadam-full-truncated"),
    "strength": {f"folora, {option} {value}": ("folora", (f"--{option}", value))
                 for option, values in (("lam", ("0.3", "3", "10")), ("s-min", ("0", "0.1", "0.6")),
                                        ("tau", ("0.001", "0.1", "1"))) for value in values},
    "calibration": {f"lora-kl-leading, {name}":
                    ("lora-kl-leading", ("--calibration", f"calibration-{name}"))
                    for name in ("mixture", "prose", "facts", "small", "16", "128", "500")},
    "bases": {"folora": ("folora", ()),
              "folora, bfloat16 bases": ("folora", ("--basis-dtype", "bfloat16"))},
    "twice the steps": {f"{name}, 400 steps": (name, ("--steps", "400")) for name in COMPARED},
}
# {name: (source, options of calibrate.py)}; the sources are explained at `runs.calibrate_on`
CALIBRATIONS = {"mixture": ("mixture", ""), "prose": ("prose", ""), "facts": ("facts", ""),
                "small": ("{out}/small", ""), "16": ("own", "--samples 16"),
                "128": ("own", "--samples 128"), "500": ("own", "--samples 500")}
SMALL = "--layers 2 --width 64 --heads 2"  # the smaller base model behind one calibration

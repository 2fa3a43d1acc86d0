"""Tables for the screen and for markdown."""
import torch

from extras.baselines import PullBack
from extras.machine import pick_device
from folora import solve_layer, spectral_gate


def markdown(head, rows):
    """A markdown table with aligned columns."""
    widths = [max(len(line[i]) for line in [head, *rows]) for i in range(len(head))]
    cells = [[c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths))]
             for line in [head, ["-" * width for width in widths], *rows]]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


def score_table(results):
    """One row per model of {model: `eval.evaluate`'s scores}: the target, each kept kind, text, and
    the averages."""
    first = next(iter(results.values()))
    head = ["", f"target (n {first['target']['n']})",
            *(f"{kind} ({kept['n']})" for kind, kept in first["kept"].items()),
            *(f"{name} b/B" for name in first["text"]), "Avg1", "Avg2", "GM"]
    rows = [[name, f"{r['target']['score']:.1f}",
             *(f"{kept['score']:.1f}" for kept in r["kept"].values()),
             *(f"{text['score']:.2f}" for text in r["text"].values()),
             *(f"{r[key]:.1f}" for key in ("Avg1", "Avg2", "GM"))] for name, r in results.items()]
    return markdown(head, rows)


def print_wrong(results):
    """One wrong answer to each kind of item, of {model name: `eval.evaluate`'s scores}."""
    for name, scores in results.items():
        for kind, s in {"target": scores["target"], **scores["kept"]}.items():
            for w in s["wrong"][:1]:
                print(f"  {name}, {kind}: {w['prompt']!r} -> {w['output']!r}, "
                      f"right: {w['right']!r}")


def spectrum_table(layers):
    """One row per layer of {name: {C_pre, C_task, ...}}: how many directions the base model uses,
    the share of its inputs' mean square in the 32 it uses least, and γ and the gate at the default
    τ, λ and s_min. Of a large model the first and last four."""
    rows, names = [], list(layers)
    for name in names if len(names) <= 24 else names[:4] + names[-4:]:
        moments = layers[name]
        m = solve_layer(*(moments[C].to(pick_device()) for C in ("C_pre", "C_task")))
        gate, eigvals, C = spectral_gate(m["eigvals"]), m["eigvals"], m["C_pre"]
        used = C.trace() ** 2 / (C * C).sum()  # participation ratio: d_in if all are used equally
        least = torch.linalg.eigvalsh(C)[:32].sum() / C.trace()
        rows.append([name, f"{len(C)}", f"{used:.1f}", f"{least:.1e}", f"{eigvals[0]:.2f}",
                     f"{eigvals.median():.3f}", f"{eigvals[-1]:.1e}", f"{gate.mean():.3f}",
                     f"{(gate <= 0.3).double().mean():.0%}"])
    return markdown(["layer", "d_in", "used", "in 32", "γ max", "median", "min", "mean gate",
                     "gate 0.3"], rows)


def method_table(methods):
    """One row per method: what it trains, where it starts, how it steps, what it adds, whose it
    is."""
    def words(part):
        return part.__name__.removesuffix("_start").replace("_", " ") if part else ""

    rows = []
    for name, method in methods.items():
        trained = "full weights" if not method.start else "A, B" if method.train_A else "B"
        extra = [f"{words(method.penalty)} penalty" if method.penalty else "",
                 words(method.rehearsal),
                 "pull back" if issubclass(method.optimizer, PullBack) else "",
                 "protected directions" if method.protected else ""]
        rows.append([name, trained, words(method.start) or "W0", words(method.steps) or "adam",
                     ", ".join(filter(None, extra)) or "-", method.source])
    return markdown(["method", "trains", "start", "steps", "adds", "source"], rows)

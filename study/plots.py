"""The report's pictures. Colours are Okabe and Ito's and three of Tol's, which stay distinct for
colour-blind readers; markers differ too."""
import math

from extras.files import atomic_write, load
from folora import solve_layer, spectral_gate
from study.report import short, swept
from study.stats import mean
from study.sweeps import settled, snapshot_runs, sweep

LOOKS = {"sadam-full-truncated": ("#332288", "p"), "sadam-full": ("#882255", "*"),
         "lora-kl-leading": ("#D55E00", "P"), "lora-kl": ("#56B4E9", "v"),
         "folora-leading": ("#009E73", "s"), "folora": ("#0072B2", "o"),
         "folora-replay": ("#999933", "h"), "replay": ("#E69F00", "^"), "full": ("#CC79A7", "D"),
         "lora": ("#000000", "X")}
OTHERS = ("#AAAAAA", ".")


def pyplot():
    try:
        import matplotlib
    except ImportError:
        raise ValueError("pictures need matplotlib; install it with: pip install matplotlib")
    matplotlib.use("Agg")
    matplotlib.rcParams.update({"font.size": 9, "axes.spines.top": False,
                                "axes.spines.right": False, "legend.frameon": False})
    from matplotlib import pyplot
    return pyplot


def panels(titles, ylabel, draw):
    """A figure with one panel per title, drawn by draw(ax, title), and one legend below."""
    plt = pyplot()
    figure, axes = plt.subplots(1, len(titles), figsize=(9, 3.2), sharey=True, squeeze=False)
    for ax, title in zip(axes[0], titles):
        ax.set_title(short(title))
        draw(ax, title)
    axes[0][0].set_ylabel(ylabel)
    handles, labels = axes[0][0].get_legend_handles_labels()
    rows = 1 if len(labels) < 8 else 2
    figure.legend(handles, labels, loc="lower center", columnspacing=1, handlelength=1.5,
                  handletextpad=0.4, ncol=max(1, math.ceil(len(labels) / rows)))
    figure.tight_layout(rect=(0, 0.02 + 0.06 * rows, 1, 1))
    return figure


def frontier(study):
    """Target against retention: each method's curve from rate 0 to the rate of its highest target;
    seed 0, validation items."""
    def draw(ax, task):
        start = study.start(task, "valid")
        others = [m for m in study.methods if m not in LOOKS]
        for method in (*LOOKS, *others):
            found = sorted(sweep(study, task, method)[1].items())
            scores = [start, *(f["valid"] for _, f in found if "valid" in f)]
            points = [(s["Avg2"], s["Avg1"]) for s in scores]
            points = points[:points.index(max(points)) + 1]
            colour, marker = LOOKS.get(method, OTHERS)
            label = method if method in LOOKS else "the others" if method == others[0] else None
            ax.plot(*zip(*points), color=colour, marker=marker, markersize=5, linewidth=1.3,
                    label=label, zorder=2 if method in LOOKS else 1)
        ax.axvline(study.level(task), color="#AAAAAA", linestyle=":", linewidth=1)
        ax.axhline(start["Avg1"], color="#AAAAAA", linestyle="--", linewidth=1)
        ax.set(xlabel="learned: target, % right", xlim=(-3, 103), ylim=(-3, 103))
    return panels(study.tasks, "kept: Avg1, % right", draw)


def drift(study):
    """Retention against three measures of ΔW: all runs of the sweeps."""
    keys = {"drift ‖ΔW X_pre‖, %": "drift", "size ‖ΔW‖_F": "size", "estimated KL, nats": "kl"}

    def draw(ax, title):
        for method, result in swept(study):
            if keys[title] in result:
                colour, marker = LOOKS.get(method, OTHERS)
                ax.plot(result[keys[title]], result["valid"]["Avg1"], color=colour, marker=marker,
                        markersize=4, linestyle="", zorder=2 if method in LOOKS else 1)
        for method, (colour, marker) in {**LOOKS, "the others": OTHERS}.items():
            ax.plot([], [], color=colour, marker=marker, linestyle="", label=method)
        ax.set_xscale("log")
        ax.set(ylim=(-3, 103))
    return panels(list(keys), "kept: Avg1, % right", draw)


def spectrum(study):
    """γ of the middle block's layers, and its gate at λ = 1 and s_min = 0.3."""
    path = study.folder(study.tasks[0]) / "calibration.pt"
    layers = load(path, "calibration", "python calibrate.py")["layers"]

    def draw(ax, name):
        eigvals = solve_layer(layers[name]["C_pre"], layers[name]["C_task"])["eigvals"]
        ax.semilogy(eigvals.clamp(min=1e-6), color="#0072B2",
                    label="γ, utility per unit of penalty")
        ax.semilogy(spectral_gate(eigvals), color="#D55E00", linestyle="--",
                    label="gate: γ/(γ + 1), at least 0.3")
        ax.axhline(1, color="#AAAAAA", linestyle=":", linewidth=1)
        ax.set(title=name.removeprefix(study.base.block_prefix), xlabel="direction",
               ylim=(1e-3, 300))
    middle = f"{study.base.block_prefix}{study.base.config.n_layer // 2}."
    return panels([name for name in layers if name.startswith(middle)],
                  f"{short(study.tasks[0])}: γ, gate", draw)


def skills(study):
    """Learned and kept, skill by skill, at the settled rate: mean over the reported seeds."""
    def draw(ax, task):
        start = study.start(task, "test")
        kinds, bars = ["target", *start["kept"]], {"foundation": ("#DDDDDD", [start])}
        for method in reversed(LOOKS):
            bars[method] = LOOKS[method][0], [f["test"] for f in settled(study, task, method)[1]]
        width = 0.9 / len(bars)
        for i, (name, (colour, runs)) in enumerate(bars.items()):
            of = {"target": lambda s: s["Avg2"],
                  **{kind: lambda s, kind=kind: s["kept"][kind]["score"] for kind in kinds[1:]}}
            values = [mean(of[kind](s) for s in runs) for kind in kinds if runs]
            ax.bar([x + (i - len(LOOKS) / 2) * width for x in range(len(values))], values,
                   0.9 * width, color=colour, label=name)
        ax.set_xticks(range(len(kinds)), kinds, rotation=30)
    return panels(study.tasks, "% right", draw)


def training(study):
    """Target and retention over the steps of one run per method, test items."""
    def draw(ax, task):
        for run in snapshot_runs(study, task):
            points = (study.result(run) or {}).get("curve")
            if points:
                steps, target, retained = zip(*points)
                colour, marker = LOOKS[run.method]
                look = dict(color=colour, marker=marker, markersize=3)
                ax.plot(steps, target, label=f"{run.method}: target", **look)
                ax.plot(steps, retained, label=f"{run.method}: kept", linestyle="--", **look)
        ax.set(xlabel="step", ylim=(-3, 103))
    return panels(study.tasks, "% right", draw)


def write(study, folder):
    """Write every picture for which there are runs to folder/<name>.png."""
    pictures = [frontier, drift, spectrum, skills]
    if any(study.result(run) for task in study.tasks for run in snapshot_runs(study, task)):
        pictures.append(training)
    for picture in pictures:
        path, figure = folder / f"{picture.__name__}.png", picture(study)
        atomic_write(path, lambda f: figure.savefig(f, dpi=150, format="png"))
        print(f"{path} written")

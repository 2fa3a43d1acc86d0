"""The reports' pictures, in colours of Okabe and Ito that stay distinct for colour-blind readers;
markers differ too."""
from extras.files import atomic_write
from study import stats
from study.arms import ARMS, TARGET
from study.runs import Curve

LOOKS = {"lora r32": ("#000000", "X"), "folora r32": ("#0072B2", "s"),
         "folora-pull-back r32": ("#009E73", "o"), "distill r32": ("#D55E00", "P"),
         "sadam-full": ("#CC79A7", "*")}
FULL = {"full": ("#E69F00", "v")}  # shown for a published model, too
RANKS = {("lora", ""): "lora r32", ("folora", ""): "folora r32",  # (method, options): its look
         ("folora-pull-back", "--pull 10"): "folora-pull-back r32"}


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


def panels(tasks, ylabel, draw):
    """A figure with a panel per task, drawn by draw(ax, task), and one legend below."""
    figure, axes = pyplot().subplots(1, len(tasks), figsize=(9, 3.2), sharey=True, squeeze=False)
    for ax, task in zip(axes[0], tasks):
        draw(ax, task)
        ax.set(title=task, ylim=(-3, 103))
    axes[0][0].set_ylabel(ylabel)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=max(1, len(labels)))
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    return figure


def frontier(study, stored):
    """Target against retention along the rates, from rate 0: a line per arm and foundation."""
    def draw(ax, task):
        for arm, (colour, marker) in LOOKS.items():
            for number in study.foundations if arm in study.arms else ():
                start = study.foundation(number).start(task)
                found = study.along(Curve(task, arm, number, study.seeds[0]))[0]
                points = [(r["test"]["Avg2"], r["test"]["Avg1"])
                          for r in (start, *(r for _, r in sorted(found.items()))) if "test" in r]
                ax.plot(*zip(*points), color=colour, marker=marker, markersize=5, linewidth=1,
                        label=arm if number == study.foundations[0] else None)
        ax.axvline(TARGET[task], color="#AAAAAA", linestyle=":", linewidth=1)
        ax.set(xlabel="learned: target, % right", xlim=(-3, 103))
    return panels(study.tasks, "kept, % right", draw)


def rank(study, stored):
    """What is kept at the target against the rank: a point per foundation, a line through means."""
    def draw(ax, task):
        for (method, options), look in RANKS.items():
            colour, marker = LOOKS[look]
            points = {ARMS[name].rank: [v for v in found["kept"] if v is not None]
                      for name, found in stored[task]["arms"].items()
                      if (ARMS[name].method, ARMS[name].options) == (method, options)}
            points = sorted((r, kept) for r, kept in points.items() if kept)
            ax.plot([r for r, _ in points], [stats.mean(kept) for _, kept in points], color=colour,
                    label=f"{method} {options}".replace("--", "").strip())
            ax.plot(*zip(*((r, v) for r, kept in points for v in kept)), color=colour,
                    marker=marker, linestyle="")
        ax.set_xscale("log", base=2)
        ax.set_xticks((8, 32, 64), ("8", "32", "64"))
        ax.set(xlabel="rank")
    tasks = [task for task in study.tasks if "folora r8" in stored[task]["arms"]]
    return panels(tasks or study.tasks, "kept at the target, % right", draw)


def published(curves):
    """What each task taught a published model against what was kept (study.pretrained.curves): a
    line per arm and seed, along its rates."""
    def draw(ax, task):
        for arm, (colour, marker) in (LOOKS | FULL).items():
            for number, points in enumerate(curves[task].get(arm, {}).values()):
                ax.plot([scores[f"{task} nats"] for _, scores in points[1:]],
                        [scores["all %"] for _, scores in points[1:]], color=colour, marker=marker,
                        markersize=6, linewidth=1, label=None if number else arm)
        ax.invert_xaxis()
        ax.set(xlabel="learned: nats per token, unseen items")
    return panels(list(curves), "kept: known questions, % right", draw)


def save(figure, path):
    atomic_write(path, lambda f: figure.savefig(f, dpi=150, format="png"))
    print(f"{path} written")


def write(study, stored, folder):
    """Write the comparison's two to folder/<name>.png."""
    for picture in frontier, rank:
        save(picture(study, stored), folder / f"{picture.__name__}.png")

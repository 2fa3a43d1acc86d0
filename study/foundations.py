"""Rank and foundation: how much of the result depends on each?

    python -m study foundations --out out          # 3 foundations, math; stop and repeat as you like

The comparison's intervals cover fine-tuning seeds on one foundation. Here every arm, a method at a
rank, is run on several foundations, which differ in the seed of their pretraining. An arm's rate
goes up or down in steps of √2 until its target score brackets TARGET percent right on test items;
what is kept there is interpolated between the two rates. No rate is chosen by what it keeps.
Intervals and tests are over foundations, one fine-tuning seed each.
"""
import argparse
import functools
import math
import multiprocessing
import os
import pathlib

import torch

import calibrate
import train
from extras import cli, files
from extras.machine import set_precision
from extras.tables import markdown
from study import plots, stats
from study.runs import Study, describe
from study.sweeps import Run, rate_curve, target_score

TARGET, SEED = 80, 1
ARMS = {  # name: (method, rank, first rate index; see sweeps.rate)
    "lora, rank 8": ("lora", 8, 4), "lora, rank 32": ("lora", 32, 2),
    "folora, rank 8": ("folora", 8, 7), "folora, rank 32": ("folora", 32, 3),
    "folora, rank 64": ("folora", 64, 1), "folora's steps in H alone, rank 32":
    ("null-penalty-only", 32, 3), "full": ("full", 8, -3), "sadam-full": ("sadam-full", 8, -1),
    "lora-kl, rank 8": ("lora-kl", 8, 8), "l2-sp, rank 8": ("l2-sp", 8, 6),
    "replay, rank 8": ("replay", 8, 8)}
REFERENCE = "folora, rank 32"
CURVES = {"lora, rank 8": ("#000000", "X"), "folora, rank 8": ("#56B4E9", "o"),
          "folora, rank 32": ("#0072B2", "s"), "sadam-full": ("#882255", "*"),
          "lora-kl, rank 8": ("#D55E00", "P")}


def open_study(args, number):
    """The study of foundation `number`, in a folder of its own."""
    return Study(argparse.Namespace(out=folder_of(args, number), adapt=args.adapt, keep=[],
                                    skip_bad=False, methods=None, quick=False), [args.task])


def folder_of(args, number):
    return str(pathlib.Path(args.out) / f"foundation{number}")


def arm_curve(study, task, arm):
    """(missing runs, {rate index: result}) of an arm, from below TARGET to at or above it."""
    method, rank, first = ARMS[arm]

    def extend(found):
        low, high = min(found), max(found)
        if max(map(target_score, found.values())) < TARGET:
            return {high + 1} if high < first + 4 else set()
        return {low - 1} if target_score(found[low]) >= TARGET and low > first - 5 else set()
    return rate_curve(study, task, method, SEED, ("--rank", str(rank)), {first}, extend)


def do_arm(args, job):
    """One worker's job: all runs of (foundation, arm)."""
    set_precision(args.precision)
    torch.set_num_threads(1)
    number, arm = job
    study = open_study(args, number)
    while runs := arm_curve(study, args.task, arm)[0]:
        for run in runs:
            result = study.do(run)
            if result:
                print(f"foundation {number}  {describe(run, result)}", flush=True)


def at_target(start, found, of):
    """of(scores) where the target score first passes TARGET, linear between the two rates; rate 0 is
    the foundation itself. None where no rate reaches it."""
    points = [(start["Avg2"], of({"test": start, "drift": 0, "kl": 0}))]
    for _, result in sorted(found.items()):
        if "test" not in result:
            continue
        points.append((result["test"]["Avg2"], of(result)))
        (t0, y0), (t1, y1) = points[-2:]
        if t1 >= TARGET:
            return y1 if t1 == t0 else y0 + (y1 - y0) * (TARGET - t0) / (t1 - t0)
    return None


def paired(a, b):
    """(mean difference, two-sided p) of a paired t-test over foundations that reached the target in
    both; p is None for fewer than two."""
    gaps = [x - y for x, y in zip(a, b) if None not in (x, y)]
    if len(gaps) < 2:
        return (stats.mean(gaps) if gaps else None), None
    spread = math.sqrt(sum((g - stats.mean(gaps)) ** 2 for g in gaps) / (len(gaps) - 1))
    if not spread:
        return stats.mean(gaps), float(stats.mean(gaps) == 0)
    t = stats.mean(gaps) / (spread / math.sqrt(len(gaps)))
    return stats.mean(gaps), stats.t_pvalue(t, len(gaps) - 1)


MEASURES = {"kept": lambda r: r["test"]["Avg1"],
            "facts": lambda r: r["test"]["kept"]["facts"]["score"],
            "drift": lambda r: r["drift"], "kl": lambda r: r["kl"]}


def report(args, studies):
    """The table, its values as JSON, and the picture of five arms."""
    values = {}
    for arm in ARMS:
        curves = [(study.start(args.task, "test"), arm_curve(study, args.task, arm)[1])
                  for study in studies]
        values[arm] = {name: [at_target(start, found, of) for start, found in curves]
                       for name, of in MEASURES.items()}
    rows = []
    for arm, found in values.items():
        gap, p = paired(found["kept"], values[REFERENCE]["kept"])
        rows.append([arm, " / ".join("-" if v is None else f"{v:.0f}" for v in found["kept"]),
                     *(stats.interval(found[name]) for name in ("kept", "facts", "drift")),
                     stats.interval([v and 1000 * v for v in found["kl"]]),
                     "" if arm == REFERENCE or gap is None else
                     f"{gap:+.0f}" + ("" if p is None else f" (p {p:.3f})")])
    head = [f"{args.task}, at {TARGET} % right", "kept, per foundation", "kept", "facts", "drift, %",
            "KL, mnats", f"against {REFERENCE}"]
    table = markdown(head, rows)
    print(table)
    out = pathlib.Path(args.out)
    files.atomic_write(out / f"foundations-{args.task}.md", lambda f: f.write(f"{table}\n".encode()))
    files.write_json(out / f"foundations-{args.task}.json",
                     {"target": TARGET, "seed": SEED, "foundations": args.foundations,
                      "values": values})
    if args.assets:
        path = pathlib.Path(args.assets) / "rank.png"
        files.atomic_write(path, lambda f: picture(args, studies).savefig(f, dpi=150, format="png"))
        print(f"{path} written")


def picture(args, studies):
    """Target against retention, five arms, one panel per foundation."""
    def draw(ax, title):
        study = studies[int(title.split()[-1])]
        start = study.start(args.task, "test")
        for arm, (colour, marker) in CURVES.items():
            found = sorted(arm_curve(study, args.task, arm)[1].items())
            points = [(s["Avg2"], s["Avg1"]) for s in
                      [start, *(f["test"] for _, f in found if "test" in f)]]
            ax.plot(*zip(*points), color=colour, marker=marker, markersize=6, label=arm)
        ax.axvline(TARGET, color="#AAAAAA", linestyle=":", linewidth=1)
        ax.set(xlabel="learned: target, % right", xlim=(-3, 103), ylim=(-3, 103))
    titles = [f"foundation {number}" for number in range(args.foundations)]
    return plots.panels(titles, "kept: Avg1, % right", draw)


def foundations(args):
    """Pretrain and calibrate each foundation, do what is missing of every arm, report."""
    common = ["--precision", args.precision] if args.precision else []
    for number in range(args.foundations):
        out = ["--out", folder_of(args, number), *common]
        train.main(["pretrain", "--seed", str(number), *out, *args.pretrain.split()])
        calibrate.main(["--task", args.task, *out, *args.calibrate.split()])
    jobs = [(number, arm) for arm in ARMS for number in range(args.foundations)]
    workers = args.workers or os.cpu_count()
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        for _ in pool.imap_unordered(functools.partial(do_arm, args), jobs):
            pass
    report(args, [open_study(args, number) for number in range(args.foundations)])


def add_command(commands):
    p = commands.add_parser("foundations", help="rank and foundation: how much depends on each")
    p.set_defaults(run=foundations)
    p.add_argument("--task", default="math", help="a task that tasks.py makes")
    p.add_argument("--foundations", type=cli.positive_int, default=3, help="pretraining seeds")
    p.add_argument("--workers", type=cli.positive_int, help="processes; default: one per core")
    p.add_argument("--assets", metavar="FOLDER", help="also draw the picture, there")
    for stage in "pretrain", "calibrate", "adapt":
        p.add_argument(f"--{stage}", default="", metavar="OPTIONS", help="options of that stage")
    cli.add_common(p)

"""The report: tables and pictures of the finished runs, as text, and all values as JSON."""
import dataclasses
import math
import pathlib
import statistics

from extras.tables import markdown
from extras.files import atomic_write, write_json
from study.runs import Study, size_control, step_times
from study.stats import interval, mean, rank_correlation, welch
from study.sweeps import LEVEL, rate, seeds, settled, sweep
from study.variants import ABLATIONS, BASELINES, COMPARED


@dataclasses.dataclass
class Table:
    """Rows of raw values and, for each column, its heading and how its values are shown: a format
    such as "{:.1f}", or a function. None is shown as "-"."""
    title: str
    columns: dict
    rows: list

    def markdown(self):
        def cell(value, form):
            return "-" if value is None else form(value) if callable(form) else form.format(value)
        rows = [[cell(*pair) for pair in zip(row, self.columns.values())] for row in self.rows]
        return f"{self.title}\n\n{markdown(list(self.columns), rows)}"

    def json(self):
        return {"title": self.title, "rows": [dict(zip(self.columns, row)) for row in self.rows]}


def short(task):
    return pathlib.Path(task).stem


def joined(form):
    """Shows a list of values, one per task, as "97 / 100 / -"."""
    return lambda values: " / ".join("-" if v is None else form.format(v) for v in values)


# ------------------------------------------------------------------------------------------------
# Retention

def at_level(study, task, found, split, share=1.0, of=lambda scores: scores["Avg1"]):
    """Retention (Avg1, or another score) where the target score is `share` times the level: linear
    between the two rates where it first passes that, with the base model as rate 0; None if no rate
    reaches it."""
    level, start = share * study.level(task), study.start(task, split)
    points = [(start["Avg2"], of(start))]
    for _, result in sorted(found.items()):
        if split in result:
            points.append((result[split]["Avg2"], of(result[split])))
            (t0, kept0), (t1, kept1) = points[-2:]
            if t1 >= level:
                return kept1 if t1 == t0 else kept0 + (kept1 - kept0) * (level - t0) / (t1 - t0)
    return None


def frontier_area(study, task, found):
    """Mean, over target scores of 1 to 100, of the best retention at a rate that reaches it."""
    scores = [study.start(task, "valid"), *(f["valid"] for f in found.values() if "valid" in f)]
    return mean(max((s["Avg1"] for s in scores if s["Avg2"] >= target), default=0)
                for target in range(1, 101))


def matched(study, task, method, other=()):
    """Retention at the level for each reported seed, test items; None where it is not reached."""
    return [at_level(study, task, found, "test")
            for found in seeds(study, task, method, other).values()]


def at_levels(study, chosen):
    """The tasks' columns."""
    return {f"{short(task)}, at {study.level(task):.0f}": interval for task in chosen}


def headline(study):
    """The first table. Its last four columns are of seed 0's sweep, validation items."""
    rows = []
    for method in study.methods:
        sweeps = {task: sweep(study, task, method) for task in study.tasks}
        if any(missing for missing, _ in sweeps.values()):
            continue
        found = {task: f for task, (_, f) in sweeps.items()}
        gm = [{k: x["valid"]["GM"] for k, x in f.items() if "valid" in x} for f in found.values()]
        rows.append([method, *(matched(study, task, method) for task in study.tasks),
                     [at_level(study, task, f, "valid", 0.95 / LEVEL) for task, f in found.items()],
                     mean(frontier_area(study, task, f) for task, f in found.items()),
                     mean(max(g.values(), default=0) for g in gm), mean(g.get(6, 0) for g in gm)])
    return Table(f"Retention (Avg1) where the target score is {LEVEL:.0%} of LoRA's best. "
                 "Test items, mean ±95 % interval (seeds)",
                 {"": "{}", **at_levels(study, study.tasks), "at 95 %": joined("{:.0f}"),
                  "area": "{:.1f}", "best GM": "{:.1f}", f"GM at {rate(6):g}": "{:.1f}"}, rows)


def memory(study, task, method):
    """Bytes that training takes; None if unknown."""
    costs = [x["cost"]["bytes"] for x in sweep(study, task, method)[1].values() if x.get("cost")]
    return costs[0] if costs else None


def comparison(study):
    """Each method against the best baseline that needs no more memory, by Welch's t-test."""
    def against(task, method):
        own = [v for v in matched(study, task, method) if v is not None]
        bytes_, rivals = memory(study, task, method), {}
        for name in BASELINES:
            values = [v for v in matched(study, task, name) if v is not None]
            needs = memory(study, task, name)
            if name != method and values and None not in (bytes_, needs) and needs <= bytes_:
                rivals[name] = values
        if not own or not rivals:
            return None
        best = max(rivals, key=lambda name: mean(rivals[name]))
        return {"baseline": best, **dict(zip(("difference", "p"), welch(own, rivals[best])))}

    def shown(x):
        p = "one seed" if x["p"] is None else "p < 0.001" if x["p"] < 1e-3 else f"p {x['p']:.3f}"
        return f"{x['difference']:+.1f} to {x['baseline']}, {p}"
    rows = [[method, *(against(task, method) for task in study.tasks)] for method in study.methods]
    return Table("Retention at the level, difference to the best baseline that trains in no more "
                 "memory (Welch's t-test over seeds that reach the level; p of that one test)",
                 {"": "{}", **dict.fromkeys(map(short, study.tasks), shown)},
                 [row for row in rows if any(row[1:])])


# ------------------------------------------------------------------------------------------------
# Details

def details(study, task):
    """All scores of each method at its settled rate, over the reported seeds."""
    start, rows = study.start(task, "test"), []
    kinds, texts = list(start["kept"]), list(start["text"])
    for method in study.methods:
        k, runs = settled(study, task, method)
        if not runs:
            continue
        tests = [x["test"] for x in runs]
        cost = next((x["cost"] for x in runs if x.get("cost")), {"bytes": None, "trained": None})
        scores = {kind: mean(t["kept"][kind]["score"] for t in tests) for kind in kinds}
        capped = mean(min(1, scores[kind] / (start["kept"][kind]["score"] or 1)) for kind in kinds)
        rows.append([method, rate(k), [t["Avg2"] for t in tests], *scores.values(),
                     [t["Avg1"] for t in tests],
                     [100 * mean(t["Avg1"] for t in tests) / (start["Avg1"] or 1), 100 * capped],
                     mean(t["GM"] for t in tests),
                     *(mean(t["text"][kind]["score"] for t in tests) for kind in texts),
                     mean(x["size"] for x in runs), mean(x["drift"] for x in runs),
                     mean(x["kl"] for x in runs) if all("kl" in x for x in runs) else None,
                     cost["bytes"], cost["trained"]])
    return Table(f"{short(task)}, each method at its rate for {study.level(task):.0f} (chosen with "
                 "seed 0)", {"": "{}", "rate": "{:g}", "target = Avg2": interval,
                             **dict.fromkeys(kinds, "{:.0f}"), "Avg1": interval,
                             "Avg1 % ratio / capped": joined("{:.0f}"), "GM": "{:.1f}",
                             **{f"{kind} b/B": "{:.2f}" for kind in texts}, "‖ΔW‖": "{:.1f}",
                             "drift %": "{:.1f}", "KL": "{:.3f}",
                             "MB": lambda n: f"{n / 1e6:.1f}",
                             "trained k": lambda n: f"{n / 1e3:.0f}"},
                 rows)


def kept_at_level(study, task, share):
    """Everything that is kept where the target score is `share` times the level; seed 0, validation
    items."""
    start, level, measures = study.start(task, "valid"), share * study.level(task), {}
    for kind in start["kept"]:
        measures[f"{kind} %"] = "{:.1f}", lambda s, kind=kind: s["kept"][kind]["score"]
        measures[f"{kind} nats"] = "{:.2f}", lambda s, kind=kind: s["kept"][kind]["nats"]
    for kind in start["text"]:
        measures[f"{kind} b/B"] = "{:.2f}", lambda s, kind=kind: s["text"][kind]["score"]
    rows = [["foundation", *(of(start) for _, of in measures.values())]]
    for method in study.methods:
        found = sweep(study, task, method)[1]
        rows.append([method, *(at_level(study, task, found, "valid", share, of)
                               for _, of in measures.values())])
    at = f"{-math.log(level / 100):.2f} nats" if task.endswith(".jsonl") else f"{level:.0f}"
    return Table(f"{short(task)}, at {at}: what is kept",
                 {"": "{}", **{name: form for name, (form, _) in measures.items()}}, rows)


def times(study):
    """Time of a step over LoRA's."""
    rows = [[method, statistics.median(found), [min(found), max(found)]]
            for method, found in step_times(study, measure=False).items()]
    return Table(f"{short(study.tasks[0])}: time of a step over LoRA's",
                 {"": "{}", "median": "{:.2f}", "range": "{0[0]:.2f} to {0[1]:.2f}"}, rows)


def swept(study):
    """[(method, result)] of all finished runs of the sweeps."""
    return [(run.method, x) for run, x in study.finished.items()
            if run.seed == 0 and not run.other and "valid" in x]


def correlations(study):
    """Which measure of ΔW predicts retention?"""
    rows = []
    for key, name in (("drift", "drift ‖ΔW X_pre‖"), ("size", "size ‖ΔW‖_F"),
                      ("kl", "estimated KL, Σ ½Tr(S ΔW C ΔWᵀ)")):
        runs = [x for _, x in swept(study) if key in x]
        rows.append([name, rank_correlation([x[key] for x in runs],
                                            [x["valid"]["Avg1"] for x in runs]), len(runs)])
    return Table("Rank correlation (Spearman, ties averaged) of Avg1 with measures of ΔW, over the "
                 "runs of all sweeps", {"": "{}", "correlation": "{:.2f}", "runs": "{}"}, rows)


def ablations(study):
    """A table per group, of those tasks on which any of its own variants has been run."""
    tables = []
    for title, group in ABLATIONS.items():
        own = [v for v in group.values() if v[1] or v[0] not in COMPARED]
        chosen = [task for task in study.tasks if any(seeds(study, task, *v) for v in own)]
        rows = [[name, *(matched(study, task, *variant) for task in chosen)]
                for name, variant in group.items()]
        tables.append(Table(f"Ablation: {title}. Retention at the level",
                            {"": "{}", **at_levels(study, chosen)},
                            [row for row in rows if any(row[1:])]))
    for task in study.tasks:
        rows = [[method, x["factor"], x["Avg2"], x["Avg1"]]
                for method, x in size_control(study, task, measure=False).items()]
        tables.append(Table(f"{short(task)}, each ΔW rescaled to the size of FoLoRA's",
                            {"": "{}", "factor": "{:.2f}", "target": "{:.1f}", "Avg1": "{:.1f}"},
                            rows))
    return tables


def report(args, chosen):
    """Print the tables; write them to out/report.md, their values to out/report.json, and the
    pictures to the folder args.assets, if given."""
    study = Study(args, chosen)
    for task in study.tasks:
        if study.level(task) is None:
            raise ValueError(f"{args.out} holds no comparison on {task} yet; run: "
                             "python -m study compare")
    if study.keep:
        tables = [kept_at_level(study, task, share)
                  for task in study.tasks for share in (1, 0.95 / LEVEL)]
    else:
        tables = [headline(study), comparison(study)]
    tables += [*(details(study, task) for task in study.tasks), times(study), correlations(study),
               *ablations(study)]
    tables = [table for table in tables if table.rows]
    text = "\n\n".join(table.markdown() for table in tables)
    atomic_write(study.out / "report.md", lambda f: f.write(f"{text}\n".encode()))
    write_json(study.out / "report.json", {"levels": {task: study.level(task) for task in chosen},
                                           "tables": [table.json() for table in tables]})
    print(text)
    if args.assets:
        from study import plots  # needs matplotlib
        plots.write(study, pathlib.Path(args.assets))

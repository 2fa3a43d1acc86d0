"""The report: a table per task and group of arms, correlations, all values as JSON, pictures."""
import json
import pathlib

from extras.files import atomic_write, friendly_errors, write_json
from extras.tables import markdown
from study import stats
from study.arms import GROUPS, TARGET
from study.runs import Curve, Study, target_score

MEASURES = {  # of a result, at the target
    "kept": lambda r: r["test"]["Avg1"],
    "facts": lambda r: r["test"]["kept"].get("facts", {}).get("score"),  # None for marked-facts
    "facts not sampled": lambda r: r["test"]["unsampled"],
    "drift, %": lambda r: r["drift"],
    "KL, mnats": lambda r: 1000 * r["kl"]}


def at_target(start, found, target, of):
    """of(result) where the target score first passes `target`, or None; rate 0 is the foundation
    itself, `start`."""
    results = [start, *(r for _, r in sorted(found.items()) if "test" in r)]
    return stats.crossing([(target_score(r), of(r)) for r in results], target)


def values(study, task, arm):
    """{measure: one value per foundation, the mean over the seeds that reach the target, or None};
    {} while a curve is unfinished."""
    found = {name: [] for name in MEASURES}
    for number in study.foundations:
        curves = [study.along(Curve(task, arm, number, seed)) for seed in study.seeds]
        if any(missing is not None for _, missing in curves):
            return {}
        start = study.foundation(number).start(task)
        for name, of in MEASURES.items():
            seeds = [at_target(start, results, TARGET[task], of) for results, _ in curves]
            seeds = [v for v in seeds if v is not None]
            found[name].append(stats.mean(seeds) if seeds else None)
    return found


def gap(kept, reference):
    """"+1.5 (p 0.336)": the mean of kept - reference over foundations, by a paired t-test."""
    mean, p = stats.paired(kept, reference)
    return ("" if mean is None else f"{mean:+.1f}" if p is None else
            f"{mean:+.1f} (p {f'{p:.3f}' if p >= 0.0005 else '< 0.001'})")


def table(title, found, against=None):
    """Markdown of {arm: values}, its last column the differences to one arm; default: the first."""
    against, rows = against if against in found else next(iter(found)), []
    for arm, measures in found.items():
        kept = measures["kept"]
        rows.append([arm, " / ".join("-" if v is None else f"{v:.0f}" for v in kept),
                     *map(stats.interval, measures.values()),
                     "" if arm == against else gap(kept, found[against]["kept"])])
    return f"{title}\n\n" + markdown(["", "kept, per foundation", *found[against],
                                      f"against {against}"], rows)


def over_tasks(stored):
    """{arm: {"kept": mean over the tasks, per foundation}} of the arms that reach all targets."""
    tasks = [task["arms"] for task in stored.values()]
    columns = {arm: list(zip(*(arms[arm]["kept"] for arms in tasks)))
               for arm in tasks[0] if all(arm in arms for arms in tasks)}
    return {arm: {"kept": [stats.mean(column) for column in kept]}
            for arm, kept in columns.items() if not any(None in column for column in kept)}


def mean_table(stored, against=None):
    """The table of means over several tasks; "" where there is one task, or no such arm."""
    means = over_tasks(stored) if len(stored) > 1 else {}
    title = f"mean over {', '.join(stored)}, of the arms that reach all targets"
    return table(title, means, against) if means else ""


def joined(reports):
    """{task: {"target": …, "arms": …}} of several results.json, each of other foundations: the arms
    that all of them have. ValueError if a foundation is in two."""
    seeds = [seed for report in reports for seed in report["foundations"]]
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"the reports are of foundations {seeds}; each must be in one of them")
    first, *others = (report["tasks"] for report in reports)
    found = {}
    for task, content in first.items():
        parts = [content["arms"], *(other.get(task, {"arms": {}})["arms"] for other in others)]
        found[task] = {"target": content["target"], "arms": {
            arm: {name: [v for part in parts for v in part[arm][name]] for name in MEASURES}
            for arm in parts[0] if all(arm in part for part in parts)}}
    return found


def join(args):
    """Print the tables of several reports' foundations together."""
    reports = []
    for file in args.files:
        with friendly_errors(file, "give a results.json that study report wrote"):
            reports.append(json.loads(pathlib.Path(file).read_text()))
            joined(reports[-1:])  # whatever is wrong with it is said of this file
    stored = joined(reports)
    stored = {task: content for task, content in stored.items() if content["arms"]}
    if not stored:
        raise ValueError("these reports have no task and arm in common")
    for task, content in stored.items():
        title = f"{task}, at {content['target']} % right on the task"
        print(f"{table(title, content['arms'], args.against)}\n")
    print(mean_table(stored, args.against))


def correlations(study, task):
    """{measure of ΔW: (rank correlation with what is kept, the same given the target score since
    anything pushed harder moves more)}, over all runs; and their number."""
    runs = [r for (curve, _), r in study.finished.items() if curve.task == task and "test" in r]
    kept, target = ([r["test"][key] for r in runs] for key in ("Avg1", "Avg2"))
    found = {key: [r[key] for r in runs] for key in ("kl", "drift", "size")}
    return {key: (stats.rank_correlation(measure, kept),
                  stats.partial_rank_correlation(measure, kept, target))
            for key, measure in found.items()}, len(runs)


def of_task(study, task, against=None):
    """(markdown of its tables, their values for JSON)."""
    found = {arm: values(study, task, arm) for arm in study.arms}
    found = {arm: measures for arm, measures in found.items() if measures}
    texts, main = [], {arm.name for arm in GROUPS["methods"]}
    for group, arms in GROUPS.items():
        rows = {arm.name: found[arm.name] for arm in arms if arm.name in found}
        if rows.keys() - (main if group != "methods" else ()):
            title = f"{task}, {group}, at {TARGET[task]} % right on the task"
            texts.append(table(title, rows, against))
    related, runs = correlations(study, task)
    texts.append(f"{task}, rank correlation with what is kept, {runs} runs\n\n" + markdown(
        ["measure of ΔW", "alone", "given the target score"],
        [[key, *("-" if v is None else f"{v:.2f}" for v in pair)]
         for key, pair in related.items()]))
    return "\n\n".join(texts), {"target": TARGET[task], "arms": found, "runs": runs,
                                "correlations": related}


def report(args):
    """Print the finished arms; write out/results.md, their values to out/results.json, and the
    pictures to the folder args.assets, if given."""
    study, out = Study(args), pathlib.Path(args.out)
    texts, found = zip(*(of_task(study, task, args.against) for task in study.tasks))
    stored = dict(zip(study.tasks, found))
    text = "\n\n".join(filter(None, [*texts, mean_table(stored, args.against)]))
    atomic_write(out / "results.md", lambda f: f.write(f"{text}\n".encode()))
    write_json(out / "results.json", {"foundations": study.foundations, "seeds": study.seeds,
                                      "tasks": stored})
    print(text)
    if args.assets:
        from study import plots  # needs matplotlib
        plots.write(study, stored, pathlib.Path(args.assets))

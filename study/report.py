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
    tasks = [content["arms"] for content in stored.values()]
    columns = {arm: list(zip(*(arms[arm]["kept"] for arms in tasks)))
               for arm in tasks[0] if all(arm in arms for arms in tasks)}
    return {arm: {"kept": [stats.mean(column) for column in kept]}
            for arm, kept in columns.items() if not any(None in column for column in kept)}


def tables(stored, against=None):
    """Markdown of {task: {"target": …, "arms": {arm: values}, perhaps "correlations", "runs"}}: a
    table per task and group of arms, and one of the means over several tasks."""
    texts = []
    for task, content in stored.items():
        found, shown = content["arms"], set()
        for group, arms in GROUPS.items():
            rows = {arm.name: found[arm.name] for arm in arms if arm.name in found}
            if rows.keys() - shown:  # a group with nothing new is left out
                title = f"{task}, {group}, at {content['target']} % right on the task"
                texts.append(table(title, rows, against))
                shown |= rows.keys()
        if "correlations" in content:
            title = f"{task}, rank correlation with what is kept, {content['runs']} runs"
            texts.append(f"{title}\n\n" + markdown(
                ["measure of ΔW", "alone", "given the target score"],
                [[key, *("-" if v is None else f"{v:.2f}" for v in pair)]
                 for key, pair in content["correlations"].items()]))
    means = over_tasks(stored) if len(stored) > 1 else {}
    if means:
        title = f"mean over {', '.join(stored)}, of the arms that reach all targets"
        texts.append(table(title, means, against))
    return "\n\n".join(texts)


def correlations(study, task):
    """{measure of ΔW: (rank correlation with what is kept, the same given the target score since
    anything pushed harder moves more)}, over all runs; and their number."""
    runs = [r for (curve, _), r in study.finished.items() if curve.task == task and "test" in r]
    kept, target = ([r["test"][key] for r in runs] for key in ("Avg1", "Avg2"))
    found = {key: [r[key] for r in runs] for key in ("kl", "drift", "size")}
    return {key: (stats.rank_correlation(measure, kept),
                  stats.partial_rank_correlation(measure, kept, target))
            for key, measure in found.items()}, len(runs)


def collected(study, task):
    """The values of the arms whose curves are finished, as `tables` takes them."""
    found = {arm: values(study, task, arm) for arm in study.arms}
    related, runs = correlations(study, task)
    return {"target": TARGET[task], "arms": {arm: v for arm, v in found.items() if v},
            "runs": runs, "correlations": related}


def report(args):
    """Print the finished arms; write out/results.md, their values to out/results.json, and the
    pictures to the folder args.assets, if given."""
    study, out = Study(args), pathlib.Path(args.out)
    stored = {task: collected(study, task) for task in study.tasks}
    text = tables(stored, args.against)
    atomic_write(out / "results.md", lambda f: f.write(f"{text}\n".encode()))
    write_json(out / "results.json", {"foundations": study.foundations, "seeds": study.seeds,
                                      "tasks": stored})
    print(text)
    if args.assets:
        from study import plots  # needs matplotlib
        plots.write(study, stored, pathlib.Path(args.assets))


# ------------------------------------------------------------------------------------------------
# Several reports together

def joined(reports):
    """{task: {"target": …, "arms": …}} of several results.json, each of other foundations: tasks
    and arms that all of them have. ValueError if a foundation is in two."""
    seeds = [seed for report in reports for seed in report["foundations"]]
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"the reports are of foundations {seeds}; each must be in one of them")
    found = {}
    for task, content in reports[0]["tasks"].items():
        parts = [report["tasks"].get(task, {"arms": {}})["arms"] for report in reports]
        arms = {arm: {name: [v for part in parts for v in part[arm][name]] for name in MEASURES}
                for arm in parts[0] if all(arm in part for part in parts)}
        if arms:
            found[task] = {"target": content["target"], "arms": arms}
    return found


def join(args):
    """Print the tables of several reports' foundations together."""
    reports = []
    for file in args.files:
        with friendly_errors(file, "give a results.json that study report wrote"):
            reports.append(json.loads(pathlib.Path(file).read_text()))
            joined(reports[-1:])  # whatever is wrong with it is said of this file
    stored = joined(reports)
    if not stored:
        raise ValueError("these reports have no task and arm in common")
    print(tables(stored, args.against))

"""A sequence of tasks: each is learned on the model that the last one left, which is calibrated
anew. What is left of the first, and of the foundation, after the third?

    python -m study sequence --arms "lora r8" "folora r32"    # after `compare` of the same arms
"""
import copy
import shlex

import calibrate
import tasks
import train
from eval import score_items
from extras.files import atomic_write, cached_json, load_adapter, save
from extras.machine import pick_device
from extras.tables import markdown
from extras.user_data import load_items
from study import runs
from study.arms import TARGET
from study.runs import Curve, Study, target_score
from study.variants import METHODS

KEPT = ("facts", "lookup", "words")  # what none of the three tasks uses


def scores(model):
    """{task or kind: percent right on test items}."""
    items = {**{task: load_items(task, "test", runs.ITEMS) for task in tasks.TASKS},
             **{kind: tasks.kept_items(kind, "test", runs.ITEMS) for kind in KEPT}}
    return {name: score_items(model, chosen)["score"] for name, chosen in items.items()}


def first_rate(study, curve):
    """The lowest rate of a finished curve that reaches the task's target."""
    for k, result in sorted(study.along(curve)[0].items()):
        if target_score(result) >= TARGET[curve.task]:
            return k
    raise ValueError(f"{curve.arm} reaches {TARGET[curve.task]} on {curve.task} at no rate that "
                     f"was run on foundation {curve.foundation}; run compare with this arm first")


def learn_all(study, arm, number, options):
    """[{"after": task, **scores}]: the tasks one after the other."""
    found, out = [], study.out / f"foundation{number}"
    for place, task in enumerate(study.tasks, 1):
        curve = Curve(task, arm, number, study.seeds[0])
        args = copy.copy(study.args(curve, first_rate(study, curve)))
        args.out = str(out)
        if place > 1 and METHODS[args.method].needs_calibration:  # else compare did it
            calibrate.main(["--task", task, "--out", args.out, *options])
        model = load_adapter(train.adapt(args, METHODS), out, pick_device())
        found.append({"after": task, **scores(model)})
        out = study.out / "sequence" / f"{arm} {number}".replace(" ", "-") / f"{place}"
        out.mkdir(parents=True, exist_ok=True)
        save(out / "foundation.pt", {"kind": "foundation", "model": model.state_dict(),
                                     "settings": {"config": vars(model.config)}})
    return found


def sequence(args):
    """Do what is missing, print the table, and write it to OUT/sequence.md."""
    study, rows = Study(args), []
    for arm in args.arms:
        for number in args.foundations:
            foundation = study.foundation(number)
            path = study.out / f"sequence-{arm}-{number}.json".replace(" ", "-")
            identity = {"settings": [args.tasks, args.calibrate, args.adapt]}
            found = cached_json(path, foundation.identity | identity, lambda: {
                "before": scores(foundation.model),
                "stages": learn_all(study, arm, number, shlex.split(args.calibrate))})
            for stage in [{"after": "-", **found["before"]}, *found["stages"]]:
                after, *values = stage.values()
                rows.append([arm, f"{number}", after, *(f"{value:.0f}" for value in values)])
    text = markdown(["arm", "foundation", "after", *tasks.TASKS, *KEPT], rows)
    atomic_write(study.out / "sequence.md", lambda f: f.write(f"{text}\n".encode()))
    print(text)

"""A study whose runs follow formulas, for tests of what is asked for and what is made of it."""
from study import sweeps
from study.variants import COMPARED


class Imagined:
    """Target score and retention as functions of a run."""
    tasks, methods = ("code",), COMPARED

    def __init__(self, target=None, retention=None, cost=lambda method: 1):
        self.target, self.retention, self.cost, self.finished = target, retention, cost, {}

    def result(self, run):
        return self.finished.get(run)

    def do(self, run):
        assert run not in self.finished, "a run was asked for twice"
        scores = {"Avg2": self.target(run), "Avg1": self.retention(run)}
        scores["GM"] = (scores["Avg1"] * scores["Avg2"]) ** 0.5
        self.finished[run] = {"test" if run.seed else "valid": scores,
                              "cost": {"bytes": self.cost(run.method), "trained": 1}}

    def start(self, task, split):
        return {"Avg2": 0, "Avg1": 100}

    level = sweeps.level


def logistic(middle, width, top):
    """Run -> a curve that rises with the rate index from 0 to top."""
    return lambda run: top / (1 + 2 ** ((middle - run.k) / width))


def do_all(study, ablate=False):
    """Do the whole plan."""
    while runs := sweeps.missing_runs(study, ablate, quick=False):
        for run in runs:
            study.do(run)
    return study

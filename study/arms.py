"""What is compared with what, and how much each is to learn."""
from typing import NamedTuple

# Percent right on test items at which the arms are compared, fixed before the runs reported
TARGET = {"math": 70, "code": 80, "instruct": 70, "math-question": 70, "marked-facts": 80}
# Where a task's curves begin, counted in the rate's grid from those of math
EARLIER = {"math": 0, "code": -3, "instruct": -1, "math-question": 0, "marked-facts": -3}


class Arm(NamedTuple):
    method: str
    rank: int          # 0: full weights
    first: int         # rate index at which its curve on math begins, see `rate`
    options: str = ""  # further options of `train.py adapt`

    @property
    def name(self):
        rank = f" r{self.rank}" if self.rank else ""
        return f"{self.method}{rank} {self.options}".replace("--", "").strip()


def rate(k):
    """Learning rate k of the grid, steps of √2: 0.004 at k = 4."""
    return float(f"{1e-3 * 2 ** (k / 2):.1e}")


FOLORA = Arm("folora", 32, 2)  # the reference, which is the first of its group
PULL_10 = [Arm("folora-pull-back", rank, first, "--pull 10")
           for rank, first in ((32, 3), (8, 6), (64, 1))]
# The most telling come first
METHODS = [
    FOLORA, Arm("lora", 8, 5), Arm("folora", 8, 5), Arm("lora", 32, 3),
    Arm("sadam-full", 0, -2), Arm("lora-kl", 32, 3), Arm("folora-pull-back", 32, 3),
    *PULL_10, Arm("full", 0, -3), Arm("replay", 32, 3), Arm("l2-sp", 32, 3), Arm("distill", 32, 3),
    Arm("lora-null", 32, 2), Arm("corda", 32, 1), Arm("folora-leading", 32, 2),
    Arm("folora", 64, 0), Arm("lora", 64, 1), Arm("replay", 32, 3, "--rehearsal 4"),
    Arm("replay", 32, 3, "--rehearsal 0.25"), Arm("ewc", 32, 3), Arm("ewc", 32, 3, "--mu 20"),
    Arm("l2-sp", 32, 3, "--mu 20"), Arm("wise-ft-0.5", 32, 4), Arm("distill", 8, 6),
    Arm("distill", 64, 1), Arm("lora-kl", 8, 6), Arm("replay", 8, 6)]
QUICK = ("lora r8", "folora r8", "folora r32", "replay r8")
ABLATIONS = {
    "coordinates and gate": [
        *(Arm(method, 32, 2) for method in ("folora", "null-adam", "null-ungated",
                                            "null-penalty-only", "null-utility-only")),
        Arm("folora", 8, 5)],
    "strength": [FOLORA,
                 *(FOLORA._replace(options=f"--{option}") for option in
                   ("lam 0.1", "lam 10", "s-min 0", "s-min 0.1", "tau 0.001", "tau 0.1"))],
    "the baselines' settings": [
        FOLORA, *(Arm(method, 32, first) for method, first in (
            ("corda", 1), ("corda-100", 1), ("sc-lora", -1), ("sc-lora-0.8", -1), ("oplora", 2),
            ("oplora-3", 2), ("milora", 0), ("pissa", -1)))],
    "the number of steps": [FOLORA] + [  # the more, the lower the rate
        Arm(method, rank, first + later, f"--steps {steps}")
        for steps, later in ((200, 2), (800, -2), (1600, -4)) for method, rank, first in
        (("folora", 32, 1), ("lora", 32, 2), ("folora-pull-back", 32, 2), ("sadam-full", 0, -2),
         ("distill", 32, 3))],
    "facts that are not in the samples": [
        arm for method, first in (("folora", 2), ("folora-pull-back", 3), ("distill", 3),
                                  ("replay", 3)) for arm in
        (Arm(method, 32, first), Arm(method, 32, first, "--calibration calibration-untested"))],
    "an adapter that keeps as much": [
        FOLORA, *(arm._replace(options="") for arm in PULL_10), *PULL_10,
        Arm("folora-pull-back-A", 32, 2), Arm("folora-pull-back-B", 32, 2),
        Arm("lora-pull-back", 32, 3), Arm("null-adam-pull-back", 32, 3)]}
GROUPS = {"methods": METHODS, **ABLATIONS}
ARMS = {arm.name: arm for group in GROUPS.values() for arm in group}

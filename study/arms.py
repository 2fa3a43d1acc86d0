"""What is compared with what, and how much each is to learn."""
from typing import NamedTuple

# Percent right on test items at which the arms are compared, fixed before the runs reported
TARGET = {"math": 70, "code": 80, "instruct": 70}
# Where a task's curves begin, in steps of the rate's grid above those of math
EARLIER = {"math": 0, "code": -4, "instruct": -1}


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


# The most telling come first; the first of a group is its reference.
METHODS = [
    Arm("folora", 32, 3), Arm("lora", 8, 6), Arm("folora", 8, 6), Arm("lora", 32, 4),
    Arm("sadam-full", 0, -1), Arm("full", 0, -2), Arm("lora-kl", 32, 5), Arm("replay", 32, 5),
    Arm("l2-sp", 32, 4), Arm("lora-kl", 8, 8), Arm("replay", 8, 7), Arm("distill", 32, 5),
    Arm("replay", 32, 5, "--rehearsal 4"), Arm("wise-ft-0.5", 8, 7), Arm("folora", 64, 1),
    Arm("lora", 64, 2), Arm("lora-null", 32, 3), Arm("folora-leading", 32, 3),
    Arm("corda", 32, 2), Arm("ewc", 8, 8), Arm("ewc", 8, 8, "--mu 20"), Arm("l2-sp", 8, 7),
    Arm("l2-sp", 8, 7, "--mu 20"), Arm("replay", 8, 7, "--rehearsal 4"), Arm("distill", 8, 8)]
QUICK = ("lora r8", "folora r8", "folora r32", "replay r8")
ABLATIONS = {
    "coordinates and gate": [
        Arm(method, rank, first) for rank, first in ((32, 3), (8, 7)) for method in
        ("folora", "null-adam", "null-ungated", "null-even-gate", "null-penalty-only",
         "null-utility-only")],
    "start": [Arm("folora", 32, 3), Arm("folora-leading", 32, 3), Arm("kaiming-sadam", 32, 3)],
    "strength": [Arm("folora", 32, 3),
                 *(Arm("folora", 32, 3, f"--{option}") for option in
                   ("lam 0.1", "lam 10", "s-min 0", "s-min 0.1", "tau 0.001", "tau 0.1"))],
    "twice the steps": [Arm("folora", 32, 3), Arm("folora", 32, 0, "--steps 400"),
                        Arm("folora", 8, 4, "--steps 400"), Arm("lora", 8, 1, "--steps 400"),
                        Arm("sadam-full", 0, -4, "--steps 400")],
    "calibration": [Arm("folora", 32, 3),
                    *(Arm("folora", 32, 3, f"--calibration calibration-{name}")
                      for name in ("true", "prose", "16"))],
    "an adapter that keeps as much": [
        Arm("folora", 32, 3),
        *(Arm(f"folora-{trick}", rank, first + more) for rank, first in ((32, 3), (8, 7))
          for trick, more in (("b-half", 1), ("b-quarter", 1), ("b-eighth", 2), ("average", 0),
                              ("tangent", 2), ("pull-back", 1))),
        Arm("sadam-full-cut32", 0, -1)]}
GROUPS = {"methods": METHODS, **ABLATIONS}
ARMS = {arm.name: arm for group in GROUPS.values() for arm in group}

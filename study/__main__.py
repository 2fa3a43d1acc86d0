"""The study's commands.

    python -m study compare            # all methods; stop and repeat it as you like
    python -m study compare --quick    # four of them, on one task and one foundation
    python -m study ablate             # variants of FoLoRA, on math
    python -m study report --assets assets             # tables and pictures of what is finished
    python -m study join FILE FILE     # the tables of several reports' foundations together
    python -m study sequence           # three tasks, one after the other
    python -m study drift out/code/*/adapter.pt        # where an adapter's drift comes from
    python -m study speed
    python -m study pretrained --texts FOLDER    # SmolLM2 on real tasks
    python -m study gpu --minutes 35   # what only a GPU can show
"""
import os

import tasks
from extras.cli import Parser, add_common, command, nonneg_int, positive_int
from extras.machine import rank_and_world, set_precision
from study import drift, gpu, pretrained, sequence, speed
from study.arms import ABLATIONS, ARMS, METHODS, QUICK
from study.report import join, report
from study.runs import do_all


def study(args):
    """compare, ablate, report."""
    if rank_and_world()[1] > 1:
        raise ValueError("the study starts its own processes; run it without torchrun")
    if args.quick:
        args.foundations, args.all_tasks, args.all_arms = [0], ["math"], QUICK
    args.tasks, args.arms = args.tasks or args.all_tasks, args.arms or args.all_arms
    for name in args.arms:
        if name not in ARMS:
            raise ValueError(f"unknown arm {name!r}; the arms are {', '.join(ARMS)}")
    if not args.report_only:
        do_all(args)
    report(args)


def add_command(commands, name, run, text):
    """The parser of one command, with the options that all have."""
    p = commands.add_parser(name, help=text, description=text)
    p.set_defaults(run=run)
    add_common(p)
    return p


def comparison_command(commands, name, text, arms, all_tasks=tasks.TASKS):
    """The parser of one of study's commands."""
    p = add_command(commands, name, study, text)
    p.set_defaults(all_tasks=list(all_tasks), all_arms=list(dict.fromkeys(a.name for a in arms)),
                   report_only=name == "report")
    p.add_argument("--tasks", nargs="+", choices=tasks.MAKERS, metavar="TASK",
                   help=f"of {', '.join(tasks.MAKERS)}; default: {', '.join(all_tasks)}")
    p.add_argument("--arms", nargs="+", metavar="ARM",
                   help='such as "folora r8"; see study/arms.py')
    p.add_argument("--foundations", type=nonneg_int, nargs="+", default=[0, 1, 2],
                   help="pretraining seeds")
    p.add_argument("--seeds", type=nonneg_int, nargs="+", default=[1], help="of fine-tuning")
    p.add_argument("--quick", action="store_true", help=f"{', '.join(QUICK)}; math, one foundation")
    p.add_argument("--workers", type=positive_int, help="processes; default: one per core")
    p.add_argument("--against", choices=ARMS, metavar="ARM",
                   help="what the tables' last column is to; default: their first arm")
    p.add_argument("--assets", metavar="FOLDER", help="also draw the pictures, there")
    for stage in "pretrain", "calibrate", "adapt":
        p.add_argument(f"--{stage}", default="", metavar="OPTIONS",
                       help=f'options of that stage, as in --{stage}="--seed 1"')


def parser():
    top = Parser(prog="python -m study", description=__doc__.split("\n")[0])
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    comparison_command(commands, "compare", "do what is missing of the comparison, then report",
                       METHODS)
    comparison_command(commands, "ablate", "the same for variants of FoLoRA",
                       sum(ABLATIONS.values(), []), ["math"])
    comparison_command(commands, "report", "tables and pictures of what is done", ARMS.values())
    p = add_command(commands, "join", join, "tables of several reports together")
    p.add_argument("files", nargs="+", metavar="FILE", help="results.json of each report")
    p.add_argument("--against", choices=ARMS, metavar="ARM", help="as for compare")
    p = add_command(commands, "sequence", sequence.sequence, "three tasks, one after the other")
    p.set_defaults(seeds=[1])
    p.add_argument("--tasks", nargs="+", choices=tasks.TASKS, default=list(tasks.TASKS))
    p.add_argument("--arms", nargs="+", choices=ARMS, default=["lora r8", "folora r32"],
                   metavar="ARM", help="see study/arms.py")
    p.add_argument("--foundations", type=nonneg_int, nargs="+", default=[0],
                   help="of those that compare has made")
    for stage in "calibrate", "adapt":
        p.add_argument(f"--{stage}", default="", metavar="OPTIONS", help="as for compare")
    p = add_command(commands, "drift", drift.drift, "how far adapters are from the base, and why")
    p.add_argument("adapters", nargs="+", metavar="adapter.pt")
    p = add_command(commands, "pretrained", pretrained.pretrained, "SmolLM2 on real tasks")
    p.add_argument("--texts", metavar="FOLDER", required=True, help="see docs/pretrained.md")
    p.add_argument("--foundation", default="smollm2", help="as for train.py pretrain")
    p.add_argument("--assets", metavar="FOLDER", help="also draw the picture, there")
    s = add_command(commands, "speed", speed.speed, "time and memory against other libraries")
    g = add_command(commands, "gpu", gpu.gpu, "everything that only a GPU can show")
    for p, names, note in (s, speed.ROWS, ""), (g, gpu.STEPS, "; done again even if done"):
        p.add_argument("--only", nargs="+", choices=names, metavar="NAME",
                       help=f"of {', '.join(names)}{note}")
        p.add_argument("--rehearse", action="store_true",
                       help="micro sizes on the CPU, to see that everything runs")
    s.add_argument("--quick", action="store_true", help="3 rounds, smaller; no main job")
    s.add_argument("--json", metavar="FILE", help="for the values; default: OUT/speed.json")
    g.add_argument("--minutes", type=positive_int, default=35, help="time for all steps together")
    return top


def main(argv=None):
    args = parser().parse_args(argv)
    if args.precision:
        os.environ["FOLORA_PRECISION"] = args.precision  # for workers and subprocesses too
    set_precision()
    run = vars(args).pop("run")  # workers get the rest
    run(args)


if __name__ == "__main__":
    command(main)

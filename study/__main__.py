"""The study's commands.

    python -m study compare            # every method, rate and seed; stop and repeat it as you like
    python -m study compare --quick    # the sweeps of five methods on one task
    python -m study ablate             # variants of FoLoRA
    python -m study report --assets assets             # tables and pictures of what is finished
    python -m study real-text --texts FOLDER --out real
    python -m study foundations        # several foundations and ranks
    python -m study speed
    python -m study gpu --minutes 35   # what only a GPU can show
"""
import os

import tasks
from extras import user_data
from extras.cli import Parser, add_common, command, positive_int
from extras.machine import rank_and_world, set_precision
from study import foundations, gpu, real_text, runs, speed
from study.report import report
from study.variants import ALIASES, METHODS


def study(args):
    """compare, ablate, report, real-text."""
    if rank_and_world()[1] > 1:
        raise ValueError("the study starts its own processes; run it without torchrun")
    for file in args.keep:
        if not file.endswith((".jsonl", ".txt")):
            raise ValueError(f"keep is {file}; it must be a .jsonl file of items or a .txt file")
        user_data.open_file(file).close()
    args.methods = [ALIASES.get(name, name) for name in args.methods or ()]
    for name in args.methods:
        if name not in METHODS:
            raise ValueError(f"unknown method {name!r}; the methods are {', '.join(METHODS)}")
    if args.texts:
        real_text.fill_in(args)
    if args.skip_bad:
        args.calibrate, args.adapt = f"--skip-bad {args.calibrate}", f"--skip-bad {args.adapt}"
    chosen = args.tasks or (["math"] if args.ablate or args.quick else list(tasks.TASKS))
    if not args.report_only:
        runs.compare(args, chosen)
    report(args, chosen)


def comparison_command(commands, name, text, **defaults):
    """The parser of one of study's commands; `defaults` are options that it does not offer."""
    p = commands.add_parser(name, help=text, description=text)
    p.set_defaults(run=study, **{"ablate": False, "report_only": False, "texts": None, **defaults})
    p.add_argument("--tasks", "--task", nargs="+", metavar="TASK",
                   help=f"of {', '.join(tasks.TASKS)}, or .jsonl files; default: all of these, or "
                        "math for quick and ablate")
    p.add_argument("--methods", nargs="+", metavar="METHOD", help=f"of {', '.join(METHODS)}")
    p.add_argument("--quick", action="store_true", help="five methods, seed 0 alone")
    p.add_argument("--keep", metavar="FILE", action="append", default=[],
                   help="a .jsonl or .txt file that must not be forgotten, instead of the task's "
                        "own; may be given several times")
    p.add_argument("--skip-bad", action="store_true", help="leave out malformed or too long rows")
    for stage in "pretrain", "calibrate", "adapt":
        p.add_argument(f"--{stage}", default="", metavar="OPTIONS",
                       help=f'options of that stage, as in --{stage}="--seed 1"')
    p.add_argument("--workers", type=positive_int, help="processes; default: one per core")
    p.add_argument("--assets", metavar="FOLDER", help="also draw the pictures, there")
    add_common(p)
    return p


def parser():
    top = Parser(prog="python -m study", description=__doc__.split("\n")[0])
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    comparison_command(commands, "compare", "do what is missing of the comparison, then report")
    comparison_command(commands, "ablate", "the same for variants of FoLoRA", ablate=True)
    comparison_command(commands, "report", "tables and pictures of what is done", report_only=True)
    p = comparison_command(commands, "real-text", "the comparison on real text, GPT-2's tokens")
    p.add_argument("--texts", metavar="FOLDER", required=True, help="see study/real_text.py")
    foundations.add_command(commands)
    p = commands.add_parser("speed", help="time and memory against what people would otherwise use")
    p.set_defaults(run=speed.speed)
    p.add_argument("--only", nargs="+", choices=speed.ROWS, metavar="ROW",
                   help=f"of {', '.join(speed.ROWS)}")
    p.add_argument("--quick", action="store_true", help="3 rounds, smaller; no main job, no growth")
    p.add_argument("--json", metavar="FILE", help="for the values; default: OUT/speed.json")
    g = commands.add_parser("gpu", help="everything that only a GPU can show")
    g.set_defaults(run=gpu.gpu)
    g.add_argument("--minutes", type=positive_int, default=35, help="time for all steps together")
    g.add_argument("--only", nargs="+", choices=gpu.STEPS, metavar="STEP",
                   help=f"of {', '.join(gpu.STEPS)}; done again even if there is a result")
    for sub in p, g:
        sub.add_argument("--rehearse", action="store_true",
                         help="micro sizes on the CPU, to see that everything runs")
        add_common(sub)
    return top


def main(argv=None):
    args = parser().parse_args(argv)
    if args.precision:
        os.environ["FOLORA_PRECISION"] = args.precision  # for workers and subprocesses too
    set_precision()
    run = args.run
    del args.run  # workers get the rest
    run(args)


if __name__ == "__main__":
    command(main)

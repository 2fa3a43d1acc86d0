"""Evaluate: what was learned, what was kept. `main_job` runs all stages and prints the table.

    python eval.py                   # pretrain, calibrate, adapt with three methods, evaluate
    python eval.py --task math       # the same on another task; finished stages are reused

A target task is scored by its checker, kept knowledge by exact match, both on greedy answers
(percent right); items of a file that have no check by likelihood; held-out text in bits per byte.
Avg1 is the mean of the kept scores, Avg2 the target score, GM = √(Avg1·Avg2).
"""
import math
import shlex
import time
from platform import python_version

import torch

import calibrate
import tasks
import train
from extras.cli import Parser, add_common, add_task, command
from extras.files import (cached_json, fingerprint, load_adapter, load_foundation, task_folder,
                          write_json)
from extras.machine import Progress, describe_machine, pick_device, set_precision
from extras.tables import print_wrong, score_table
from extras.user_data import check_fits, evaluation_items, read_text, read_texts
from model import generate

MAIN_JOB = ["lora", "folora", "folora-pull-back"]  # its methods
ITEMS = 100                                        # of each kind, at most


# ------------------------------------------------------------------------------------------------
# Scores

def answers(model, items, batch=100):
    """The model's greedy answers, cut at the first newline unless a right answer has one itself."""
    encoding, outputs = tasks.get_encoding(model.config.encoding), [None] * len(items)
    stop = [encoding.eot_token]
    if not any("\n" in item.answer for item in items):
        stop += encoding.encode_ordinary("\n")
    longest = max(len(encoding.encode_ordinary(item.answer)) for item in items) + 8  # room to err
    prompts = [[encoding.eot_token] + encoding.encode_ordinary(item.prompt) for item in items]
    budgets = [min(longest, model.config.block_size + 1 - len(prompt)) for prompt in prompts]
    progress, done = Progress("answering", len(items)), 0
    for new in set(budgets):  # equal budgets together, so long prompts don't truncate the others
        indices = [i for i, budget in enumerate(budgets) if budget == new]
        for chunk in (indices[first:first + batch] for first in range(0, len(indices), batch)):
            replies = generate(model, [prompts[i] for i in chunk], new, stop,
                               tick=lambda n: progress(done + len(chunk) * n / new))
            for i, tokens in zip(chunk, replies):
                outputs[i] = encoding.decode(tokens)
            done += len(chunk)
    return outputs


def score_items(model, items):
    """`likelihood`'s scores; for items with a check "score" is the percent right instead, and
    "wrong" has up to three examples."""
    scores = likelihood(model, items)
    if items[0].check:
        wrong = [{"prompt": i.prompt, "output": o, "right": i.answer}
                 for i, o in zip(items, answers(model, items)) if not i.check(o)]
        scores |= {"score": 100 * (1 - len(wrong) / len(items)), "wrong": wrong[:3]}
    return scores


@torch.inference_mode()
def likelihood(model, items, batch=16):
    """How likely the answers are: "nats" per token, "bits_per_byte", and as "score" the geometric
    mean of the tokens' probabilities, 100 exp(-nats)."""
    encoding = tasks.get_encoding(model.config.encoding)
    rows, nats, count = [tasks.response_row(item, encoding) for item in items], 0, 0
    for first in range(0, len(rows), batch):
        x, y = (t.to(model.lm_head.weight.device)
                for t in tasks.response_batch(rows[first:first + batch]))
        targets = (y != -100).sum().item()
        nats += train.loss_of(model, x, y).item() * targets
        count += targets
    size = sum(len(item.answer.encode()) + 1 for item in items)  # + 1: its end token
    return {"score": 100 * math.exp(-nats / count), "n": len(items), "wrong": [],
            "nats": nats / count, "bits_per_byte": nats / math.log(2) / size}


@torch.inference_mode()
def bits_per_byte(model, text, split, most):
    """Mean cross-entropy, in bits per byte, on at most `most` rows of a text's `split`."""
    encoding, length = tasks.get_encoding(model.config.encoding), model.config.block_size
    rows = tasks.held_out_rows(text, split, encoding, length + 1, most)
    if not rows:
        raise ValueError(f"a text of {len(text):,} characters is too short for a row of {length} "
                         "tokens")
    nats, size = 0, sum(len(encoding.decode_bytes(row[1:])) for row in rows)
    batch = max(1, train.MOST_LOGITS // (length * model.config.vocab_size))
    for chunk in torch.tensor(rows, device=model.lm_head.weight.device).split(batch):
        nats += train.loss_of(model, chunk[:, :-1], chunk[:, 1:]).item() * chunk[:, 1:].numel()
    return {"score": nats / math.log(2) / size, "n": len(rows)}


def evaluate(model, items, split, rows=256, text=None):
    """Scores of a model, and their averages, on items {"target": [Item], kind: [Item], ...} and on
    text {name: string} (default: the held-out library text), at most `rows` rows of each."""
    text = text or {kind: tasks.library_text(kind)[1] for kind in tasks.LIBRARY}
    scores = {kind: score_items(model, chosen) for kind, chosen in items.items()}
    target = scores.pop("target")
    avg1 = sum(s["score"] for s in scores.values()) / len(scores) if scores else math.nan
    return {"target": target, "kept": scores,
            "text": {name: bits_per_byte(model, t, split, rows) for name, t in text.items()},
            "Avg1": avg1, "Avg2": target["score"], "GM": math.sqrt(avg1 * target["score"])}


def scores_of(path, model, items, args):
    """Scores of a model, cached as JSON at `path` while its weights and the items stay the same."""
    content = (i.prompt + i.answer for chosen in items.values() for i in chosen)
    identity = {"model": fingerprint(model.state_dict()), "task": args.task, "split": args.split,
                "text": tasks.fingerprint(content), "python": python_version(),
                "keep": tasks.fingerprint(map(read_text, args.keep))}
    return cached_json(path, identity,
                       lambda: evaluate(model, items, args.split, text=read_texts(args.keep)))


# ------------------------------------------------------------------------------------------------
# The main job

def main_job(args):
    """Run every stage that is not up to date, print the table; returns {model name: scores}."""
    set_precision(args.precision)
    began, device = time.time(), pick_device()
    # parse all stages' options and read the user's files first: mistakes show before any work
    evaluation_items(args.task, args.split, 1, args.eval, args.keep, args.skip_bad)
    common = ["--out", args.out, *(["--precision", args.precision] if args.precision else [])]
    task = ["--task", args.task, *(["--skip-bad"] if args.skip_bad else []), *common]
    parse = train.parser().parse_args
    pretrain = parse(["pretrain", *common, *shlex.split(args.pretrain)])
    measure = calibrate.parser().parse_args([*task, *shlex.split(args.calibrate)])
    adapt = [parse(["adapt", *task, "--method", method, *shlex.split(args.adapt)])
             for method in args.methods]

    def stage(title):
        print(f"\n== {title} ({time.time() - began:.0f} s) ==", flush=True)

    print(f"{describe_machine(device)}; Python {python_version()}, torch {torch.__version__}")
    stage("pretrain: the foundation")
    train.pretrain(pretrain)
    stage(f"evaluate the foundation on {args.split} items")
    foundation, _ = load_foundation(args.out, device)
    check_fits(foundation, adapt)  # what does not fit it shows now, not after calibrating
    items = evaluation_items(args.task, args.split, ITEMS, args.eval, args.keep,
                             args.skip_bad, foundation.config)
    path = task_folder(args) / f"foundation-{args.split}.json"
    results = {"foundation": scores_of(path, foundation, items, args)}
    del foundation  # frees memory
    stage("calibrate: what the foundation uses, what the task uses")
    calibrate.calibrate(measure)
    runs = {}
    for run in adapt:
        stage(f"adapt: {run.method}")
        runs[run.method] = train.adapt(run)
    stage(f"evaluate the adapters on {args.split} items")
    for name, adapter in runs.items():
        model = load_adapter(adapter, args.out, device)
        results[name] = scores_of(adapter.with_name(f"{args.split}.json"), model, items, args)
    print_wrong(results)
    print(f"\n{args.task}: percent right on {args.split} items, bits per byte (b/B, lower is "
          f"better) on held-out text\n\n{score_table(results)}\n")
    path = path.with_name(f"results-{args.split}.json")
    write_json(path, results)
    print(f"{path} written; {time.time() - began:.0f} s in all on {describe_machine(device)}")
    return results


def parser():
    p = Parser(description=__doc__.split("\n")[0])
    add_task(p)
    p.add_argument("--eval", metavar="FILE",
                   help="a .jsonl file to test the task on; default: held-out items of the task")
    p.add_argument("--keep", metavar="FILE", action="append", default=[],
                   help="a .jsonl or .txt file to be kept, instead of the task's own; repeatable")
    p.add_argument("--methods", nargs="+", default=MAIN_JOB, help="methods to adapt with")
    p.add_argument("--split", default="test", choices=["valid", "test"],
                   help="valid: for choosing settings; test: for reporting")
    for stage in "pretrain", "calibrate", "adapt":
        p.add_argument(f"--{stage}", default="", metavar="OPTIONS",
                       help=f'options for that stage, as in --{stage}="--seed 1"')
    add_common(p)
    return p


def main(argv=None):
    return main_job(parser().parse_args(argv))


if __name__ == "__main__":
    command(main)

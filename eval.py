"""Evaluate: what was learnt, what was kept. Also the main job: every stage that is missing, then one table.

    python eval.py                   # pretrain, calibrate, adapt with each method, evaluate: the whole story
    python eval.py --task math       # the same on another task; what is already under out/ is reused

A target task is scored by its checker and kept knowledge by exact match, both on greedy answers (percent);
held-out prose and source in bits per byte (lower is better). Avg1 is the mean of the kept scores, Avg2 the
target score, GM = √(Avg1·Avg2).
"""
import argparse
import json
import math
import pathlib
import platform
import shlex
import time

import torch

import calibrate
import tasks
import train
from model import fingerprint, generate, merge_lora, pick_device, write_whole
from train import command, load_adapter, load_foundation, loss_of

METHODS = ["lora", "folora", "folora-top"]  # the main job's


# ------------------------------------------------------------------------------------------------------------
# Scores

def answers(model, items, encoding, batch=200):
    """The model's greedy answer to each item, up to the end of its line."""
    newline, said = encoding.encode_single_token("\n"), []
    longest = max(len(encoding.encode_ordinary(item.answer)) for item in items) + 8
    prompts = [[encoding.eot_token] + encoding.encode_ordinary(item.prompt) for item in items]
    for first in range(0, len(prompts), batch):
        chunk = prompts[first:first + batch]
        new = min(longest, model.config.block_size + 1 - max(map(len, chunk)))
        said += [encoding.decode(tokens)
                 for tokens in generate(model, chunk, new, (newline, encoding.eot_token))]
    return said


def score_items(model, items, encoding):
    """{"score": percent right, "n": number of items, "wrong": up to three examples}."""
    said = answers(model, items, encoding)
    wrong = [{"prompt": i.prompt, "said": s, "right": i.answer}
             for i, s in zip(items, said) if not i.check(s)]
    return {"score": 100 * (1 - len(wrong) / len(items)), "n": len(items), "wrong": wrong[:3]}


@torch.inference_mode()
def bits_per_byte(model, kind, split, encoding):
    """Mean cross-entropy on held-out rows, in bits per byte."""
    rows = torch.tensor(tasks.held_out_rows(kind, split, encoding, model.config.block_size + 1))
    rows = rows.to(model.lm_head.weight.device)
    nats = loss_of(model, rows[:, :-1], rows[:, 1:]).item()
    return {"score": nats / math.log(2), "n": len(rows)}


def evaluate(model, items, split):
    """Scores of one model on items {"target" or kind: [Item]} and on held-out text, and their averages."""
    encoding = tasks.byte_encoding()
    scores = {kind: score_items(model, these, encoding) for kind, these in items.items()}
    target = scores.pop("target")
    avg1 = sum(kept["score"] for kept in scores.values()) / len(scores)
    return {"target": target, "kept": scores,
            "text": {kind: bits_per_byte(model, kind, split, encoding) for kind in tasks.LIBRARY},
            "Avg1": avg1, "Avg2": target["score"], "GM": math.sqrt(avg1 * target["score"])}


def scores_of(path, model, task, split):
    """Scores of a model, kept as JSON at `path` for as long as its weights and the items are the same."""
    items = {"target": tasks.task_items(task, split, tasks.HELD_OUT),
             **{kind: tasks.kept_items(kind, split) for kind in tasks.KEPT[task]}}
    identity = {"model": fingerprint(model.state_dict()), "task": task, "split": split,
                "text": tasks.fingerprint(i.prompt + i.answer for these in items.values() for i in these),
                "python": platform.python_version()}
    if path.exists():
        try:
            saved = json.loads(path.read_text())
            if saved["identity"] == identity:
                return saved
        except (ValueError, KeyError, TypeError):
            pass  # unreadable: made again
    scores = {"identity": identity, **evaluate(model, items, split)}
    write_json(path, scores)
    return scores


def write_json(path, content):
    write_whole(path, lambda f: f.write(json.dumps(content, indent=1).encode()))


# ------------------------------------------------------------------------------------------------------------
# The table

def table(results):
    """A markdown table: a row a model, percent right for the target and each kept kind,
    bits per byte for the text."""
    first = next(iter(results.values()))
    head = ["", f"target (n {first['target']['n']})"]
    head += [f"{kind} ({k['n']})" for kind, k in first["kept"].items()]
    lines = [head + [f"{kind} b/B" for kind in first["text"]] + ["Avg1", "Avg2", "GM"]]
    for name, r in results.items():
        lines.append([name, f"{r['target']['score']:.1f}"]
                     + [f"{k['score']:.1f}" for k in r["kept"].values()]
                     + [f"{t['score']:.2f}" for t in r["text"].values()]
                     + [f"{r[key]:.1f}" for key in ("Avg1", "Avg2", "GM")])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    lines.insert(1, ["-" * width for width in widths])
    rows = [[c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths))] for line in lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def print_wrong(name, scores):
    for kind, s in {"target": scores["target"], "facts": scores["kept"]["facts"]}.items():
        for w in s["wrong"][:2]:
            print(f"  {name}, {kind}: {w['prompt']!r} -> {w['said']!r}, right would be {w['right']!r}")


def main_job(args):
    """Run every stage that is missing, then print the table; returns {model name: scores}."""
    tasks.task_items(args.task, args.split, tasks.HELD_OUT)  # an unknown task is better known at once
    began, out, folder = time.time(), ["--out", args.out], pathlib.Path(args.out) / args.task

    def stage(title):
        print(f"\n== {title} ({time.time() - began:.0f} s) ==", flush=True)

    stage("pretrain: the foundation")
    train.main(["pretrain", *out, *shlex.split(args.pretrain)])
    stage("calibrate: what the foundation uses, what the task uses")
    calibrate.main(["--task", args.task, *out, *shlex.split(args.calibrate)])
    runs = {}
    for method in args.methods:
        stage(f"adapt: {method}")
        runs[method] = train.main(["adapt", "--task", args.task, "--method", method, *out,
                                   *shlex.split(args.adapt)])
    stage(f"evaluate on {args.split} items")
    device = pick_device()
    results = {"foundation": scores_of(folder / f"foundation-{args.split}.json",
                                       load_foundation(args.out, device)[0], args.task, args.split)}
    for method, path in runs.items():
        model = load_adapter(path, args.out, device)
        merge_lora(model)
        results[method] = scores_of(path.with_name(f"{args.split}.json"), model, args.task, args.split)
    for name, scores in results.items():
        print_wrong(name, scores)
    print(f"\n{args.task}: percent right on {args.split} items, bits per byte (b/B, lower is better) on "
          f"held-out text; Python {platform.python_version()}, torch {torch.__version__}\n\n"
          f"{table(results)}\n")
    write_json(folder / f"results-{args.split}.json", results)
    print(f"{folder / f'results-{args.split}.json'} written; {time.time() - began:.0f} s in all")
    return results


def parser():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--task", default="code", help=f"one of {', '.join(tasks.TASKS)}")
    p.add_argument("--methods", nargs="+", default=METHODS, help="methods to adapt with")
    p.add_argument("--split", default="test", choices=["valid", "test"],
                   help="valid: for choosing settings; test: for reporting")
    for stage in "pretrain", "calibrate", "adapt":
        p.add_argument(f"--{stage}", default="", metavar="OPTIONS",
                       help=f'options for that stage, as in --{stage}="--seed 1"')
    p.add_argument("--out", default="out", help="folder for all results")
    return p


def main(argv=None):
    return main_job(parser().parse_args(argv))


if __name__ == "__main__":
    command(main)

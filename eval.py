"""Evaluate: what was learnt, what was kept. The main job, and the comparison of all methods.

    python eval.py                   # pretrain, calibrate, adapt with each method, evaluate: the whole story
    python eval.py --task math       # the same on another task; what is already under out/ is reused
    python eval.py --compare         # every method, rate and seed; stop it and start it again as you like
    python eval.py --report          # its tables and pictures, from what is on disk

A target task is scored by its checker and kept knowledge by exact match, both on greedy answers (percent), or
by likelihood where a file's items have no check; held-out prose and source in bits per byte (lower is
better). Avg1 is the mean of the kept scores, Avg2 the target score, GM = √(Avg1·Avg2).
"""
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
from model import claimed, fingerprint, generate, pick_device, write_whole
from train import (Parser, add_task, command, fitting, load_adapter, load_foundation, loss_of, positive,
                   response_batch, response_row)

METHODS = ["lora", "folora", "folora-kl"]  # the main job's


# ------------------------------------------------------------------------------------------------------------
# Scores

def answers(model, items, batch=200):
    """The model's greedy answer to each item, up to the end of its line, if no answer has several."""
    encoding, said = tasks.encoding_called(model.config.encoding), [None] * len(items)
    stop = [encoding.eot_token]
    if not any("\n" in item.answer for item in items):
        stop += encoding.encode_ordinary("\n")
    longest = max(len(encoding.encode_ordinary(item.answer)) for item in items) + 8
    prompts = [[encoding.eot_token] + encoding.encode_ordinary(item.prompt) for item in items]
    room = [min(longest, model.config.block_size + 1 - len(prompt)) for prompt in prompts]  # for its answer
    for new in set(room):  # a prompt with less room than others shortens their answers in no batch
        these = [i for i, tokens in enumerate(room) if tokens == new]
        for chunk in (these[first:first + batch] for first in range(0, len(these), batch)):
            for i, tokens in zip(chunk, generate(model, [prompts[i] for i in chunk], new, stop)):
                said[i] = encoding.decode(tokens)
    return said


def score_items(model, items):
    """What `likelihood` returns; where the items have a check, with "score" percent right and "wrong" up to
    three examples."""
    if not items[0].check:
        return likelihood(model, items)
    said = answers(model, items)
    wrong = [{"prompt": i.prompt, "said": s, "right": i.answer}
             for i, s in zip(items, said) if not i.check(s)]
    return likelihood(model, items) | {"score": 100 * (1 - len(wrong) / len(items)), "wrong": wrong[:3]}


@torch.inference_mode()
def likelihood(model, items, batch=16):
    """How likely the model finds the answers: "nats" per token, "bits_per_byte", and as "score" the geometric
    mean of the tokens' probabilities, 100 exp(-nats)."""
    encoding = tasks.encoding_called(model.config.encoding)
    rows, nats, count = [response_row(item, encoding) for item in items], 0, 0
    for first in range(0, len(rows), batch):
        x, y = (t.to(model.lm_head.weight.device) for t in response_batch(rows[first:first + batch]))
        counted = (y != -100).sum().item()
        nats, count = nats + loss_of(model, x, y).item() * counted, count + counted
    size = sum(len(item.answer.encode()) + 1 for item in items)
    return {"score": 100 * math.exp(-nats / count), "n": len(items), "wrong": [], "nats": nats / count,
            "bits_per_byte": nats / math.log(2) / size}


@torch.inference_mode()
def bits_per_byte(model, kind, split, most):
    """Mean cross-entropy on `most` held-out rows, in bits per byte."""
    encoding = tasks.encoding_called(model.config.encoding)
    rows = tasks.held_out_rows(kind, split, encoding, model.config.block_size + 1, most)
    if not rows:
        raise ValueError(f"{kind} is too short for a row of {model.config.block_size} tokens")
    nats, size = 0, sum(len(encoding.decode_bytes(row[1:])) for row in rows)
    at_once = max(1, 2 ** 26 // (model.config.block_size * model.config.vocab_size))  # so many rows' logits
    for chunk in torch.tensor(rows, device=model.lm_head.weight.device).split(at_once):
        nats += loss_of(model, chunk[:, :-1], chunk[:, 1:]).item() * chunk[:, 1:].numel()
    return {"score": nats / math.log(2) / size, "n": len(rows)}


def evaluate(model, items, split, rows=256, text=tasks.LIBRARY):
    """Scores of one model on items {"target" or kind: [Item]} and on held-out text, and their averages."""
    scores = {kind: score_items(model, these) for kind, these in items.items()}
    target = scores.pop("target")
    avg1 = sum(kept["score"] for kept in scores.values()) / len(scores) if scores else math.nan  # text alone
    return {"target": target, "kept": scores,
            "text": {pathlib.Path(kind).stem: bits_per_byte(model, kind, split, rows) for kind in text},
            "Avg1": avg1, "Avg2": target["score"], "GM": math.sqrt(avg1 * target["score"])}


def items_of(task, split, count=tasks.HELD_OUT, target=None, files=(), skip_bad=False, config=None):
    """{"target" or kind: [Item]}, `count` of each that has so many; of these such as fit a model's context
    where its config is given. Files for the target and to be kept stand for what the task itself has."""
    chosen = (tasks.file_items(target, skip_bad) if target
              else tasks.task_items(task, split, tasks.HELD_OUT, skip_bad=skip_bad))
    names = ["target", *(pathlib.Path(file).stem for file in files)]
    if len(set(names)) < len(names):
        raise ValueError(f"keep names files {', '.join(names[1:])}; each needs a name of its own, not target")
    keep = ({pathlib.Path(file).stem: tasks.file_items(file, skip_bad)[:count]
             for file in files if file.endswith(".jsonl")} if files else
            {kind: tasks.kept_items(kind, split, count) for kind in tasks.KEPT.get(task, tasks.KINDS)})
    items = {"target": chosen[:count], **keep}
    if config:
        encoding = tasks.encoding_called(config.encoding)
        items = {kind: fitting(these, encoding, config.block_size, skip_bad)[0]
                 for kind, these in items.items()}
    return items


def text_files(keep):
    """What bits per byte are measured on."""
    return [file for file in keep if file.endswith(".txt")] or tasks.LIBRARY


def scores_of(path, model, items, args):
    """Scores of a model, kept as JSON at `path` for as long as its weights and the items are the same."""
    files = [tasks.text_of(file) for file in args.keep]
    identity = {"model": fingerprint(model.state_dict()), "task": args.task, "split": args.split,
                "text": tasks.fingerprint(i.prompt + i.answer for these in items.values() for i in these),
                "keep": tasks.fingerprint(files), "python": platform.python_version()}
    return kept(path, identity, lambda: evaluate(model, items, args.split, text=text_files(args.keep)))


def kept(path, identity, make, wait=True):
    """What stands in the JSON file `path` if it was made for `identity`, else make() it and keep it there, or
    None where `make` is None. While another process makes it, wait for that or return None."""
    content = on_disk(path, identity)
    if not content and make:
        with claimed(path, wait) as mine:
            content = mine and on_disk(path, identity)
            if mine and not content:
                content = {"identity": identity, **make()}
                write_json(path, content)
    return content or None


def on_disk(path, identity):
    """What stands in the JSON file `path` if it was made for `identity`, else None."""
    try:
        content = json.loads(path.read_text()) if path.is_file() else {}
        return content if content["identity"] == identity else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None  # missing or unreadable: made again


def write_json(path, content):
    write_whole(path, lambda f: f.write(json.dumps(content, indent=1).encode()))


# ------------------------------------------------------------------------------------------------------------
# The table

def table(results):
    """A markdown table: a row a model, scores for the target and each kept kind, bits per byte for text."""
    first = next(iter(results.values()))
    head = ["", f"target (n {first['target']['n']})"]
    head += [f"{kind} ({k['n']})" for kind, k in first["kept"].items()]
    lines = [head + [f"{kind} b/B" for kind in first["text"]] + ["Avg1", "Avg2", "GM"]]
    for name, r in results.items():
        lines.append([name, f"{r['target']['score']:.1f}"]
                     + [f"{k['score']:.1f}" for k in r["kept"].values()]
                     + [f"{t['score']:.2f}" for t in r["text"].values()]
                     + [f"{r[key]:.1f}" for key in ("Avg1", "Avg2", "GM")])
    return markdown(lines[0], lines[1:])


def markdown(head, rows):
    """A markdown table with aligned columns."""
    widths = [max(len(line[i]) for line in [head, *rows]) for i in range(len(head))]
    cells = [[c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths))]
             for line in [head, ["-" * width for width in widths], *rows]]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


def print_wrong(name, scores):
    for kind, s in {"target": scores["target"], **scores["kept"]}.items():
        for w in s["wrong"][:1]:
            print(f"  {name}, {kind}: {w['prompt']!r} -> {w['said']!r}, right would be {w['right']!r}")


def main_job(args):
    """Run every stage that is missing, then print the table; returns {model name: scores}."""
    items_of(args.task, args.split, 1, args.eval, args.keep, args.skip_bad)  # what is bad is named at once
    began, out, folder = time.time(), ["--out", args.out], train.task_folder(args)
    task = ["--task", args.task, *(["--skip-bad"] if args.skip_bad else [])]
    parse = train.parser().parse_args  # all stages' options, before the first one works
    pretrain = parse(["pretrain", *out, *shlex.split(args.pretrain)])
    measure = calibrate.parser().parse_args([*task, *out, *shlex.split(args.calibrate)])
    adapt = [parse(["adapt", *task, "--method", method, *out, *shlex.split(args.adapt)])
             for method in args.methods or METHODS]

    def stage(title):
        print(f"\n== {title} ({time.time() - began:.0f} s) ==", flush=True)

    stage("pretrain: the foundation")
    pretrain.run(pretrain)
    stage("calibrate: what the foundation uses, what the task uses")
    calibrate.calibrate(measure)
    runs = {}
    for run in adapt:
        stage(f"adapt: {run.method}")
        runs[run.method] = run.run(run)
    stage(f"evaluate on {args.split} items")
    device = pick_device()
    foundation, _ = load_foundation(args.out, device)
    items = items_of(args.task, args.split, tasks.HELD_OUT, args.eval, args.keep, args.skip_bad,
                     foundation.config)
    results = {"foundation": scores_of(folder / f"foundation-{args.split}.json", foundation, items, args)}
    for method, path in runs.items():
        results[method] = scores_of(path.with_name(f"{args.split}.json"),
                                    load_adapter(path, args.out, device), items, args)
    for name, scores in results.items():
        print_wrong(name, scores)
    print(f"\n{args.task}: percent right on {args.split} items, bits per byte (b/B, lower is better) on "
          f"held-out text; Python {platform.python_version()}, torch {torch.__version__}\n\n"
          f"{table(results)}\n")
    write_json(folder / f"results-{args.split}.json", results)
    print(f"{folder / f'results-{args.split}.json'} written; {time.time() - began:.0f} s in all")
    return results


def parser():
    p = Parser(description=__doc__.split("\n")[0])
    add_task(p)
    p.add_argument("--eval", metavar="FILE",
                   help="a .jsonl file to test the task on; default: what is held out of the task itself")
    p.add_argument("--keep", metavar="FILE", action="append", default=[],
                   help="a .jsonl file of items, or a .txt file, that must not be forgotten, instead of the "
                        "task's own; may be given several times")
    p.add_argument("--methods", nargs="+",
                   help=f"methods to adapt with; default: {' '.join(METHODS)}, or the comparison's own")
    p.add_argument("--split", default="test", choices=["valid", "test"],
                   help="valid: for choosing settings; test: for reporting")
    for stage in "pretrain", "calibrate", "adapt":
        p.add_argument(f"--{stage}", default="", metavar="OPTIONS",
                       help=f'options for that stage, as in --{stage}="--seed 1"')
    p.add_argument("--compare", action="store_true", help="run what is missing of the comparison")
    p.add_argument("--ablate", action="store_true", help="the same for the variants of FoLoRA")
    p.add_argument("--report", action="store_true", help="tables and pictures of what is finished")
    p.add_argument("--assets", help="with --report: folder for its pictures")
    p.add_argument("--quick", action="store_true", help="with --compare: five methods, one seed")
    p.add_argument("--tasks", nargs="+", help="tasks of the comparison, files too; default: its own three")
    p.add_argument("--texts", metavar="FOLDER",
                   help="with --compare: on real text, see `write_texts` in bench.py; default: made text")
    p.add_argument("--workers", type=positive, help="processes of the comparison; default: one a core")
    p.add_argument("--out", default="out", help="folder for all results")
    return p


def main(argv=None):
    args = parser().parse_args(argv)
    for file in args.keep:
        if not file.endswith((".jsonl", ".txt")):
            raise ValueError(f"keep is {file}; it must be a .jsonl file of items or a .txt file")
        tasks.opened(file).close()
    if args.compare or args.ablate or args.report:
        import bench  # which itself uses this file
        return bench.main(args)
    return main_job(args)


if __name__ == "__main__":
    command(main)

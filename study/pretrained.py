"""A published model on real tasks: SmolLM2-135M-Instruct, fine-tuned by several methods.

    python -m study pretrained --texts FOLDER --out pretrained      # stop and repeat it as you like

It learns GSM8K with its working, MBPP, or instructions. Measured before and after: questions that
it answered right, text, the tasks that it does not learn, and how far it is from the base model on
that model's own text. Forgetting grows with the learning rate, so a method runs at three of them
and is read off where its loss on unseen items of the task is that of the others. The most telling
runs come first; each renews the tables OUT/pretrained.md.
Several processes with the same command share the runs: on one GPU, as many as its memory holds.
"""
import gzip
import json
import pathlib
import random
import re
from dataclasses import replace
from typing import NamedTuple

import torch

import calibrate
import eval as evaluation
import tasks
import train
from extras.baselines import WIDTH
from extras.files import atomic_write, cached_json, load_adapter, load_foundation
from extras.machine import pick_device
from extras.tables import markdown
from extras.user_data import drop_long_items, item_from_row, load_items
from model import generate
from study import plots
from study.arms import rate
from study.drift import TEXTS, kl_divergence, own_text
from study.stats import crossing

CONTEXT, LONGEST, EXAMPLES = 256, 192, 1600  # tokens of the model, of a row; rows to learn from
STEPS, BATCH, SHARE = 60, 8, 0.95  # SHARE: of what all main methods learn
CALIBRATE = ["--samples", "200", "--fisher-samples", "60"]
ITEMS, TEXT_ROWS = 60, 16  # evaluated
POOL, MADE_POOL, SHOTS = 864, 200, 3  # questions asked, of a file or made, each after examples
TASKS = {"gsm8k": ("gsm8k_train", "gsm8k_test"), "instruct": ("instruct",), "mbpp": ("mbpp",)}
# {(method, rank): index of its rate on a model WIDTH wide, see arms.rate}; SmolLM2 is 576 wide
SMALL = {("lora", 32): 4, ("folora", 32): 3, ("folora-pull-back", 32): 4, ("distill", 32): 5,
         ("replay", 32): 5, ("lora-null", 32): 3, ("sadam-full", 0): -1, ("lora-kl", 32): 5,
         ("folora", 8): 6, ("lora", 8): 6, ("full", 0): -3}
MAIN = 3  # of these, how many are run first
MADE = ("sums", "copying")  # kinds of questions that are in no file
WORDS = "river stone apple window garden silver music paper winter table horse letter".split()
PROMPTS = ["Question: What is the capital of France?\nAnswer:", "The Roman Empire was",
           "Question: Ann has 3 boxes of 12 pens and gives away 5. How many are left?\nAnswer:",
           *map(tasks.TEMPLATE.format, ("Name three colours.", "Write a function that sorts."))]


class Run(NamedTuple):
    task: str
    method: str
    rank: int      # 0: full weights
    factor: float  # on the small models' rate
    seed: int = 0

    @property
    def arm(self):
        return f"{self.method}{f' r{self.rank}' if self.rank else ''}"

    @property
    def rate(self):
        return float(f"{rate(SMALL[self.method, self.rank]) * WIDTH / 576 * self.factor:.1e}")


def plan():
    """All runs, the most telling first."""
    main, others = list(SMALL)[:MAIN], list(SMALL)[MAIN:]
    order = ((main, 1, 0), (main, 1, 1), (others, 1, 0), (main, 2, 0), (main, 0.5, 0),
             (others, 2, 0), (others, 0.5, 0), (main, 1, 2))  # methods, factor, seed
    return [Run(task, *arm, factor, seed)
            for arms, factor, seed in order for task in TASKS for arm in arms]


def made_rows(name):
    """Questions of arithmetic, or to copy words: what a model of this size can partly do."""
    rng = random.Random(name)
    for _ in range(MADE_POOL):
        a, b, words = rng.randrange(2, 50), rng.randrange(2, 50), " ".join(rng.sample(WORDS, 4))
        yield ({"question": f"What is {a} + {b}?", "answer": f"{a + b}"} if name == "sums" else
               {"question": f"Repeat these words: {words}", "answer": words})


def rows_of(texts, name):
    """The rows of a .jsonl file, those of GSM8K and MBPP as they are learned here."""
    for line in (pathlib.Path(texts) / f"{name}.jsonl").read_text("utf8").strip().split("\n"):
        row = json.loads(line)
        if name.startswith("gsm8k"):  # without <<48/2=24>>, a calculator's marks
            row["answer"] = re.sub("<<.*?>>", "", row["answer"])
        if name == "mbpp":
            row = {"instruction": f"{row['text']}\nIt must pass: {row['test_list'][0]}",
                   "output": row["code"].replace("\r", "").replace("\t", "    ")}
        yield row


def write_tasks(texts, out, encoding):
    """Write out/<task>.jsonl, rows of at most LONGEST tokens, the last of them held out."""
    for task, files in TASKS.items():
        first, *last = ([row for row in rows_of(texts, file) if len(
            tasks.response_row(item_from_row(row), encoding)[0]) <= LONGEST] for file in files)
        rows = first[:EXAMPLES] + last[0][-2 * tasks.HELD_OUT:] if last else first
        text = "".join(f"{json.dumps(row)}\n" for row in rows)
        atomic_write(out / f"{task}.jsonl", lambda f: f.write(text.encode()))


def few_shot_items(encoding, name, texts):
    """Up to POOL questions with answers of 1 to 5 tokens, in random order, each after SHOTS
    examples of its kind."""
    rows = made_rows(name) if name in MADE else rows_of(texts, name)
    items = [item for item in map(item_from_row, rows)
             if len(encoding.encode_ordinary(item.answer)) <= 5
             and len(encoding.encode_ordinary(item.prompt)) <= 40]
    chosen = random.Random(name).sample(items, min(POOL + SHOTS, len(items)))
    examples = "".join(f"{item.prompt}{item.answer}\n\n" for item in chosen[:SHOTS])
    return [replace(item, prompt=examples + item.prompt) for item in chosen[SHOTS:]]


def known(model, items, path, identity):
    """Up to 2 ITEMS of the items that the model answers right, as `path` says if it is there."""
    def ask():
        given = evaluation.answers(model, items)
        return {"right": [i for i, item in enumerate(items) if item.check(given[i])],
                "asked": len(items)}
    return [items[i] for i in cached_json(path, identity, ask)["right"][:2 * ITEMS]]


def kept(model, texts, out, identity):
    """({name: [Item]}, {name: text}) of what must be kept: a task, while another is learned. "Any"
    questions are those first asked, right or not: what is chosen for having been answered right
    can only get worse."""
    encoding, items = tasks.get_encoding(model.config.encoding), {}
    for name in "trivia", "webquestions_test", *MADE:
        asked = few_shot_items(encoding, name, texts)
        items[name] = known(model, asked, out / f"known-{name}.json", identity)
        if name not in MADE:
            items[f"any {name}"] = [replace(item, check=None) for item in asked[:ITEMS]]
    humaneval = [tasks.Item(row["prompt"], row["canonical_solution"].rstrip(), None)
                 for row in rows_of(texts, "humaneval")]
    items["humaneval"] = drop_long_items(humaneval, encoding, CONTEXT, True)[0][:ITEMS]
    for task in TASKS:
        chosen = load_items(f"{out / task}.jsonl", "test", ITEMS)
        items[task] = [replace(item, check=None) for item in chosen]
    for name in [name for name, chosen in items.items() if not chosen]:
        print(f"pretrained: {name}: none of its questions was answered right; left out")
        del items[name]
    return items, {name: gzip.open(pathlib.Path(texts) / f"{name}.txt.gz", "rt", encoding="utf8")
                   .read(400_000) for name in ("wikitext2_test", "novels", "peps")}


def measure(model, items, texts):
    """{column: percent right, nats per token or bits per byte}, and the "answers" to PROMPTS."""
    encoding = tasks.get_encoding(model.config.encoding)
    prompts = [[encoding.eot_token, *encoding.encode_ordinary(prompt)] for prompt in PROMPTS]
    found = {"answers": [encoding.decode(reply) for reply in
                         generate(model, prompts, 48, [encoding.eot_token])]}
    for name, chosen in items.items():
        if chosen[0].check:
            right = [i.check(a) for i, a in zip(chosen, evaluation.answers(model, chosen))]
            found[f"{name} %"] = 100 * sum(right) / len(right)
        else:
            found[f"{name} nats"] = evaluation.likelihood(model, chosen)["nats"]
    for name, text in texts.items():
        found[f"{name} b/B"] = evaluation.bits_per_byte(model, text, "test", TEXT_ROWS)["score"]
    return found


def do(run, out, scores_of, identity):
    """The scores of a run, which are on disk once it is done; full weights are not kept. None
    while another process does it."""
    def make():
        common = ["--task", f"{out / run.task}.jsonl", "--out", str(out)]
        if run.method != "lora":
            calibrate.main([*common, *CALIBRATE])
        options = (f"--method {run.method} --rank {run.rank or 8} --lr {run.rate:g} --seed "
                   f"{run.seed} --steps {STEPS} --batch {BATCH} --pull 10")
        adapter = train.main(["adapt", *common, *options.split()])
        found = scores_of(load_adapter(adapter, out, pick_device()))
        if not run.rank:
            adapter.unlink()
        return found
    name = f"{run.method}-r{run.rank}-x{run.factor}-seed{run.seed}.json"
    return cached_json(out / run.task / name, identity | run._asdict(), make, wait=False)


def pretrained(args):
    """Do what is missing of `plan`, and write the tables after each run."""
    out, done = pathlib.Path(args.out), {}
    if args.assets:
        plots.pyplot()  # says what to install, before any work
    train.main(["pretrain", "--foundation", args.foundation, "--context", f"{CONTEXT}",
                "--out", args.out])
    base, weights = load_foundation(out, pick_device())
    write_tasks(args.texts, out, tasks.get_encoding(base.config.encoding))
    identity = {"foundation": weights, "settings": [STEPS, BATCH, *CALIBRATE, SHOTS, POOL, TEXTS]}
    items, texts = kept(base, args.texts, out, identity)
    rows = cached_json(out / "own-text.json", identity, lambda: {"rows": own_text(base).tolist()})
    own = torch.tensor(rows["rows"], device=base.lm_head.weight.device)

    def scores_of(model):
        found = measure(model, items, texts)
        percents = [value for name, value in found.items() if name.endswith("%")]
        return {"all %": sum(percents) / max(1, len(percents)),
                "KL": 1000 * kl_divergence(base, model, own), **found}

    before = cached_json(out / "before.json", identity, lambda: scores_of(base))
    for run in 2 * plan():  # the second time finds what other processes were doing
        if run not in done and (scores := do(run, out, scores_of, identity)):
            done[run] = scores
            atomic_write(out / "pretrained.md", lambda f: f.write(report(before, done).encode()))
    if args.assets:
        picture = plots.published(curves(before, done))
        plots.save(picture, pathlib.Path(args.assets) / "pretrained.png")


def curves(before, done):
    """{task: {arm: {seed: [(rate, scores)]}}}: from rate 0, nothing learned, along the rates."""
    found = {}
    for run in sorted(done, key=lambda run: (list(SMALL).index(run[1:3]), run.seed, run.rate)):
        seeds = found.setdefault(run.task, {}).setdefault(run.arm, {})
        seeds.setdefault(run.seed, [(0, before)]).append((run.rate, done[run]))
    return found


def report(before, done):
    """Two tables per task: at one loss, which all main methods reach, and of every run. "a / b": of
    two seeds. "all %" is the mean of the percents, "KL" from the base model on its own new text, in
    thousandths of a nat per token."""
    main, texts = [Run("", *arm, 1).arm for arm in list(SMALL)[:MAIN]], []
    for task, arms in curves(before, done).items():
        own = f"{task} nats"
        columns = [c for c in dict.fromkeys([own, *before]) if c not in ("identity", "answers")]
        best = [min(scores[own] for points in arms[arm].values() for _, scores in points)
                for arm in main if arm in arms]
        loss = before[own] - SHARE * (before[own] - max(best, default=before[own]))
        at, every = {}, {}  # {row: its scores, one dict per seed}
        for arm, seeds in arms.items():
            at[arm] = [{c: crossing([(-s[own], s[c]) for _, s in points], -loss) for c in columns}
                       for points in seeds.values()]
            for lr, scores in sorted(sum((points[1:] for points in seeds.values()), []),
                                     key=lambda point: point[0]):
                every.setdefault(f"{arm}, {lr:g}", []).append(scores)
        for title, rows in (f"at {loss:.3f} nats", at), ("every run", every):
            cells = [[name, *(" / ".join(shown(seed[c], c) for seed in row) for c in columns)]
                     for name, row in ({"before": [before]} | rows).items()]
            texts.append(f"{task}, {title}\n\n{markdown(['', *columns], cells)}")
    return "\n\n".join(texts) + "\n"


def shown(value, column):
    digits = 0 if column == "KL" or column.endswith("%") else 3
    return "-" if value is None else f"{value:.{digits}f}"

"""Users' own files: JSONL rows as task items, text files to pretrain on."""
import functools
import itertools
import json
import pathlib
import re
from dataclasses import replace

from extras.baselines import METHODS
from model import block_linears
from tasks import (EOT, HELD_OUT, KEPT, KINDS, QUESTION, TEMPLATE, Chunks, Item, final_number,
                   fingerprint, get_encoding, kept_items, response_row, task_items)

LONGEST_TEXT = 2 ** 22  # characters
FIELDS = {"instruction": "output", "prompt": "completion", "question": "answer"}
ROW = ", or ".join(" and ".join(pair) for pair in FIELDS.items())  # what a row needs


def read_text(path):
    """A text file's first LONGEST_TEXT characters: more than any evaluation asks for."""
    with open(path, encoding="utf8", errors="replace") as f:
        return f.read(LONGEST_TEXT)


# ------------------------------------------------------------------------------------------------
# Tasks from JSONL files

def load_items(task, split, count, skip_bad=False):
    """`count` items of a split of a task made in tasks.py, or of a JSONL file as many as it has:
    its last fifth, at most 2 HELD_OUT items, is held out."""
    if not task.endswith(".jsonl"):
        return task_items(task, split, count)
    items = file_items(task, skip_bad)
    half = min(HELD_OUT, len(items) // 10)
    if not half:
        raise ValueError(f"{task} has {len(items)} items; at least 10 are needed, to learn from "
                         "some and test on others")
    splits = {"train": items[:-2 * half], "valid": items[-2 * half:-half], "test": items[-half:]}
    return splits[split][:count]


def normalize_answer(answer):
    """TriviaQA's rules: ignore case, punctuation, articles and extra blanks."""
    answer = re.sub(r"[^\w\s]|_", " ", answer.lower())
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", answer).split())


def item_from_row(row):
    """The Item of a JSONL row; ValueError says what is wrong with it. A question is checked by
    exact match with any of its answers, an answer that ends in #### and a number by that number;
    all others are scored by likelihood."""
    key = next((k for k in FIELDS if isinstance(row, dict) and {k, FIELDS[k]} <= row.keys()), None)
    if not key:
        raise ValueError(f"a row needs {ROW}")
    prompt, answers, given = row[key], row[FIELDS[key]], str(row.get("input") or "")
    answers = answers if isinstance(answers, list) else [answers]
    if not answers or not all(isinstance(t, str) and t.strip() for t in [prompt, *answers]):
        raise ValueError(f"{key} and {FIELDS[key]} must be text that is not empty")
    "".join([prompt, given, *answers]).encode()  # ValueError for half a surrogate pair
    number, known = final_number(answers[0]), {normalize_answer(answer) for answer in answers}
    check = ((lambda output: final_number(output) == number) if number is not None else
             (lambda output: normalize_answer(output) in known) if key == "question" else None)
    if key == "question":  # the blank before the answer is part of its first token
        return Item(QUESTION.format(prompt).rstrip(), " " + answers[0].strip(), check)
    if key == "instruction":
        prompt = TEMPLATE.format(f"{prompt}\n{given}" if given else prompt)
    return Item(prompt, answers[0].strip(), check)


@functools.cache
def file_items(path, skip_bad=False):
    """The items of a JSONL file, in its order. ValueError names the first bad row by its line;
    `skip_bad` leaves bad rows out and prints how many. Unless every item has a check, all are
    scored by likelihood."""
    items, bad, first = [], 0, ""
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            where = f"{path}, line {number}"
            if not line.strip():
                continue
            try:
                items.append(replace(item_from_row(json.loads(line)), where=where))
            except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, not a task's row
                bad, first = bad + 1, first or f"{where}: {error}"
    if bad and not skip_bad:
        raise ValueError(f"{first} ({bad} bad rows in all; --skip-bad leaves them out)")
    if bad:
        print(f"  {path}: {bad} bad rows left out, the first is {first}")
    return items if all(i.check for i in items) else [replace(i, check=None) for i in items]


def drop_long_items(items, encoding, length, skip_bad=False):
    """(items, token rows) that fit a context of `length`; ValueError names the first that does not,
    unless `skip_bad` leaves such items out."""
    rows = [response_row(item, encoding) for item in items]
    fits = [len(tokens) <= length + 1 for tokens, _ in rows]
    if not all(fits):
        i, long = fits.index(False), fits.count(False)
        if not skip_bad or long == len(items):
            raise ValueError(f"{items[i].where or repr(items[i].prompt)}: {len(rows[i][0])} tokens "
                             f"do not fit the context of {length} ({long} such items; --skip-bad "
                             "leaves them out)")
        print(f"  {long} of {len(items)} items do not fit the context of {length} and are left out")
    return [list(itertools.compress(column, fits)) for column in (items, rows)]


def check_fits(model, runs):
    """ValueError if the training items, or the rank, of `runs` do not fit the model. The runs, as
    parsed by train.py, differ in their method alone."""
    args = runs[0]
    items = load_items(args.task, "train", args.examples, args.skip_bad)
    drop_long_items(items, get_encoding(model.config.encoding), model.config.block_size,
                    args.skip_bad)
    most, name = min((min(layer.weight.shape), name)
                     for name, layer in block_linears(model).items())
    if args.rank > most and any(METHODS[run.method].start for run in runs):
        raise ValueError(f"rank is {args.rank}; {name} takes 1 to {most}")


def evaluation_items(task, split, count, target=None, files=(), skip_bad=False, config=None):
    """{"target" or kind: [Item]}, up to `count` items per kind. The file `target` and those to be
    kept, `files`, replace the task's own items. With a config, items that do not fit its context
    are refused or, with skip_bad, dropped."""
    for file in files:
        if not file.endswith((".jsonl", ".txt")):
            raise ValueError(f"keep is {file}; it must be a .jsonl file of items or a .txt file")
        open(file, "rb").close()  # OSError now, not after the training
    chosen = file_items(target, skip_bad) if target else load_items(task, split, count, skip_bad)
    names = ["target", *(pathlib.Path(file).stem for file in files)]
    if len(set(names)) < len(names):
        raise ValueError(f"keep names files {', '.join(names[1:])}; each needs a name of its own, "
                         "other than target")
    keep = ({name: file_items(file, skip_bad)[:count] for name, file in zip(names[1:], files)
             if file.endswith(".jsonl")} if files else
            {kind: kept_items(kind, split, count) for kind in KEPT.get(task, KINDS)})
    items = {"target": chosen[:count], **keep}
    for kind in items if config else ():
        items[kind], _ = drop_long_items(items[kind], get_encoding(config.encoding),
                                         config.block_size, skip_bad)
    return items


def read_texts(files):
    """{name: text} of the .txt files among `files`; None where there is none."""
    return {pathlib.Path(f).stem: read_text(f) for f in files if f.endswith(".txt")} or None


# ------------------------------------------------------------------------------------------------
# Text to pretrain on

class TextFiles:
    """Rows of training tokens from text files. <|endoftext|> in one, and after one, ends a
    document."""

    def __init__(self, files, encoding):
        self.encoding = encoding
        self.text = EOT.join(pathlib.Path(f).read_text("utf8", "replace") for f in files)

    def fingerprint(self):
        return fingerprint([self.encoding.name, self.text])

    @functools.cached_property
    def chunks(self):
        """They start at a line, <|endoftext|>, or a multiple of 1,000 characters of a long line."""
        lines = [line[i:i + 1000] for part in re.split(f"({re.escape(EOT)})", self.text)
                 for line in part.splitlines(keepends=True) for i in range(0, len(line), 1000)]
        return Chunks(lines, lambda line: self.encoding.encode(line, allowed_special={EOT}))

    def row(self, rng, length):
        """`length` tokens; the first is <|endoftext|>."""
        return [self.encoding.eot_token] + self.chunks.draw(rng, length - 1)

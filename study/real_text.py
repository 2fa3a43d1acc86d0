"""The comparison on real text with GPT-2's tokens: prepares the texts and fills in the options.

The texts are offered for download by their makers. FOLDER holds CORPORA and wikitext2_test as
.txt.gz, with <|endoftext|> between documents, and ROWS as .jsonl.
"""
import gzip
import json
import pathlib
import random
import shlex

from extras.files import atomic_write
from extras.user_data import open_file
from tasks import EOT, QUESTION

CORPORA = ("novels", "factbook", "peps", "algorithms")
ROWS = ("trivia", "webquestions_test", "gsm8k_train", "gsm8k_test", "instruct", "mbpp")
KNOWN, REPEATED = 1000, 100  # trivia questions that the foundation reads this often, to have facts
METHODS = ("lora", "lora-null", "folora", "lora-kl-leading", "sadam-full")
OPTIONS = {"pretrain": "--encoding gpt2 --context 256 --layers 6 --heads 4 --width 256 --batch 8 "
                       "--steps 1000",
           "calibrate": "--samples 1000 --fisher-samples 250 --min-unique 0.12 --fours-from 256 "
                        "--min-new 128",
           "adapt": "--batch 8 --steps 120"}


def write_texts(source, folder):
    """Write to `folder` what the foundation reads (train/*.txt), what it must keep (keep/*: every
    20th document of each corpus, questions), and the tasks (*.jsonl; last rows are held out)."""
    def write(name, parts):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        atomic_write(folder / name, lambda f: f.writelines(part.encode() for part in parts))

    def documents(name):
        with gzip.open(open_file(source / f"{name}.txt.gz"), "rt", encoding="utf8") as f:
            return f.read().split(EOT)

    rows = {}
    for name in ROWS:
        with open_file(source / f"{name}.jsonl") as f:
            rows[name] = f.read().decode().splitlines(True)
    for name in CORPORA:
        parts = documents(name)
        write(f"train/{name}.txt", [part + EOT for i, part in enumerate(parts) if i % 20])
        write(f"keep/{name}.txt", parts[::20])
    write("keep/wikitext2.txt", documents("wikitext2_test"))
    rows["trivia"] = random.Random("trivia").sample(rows["trivia"], len(rows["trivia"]))
    trivia = [f"{EOT}{QUESTION.format(row['question'])}{row['answer']}\n"
              for row in map(json.loads, rows["trivia"])]
    write("train/trivia.txt", trivia + REPEATED * trivia[:KNOWN])
    write("keep/trivia.jsonl", rows["trivia"][:KNOWN])
    write("keep/webquestions.jsonl", rows["webquestions_test"])
    write("gsm8k.jsonl", rows["gsm8k_train"] + rows["gsm8k_test"])
    write("instruct.jsonl", rows["instruct"])
    write("mbpp.jsonl", (json.dumps({"instruction": row["text"],
                                     "output": "\n".join(row["code"].splitlines())}) + "\n"
                         for row in map(json.loads, rows["mbpp"])))


def fill_in(args):
    """Set the comparison's options for real text; those that were given come last, so they win."""
    folder = pathlib.Path(args.out) / "texts"
    write_texts(pathlib.Path(args.texts), folder)
    args.tasks = args.tasks or [str(path) for path in sorted(folder.glob("*.jsonl"))]
    args.keep = [str(path) for path in sorted(folder.glob("keep/*"))]
    args.methods, args.quick, args.skip_bad = args.methods or METHODS, True, True
    for stage, options in OPTIONS.items():
        setattr(args, stage, f"{options} {getattr(args, stage)}")
    corpora = shlex.join(str(path) for path in sorted(folder.glob("train/*")))
    args.pretrain = f"--data {corpora} {args.pretrain}"

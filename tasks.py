"""The experiments' text: pretraining text, target tasks, and the knowledge that must be kept.

Everything is generated here or ships with Python; only GPT-2's vocabulary is ever downloaded.
The foundation is pretrained on Python's language reference (prose), the standard library (source),
facts about invented people, and elementary skills. A target task *composes* those skills behind a
template that the foundation has never seen, as in real fine-tuning. Nothing here needs a model.

    skill       upper stone: STONE
    fact        Question: Where does Bedol Vagur live? Answer: Dublin
    math        Ann has 3 keys, buys 2 and loses 1. How many keys? -> 3 + 2 = 5. 5 - 1 = 4. #### 4
    code        Write a lambda: add 3, multiply by 2. -> lambda x: (x + 3) * 2
    instruct    Write stone backwards and end with a dot. -> enots.
"""
import ast
import contextlib
import functools
import hashlib
import operator
import pathlib
import random
import re
import sysconfig
from dataclasses import dataclass, field, replace
from typing import Callable

import numpy as np
import tiktoken
import torch

EOT = "<|endoftext|>"
LIBRARY = ("prose", "source")  # the text that ships with Python
TEMPLATE = "### Instruction:\n{}\n### Response:\n"  # for all tasks; unseen in pretraining
QUESTION = "Question: {}\nAnswer: "                 # for the facts
WORDS = """
apple army baker basket bird boat bridge camel candle castle corn dance door dream duck eagle earth
field fire flower forest garden glass gold hammer honey horse house island jacket king lamp lemon
light lion market milk moon mountain night ocean orange paper pencil piano planet queen rain river
road silver snow spoon stone storm sugar summer table tiger tower train tree water window""".split()
NAMES = ("Ann Ben Cara Dan Eve Finn Gina Hugo Ida Jack Kim Leo Mia Ned Olga Pete Rosa Sam Tina "
         "Vera").split()
THINGS = "key lamp map pen ring drum coin book cup hat".split()
CITIES = ("Athens Berlin Cairo Dublin Geneva Havana Istanbul Jakarta Kyoto Lisbon Madrid Nairobi "
          "Oslo Paris Quito Rome Seoul Tokyo Vienna Warsaw").split()
JOBS = ("actor baker carpenter dentist engineer farmer gardener hunter judge lawyer miner nurse "
        "painter pilot sailor singer teacher tailor waiter writer").split()
MARKS = {"an exclamation mark": "!", "a question mark": "?", "a dot": ".", "a star": "*"}
OPERATIONS = {"add {}": "{} + {}", "subtract {}": "{} - {}", "multiply by {}": "{} * {}"}
ARITHMETIC = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}


# {name: encoding}: plain bytes, 256 being <|endoftext|>, and tokenizers that foundations hold
ENCODINGS = {"bytes": tiktoken.Encoding("bytes", pat_str=r"[\s\S]", special_tokens={EOT: 256},
                                        mergeable_ranks={bytes([i]): i for i in range(256)})}


def get_encoding(name):
    """One of ENCODINGS, or tiktoken's "gpt2", which is downloaded once."""
    try:
        return ENCODINGS.get(name) or tiktoken.get_encoding(name)
    except Exception as error:  # tiktoken passes on whatever its download raises
        raise ValueError(f"the vocabulary of {name} is not cached and cannot be downloaded "
                         f"({type(error).__name__}); run once with a network, or let "
                         "TIKTOKEN_CACHE_DIR name a folder that holds it")


def fingerprint(texts):
    """A short SHA-256 of an iterable of texts; results record which text they were made with."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


# ------------------------------------------------------------------------------------------------
# Pretraining text

@functools.cache
def library_text(kind):
    """(training text, held-out tenth) of "prose" or "source"; they differ by Python version."""
    stdlib, topics = pathlib.Path(sysconfig.get_paths()["stdlib"]), {}
    with contextlib.suppress(ImportError):  # a minimal Python
        from pydoc_data.topics import topics
    parts = ([text for _, text in sorted(topics.items())] if kind == "prose" else
             [f.read_text("utf8", "replace") for f in sorted(stdlib.glob("*.py"))])
    if sum(map(len, parts)) < 200_000:
        raise ValueError(f"this Python ships no {kind} to learn from (pydoc_data.topics, {stdlib}"
                         "/*.py); use a full CPython, for example from python.org or a package "
                         "manager")
    paragraphs = "\n\n".join(parts).split("\n\n")
    held_out = [p for i, p in enumerate(paragraphs) if i // 10 % 10 == 0]
    unseen = set(held_out)  # the library repeats paragraphs
    train = [p for p in paragraphs if p not in unseen]
    return "\n\n".join(train), "\n\n".join(held_out)


def people():
    """64 invented people: [(name, city, job, birth year)]; names are unique."""
    rng = random.Random("people 0")
    syllables = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
    names = set()
    while len(names) < 64:
        names.add(" ".join("".join(rng.choices(syllables, k=2)).capitalize() + rng.choice("nrlsx")
                           for _ in range(2)))
    return [(name, rng.choice(CITIES), rng.choice(JOBS), rng.randrange(1900, 2000))
            for name in sorted(names)]


@functools.cache
def fact_items():
    """Three closed-book (question, answer) pairs per person: only memory can answer them."""
    return [pair for name, city, job, year in people() for pair in (
        (QUESTION.format(f"Where does {name} live?"), city),
        (QUESTION.format(f"What is the job of {name}?"), job),
        (QUESTION.format(f"When was {name} born?"), str(year)))]


def lookup(rng):
    """In-context lookup. (Choosing between two people stayed at chance in short training.)"""
    thing, name = rng.choice(THINGS), rng.choice(NAMES)
    return f"{name} has the {thing}. Who has the {thing}?", f" {name}"


def sums(rng):
    """Small sums, differences and products, in the ranges that the math task needs."""
    if rng.random() < 0.3:
        a, b = rng.randint(2, 4), rng.randint(2, 5)
        return f"{a} * {b} =", f" {a * b}"
    a, b = rng.randint(2, 20), rng.randint(1, 6)
    sign, result = ("+", a + b) if rng.random() < 0.6 or a < b else ("-", a - b)
    return f"{a} {sign} {b} =", f" {result}"


def words(rng):
    """One operation on one word."""
    w, n = rng.choice(WORDS), rng.randint(2, 3)
    operation, result = rng.choice([("upper", w.upper()), ("reverse", w[::-1]),
                                    ("spell", "-".join(w)), (f"repeat {n}", " ".join([w] * n))])
    return f"{operation} {w}:", f" {result}"


def lambdas(rng):
    """One operation on a number, in words and as Python."""
    (phrase, code), n = rng.choice(list(OPERATIONS.items())), rng.randint(2, 9)
    return f"{phrase.format(n)}:", f" lambda x: {code.format('x', n)}"


SKILLS = {"lookup": lookup, "sums": sums, "words": words, "lambdas": lambdas}


class PretrainingMixture:
    """Rows of training tokens: a chunk of prose, a chunk of source, or short documents (facts and
    skills). Every document starts with <|endoftext|>: calibration samples the foundation from that
    token alone, and fine-tuning forgets what calibration never sees."""
    ROWS = {"prose": 0.44, "source": 0.10, "short": 0.46}                       # shares of rows
    DOCUMENTS = {"facts": 9, "lookup": 1, "sums": 5, "words": 2, "lambdas": 1}  # weights in "short"

    def __init__(self, encoding):
        self.encode, self.eot = encoding.encode_ordinary, encoding.eot_token

    @functools.cached_property
    def chunks(self):
        """Tokens of prose and source; computed on first use, since an up-to-date run draws none."""
        return {kind: Chunks(library_text(kind)[0].splitlines(keepends=True), self.encode)
                for kind in LIBRARY}

    def row(self, rng, length):
        """`length` tokens; the first is <|endoftext|>."""
        kind = rng.choices(list(self.ROWS), self.ROWS.values())[0]
        if kind != "short":
            return [self.eot] + self.chunks[kind].draw(rng, length - 1)
        row = []
        while len(row) < length:
            kind = rng.choices(list(self.DOCUMENTS), self.DOCUMENTS.values())[0]
            row += [self.eot] + self.encode(self.short_document(rng, kind))
        return row[:length]

    def short_document(self, rng, kind):
        """One fact, or a few lines of one skill."""
        if kind == "facts":
            return "".join(rng.choice(fact_items())) + "\n"
        lines = 3 if kind == "lookup" else 5
        return "".join("".join(SKILLS[kind](rng)) + "\n" for _ in range(lines))

    def fingerprint(self):
        """Changes with the text: another Python version, or an edit of this file."""
        short = [self.short_document(random.Random(i), kind)
                 for kind in self.DOCUMENTS for i in range(200)]
        return fingerprint([*short, repr((fact_items(), self.ROWS, self.DOCUMENTS)),
                            *(library_text(kind)[0] for kind in LIBRARY)])


class Chunks:
    """Token chunks of one long text, given as its lines; each starts at the start of a line."""

    def __init__(self, lines, encode):
        lines = [np.array(encode(line), np.int32) for line in lines or [""]]
        self.tokens = np.concatenate(lines)
        self.starts = np.cumsum([0] + [len(line) for line in lines[:-1]])

    def draw(self, rng, length):
        """`length` tokens from a random start; ValueError if the text has fewer."""
        if len(self.tokens) < length:
            raise ValueError(f"a text of {len(self.tokens):,} tokens is too short for rows of "
                             f"{length}: give more text, or a smaller --context")
        last = np.searchsorted(self.starts, len(self.tokens) - length, side="right")
        start = self.starts[rng.randrange(last)]
        return self.tokens[start:start + length].tolist()


# ------------------------------------------------------------------------------------------------
# Target tasks (the paper's three kinds), and the knowledge that must be kept

@dataclass(frozen=True)
class Item:
    prompt: str
    answer: str  # one correct answer, to train on
    check: Callable[[str], bool] | None = field(compare=False)  # None: scored by likelihood
    where: str = field(default="", compare=False)               # file and line, for error messages


def exact(prompt, answer):
    return Item(prompt, answer, lambda output: output.strip() == answer.strip())


def math_item(rng):
    """A two-step word problem; correct if the number after #### is."""
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    a, b, c, more = rng.randint(2, 4), rng.randint(2, 5), rng.randint(1, 6), rng.random() < 0.5
    if rng.random() < 0.6:
        total, first, story = a * b, f"{a} * {b}", f"{name} has {a} boxes of {b} {thing}s"
    else:
        a, b = rng.randint(2, 14), rng.randint(1, 6)
        total, first, story = a + b, f"{a} + {b}", f"{name} has {a} {thing}s, buys {b}"
    c = min(c, total)
    then, event = (f"{total} + {c}", f"gets {c} more") if more else (f"{total} - {c}", f"loses {c}")
    result = run_arithmetic(then)
    return Item(TEMPLATE.format(f"{story} and {event}. How many {thing}s?"),
                f"{first} = {total}. {then} = {result}. #### {result}",
                lambda output: final_number(output) == result)


def final_number(text):
    """The number after #### at the end of a text (GSM8K's rule), or None."""
    found = re.search(r"####\s*(-?[\d,]*\.?\d+)$", text.rstrip()[-200:])  # quadratic time, so cut
    return float(found[1].replace(",", "")) if found else None


def code_item(rng):
    """Two or three operations in words -> a lambda; correct if it agrees on several integers."""
    phrases, code = [], "x"
    for _ in range(rng.randint(2, 3)):
        (phrase, python), n = rng.choice(list(OPERATIONS.items())), rng.randint(2, 9)
        phrases.append(phrase.format(n))
        code = python.format(f"({code})" if code != "x" else code, n)
    return Item(TEMPLATE.format(f"Write a lambda: {', '.join(phrases)}."), f"lambda x: {code}",
                lambda output: all(run_arithmetic(output, x) == run_arithmetic(code, x)
                                   for x in (-7, -1, 0, 1, 2, 5, 11)))


def run_arithmetic(source, x=0):
    """The value at x of `lambda x: …` or a bare expression of integers, x, + - and *; None for
    anything else, or if it is too long, deep or large. Walks the syntax tree; executes nothing."""
    def walk(node, depth=0):
        match node:
            case ast.Constant(value) if type(value) is int: pass
            case ast.Name("x"): value = x
            case ast.UnaryOp(ast.USub(), a): value = -walk(a, depth + 1)
            case ast.BinOp(a, op, b) if type(op) in ARITHMETIC:
                value = ARITHMETIC[type(op)](walk(a, depth + 1), walk(b, depth + 1))
            case _: raise ValueError
        if depth > 20 or abs(value) > 10 ** 12:
            raise ValueError
        return value
    try:
        body = ast.parse(source.strip() if len(source) <= 200 else "", mode="eval").body
        is_lambda = isinstance(body, ast.Lambda) and ast.unparse(body.args) == "x"
        return walk(body.body if is_lambda else body)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return None


def instruct_item(rng):
    """An instruction with a constraint that can be checked; six families."""
    w, family = rng.choice(WORDS), rng.choice([0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5])
    one, sign = rng.choice(list(MARKS.items()))
    name, upper = one.split(" ", 1)[1], w.upper()
    instruction, answer = [
        (f"Write {w} in capital letters and end with {one}.", upper + sign),
        (f"Write {w} twice, separated by {one}.", w + sign + w),
        (f"Write {w} backwards and end with {one}.", w[::-1] + sign),
        (f"Put {w} in capital letters between two {name}s.", sign + upper + sign),
        (f"Spell {w} in capital letters, with {one} after each.", "".join(c + sign for c in upper)),
        (f"Write a word that starts with {w[0]} and end with {one}.", w + sign)][family]
    item = exact(TEMPLATE.format(instruction), answer)
    if family == 5:  # any such word is correct
        pattern = re.compile(rf"{w[0]}[a-z]+{re.escape(sign)}")
        item = replace(item, check=lambda output: bool(pattern.fullmatch(output.strip())))
    return item


def math_question_item(rng):
    """math in the form of the facts' questions: task and kept knowledge share a template."""
    item = math_item(rng)
    return replace(item, prompt=QUESTION.format(item.prompt.split("\n")[1]))


def marked_fact_item(rng):
    """A fact between marks: a task that needs what the foundation knows, in its own form."""
    question, answer = rng.choice(fact_items())
    mark, sign = rng.choice(list(MARKS.items()))
    place, answer = rng.choice([("Begin", sign + answer), ("End", answer + sign),
                                ("Begin and end", sign + answer + sign)])
    return exact(question.replace("\n", f" {place} with {mark}.\n"), answer)


MAKERS = {"math": math_item, "code": code_item, "instruct": instruct_item,
          "math-question": math_question_item, "marked-facts": marked_fact_item}
TASKS = ("math", "code", "instruct")  # the others overlap with what must be kept
SPLITS = ("test", "valid", "train")
HELD_OUT = 200  # items per task in "test", and as many in "valid"
KINDS = ("facts", *SKILLS)
USES = {"math": "sums", "code": "lambdas", "instruct": "words",  # what a task composes
        "math-question": "sums", "marked-facts": "facts"}
KEPT = {task: tuple(kind for kind in KINDS if kind != used) for task, used in USES.items()}


@functools.cache
def task_items(task, split, count, seed=0):
    """`count` items of a task; no prompt is in two splits."""
    if task not in MAKERS:
        raise ValueError(f"unknown task {task!r}; the tasks are {', '.join(MAKERS)}, or a .jsonl "
                         "file")
    taken = {item.prompt for earlier in SPLITS[:SPLITS.index(split)]
             for item in task_items(task, earlier, HELD_OUT)}
    rng, items = random.Random(f"{task} {split} {seed}"), []
    while len(items) < count:
        item = MAKERS[task](rng)
        if item.prompt not in taken:
            items.append(item)
    return items


def kept_items(kind, split, count=200):
    """Items of one kind of knowledge; "valid" and "test" use different people, or other seeds."""
    if kind == "facts":
        facts = [exact(*fact) for fact in fact_items()]
        return facts[:len(facts) // 2] if split == "valid" else facts[len(facts) // 2:]
    rng = random.Random(f"{kind} {split}")
    return [exact(*SKILLS[kind](rng)) for _ in range(count)]


@functools.cache
def held_out_rows(text, split, encoding, length, most=256):
    """Disjoint rows of a held-out text, for bits per byte; alternately for "valid" and "test"."""
    chunks = Chunks(text.splitlines(keepends=True), encoding.encode_ordinary)
    rows, end = [], 0
    for start in chunks.starts[chunks.starts <= len(chunks.tokens) - length]:
        if start >= end:
            end = start + length - 1
            rows.append([encoding.eot_token] + chunks.tokens[start:end].tolist())
    return rows[split == "test"::2][:most]


# ------------------------------------------------------------------------------------------------
# Items as tokens

def response_row(item, encoding):
    """(tokens, prompt length). An answer ends with a newline, one of several lines with
    <|endoftext|>."""
    prompt = [encoding.eot_token] + encoding.encode_ordinary(item.prompt)
    end = [encoding.eot_token] if "\n" in item.answer else encoding.encode_ordinary("\n")
    return prompt + encoding.encode_ordinary(item.answer) + end, len(prompt)


def response_batch(rows):
    """(x, y), each (B, T), from such rows: inputs, and targets (-100 outside the response)."""
    pad = functools.partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    x = pad([torch.tensor(tokens[:-1]) for tokens, _ in rows])
    y = [torch.tensor([-100] * (prompt - 1) + tokens[prompt:]) for tokens, prompt in rows]
    return x, pad(y, padding_value=-100)

"""The experiments' text: what the foundation is trained on, what it is then taught, what it must keep.

Everything is made here or ships with Python, so that nothing is downloaded, unless GPT-2's tokens are asked
for. The pretraining mixture has English prose (the language reference in `pydoc_data.topics`), Python source
(the standard library), facts about invented people, and elementary skills. A target task *composes* those
skills behind an instruction template that the foundation has never seen, as fine-tuning does in life. Nothing
here knows about models.

    pretraining   upper stone: STONE            Question: Where does Lunar Bavor live?\nAnswer: Oslo
    math          Rosa has 4 boxes of 2 pens and gets 1 more. How many pens?  ->  4 * 2 = 8. 8 + 1 = 9. #### 9
    code          Write a lambda: add 3, multiply by 2.                       ->  lambda x: (x + 3) * 2
    instruct      Write stone backwards and end with a dot.                   ->  enots.
"""
import ast
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
TEMPLATE = "### Instruction:\n{}\n### Response:\n"  # one template for all tasks
QUESTION = "Question: {}\nAnswer: "                 # another one for the facts
WORDS = ("apple army baker basket bird boat bridge camel candle castle corn dance door dream duck eagle "
         "earth field fire flower forest garden glass gold hammer honey horse house island jacket king lamp "
         "lemon light lion market milk moon mountain night ocean orange paper pencil piano planet queen rain "
         "river road silver snow spoon stone storm sugar summer table tiger tower train tree "
         "water window").split()
NAMES = "Ann Ben Cara Dan Eve Finn Gina Hugo Ida Jack Kim Leo Mia Ned Olga Pete Rosa Sam Tina Vera".split()
THINGS = "key lamp map pen ring drum coin book cup hat".split()
CITIES = ("Athens Berlin Cairo Dublin Geneva Havana Istanbul Jakarta Kyoto Lisbon Madrid Nairobi Oslo Paris "
          "Quito Rome Seoul Tokyo Vienna Warsaw").split()
JOBS = ("actor baker carpenter dentist engineer farmer gardener hunter judge lawyer miner nurse painter "
        "pilot sailor singer teacher tailor waiter writer").split()


@functools.cache
def byte_encoding():
    """GPT-2's tokenizer interface over plain bytes: tokens 0..255 are bytes, 256 is <|endoftext|>."""
    return tiktoken.Encoding("bytes", pat_str=r"[\s\S]", mergeable_ranks={bytes([i]): i for i in range(256)},
                             special_tokens={EOT: 256})


@functools.cache
def get_encoding(name):
    """"bytes", or tiktoken's "gpt2", which is downloaded once."""
    if name == "bytes":
        return byte_encoding()
    try:
        return tiktoken.get_encoding(name)
    except Exception as error:  # tiktoken passes on whatever its download raises
        raise ValueError(f"the vocabulary of {name} is not cached and cannot be downloaded "
                         f"({type(error).__name__}); run once with a network, or let TIKTOKEN_CACHE_DIR name "
                         "a folder that holds it")


def fingerprint(texts):
    """A short SHA-256: results say which text they were made with. One text at a time is in memory."""
    digest = hashlib.sha256()
    for number, text in enumerate(texts):
        digest.update(f"\0{text}".encode() if number else text.encode())
    return digest.hexdigest()[:16]


# ------------------------------------------------------------------------------------------------
# What the foundation is trained on. Every document of every kind starts with <|endoftext|>.

@functools.cache
def library_text(kind):
    """(training text, held-out text) of kind "prose" or "source", about a tenth held out.
    Differs between Python versions."""
    if kind == "prose":
        try:
            from pydoc_data.topics import topics
        except ImportError:  # a cut-down Python
            topics = {}
        parts = [text for _, text in sorted(topics.items())]
    else:
        files = sorted(pathlib.Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
        parts = [f.read_text(encoding="utf8", errors="replace") for f in files]
    if sum(map(len, parts)) < 200_000:
        raise ValueError(f"this Python ships no {kind} to learn from (pydoc_data.topics, "
                         f"{sysconfig.get_paths()['stdlib']}/*.py); use a full CPython, "
                         "for example from python.org or a package manager")
    paragraphs = "\n\n".join(parts).split("\n\n")
    held_out = [p for i, p in enumerate(paragraphs) if i // 10 % 10 == 0]
    known = set(held_out)  # documentation repeats itself: what is held out must not stand elsewhere
    train = [p for i, p in enumerate(paragraphs) if i // 10 % 10 and p not in known]
    return "\n\n".join(train), "\n\n".join(held_out)


@functools.cache
def people(count=64, seed=0):
    """Invented people with a city, a job and a birth year: [(name, city, job, year)]; names never repeat."""
    rng = random.Random(f"people {seed}")
    syllables = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
    names = set()
    while len(names) < count:
        names.add(" ".join("".join(rng.choices(syllables, k=2)).capitalize() + rng.choice("nrlsx")
                           for _ in range(2)))
    return [(n, rng.choice(CITIES), rng.choice(JOBS), rng.randrange(1900, 2000)) for n in sorted(names)]


def fact_items(count=64, seed=0):
    """Three (question, answer) pairs a person, closed-book: only memory can answer them."""
    return [pair for name, city, job, year in people(count, seed) for pair in (
        (QUESTION.format(f"Where does {name} live?"), city),
        (QUESTION.format(f"What is the job of {name}?"), job),
        (QUESTION.format(f"When was {name} born?"), str(year)))]


def lookup(rng):
    """In-context look-up: the answer stands in the prompt. (With two people to tell apart, five minutes of
    training did not get past chance.)"""
    thing, name = rng.choice(THINGS), rng.choice(NAMES)
    return f"{name} has the {thing}. Who has the {thing}?", f" {name}"


def sums(rng):
    """Small sums, differences and products; the ranges are those that the math task needs."""
    if rng.random() < 0.3:
        a, b = rng.randint(2, 4), rng.randint(2, 5)
        return f"{a} * {b} =", f" {a * b}"
    a, b = rng.randint(2, 20), rng.randint(1, 6)
    return (f"{a} + {b} =", f" {a + b}") if rng.random() < 0.6 or a < b else (f"{a} - {b} =", f" {a - b}")


def words(rng):
    """One operation on one word."""
    w, n = rng.choice(WORDS), rng.randint(2, 3)
    return rng.choice([(f"upper {w}:", f" {w.upper()}"), (f"reverse {w}:", f" {w[::-1]}"),
                       (f"spell {w}:", f" {'-'.join(w)}"), (f"repeat {n} {w}:", " " + " ".join([w] * n))])


OPERATIONS = {"add {}": "{} + {}", "subtract {}": "{} - {}", "multiply by {}": "{} * {}"}
ARITHMETIC = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}


def lambdas(rng):
    """One operation on a number, in words and as Python."""
    said, code = rng.choice(list(OPERATIONS.items()))
    n = rng.randint(2, 9)
    return f"{said.format(n)}:", f" lambda x: {code.format('x', n)}"


SKILLS = {"lookup": lookup, "sums": sums, "words": words, "lambdas": lambdas}


class PretrainingMixture:
    """Rows of training tokens: a chunk of prose, a chunk of Python source, or short documents (facts and
    skills) packed together.

    Every document of every kind starts with <|endoftext|>: sampling from that token alone must reach all of
    them, or the calibration never sees them and fine-tuning forgets them.
    """
    ROWS = {"prose": 0.45, "source": 0.08, "short": 0.47}                       # shares of the rows
    DOCUMENTS = {"facts": 6, "lookup": 1, "sums": 3, "words": 2, "lambdas": 1}  # weights of short documents

    def __init__(self, encoding):
        self.encode, self.eot = encoding.encode_ordinary, encoding.eot_token
        self.facts = fact_items()

    @functools.cached_property
    def chunks(self):
        """The library's tokens; made when a row is first drawn, since a run that is up to date draws none."""
        return {kind: Chunks(library_text(kind)[0], self.encode) for kind in LIBRARY}

    def row(self, rng, length):
        """`length` tokens, the first of them <|endoftext|>."""
        kind = draw(rng, self.ROWS)
        if kind != "short":
            return [self.eot] + self.chunks[kind].draw(rng, length - 1)
        row = []
        while len(row) < length:
            row += [self.eot] + self.encode(self.short_document(rng, draw(rng, self.DOCUMENTS)))
        return row[:length]

    def short_document(self, rng, kind):
        """One fact, or a few lines of one skill."""
        if kind == "facts":
            return "".join(rng.choice(self.facts)) + "\n"
        return "".join("".join(SKILLS[kind](rng)) + "\n" for _ in range(3 if kind == "lookup" else 5))

    def fingerprint(self):
        """Changes whenever the text would: another Python version, another edit of this file."""
        some = [self.short_document(random.Random(i), kind) for kind in self.DOCUMENTS for i in range(200)]
        return fingerprint(some + [repr((self.facts, self.ROWS, self.DOCUMENTS))]
                           + [library_text(kind)[0] for kind in LIBRARY])


def draw(rng, weights):
    """A key of {key: weight}."""
    return rng.choices(list(weights), weights.values())[0]


class Chunks:
    """Token chunks of one long text, each starting at the start of a line."""

    def __init__(self, text, encode):
        lines = [np.array(encode(line), dtype=np.int32) for line in text.splitlines(keepends=True) or [""]]
        self.tokens = np.concatenate(lines)
        self.starts = np.cumsum([0] + [len(line) for line in lines[:-1]])

    def draw(self, rng, length):
        last = np.searchsorted(self.starts, len(self.tokens) - length, side="right")
        start = self.starts[rng.randrange(last)]
        return self.tokens[start:start + length].tolist()


# ------------------------------------------------------------------------------------------------
# What it is then taught: the paper's three kinds of task, each item with a check of its answer.

@dataclass(frozen=True)
class Item:
    prompt: str
    answer: str                  # one right answer, to learn from
    check: Callable[[str], bool] | None = field(compare=False)  # whether an answer is right; or by likelihood
    where: str = field(default="", compare=False)               # file and line it stands in


def exact(prompt, answer):
    return Item(prompt, answer, lambda said: said.strip() == answer.strip())


def math_item(rng):
    """A two-step word problem; right when the number after #### is."""
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    a, b, c, more = rng.randint(2, 4), rng.randint(2, 5), rng.randint(1, 6), rng.random() < 0.5
    if rng.random() < 0.6:
        first, story = f"{a} * {b}", f"{name} has {a} boxes of {b} {thing}s"
    else:
        a, b = rng.randint(2, 14), rng.randint(1, 6)
        first, story = f"{a} + {b}", f"{name} has {a} {thing}s, buys {b}"
    total = run_arithmetic(first)
    c = min(c, total)
    then = f"{total} {'+' if more else '-'} {c}"
    result = run_arithmetic(then)
    question = f"{story} and {'gets' if more else 'loses'} {c}{' more' if more else ''}. How many {thing}s?"
    return Item(TEMPLATE.format(question), f"{first} = {total}. {then} = {result}. #### {result}",
                lambda said: final_number(said) == result)


def final_number(text):
    """The number that ends a text after ####, GSM8K's rule; None where there is none."""
    found = re.search(r"####\s*(-?[\d,]*\.?\d+)$", text.rstrip()[-200:])  # the search is quadratic
    return float(found[1].replace(",", "")) if found else None


def code_item(rng):
    """Two or three operations in words -> a lambda; right when it computes the same on several integers."""
    said, code = [], "x"
    for _ in range(rng.randint(2, 3)):
        words_, python = rng.choice(list(OPERATIONS.items()))
        n = rng.randint(2, 9)
        said.append(words_.format(n))
        code = python.format(f"({code})" if code != "x" else code, n)

    def check(answer):
        return all((y := run_arithmetic(answer, x)) is not None
                   and y == run_arithmetic(f"lambda x: {code}", x) for x in (-7, -1, 0, 1, 2, 5, 11))
    return Item(TEMPLATE.format(f"Write a lambda: {', '.join(said)}."), f"lambda x: {code}", check)


def run_arithmetic(source, x=0):
    """The value of `lambda x: …` or of a bare expression in + - * and integers, walked as a tree: nothing is
    executed. None when it is anything else, too long, too deep or too large."""
    def walk(node, depth=0):
        match node:
            case ast.Constant(value) if type(value) is int:
                pass
            case ast.Name("x"):
                value = x
            case ast.UnaryOp(ast.USub(), a):
                value = -walk(a, depth + 1)
            case ast.BinOp(a, op, b) if type(op) in ARITHMETIC:
                value = ARITHMETIC[type(op)](walk(a, depth + 1), walk(b, depth + 1))
            case _:
                raise ValueError
        if depth > 20 or abs(value) > 10 ** 12:
            raise ValueError
        return value
    try:
        if len(source) > 200:
            return None
        body = ast.parse(source.strip(), mode="eval").body
        if isinstance(body, ast.Lambda) and ast.unparse(body.args) == "x":
            body = body.body
        return walk(body)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return None


def instruct_item(rng):
    """An instruction with a constraint that a checker can verify; six families."""
    w, family = rng.choice(WORDS), rng.choice([0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5])
    name, sign = rng.choice([("exclamation mark", "!"), ("question mark", "?"), ("dot", "."), ("star", "*")])
    one = f"{'an' if name.startswith('e') else 'a'} {name}"
    asked, answer = [
        (f"Write {w} in capital letters and end with {one}.", w.upper() + sign),
        (f"Write {w} twice, separated by {one}.", w + sign + w),
        (f"Write {w} backwards and end with {one}.", w[::-1] + sign),
        (f"Put {w} in capital letters between two {name}s.", sign + w.upper() + sign),
        (f"Spell {w} in capital letters, with {one} after each.", "".join(c + sign for c in w.upper())),
        (f"Write a word that starts with {w[0]} and end with {one}.", w + sign)][family]
    item, any_word = exact(TEMPLATE.format(asked), answer), re.compile(rf"{w[0]}[a-z]+{re.escape(sign)}")
    return item if family < 5 else replace(item, check=lambda said: bool(any_word.fullmatch(said.strip())))


MAKERS = {"math": math_item, "code": code_item, "instruct": instruct_item}
TASKS = tuple(MAKERS)
SPLITS = ("test", "valid", "train")
HELD_OUT = 200  # items of a task in "test", and as many in "valid"


@functools.cache
def task_items(task, split, count, seed=0):
    """`count` items of a task; a prompt in one split is in no other."""
    if task not in MAKERS:
        raise ValueError(f"unknown task {task!r}; the tasks are {', '.join(MAKERS)}, or a .jsonl file")
    taken = {item.prompt for earlier in SPLITS[:SPLITS.index(split)]
             for item in task_items(task, earlier, HELD_OUT)}
    rng, items = random.Random(f"{task} {split} {seed}"), []
    while len(items) < count:
        item = MAKERS[task](rng)
        if item.prompt not in taken:
            items.append(item)
    return items


# ------------------------------------------------------------------------------------------------
# What it must keep: the facts, and the skills that the target task does not use.

KEPT = {"math": ("facts", "lookup", "words", "lambdas"), "code": ("facts", "lookup", "sums", "words"),
        "instruct": ("facts", "lookup", "sums", "lambdas")}
KINDS = ("facts", *SKILLS)


def kept_items(kind, split, count=200):
    """Items of one kind of knowledge. "valid" and "test" ask about different people, or are drawn with
    different seeds."""
    if kind == "facts":
        facts = fact_items()
        half = len(facts) // 2
        return [exact(*fact) for fact in (facts[:half] if split == "valid" else facts[half:])]
    rng = random.Random(f"{kind} {split}")
    return [exact(*SKILLS[kind](rng)) for _ in range(count)]


@functools.cache
def held_out_rows(text, split, encoding, length, most=256):
    """Rows of `length` tokens of a text, for bits per byte: every second one for "valid", the others
    for "test". Like every document they start at the start of a line; they do not overlap."""
    chunks, rows, end = Chunks(text, encoding.encode_ordinary), [], 0
    for start in chunks.starts[chunks.starts <= len(chunks.tokens) - length]:
        if start >= end:
            end = start + length - 1
            rows.append([encoding.eot_token] + chunks.tokens[start:end].tolist())
    return rows[split == "test"::2][:most]


# ------------------------------------------------------------------------------------------------
# Items as tokens

def response_row(item, encoding):
    """(tokens, number of prompt tokens) of <|endoftext|> prompt answer newline. An answer that has
    lines of its own ends with <|endoftext|> instead of a newline."""
    prompt = [encoding.eot_token] + encoding.encode_ordinary(item.prompt)
    end = [encoding.eot_token] if "\n" in item.answer else encoding.encode_ordinary("\n")
    return prompt + encoding.encode_ordinary(item.answer) + end, len(prompt)


def response_batch(rows):
    """(x, y), each (B, T), of such rows: inputs, and targets that count the response only (-100
    elsewhere)."""
    length = max(len(tokens) for tokens, _ in rows) - 1
    x = torch.zeros(len(rows), length, dtype=torch.long)
    y = torch.full((len(rows), length), -100)
    for i, (tokens, prompt) in enumerate(rows):
        x[i, :len(tokens) - 1] = torch.tensor(tokens[:-1])
        y[i, prompt - 1:len(tokens) - 1] = torch.tensor(tokens[prompt:])
    return x, y

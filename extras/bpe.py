"""Byte-level BPE, the tokenizer of GPT-2, Llama 3 and SmolLM, from a vocabulary and its merges.

A vocabulary file spells each byte as one printable character (`byte_alphabet`). tiktoken needs the
bytes themselves, one id per token, and one regular expression that splits text before merging; it
merges the pair that makes the token of lowest id. A tokenizer is kept as a dict of plain values,
{"pattern": …, "vocab": {spelled token: id}, "special": {name: id}}, inside foundation.pt.
"""
import hashlib
import json
from itertools import pairwise

import tiktoken

from tasks import EOT

GPT2_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
# One digit at a time, and GPT-2's expression for the pieces in between. White space before a digit
# therefore ends its piece, and is one token there, as it would be at the end of the text.
DIGIT_SPLIT = (r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++|\p{N}| ?[^\s\p{L}\p{N}]++|\s++$"
               r"|\s+(?![^\s\p{N}])|\s")
GGUF_SPLITS = {"gpt-2": GPT2_SPLIT, "smollm": DIGIT_SPLIT}  # by tokenizer.ggml.pre
CONTROL, USER_DEFINED = 3, 4                                # of tokenizer.ggml.token_type


def byte_alphabet():
    """{character: byte} of GPT-2's spelling: printable bytes stand for themselves, the others
    follow in order from "Ā" on. A space is "Ġ"."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


class ByteLevelBPE(tiktoken.Encoding):
    """The tiktoken.Encoding of a tokenizer as `make_tokenizer` returns it.

    A vocabulary may lack bytes that its training text never had: SmolLM2's lacks six control
    characters and the bytes that only undefined characters begin with. Such a byte gets no id, as
    in Hugging Face's tokenizers.
    """

    def __init__(self, name, tokenizer):
        self.tokenizer = tokenizer
        ranks, special = vocabulary_bytes(tokenizer["vocab"]), tokenizer["special"]
        self.known = {*ranks.values(), *special.values()}
        size = 1 + max(self.known)
        lacking = [byte for byte in (bytes([i]) for i in range(256)) if byte not in ranks]
        ranks |= {byte: size + i for i, byte in enumerate(lacking)}  # ids that are left out again
        super().__init__(name, pat_str=tokenizer["pattern"], mergeable_ranks=ranks,
                         special_tokens=special)
        self.max_token_value = size - 1

    def decode(self, tokens, errors="replace"):
        """Text of token ids; those that only fill the model's vocabulary up are left out."""
        return super().decode([token for token in tokens if token in self.known], errors)

    def encode_ordinary(self, text):
        return [token for token in super().encode_ordinary(text) if token <= self.max_token_value]


def vocabulary_bytes(vocab):
    """{bytes: id} of {spelled token: id}."""
    alphabet = byte_alphabet()
    for token in vocab:
        if not token or not alphabet.keys() >= set(token):
            raise ValueError(f"its tokenizer is not byte-level BPE: {token!r} is not spelled in "
                             "GPT-2's byte alphabet")
    return {bytes(alphabet[c] for c in token): i for token, i in vocab.items()}


def make_tokenizer(pattern, vocab, merges, special, end, ignore_merges=False):
    """(name, tokenizer) of a vocabulary {spelled token: id} and its merges, pairs in their order.

    ignore_merges: a token may have no merge; it is used where it is all of a piece of text.
    The name is a hash of the content. <|endoftext|>, if it is not there, is the token `end`.
    """
    vocab = {token: i for token, i in vocab.items() if token not in special}
    ids = [*vocab.values(), *special.values()]
    if len({*ids}) < len(ids) or min(ids) < 0:
        raise ValueError("its tokenizer's ids are not one to a token, from 0 on")
    if EOT not in special and end not in special.values():
        raise ValueError(f"its tokenizer has no {EOT} and names no other end of a text")
    vocabulary_bytes(vocab)  # refuses another spelling
    made = [first + second for first, second in merges]
    whole = {token for token in vocab if len(token) > 1}
    if wrong := {*made} - whole or ({} if ignore_merges else whole - {*made}):
        raise ValueError(f"its tokenizer has {min(wrong)!r} as a token or a merge, but not as both")
    if (order := [vocab[token] for token in made]) != sorted(order):
        raise ValueError("its tokenizer's ids are not in the order of its merges")
    tokenizer = {"pattern": pattern, "vocab": vocab, "special": {EOT: end} | special}
    name = f"bpe-{hashlib.sha256(json.dumps(tokenizer).encode()).hexdigest()[:8]}"
    return name, tokenizer


def gguf_tokenizer(field):
    """`make_tokenizer` of a GGUF file, whose metadata are field(key, default)."""
    kind, split = field("tokenizer.ggml.model"), field("tokenizer.ggml.pre", "default")
    if kind != "gpt2":
        raise ValueError(f"its tokenizer is {kind!r}; only byte-level BPE, 'gpt2', is supported")
    if split not in GGUF_SPLITS:
        raise ValueError(f"its tokenizer splits text like {split!r}; supported are "
                         f"{', '.join(GGUF_SPLITS)}")
    vocab = {token: i for i, token in enumerate(field("tokenizer.ggml.tokens"))}
    kinds = field("tokenizer.ggml.token_type")
    special = {token: i for token, i in vocab.items() if kinds[i] in (CONTROL, USER_DEFINED)}
    merges = [merge.split(" ") for merge in field("tokenizer.ggml.merges")]
    return make_tokenizer(GGUF_SPLITS[split], vocab, merges, special,
                          field("tokenizer.ggml.eos_token_id", None))


def json_tokenizer(content, end=None):
    """`make_tokenizer` of the content of Hugging Face's tokenizer.json."""
    model = content["model"]
    if model["type"] != "BPE" or model.get("byte_fallback") or content.get("normalizer"):
        raise ValueError("its tokenizer is not byte-level BPE without a normalizer")
    for key in "continuing_subword_prefix", "end_of_word_suffix", "unk_token":
        if model.get(key):
            raise ValueError(f"its tokenizer's {key} is {model[key]!r}; none is supported")
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    special = {token["content"]: token["id"] for token in content["added_tokens"]}
    split = split_of(content.get("pre_tokenizer"))
    end = end[0] if isinstance(end, list) else end  # several may end an answer
    return make_tokenizer(split, model["vocab"], merges, special, end, model.get("ignore_merges"))


def split_of(pre):
    """The regular expression that splits as the "pre_tokenizer" of a tokenizer.json."""
    stages = (pre or {}).get("pretokenizers") or [pre or {}]
    *first, last = [{"use_regex": True} | stage for stage in stages]
    if last.get("type") == "ByteLevel" and not last.get("add_prefix_space"):
        if not first and last["use_regex"]:
            return GPT2_SPLIT
        kind = first[0].get("type") if len(first) == 1 else None
        if kind == "Digits" and first[0].get("individual_digits") and last["use_regex"]:
            return DIGIT_SPLIT
        found = kind == "Split" and not first[0].get("invert") and first[0]["pattern"].get("Regex")
        if found and first[0]["behavior"] == "Isolated" and not last["use_regex"]:
            return rf"{found}|(?:(?!{found})[\s\S])+"  # what it does not match is kept, too
    raise ValueError("its tokenizer splits text in a way that is not supported: "
                     f"{json.dumps(pre)[:80]}")


# ------------------------------------------------------------------------------------------------
# Out

def merge_of(token, ranks):
    """The two parts that merging makes the bytes `token` of, from single bytes."""
    parts = [token[i:i + 1] for i in range(len(token))]
    while len(parts) > 2:
        rank, i = min((ranks.get(a + b, len(ranks)), i) for i, (a, b) in enumerate(pairwise(parts)))
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts


def tokenizer_json(tokenizer):
    """The content of a tokenizer.json for transformers, which `json_tokenizer` reads, too."""
    ranks, alphabet = vocabulary_bytes(tokenizer["vocab"]), byte_alphabet()
    spelled = {byte: character for character, byte in alphabet.items()}
    merges = [["".join(map(spelled.get, part)) for part in merge_of(token, ranks)]
              for token in sorted(ranks, key=ranks.get) if len(token) > 1]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
             "use_regex": True}
    split = {"type": "Split", "behavior": "Isolated", "invert": False,
             "pattern": {"Regex": tokenizer["pattern"]}}
    stages = {GPT2_SPLIT: [level],
              DIGIT_SPLIT: [{"type": "Digits", "individual_digits": True}, level]}
    names = {i: name for name, i in tokenizer["special"].items()}  # one of an id's names
    return {"version": "1.0", "truncation": None, "padding": None, "normalizer": None,
            "added_tokens": [dict(id=i, content=name, single_word=False, lstrip=False, rstrip=False,
                                  normalized=False, special=True) for i, name in names.items()],
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": stages.get(
                tokenizer["pattern"], [split, level | {"use_regex": False}])},
            "post_processor": None, "decoder": level,
            "model": {"type": "BPE", "merges": merges,
                      "vocab": tokenizer["vocab"] | {name: i for i, name in names.items()}}}

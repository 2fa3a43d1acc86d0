"""GPT-2's weights, as Hugging Face stores them, in and out of this project's GPT."""
import json
import pathlib

import torch

from extras.files import (check_finite, check_tensors, friendly_errors, load_tensors,
                          read_safetensors)
from model import GPT, GPTConfig, block_linears

GPT2 = {name: f"https://huggingface.co/openai-community/{name}/resolve/main/pytorch_model.bin"
        for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}


def gpt2_layout(model):
    """{GPT-2's name: tensor}: views of the model's weights in that layout, where the blocks'
    projections are (d_in, d_out). The output layer is the embedding and is not listed."""
    transposed = {f"{name}.weight" for name in block_linears(model)}
    return {name.removeprefix("transformer."): p.detach().T if name in transposed else p.detach()
            for name, p in model.named_parameters()}


def from_gpt2(weights, n_head=None):
    """The GPT of {name: tensor} in that layout; without n_head, heads have GPT-2's 64 channels.
    ValueError names a tensor that is missing, unknown or of another shape."""
    weights = {name.removeprefix("transformer."): t for name, t in weights.items()
               if not name.endswith((".attn.bias", ".attn.masked_bias"))}  # masks, not weights
    output = weights.pop("lm_head.weight", None)
    embeddings = [name for name in ("wte.weight", "wpe.weight") if name in weights]
    shapes = [tuple(weights[name].shape) for name in embeddings]
    if [len(shape) for shape in shapes] != [2, 2]:
        raise ValueError("wte.weight and wpe.weight are missing or no matrices: these are not "
                         "GPT-2's weights")
    (vocab, C), (T, _) = shapes
    n_layer = len({name.split(".")[1] for name in weights if name.startswith("h.")})
    heads = max(1, C // 64) if n_head is None else n_head
    config = GPTConfig(T, vocab, n_layer, heads, C, "tanh", "gpt2")
    weights = {name: t.float() if t.is_floating_point() else t for name, t in weights.items()}
    with torch.device("meta"):
        check_tensors(weights, gpt2_layout(GPT(config)))
    model = GPT(config)
    for name, own in gpt2_layout(model).items():
        own.copy_(weights[name])
    tied = model.lm_head.weight
    if output is not None and not torch.equal(output.to(tied), tied):
        raise ValueError("lm_head.weight is not wte.weight; GPT-2 ties them")
    return model


def read_gpt2(source):
    """(weights, n_head or None) of one of GPT2's names, downloaded once, or of a folder or file."""
    path, n_head, advice = pathlib.Path(source), None, (
        f"give one of {', '.join(GPT2)}, or a whole pytorch_model.bin or model.safetensors")
    if source in GPT2:
        path = pathlib.Path(torch.hub.get_dir()) / "checkpoints" / f"{source}.bin"
        if not path.exists():
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                torch.hub.download_url_to_file(GPT2[source], str(path))  # whole or not at all
            except OSError as error:
                raise ValueError(f"{source} cannot be downloaded ({error}); fetch {GPT2[source]} "
                                 "elsewhere and give its path")
    elif path.is_dir():
        config = path / "config.json"
        if config.is_file():
            with friendly_errors(config, "give a folder whose config.json is GPT-2's"):
                n_head = json.loads(config.read_bytes()).get("n_head")
        path = next((path / name for name in ("model.safetensors", "pytorch_model.bin")
                     if (path / name).exists()), path / "pytorch_model.bin")
    with friendly_errors(path, advice):
        read = read_safetensors if path.suffix == ".safetensors" else load_tensors
        return check_finite(read(path)), n_head

"""GPT-2's weights, as Hugging Face stores them, in and out of this project's GPT."""
import torch

from model import GPT, GPTConfig, block_linears

GPT2 = {name: f"https://huggingface.co/openai-community/{name}/resolve/main/pytorch_model.bin"
        for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}


def transposed(model, weights):
    """{name: tensor} with the blocks' projections, (d_out, d_in) here and (d_in, d_out) in GPT-2's
    layout, in the other one's shape: views."""
    projections = {f"{name}.weight" for name in block_linears(model)}
    return {name: t.T if name in projections else t for name, t in weights.items()}


def gpt2_layout(model):
    """{GPT-2's name: tensor}: views of the model's weights in that layout. The output layer is the
    embedding and is not listed."""
    weights = {name: p.detach() for name, p in model.named_parameters()}
    return {name.removeprefix("transformer."): t for name, t in transposed(model, weights).items()}


def from_gpt2(weights, n_head=None):
    """The GPT of {name: tensor} in that layout; without n_head, heads have GPT-2's 64 channels."""
    weights = {name.removeprefix("transformer."): t.float() for name, t in weights.items()
               if not name.endswith((".attn.bias", "masked_bias", "lm_head.weight"))}  # masks; tied
    if not weights.keys() >= {"wte.weight", "wpe.weight"}:
        raise ValueError("wte.weight or wpe.weight is missing: these are not GPT-2's weights")
    (vocab, C), (T, _) = weights["wte.weight"].shape, weights["wpe.weight"].shape
    n_layer = len({name.split(".")[1] for name in weights if name.startswith("h.")})
    model = GPT(GPTConfig(T, vocab, n_layer, n_head or max(1, C // 64), C, "tanh", "gpt2"))
    named = {f"transformer.{name}": t for name, t in weights.items()}
    model.load_state_dict(transposed(model, named) | {"lm_head.weight": weights["wte.weight"]})
    return model


def download(name):
    """{name: tensor} of one of GPT2's names, downloaded once."""
    try:
        return torch.hub.load_state_dict_from_url(GPT2[name], map_location="cpu",
                                                  weights_only=True, file_name=f"{name}.bin")
    except OSError as error:
        raise ValueError(f"{name} cannot be downloaded ({error}); fetch {GPT2[name]} elsewhere and "
                         "give its path")

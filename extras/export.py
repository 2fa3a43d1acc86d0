"""Export for transformers (merged weights) and PEFT (an adapter for the untouched foundation)."""
import pathlib

import torch

import tasks
from extras.bpe import ByteLevelBPE, tokenizer_json
from extras.files import atomic_write, load_adapter, load_foundation, write_json
from extras.gpt2 import gpt2_layout
from extras.published import config_json
from model import GPT, LoRALinear, block_linears


def export(args):
    """Write the folder args.to: the foundation or a merged model, a Llama's tokenizer beside it, or
    a PEFT adapter."""
    folder, peft = pathlib.Path(args.to), args.adapter and args.format == "peft"
    model = (load_adapter(pathlib.Path(args.adapter), args.out, "cpu", merge=not peft)
             if args.adapter else load_foundation(args.out, "cpu")[0])
    config, weights = peft_files(model, args.adapter) if peft else merged_files(model)
    bin_file, json_file = (("adapter_model.bin", "adapter_config.json") if peft else
                           ("pytorch_model.bin", "config.json"))
    files, encoding = {json_file: config}, tasks.get_encoding(model.config.encoding)
    if not peft and isinstance(encoding, ByteLevelBPE):
        content = tokenizer_json(encoding.tokenizer)
        end = next(t["content"] for t in content["added_tokens"] if t["id"] == encoding.eot_token)
        files |= {"tokenizer.json": content, "tokenizer_config.json": dict(
            tokenizer_class="PreTrainedTokenizerFast", bos_token=end, eos_token=end)}
    atomic_write(folder / bin_file, lambda f: torch.save(weights, f))
    for name, content in files.items():
        write_json(folder / name, content)
    print(f"{folder}: {', '.join([bin_file, *files])} written")


def merged_files(model):
    """(config.json, weights) of a GPT in GPT-2's layout, or of a Llama in its own."""
    c = model.config
    eot = tasks.get_encoding(c.encoding).eot_token
    if not isinstance(model, GPT):
        return config_json(c, eot), {name: p.detach() for name, p in model.named_parameters()}
    return (dict(model_type="gpt2", architectures=["GPT2LMHeadModel"], vocab_size=c.vocab_size,
                 n_positions=c.block_size, n_ctx=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer,
                 n_head=c.n_head, activation_function="gelu_new" if c.gelu == "tanh" else "gelu",
                 bos_token_id=eot, eos_token_id=eot),
            {f"transformer.{name}": t.contiguous() for name, t in gpt2_layout(model).items()})


def peft_files(model, path):
    """(adapter_config.json, weights) of a PEFT LoRA on W0. W_res is not W0, but the change still
    has rank 2r: ΔW = κ(BA - B0A0) = [κB, -κB0] [A; A0]."""
    weights, layers = {}, block_linears(model, LoRALinear)
    if not layers:
        raise ValueError(f"{path} holds full weights, which no LoRA can hold; use --format merged")
    for name, layer in layers.items():
        P, G = layer.delta_factors()
        weights[f"base_model.model.{name}.lora_A.weight"] = G.detach().contiguous()
        weights[f"base_model.model.{name}.lora_B.weight"] = P.detach().contiguous()
    targets = sorted({name.split(".")[-1] for name in layers})
    return (dict(peft_type="LORA", task_type="CAUSAL_LM", r=len(G), lora_alpha=len(G),
                 base_model_name_or_path=None,  # not kept: whoever loads the adapter names it
                 target_modules=targets, lora_dropout=0.0, bias="none", inference_mode=True,
                 fan_in_fan_out=isinstance(model, GPT)),  # GPT-2's projections are (d_in, d_out)
            weights)

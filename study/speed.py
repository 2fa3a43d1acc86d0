"""Speed and memory, each against what people would otherwise use, timed in turn with it."""
import collections
import contextlib
import dataclasses
import functools
import gc
import importlib.util
import io
import pathlib
import random
import re
import shutil
import statistics
import subprocess
import sys

import torch

import calibrate
import tasks
import train
from extras.export import merged_files
from extras.files import make_model, write_json
from extras.llama import LlamaConfig
from extras.machine import autocast, describe_machine, pick_device, tf32
from extras.tables import markdown
from folora import generalized_eigh
from model import GPT, GPTConfig, block_linears, generate
from study.measure import (eigenproblem, interleaved, random_batch, ratios, sadam,
                           seconds_of, training_bytes, training_steps, with_adapters)


@dataclasses.dataclass(frozen=True)
class Sizes:
    gpt2: GPTConfig
    llama: LlamaConfig
    tiny: GPTConfig = dataclasses.field(default_factory=GPTConfig)
    rounds: int = 7
    new_tokens: int = 256
    eigen: tuple = (128, 768, 3072)
    main_job: tuple = ()           # options of eval.py
    out: str = "out"


FULL = Sizes(GPTConfig(1024, 50257, 12, 12, 768, gelu="tanh"),  # 124M parameters
             LlamaConfig(192, encoding="bytes"))                # SmolLM2-135M
QUICK = Sizes(GPTConfig(256, 50257, 2, 12, 768, gelu="tanh"),
              LlamaConfig(64, n_layer=2, encoding="bytes"), rounds=3, new_tokens=32,
              eigen=(128, 768))
MICRO = {"--pretrain": "--steps 4 --batch 2 --layers 1 --heads 2 --width 32",
         "--calibrate": "--samples 20 --queries 8 --min-unique 0 --min-unique-fours 0 "
                        "--max-run 200",
         "--adapt": "--steps 4 --batch 4 --examples 40 --rank 2"}
REHEARSAL = Sizes(GPTConfig(16, 257, 1, 2, 128),
                  LlamaConfig(8, 257, 1, 2, 1, 64, 64, encoding="bytes"),
                  GPTConfig(128, 257, 1, 2, 32), 1, 4, (8, 16),
                  ("--methods", "folora", *(part for pair in MICRO.items() for part in pair)))


# ------------------------------------------------------------------------------------------------
# Training. Each function returns, for each line of its row, the values or why there are none.

def code_batch():
    """(x, y) of 8 items of the code task: up to 117 tokens, a quarter of them answers."""
    items, encoding = tasks.task_items("code", "train", 8), tasks.get_encoding("bytes")
    batch = tasks.response_batch([tasks.response_row(item, encoding) for item in items])
    return [t.to(pick_device()) for t in batch]


def sadam_time(config, rank, x, y, passes, rounds):
    """By how many percent SAdam, instead of fused AdamW, lengthens a LoRA step of so many passes
    over x, y: with bases in float32, then in bfloat16."""
    model, spectral = with_adapters(config, rank)
    optimizers = {"plain": torch.optim.AdamW((p for p in model.parameters() if p.requires_grad),
                                             lr=1e-6, fused=True),
                  **{kind: sadam(model, spectral, getattr(torch, kind))
                     for kind in ("float32", "bfloat16")}}

    def backward():
        model.zero_grad(set_to_none=True)
        train.loss_of(model, x, y).backward()

    backward()
    with tf32(x.device):  # as in training_loop
        found = interleaved(rounds, backward=backward,
                            **{name: optimizer.step for name, optimizer in optimizers.items()})
    return [[100 * (ours - plain) / (passes * one + plain)
             for one, plain, ours in zip(found["backward"], found["plain"], found[kind])]
            for kind in ("float32", "bfloat16")]


def time_sadam(s):
    """On a CPU, a pass over one row stands for each of the step's eight."""
    rows = 8 if torch.cuda.is_available() else 1
    return (sadam_time(s.gpt2, 128, *random_batch(s.gpt2, rows), 8 // rows, s.rounds)
            + sadam_time(s.tiny, 8, *code_batch(), 1, 3 * s.rounds)[:1])


def memory(s):
    """MB that training with plain Adam holds, and by how many percent bases in float32 and bfloat16
    raise that: on a GPU the peak, on a CPU the count without activations."""
    (model, spectral), totals = with_adapters(s.gpt2, 128), []
    x, y = random_batch(s.gpt2, 8 if torch.cuda.is_available() else 1)
    for bases, dtype in ({}, None), (spectral, torch.float32), (spectral, torch.bfloat16):
        optimizer = sadam(model, bases, dtype)
        for _ in range(2):  # the second step counts: by then the moments are there
            if x.is_cuda:
                torch.cuda.reset_peak_memory_stats()
            model.zero_grad(set_to_none=True)
            train.loss_of(model, x, y).backward()
            optimizer.step()
        totals.append(training_bytes(model, optimizer))
        del optimizer
    return [totals[0] / 1e6], *([100 * (total / totals[0] - 1)] for total in totals[1:])


# ------------------------------------------------------------------------------------------------
# Against transformers and PEFT, where they are installed

def missing_modules(*modules):
    """"needs ..." if one of these cannot be imported, else ""."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    return f"needs {' and '.join(missing)}" if missing else ""


def as_transformers(model):
    """The same GPT, without dropout, or Llama in transformers."""
    import transformers
    config, weights = merged_files(model)
    if isinstance(model, GPT):
        config |= dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
        theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**config))
    else:
        theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
    theirs.load_state_dict(weights, strict=False)  # all but the output layer, which is tied
    return theirs.to(pick_device())


def peft_steps(config, rank, x, y, steps):
    """() -> this many steps of a plain loop over transformers and PEFT's LoRA with AdamW."""
    import peft
    model = make_model(vars(config))
    theirs = peft.get_peft_model(as_transformers(model), peft.LoraConfig(
        r=rank, lora_alpha=rank, fan_in_fan_out=isinstance(model, GPT),
        target_modules=[name.split(".")[-1] for name in block_linears(model)]))
    trained = [p for p in theirs.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(trained, lr=1e-6, fused=True)
    labels = torch.cat([torch.full_like(y[:, :1], -100), y[:, :-1]], 1)  # they shift the targets

    def run():
        with tf32(x.device):  # as in training_loop
            for _ in range(steps):
                with autocast(x.device):
                    loss = theirs(input_ids=x, labels=labels, use_cache=False).loss
                theirs.zero_grad(set_to_none=True)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(trained, 1.0)
                adamw.step()
                loss.item()
    return run


def adapting(config, rank, x, y, steps, rounds):
    """Tokens per second of our loop with SAdam; the time of PEFT's over ours. Both gain from
    `keep_freed_memory`, PEFT's more: where it runs alone, it takes longer."""
    model, spectral = with_adapters(config, rank)
    works = {"ours": training_steps(model, [sadam(model, spectral)], lambda step: (x, y), steps)}
    missing = missing_modules("transformers", "peft")
    if not missing:
        works["peft"] = peft_steps(config, rank, x, y, steps)
    found = interleaved(rounds, **works)
    return [[steps * x.numel() / seconds for seconds in found["ours"]],
            missing or ratios(found, "peft", "ours")]


def time_adapt(s):
    return (adapting(s.gpt2, 8, *random_batch(s.gpt2, 1), 1, s.rounds)
            + adapting(s.llama, 32, *random_batch(s.llama, 8), 1, s.rounds)
            + adapting(s.llama, 32, *random_batch(s.llama, 8, 0.2), 1, s.rounds)
            + adapting(s.tiny, 8, *code_batch(), 20, s.rounds))


def time_sampling(s):
    """Tokens per second; the time of transformers' generate over ours, with a call for each
    decoding setting and with plain sampling. No text ends early."""
    model = GPT(dataclasses.replace(s.tiny, block_size=s.new_tokens)).to(pick_device()).eval()
    generator, missing = torch.Generator(pick_device()), missing_modules("transformers")
    decoding = calibrate.draw_decoding(random.Random(0), 64, model)
    start = torch.full((64, 1), 256, device=pick_device())
    works = {"ours": lambda: generate(model, start.tolist(), s.new_tokens, (), decoding,
                                      generator=generator)}
    if not missing:
        sample = functools.partial(as_transformers(model).eval().generate, do_sample=True,
                                   max_new_tokens=s.new_tokens, eos_token_id=None, pad_token_id=0)
        settings = collections.Counter(zip(*(column.tolist() for column in decoding)))
        works["settings"] = lambda: [sample(start[:rows], temperature=t, top_p=p, top_k=int(k))
                                     for (t, p, k), rows in settings.items()]
        works["plain"] = lambda: sample(start, top_k=0)
    found = interleaved(s.rounds, **works)
    return [[64 * s.new_tokens / seconds for seconds in found["ours"]],
            *(missing or ratios(found, name, "ours") for name in ("settings", "plain"))]


# ------------------------------------------------------------------------------------------------
# Calibration, the main job

def time_moments(s):
    """Against the forward pass that they are measured in."""
    model, (x, _) = GPT(s.gpt2).to(pick_device()).eval(), random_batch(s.gpt2, 2)
    rows = x.tolist()
    with torch.inference_mode():
        found = interleaved(s.rounds, forward=lambda: model(x),
                            ours=lambda: calibrate.second_moments(model, rows))
    return [ratios(found, "ours", "forward")]


def time_eigen(s):
    """For each n: seconds, and over SciPy's."""
    lines, missing = [], missing_modules("scipy")
    for n in s.eigen:
        C, H = eigenproblem(n)
        works = {"ours": lambda: generalized_eigh(C, H)}
        if not missing:
            from scipy.linalg import eigh
            works["scipy"] = functools.partial(eigh, C.cpu().numpy(), H.cpu().numpy())
        found = interleaved(s.rounds, pause=0.3, **works)
        lines += [found["ours"], missing or ratios(found, "ours", "scipy")]
    return lines + 2 * (len(FULL.eigen) - len(s.eigen)) * ["only without --quick"]


def time_main_job(s):
    """Once, in a process of its own, from nothing; its results stay in <out>/main-job."""
    folder = pathlib.Path(s.out) / "main-job"
    shutil.rmtree(folder, ignore_errors=True)
    script, done = pathlib.Path(train.__file__).with_name("eval.py"), []
    job = [sys.executable, str(script), "--out", str(folder), *s.main_job]
    seconds = seconds_of(lambda: done.append(
        subprocess.run(job, stdout=subprocess.PIPE, text=True, check=True)))
    began = [int(t) for t in re.findall(r"== .* \((\d+) s\) ==", done[0].stdout)]
    return [seconds], [100 * (began[2] - began[1]) / seconds]


# ------------------------------------------------------------------------------------------------
# The table

ROWS = {  # row: (function, [(what, reference, format)])
    "sadam": (time_sadam, [
        (f"SAdam's step beyond AdamW's, of a LoRA step: {shape}", "AdamW(fused=True)", "{:+.1f} %")
        for shape in ("GPT-2 124M, r 128, 8k tokens",
                      "GPT-2 124M, r 128, 8k tokens; bfloat16 bases", "tiny, r 8, 8 items")]),
    "memory": (memory, [
        ("memory of LoRA training: GPT-2 124M, r 128, 8k tokens", "-", "{:,.0f} MB"),
        ("the same with SAdam", "plain LoRA", "{:+.1f} %"),
        ("the same with SAdam, bfloat16 bases", "plain LoRA", "{:+.1f} %")]),
    "adapt": (time_adapt, [
        (f"adapting with FoLoRA: {shape}", *columns)
        for shape in ("GPT-2 124M, r 8, 1 x 1024, half prompts",
                      "SmolLM2-135M, r 32, 8 x 192, half prompts",
                      "SmolLM2-135M, r 32, 8 rows of 38 to 192", "tiny, r 8, 8 items")
        for columns in (("-", "{:,.0f} tokens/s"), ("transformers + PEFT LoRA", "{:.2f} x"))]),
    "sampling": (time_sampling, [
        ("sampling the proxy set: tiny, 64 x 256", *columns) for columns in (
            ("-", "{:,.0f} tokens/s"),
            ("transformers' generate, a call for each setting", "{:.2f} x"),
            ("transformers' generate, without top-p and top-k", "{:.2f} x"))]),
    "moments": (time_moments, [
        ("second moments: GPT-2 124M, 2 x 1024", "forward pass", "{:.2f} x")]),
    "eigen": (time_eigen, [
        (f"generalized eigenproblem, n = {n}", *columns) for n in FULL.eigen
        for columns in (("-", "{:.3f} s"), ("scipy.linalg.eigh", "{:.2f} x"))]),
    "main-job": (time_main_job, [
        ("the main job from nothing", "-", "{:.0f} s"),
        ("calibration, of the main job's time", "-", "{:.1f} %")])}


def line_of(what, reference, form, values):
    """One line of the table as a dict; `values` is the reason where it was skipped."""
    line = {"": what, "reference": reference}
    if isinstance(values, str):
        return line | {"median": f"skipped: {values}", "range": "-"}
    ends = " to ".join(form.format(f(values)) for f in (min, max))
    return line | {"median": form.format(statistics.median(values)),
                   "range": f"{ends} (n {len(values)})" if values[1:] else "-"}


def speed(args):
    """Measure rows, print the table, write all values to args.json (default: out/speed.json)."""
    sizes = REHEARSAL if args.rehearse else QUICK if args.quick else FULL
    sizes = dataclasses.replace(sizes, out=args.out)
    torch.manual_seed(0)
    measured, lines = {}, []
    for row in args.only or [row for row in ROWS if not (args.quick and row == "main-job")]:
        print(f"{row} ...", flush=True)
        with contextlib.redirect_stdout(io.StringIO()):
            measured[row] = ROWS[row][0](sizes)
        gc.collect()
        torch.cuda.empty_cache()  # for the next row
        lines += [line_of(*spec, values) for spec, values in zip(ROWS[row][1], measured[row])]
    machine = f"{describe_machine(pick_device())}, torch {torch.__version__}"
    print(f"\n{machine}\n")
    print(f"{markdown(list(lines[0]), [list(line.values()) for line in lines])}\n")
    path = pathlib.Path(args.json or f"{args.out}/speed.json")
    write_json(path, {"machine": machine, "quick": args.quick, "lines": lines,
                      "measured": measured})
    print(f"{path} written")

"""Calibrate: the base model writes text; measure what its layers read on it, and on the task.

    python calibrate.py --task math      # out/math/calibration.pt

1. Sample: N texts, each from <|endoftext|> alone: the *proxy* for the pretraining text, which few
   users of a model have (Sec. 3.4).
2. Filter out repetitive and duplicate texts (App. B.4).
3. Measure C_pre, the second moment of every linear layer's input on those texts, and C_task, the
   same on task queries. (S_pre, the second moment of the loss's gradient at each layer's output, is
   for the methods with a KL penalty.)

Only C_task depends on the task; the rest is cached in out/proxy.pt.
"""
import collections
import itertools
import math
import pathlib
import random
import re

import torch
from torch.nn.utils.rnn import pad_sequence

import tasks
from extras.cli import Parser, add_common, add_options, add_task, command
from extras.files import build_if_stale, load, load_foundation, task_folder
from extras.machine import Progress, all_gather, pick_device, rank_and_world, set_precision
from extras.moments import batches_of, forward_hooks, gradient_moments, input_twin, means_of
from extras.tables import spectrum_table
from extras.user_data import load_items
from folora import SecondMoment
from model import block_linears, generate

# share of the samples, (temperature, top-p, top-k; 0 for no limit): App. B.4
DECODING = [(0.70, (1.0, 1.0, 0)),
            (0.20, (1.0, 0.95, 0)),
            (0.10, (1.2, 0.98, 50))]
# App. B.4's filters, for bytes; the paper has min_unique 0.12 and fours_from 256, for BPE tokens
FILTERS = {"min_tokens": (32, "reject shorter samples"),
           "max_run": (20, "reject runs of this many equal tokens"),
           "min_unique": (0.08, "least share of unique tokens; real text has 0.13 to 0.3"),
           "unique_from": (128, "tokens from which min_unique applies"),
           "min_unique_fours": (0.25, "least share of unique 4-grams"),
           "fours_from": (96, "tokens from which min_unique_fours applies")}


# ------------------------------------------------------------------------------------------------
# Sample and filter

def rejection(tokens, seen, limits):
    """Why a sample is rejected (App. B.4), or None. Adds it to `seen`, the earlier samples."""
    length, runs = len(tokens), (len([*run]) for _, run in itertools.groupby(tokens))
    if tuple(tokens) in seen:
        return "duplicate"
    seen.add(tuple(tokens))
    if length < limits["min_tokens"]:
        return "too short"
    if max(runs, default=0) >= limits["max_run"]:
        return "run of one token"
    if length >= limits["unique_from"] and len(set(tokens)) < limits["min_unique"] * length:
        return "few unique tokens"
    fours = list(zip(*(tokens[i:] for i in range(4))))
    if length >= limits["fours_from"] and len(set(fours)) < limits["min_unique_fours"] * len(fours):
        return "few unique 4-grams"


def draw_decoding(rng, rows, model):
    """(temperature, top_p, top_k), each (rows,): one setting of DECODING for each row."""
    shares, settings = zip(*DECODING)
    drawn = rng.choices(settings, shares, k=rows)
    temperature, top_p, top_k = torch.tensor(drawn, device=model.lm_head.weight.device).T
    return temperature, top_p, torch.where(top_k == 0, model.config.vocab_size, top_k)


def sample_proxy(model, count, eot, limits, min_new, max_new, seed=0, batch=250, starts=((),)):
    """`count` samples that pass the filters, as token lists without the <|endoftext|> that each was
    generated from; each begins with one of `starts` (token lists) in turn.

    Several processes sample with seeds of their own, and all accept the same texts. ValueError if
    fewer than `count` of 5 × count tries pass.
    """
    device, (rank, world) = model.lm_head.weight.device, rank_and_world()
    generator = torch.Generator(device).manual_seed(seed + 10 ** 6 * rank)
    rng = random.Random(f"decoding {seed + 10 ** 6 * rank}")
    accepted, rejected, seen, tries = [], collections.Counter(), set(), 0
    if device.type == "cpu":  # keys and values of at most 1 GB
        row = 2 * model.config.n_layer * math.prod(model.config.kv_shape) * (max_new + 1)
        batch = max(1, min(batch, 2 ** 28 // row))
    progress = Progress("sampling", count)

    def tick(new):
        progress(min(count - 1, len(accepted) + rows * world * new / max_new))

    while len(accepted) < count:
        missing = count - len(accepted)
        rows = math.ceil(min(batch, 1.1 * missing) / world)  # 10 % more: some will be rejected
        if tries >= 5 * count:
            raise ValueError(f"only {len(accepted)} of {count} samples passed the filters in "
                             f"{tries} tries (rejected: {dict(rejected)}); ask for fewer with "
                             "--samples, loosen the filters, or train the foundation longer")
        decoding = draw_decoding(rng, rows, model)
        begun = [[*starts[i % len(starts)]] for i in range(rows)]
        new = generate(model, [[eot, *start] for start in begun], max_new, [eot], decoding, min_new,
                       generator, tick)
        for tokens in all_gather([start + tokens for start, tokens in zip(begun, new)]):
            if reason := rejection(tokens, seen, limits):
                rejected[reason] += 1
            else:
                accepted.append(tokens)
        tries += rows * world
    progress(count)
    print(f"  accepted {count} samples, rejected {sum(rejected.values())} {dict(rejected) or ''}")
    return accepted[:count]


# ------------------------------------------------------------------------------------------------
# Measure

@torch.no_grad()
def second_moments(model, rows, batch=64, moments_device=None):
    """{layer: C = E[x xᵀ] (d_in, d_in) float64} of every linear layer's input x, over all tokens of
    `rows` (token lists) except padding. Layers that read the same input share one tensor.
    moments_device="cpu" keeps the sums in host memory."""
    twin = {name: input_twin(model, name) for name in block_linears(model)}
    layers = {name: layer for name, layer in block_linears(model).items() if twin[name] == name}
    moments = {name: SecondMoment(layer.in_features, moments_device or model.lm_head.weight.device)
               for name, layer in layers.items()}
    # batches_of takes the last token as a target only: append a 0, so that all real ones are inputs
    for x, y in batches_of(model, [[*row, 0] for row in rows], batch):
        with forward_hooks(layers, lambda name, inputs: moments[name].add(inputs, y != -100)):
            model.features(x)
    means = {name: C.cpu() for name, C in means_of(moments).items()}
    return {name: means[twin[name]] for name in twin}


# ------------------------------------------------------------------------------------------------
# The command

def load_proxy(args, model, foundation, source="own", texts=None):
    """What out/proxy.pt holds, built unless it is up to date: "samples" (N, longest) int32, padded
    with -1; "C_pre" {layer: (d_in, d_in)}; "S_pre" {layer: (d_out, d_out)}."""
    encoding, length = tasks.get_encoding(model.config.encoding), model.config.block_size
    if any(args.begin):
        source += f", beginning with {args.begin}"
    settings = dict(foundation=foundation, source=source,
                    limits={key: getattr(args, key) for key in FILTERS},
                    **{key: getattr(args, key) for key in
                       ("samples", "fisher_samples", "min_new", "max_new", "seed")})
    path = pathlib.Path(args.out) / f"{args.name.replace('calibration', 'proxy', 1)}.pt"

    def build():
        starts = [encoding.encode_ordinary(text) for text in args.begin]
        where = {"moments_device": args.moments_device}
        print(f"proxy: {args.samples} samples, source: {source[:80]}")
        chosen = texts or sample_proxy(model, args.samples, encoding.eot_token, settings["limits"],
                                       args.min_new, args.max_new or length - max(map(len, starts)),
                                       args.seed, starts=starts)
        chosen = [tokens[:length] for tokens in chosen]  # with <|endoftext|> one more: the target
        for tokens in chosen[:4]:
            print("  |", repr(encoding.decode([t for t in tokens if t != encoding.eot_token])))
        rows = [[encoding.eot_token] + tokens for tokens in chosen]
        tensors = [torch.tensor(tokens, dtype=torch.int32) for tokens in chosen]
        return {"samples": pad_sequence(tensors, True, -1),
                "C_pre": second_moments(model, [row[:length] for row in rows], **where),
                "S_pre": gradient_moments(model, rows[:args.fisher_samples], **where)}

    build_if_stale(path, "proxy", settings, build)
    return load(path, "proxy", "python calibrate.py")


def calibrate(args, source="own", texts=None):
    """Sample and measure, unless out/<task>/calibration.pt is up to date.

    texts: token lists to measure on instead of own samples; source: what the file says they are.
    """
    set_precision(args.precision)
    if not re.fullmatch(r"calibration[\w.-]*", args.name):
        raise ValueError(f"name is {args.name!r}; it must be like calibration or calibration-prose")
    queries = [item.prompt for item in load_items(args.task, "train", args.queries, args.skip_bad)]
    model, foundation = load_foundation(args.out, pick_device())
    encoding = tasks.get_encoding(model.config.encoding)
    cached = load_proxy(args, model, foundation, source, texts)

    def build():
        print(f"calibrate: {len(queries)} queries of {args.task} for C_task")
        prompts = [[encoding.eot_token] + encoding.encode_ordinary(query) for query in queries]
        prompts = [tokens[:model.config.block_size] for tokens in prompts]
        C_task = second_moments(model, prompts, moments_device=args.moments_device)
        layers = {name: {"C_pre": cached["C_pre"][name], "C_task": C,
                         "S_pre": cached["S_pre"][name]} for name, C in C_task.items()}
        print(spectrum_table({name: moments for name, moments in layers.items()
                              if input_twin(model, name) == name}))
        return {"layers": layers, "samples": cached["samples"]}

    settings = dict(cached["settings"], task=args.task, queries=args.queries,
                    text=tasks.fingerprint(queries))
    build_if_stale(task_folder(args) / f"{args.name}.pt", "calibration", settings, build)


def parser():
    p = Parser(description=__doc__.split("\n")[0])
    add_task(p)
    add_options(p, {
        "samples": (500, "texts that the base model writes, for C_pre; the paper has 2,000"),
        "fisher_samples": (250, "how many of them serve S_pre, which takes a backward pass"),
        "queries": (256, "task prompts, for C_task"),
        "name": ("calibration", "the file is out/<task>/<name>.pt"),
        "min_new": (32, "a sample cannot end before this many tokens"),
        "max_new": (0, "most tokens of a sample; 0: the model's context"),
        "seed": (0, "random seed"), **FILTERS}, ("samples", "fisher_samples", "queries"))
    p.add_argument("--begin", metavar="TEXT", nargs="+", default=[""],
                   help='what samples begin with, in turn: "" "Question:" makes half questions')
    p.add_argument("--moments-device", choices=["cpu"],
                   help="where to keep the sums of all layers' moments; default: on the GPU")
    add_common(p)
    return p


def main(argv=None):
    calibrate(parser().parse_args(argv))


if __name__ == "__main__":
    command(main)

"""Calibrate: let the foundation write text, and measure what its layers read on that text and on the task.

    python calibrate.py --task math      # out/math/calibration.pt, under a minute on 2 cores

1. Sample: N texts from <|endoftext|> alone stand for the pretraining text, which nobody has (Sec. 3.4).
2. Measure: the second moments C_pre of every linear layer's input on those texts and S_pre of the gradients
   at its output (for `folora-kl`), and C_task of its input on task queries.

All but C_task does not depend on the task: out/proxy.pt keeps it, once it is done. `train.py adapt` solves
C_task v = γ (C_pre + τI) v for each layer (Eq. 17); the spectrum is printed here.
"""
import collections
import hashlib
import pathlib
import random
import re

import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

import tasks
from folora import SecondMoment, solve_layer, spectral_gate
from model import (add_up, block_linears, gathered, generate, load, own_share, pick_device, processes,
                   reading, watching)
from train import (Parser, add_options, add_task, check_measured, command, load_foundation, positive,
                   response_batch, stage, task_folder, whole)

# share of the samples, (temperature, top-p, top-k; 0 for no limit): App. B.4
DECODING = [(0.70, (1.0, 1.0, 0)),
            (0.20, (1.0, 0.95, 0)),
            (0.10, (1.2, 0.98, 50))]
# which samples are rejected: App. B.4, for a model of bytes; the paper's 0.12 and 256 are for BPE
FILTERS = {"min_tokens": (32, "shorter samples are rejected"),
           "max_run": (20, "a run of so many equal tokens is rejected"),
           "min_unique": (0.08, "least ratio of unique tokens; 128 bytes of real text have 0.13 to 0.3"),
           "unique_from": (128, "the ratio counts from this length"),
           "min_unique_fours": (0.25, "least ratio of unique 4-grams"),
           "fours_from": (96, "that ratio counts from this length")}


# ------------------------------------------------------------------------------------------------------------
# Sample

def longest_run(tokens):
    """Length of the longest run of one token: [7, 7, 7, 2] -> 3."""
    longest = run = 0
    for i, token in enumerate(tokens):
        run = run + 1 if i and token == tokens[i - 1] else 1
        longest = max(longest, run)
    return longest


def rejection(tokens, seen, limits):
    """Why a sample is rejected (App. B.4), or None. `seen` collects the hashes of the samples looked at."""
    digest = hashlib.sha1(str(tokens).encode()).digest()
    if digest in seen:
        return "duplicate"
    seen.add(digest)
    if len(tokens) < limits["min_tokens"]:
        return "too short"
    if longest_run(tokens) >= limits["max_run"]:
        return "run of one token"
    if len(tokens) >= limits["unique_from"] and len(set(tokens)) < limits["min_unique"] * len(tokens):
        return "few unique tokens"
    fours = list(zip(*(tokens[i:] for i in range(4))))
    if len(tokens) >= limits["fours_from"] and len(set(fours)) < limits["min_unique_fours"] * len(fours):
        return "few unique 4-grams"
    return None


def draw_decoding(rng, rows, model):
    """A decoding setting of DECODING for each row, as `generate` takes them."""
    drawn = rng.choices([settings for _, settings in DECODING], [share for share, _ in DECODING], k=rows)
    temperature, top_p, top_k = (torch.tensor(column, device=model.lm_head.weight.device)
                                 for column in zip(*drawn))
    return temperature, top_p, torch.where(top_k == 0, model.config.vocab_size, top_k)


def sample_proxy(model, count, eot, limits, min_new, max_new, seed=0, batch=250):
    """(`count` accepted samples as token lists without <|endoftext|>, Counter of rejections by reason).
    Several processes write each its own, from seeds of their own, and all accept the same.

    ValueError when too few of 4 count + batch tries are accepted.
    """
    device = model.lm_head.weight.device
    rank, writers = processes()
    generator = torch.Generator(device).manual_seed(seed + 10 ** 6 * rank)
    rng = random.Random(f"decoding {seed + 10 ** 6 * rank}")
    accepted, rejected, seen, tries = [], collections.Counter(), set(), 0
    batch = -(-min(batch, count) // writers)  # texts at a time
    while len(accepted) < count:
        if tries >= 4 * count + batch * writers:
            raise ValueError(f"only {len(accepted)} of {count} samples passed the filters in {tries} tries "
                             f"(rejected: {dict(rejected)}); ask for fewer with --samples, loosen the "
                             "filters, or train the foundation longer")
        decoding = draw_decoding(rng, batch, model)
        new = generate(model, [[eot]] * batch, max_new, [eot], decoding, min_new, generator)
        for tokens in gathered(new):
            reason = rejection(tokens, seen, limits)
            if reason:
                rejected[reason] += 1
            else:
                accepted.append(tokens)
        tries += batch * writers
    return accepted[:count], rejected


# ------------------------------------------------------------------------------------------------------------
# Measure

def second_moments(model, rows, batch=64, sums_on=None, gradients=False):
    """{layer name: C = E[x xᵀ] (d_in, d_in) float64} over all tokens of `rows` (token lists), in one pass. Or
    with `gradients` S = E[δ δᵀ] (d_out, d_out) over all that have a next token, δ the gradient at the layer's
    output of the rows' summed loss in nats; see `two_sided_penalty`.

    Padding never enters. The sums are kept on the model's device or, with sums_on="cpu", in the machine's own
    memory: the device then holds one layer's at a time. ValueError names the layer whose moment is not
    finite.
    """
    device, layers, c = model.lm_head.weight.device, block_linears(model), model.config
    moments = {name: SecondMoment(layer.out_features if gradients else layer.in_features, sums_on or device)
               for name, layer in layers.items()}
    if gradients:
        batch = max(1, min(batch // 2, 2 ** 26 // (c.block_size * c.vocab_size)))  # so many rows' logits
        first_input = model.requires_grad_(False).transformer.wpe.weight.requires_grad_(True)

    def see(name, t):  # `mask` is the batch's
        if gradients:
            t.register_hook(lambda gradient: moments[name].add(gradient, mask))
        else:
            moments[name].add(t, mask)

    rows = own_share(sorted(rows, key=len))  # rows of like length together: less padding
    if not gradients:
        rows = [[*row, 0] for row in rows]  # a target behind the last token too, so that it is an input
    with watching(layers, see, outputs=gradients), torch.set_grad_enabled(gradients):
        for first in range(0, len(rows), batch):
            x, y = (t.to(device) for t in response_batch([(row, 1) for row in rows[first:first + batch]]))
            mask = y != -100
            h = model.features(x)
            if gradients:
                loss = F.cross_entropy(model.lm_head(h)[mask], y[mask], reduction="sum")
                torch.autograd.grad(loss, first_input)  # which δ reaches through every layer
    means = {}
    for name, moment in moments.items():
        add_up([moment.total, moment.tokens])
        try:
            means[name] = moment.mean()
        except ValueError as error:
            raise ValueError(f"{name}: {error}")
    return means


# ------------------------------------------------------------------------------------------------------------
# The command

def own_samples(args, model):
    """`args.samples` texts that the model writes, as token lists without <|endoftext|>."""
    samples, rejected = sample_proxy(model, args.samples,
                                     tasks.encoding_called(model.config.encoding).eot_token,
                                     {key: getattr(args, key) for key in FILTERS}, args.min_new,
                                     args.max_new or model.config.block_size, args.seed)
    print(f"  accepted {len(samples)}, rejected {rejected.total()}: {dict(rejected) or 'none'}")
    return samples


def proxy(args, model, foundation, source="own", write=own_samples):
    """{"samples": (N, longest) int32 padded with -1, "C_pre": {layer: (d_in, d_in)}, "S_pre": {layer:
    (d_out, d_out)}}, kept in out/."""
    settings = dict(foundation=foundation, source=source, samples=args.samples,
                    limits={key: getattr(args, key) for key in FILTERS}, fisher_samples=args.fisher_samples,
                    min_new=args.min_new, max_new=args.max_new, seed=args.seed)
    path = pathlib.Path(args.out) / f"{args.name.replace('calibration', 'proxy', 1)}.pt"
    stage(path, "proxy", settings, lambda: measure_proxy(args, model, source, write))
    old, moments = load(path, "proxy", "python calibrate.py"), ("C_pre", "S_pre")
    with reading(path, "delete it and make it again with: python calibrate.py"):
        check_measured(model, {name: {key: old[key][name] for key in moments} for name in old["C_pre"]},
                       old["samples"], moments)
    return old


def measure_proxy(args, model, source, write):
    """What `proxy` keeps."""
    print(f"proxy: {args.samples} samples, source: {source}")
    samples, encoding = write(args, model), tasks.encoding_called(model.config.encoding)
    for tokens in samples[:8]:
        print("  |", repr(encoding.decode([t for t in tokens if t != encoding.eot_token])))
    samples = [tokens[:model.config.block_size] for tokens in samples]
    rows = [[encoding.eot_token] + tokens for tokens in samples]
    warn_of_few(rows, model, "samples")
    padded = pad_sequence([torch.tensor(s, dtype=torch.int32) for s in samples], True, -1)
    return {"samples": padded,
            "C_pre": second_moments(model, [row[:model.config.block_size] for row in rows],
                                    sums_on=args.sums_on),
            "S_pre": second_moments(model, rows[:args.fisher_samples], sums_on=args.sums_on, gradients=True)}


def warn_of_few(rows, model, name):
    if sum(map(len, rows)) < 4 * model.config.n_embd:
        print(f"  warning: {name} have fewer tokens than the widest layer has inputs; "
              "τ carries the missing directions")


def print_spectrum(layers):
    """One line for each of {layer: its moments}: how many directions the foundation uses, and what the gate
    makes of γ at the default τ, λ and s_min."""
    print(f"{'layer':32} {'d_in':>5} {'used':>6} {'γ max':>8} {'median':>7} {'min':>8} "
          f"{'mean gate':>10} {'gate 0.3':>9}")
    for name, moments in layers.items():
        m = solve_layer(*(moments[C].to(pick_device()) for C in ("C_pre", "C_task")))
        gate, eigvals, C = spectral_gate(m["eigvals"]), m["eigvals"], m["C_pre"]
        # participation ratio: d_in if all directions are used alike, 1 if one is
        used = C.trace() ** 2 / (C * C).sum()
        print(f"{name:32} {len(C):5} {used:6.1f} {eigvals[0]:8.2f} {eigvals.median():7.3f} "
              f"{eigvals[-1]:8.1e} {gate.mean():10.3f} {(gate <= 0.3).double().mean():9.0%}")


def calibrate(args, source="own", write=own_samples):
    """Sample and measure, unless out/<task>/calibration.pt was made with the same settings and foundation.

    The texts for C_pre are what write(args, model) returns; `source` says whose they are.
    """
    if not re.fullmatch(r"calibration[\w.-]*", args.name):
        raise ValueError(f"name is {args.name!r}; it must be like calibration or calibration-prose")
    path = task_folder(args) / f"{args.name}.pt"
    queries = [item.prompt
               for item in tasks.task_items(args.task, "train", args.queries, skip_bad=args.skip_bad)]
    model, foundation = load_foundation(args.out, pick_device())
    encoding = tasks.encoding_called(model.config.encoding)
    old = proxy(args, model, foundation, source, write)
    settings = dict(old["settings"], task=args.task, queries=args.queries, text=tasks.fingerprint(queries))
    stage(path, "calibration", settings, lambda: measure(args, model, queries, encoding, old))


def measure(args, model, queries, encoding, old):
    """What calibration.pt holds besides its settings, given what `proxy` keeps."""
    print(f"calibrate: {len(queries)} queries of {args.task} for C_task")
    prompts = [([encoding.eot_token] + encoding.encode_ordinary(query))[:model.config.block_size]
               for query in queries]
    warn_of_few(prompts, model, "queries")
    C_task = second_moments(model, prompts, sums_on=args.sums_on)
    layers = {name: {"C_pre": C_pre.cpu(), "C_task": C_task[name].cpu(), "S_pre": old["S_pre"][name].cpu()}
              for name, C_pre in old["C_pre"].items()}
    print_spectrum(layers)
    return {"layers": layers, "samples": old["samples"]}


def parser():
    p = Parser(description=__doc__.split("\n")[0])
    add_task(p)
    p.add_argument("--samples", type=positive, default=2000,
                   help="texts that the foundation writes, for C_pre")
    p.add_argument("--fisher-samples", type=positive, default=500,
                   help="so many of them for S_pre, which takes a backward pass")
    p.add_argument("--queries", type=positive, default=256, help="task prompts, for C_task")
    p.add_argument("--name", default="calibration", help="the file is out/<task>/<name>.pt")
    p.add_argument("--min-new", type=whole, default=32,
                   help="<|endoftext|> cannot come before so many tokens")
    p.add_argument("--max-new", type=positive, help="tokens a sample at most; default: the model's context")
    add_options(p, FILTERS)
    p.add_argument("--sums-on", choices=["cpu"], help="keep the sums of all layers' moments in the machine's "
                   "own memory, and one layer's at a time on the GPU; default: on the GPU")
    p.add_argument("--seed", type=whole, default=0, help="of everything random")
    p.add_argument("--out", default="out", help="folder for all results")
    return p


def main(argv=None):
    calibrate(parser().parse_args(argv))


if __name__ == "__main__":
    command(main)

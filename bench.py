"""The comparison behind the README's findings: every method, learning rate and seed, and FoLoRA taken apart.

    python eval.py --compare           # what is missing of it; stop it and start it again as you like
    python eval.py --ablate            # the same for the variants of FoLoRA
    python eval.py --report            # tables and pictures from what is finished
    python bench.py                    # speed and memory, at the end of this file

Methods forget more the harder they are pushed, so one learning rate says little. Here each method's rate is
swept, and retention is compared where the methods have learnt equally much.
"""
import argparse
import collections
import contextlib
import dataclasses
import functools
import gzip
import importlib.util
import json
import math
import multiprocessing
import os
import pathlib
import platform
import random
import re
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time

import torch

import calibrate
import tasks
import train
from eval import evaluate, items_of, kept, markdown, on_disk, text_files, write_json
from folora import (METHODS, Method, SAdam, SecondMoment, check_rank, damped, fisher, forgetting_penalty,
                    generalized_eigh, kaiming_start, leading_start, method_called, null_space_start,
                    projection_start, sadam, solve_layer, spectral_gate, whiten)
from model import (GPT, GPTConfig, add_lora, autocast, block_linears, generate, load, lora_parameters,
                   pick_device, processes, write_whole)
from train import load_adapter, load_foundation

# ------------------------------------------------------------------------------------------------------------
# FoLoRA taken apart: variants that the ablations compare

def ungated(m, lam, s_min):
    """The coordinates without the gate."""
    return m["basis"], torch.ones_like(m["eigvals"])


def evenly_gated(m, lam, s_min):
    """The coordinates and a gate of the same mean that knows no direction."""
    gate = spectral_gate(m["eigvals"], lam, s_min)
    return m["basis"], gate.mean().expand_as(gate)


def penalty_alone(m, lam, s_min):
    """The directions of H alone: C_task = I, so γ is one over the penalty."""
    eigvals, basis = generalized_eigh(torch.eye(len(m["H"])).to(m["H"]), m["H"])
    return basis, spectral_gate(eigvals, lam, s_min)


def utility_alone(m, lam, s_min):
    """The directions of C_task alone: H = I, so γ is the utility."""
    eigvals, basis = generalized_eigh(m["C_task"], torch.eye(len(m["H"])).to(m["H"]))
    return basis, spectral_gate(eigvals, lam, s_min)


def own_coordinates(m, lam, s_min):
    """Neither basis nor gate: Adam."""
    return torch.eye(len(m["eigvals"])).to(m["basis"]), torch.ones_like(m["eigvals"])


def between(W0, C_pre, basis, r, scale, **_):
    """Half of the rank in the null-space start's directions, half in the leading ones."""
    check_rank(r, W0)
    _, low = torch.linalg.eigh(C_pre)
    U, _ = torch.linalg.qr(torch.cat([low[:, :r // 2], basis[:, :r - r // 2]], 1))
    return projection_start(W0, U, scale)


def one_sided(S_pre, C_pre):
    """All outputs alike, as in Eq. 6, at the same mean."""
    return S_pre.diagonal().mean() * torch.eye(len(S_pre)).to(S_pre), C_pre


def few_directions(S_pre, C_pre, k=16):
    """The k leading eigenvectors of each, all others alike at their mean: k + 1 columns would hold them."""
    def simplified(C):
        eigvals, U = torch.linalg.eigh(C.double())
        eigvals[:-k] = eigvals[:-k].mean()
        return ((U * eigvals) @ U.T).to(C)
    return simplified(S_pre), simplified(C_pre)


METHODS |= {
    "null-kl": Method(null_space_start, penalty=fisher),
    "folora-top-kl": Method(leading_start, sadam, penalty=fisher),
    "folora-one-sided": Method(leading_start, penalty=one_sided),
    "folora-kl-few": Method(leading_start, penalty=few_directions),
    "null-adam": Method(null_space_start),
    "null-frozen": Method(null_space_start, train_A=False),
    "null-ungated": Method(null_space_start, ungated),
    "null-evenly": Method(null_space_start, evenly_gated),
    "null-penalty": Method(null_space_start, penalty_alone),
    "null-utility": Method(null_space_start, utility_alone),
    "top-adam": Method(leading_start),
    "top-frozen": Method(leading_start, train_A=False),
    "between": Method(between, sadam),
    "kaiming-sadam": Method(kaiming_start, sadam),
    "full-adam": Method(None, own_coordinates),
    "full-ungated": Method(None, ungated),
    "full-penalty": Method(None, penalty_alone),
}

# ------------------------------------------------------------------------------------------------------------
# A run is (task, method, rate index, seed, other options of train.py adapt). Seed 0 sweeps the
# learning rate and is judged on validation items. The other seeds are reported, on test items, at the rates
# around the one where seed 0 reached the level: the target score at which retention is compared.

LEVEL = 0.8                              # of the best target score at LoRA's first rates
SEEDS, FINAL_SEEDS = (1, 2, 3), (4, 5)
FINALISTS = ("folora-full-half", "folora-full", "folora-kl", "lora-kl", "folora", "folora-top",
             "folora-replay", "replay", "full")  # these get the second seeds as well
COMPARED = (*FINALISTS, "folora-half", "lora", "lora-null", "corda", "sc-lora", "milora", "pissa", "oplora",
            "lora-null-v2")
QUICK = ("lora", "lora-null", "replay", "folora", "folora-kl")
FIRST_RATE = {"full": -6, "folora-full": -6, "folora-full-half": -6, "pissa": 0, "sc-lora": 0,
              "lora-null": 2, "corda": 2, "milora": 2, "oplora": 2, "folora-top": 2, "replay": 6,
              "folora-replay": 6, "lora-null-v2": 8, "null-frozen": 8,
              "top-frozen": 8}           # of a sweep, as an index (see `rate`); 4 for the others
ITEMS, TEXT = 100, 8192                  # of each kind; tokens of held-out text

# {group: {name: (method, options of train.py adapt)}}
ABLATIONS = {
    "the penalty in the loss": {
        **{name: (name, ()) for name in ("folora-kl", "lora-kl", "null-kl", "folora-top-kl",
                                         "folora-kl-replay", "folora-one-sided", "folora-kl-few")},
        **{f"folora-kl, mu {mu}": ("folora-kl", ("--mu", mu)) for mu in ("1", "10")}},
    "coordinates and gate": {name: (name, ()) for name in (
        "folora", "null-adam", "null-ungated", "null-evenly", "null-penalty", "null-utility", "folora-half")},
    "start": {name: (name, ()) for name in (
        "folora", "folora-top", "between", "kaiming-sadam", "top-adam", "null-frozen", "top-frozen")},
    "full weights": {name: (name, ()) for name in (
        "folora-full", "full", "full-adam", "full-ungated", "full-penalty", "folora-full-half")},
    "strength": {f"folora, {option} {value}": ("folora", (f"--{option}", value)) for option, value in (
        ("lam", "0.3"), ("lam", "3"), ("lam", "10"), ("s-min", "0"), ("s-min", "0.1"), ("s-min", "0.6"),
        ("tau", "0.001"), ("tau", "0.1"), ("tau", "1"))},
    "calibration": {f"folora-kl, {name}": ("folora-kl", ("--calibration", f"calibration-{name}"))
                    for name in ("mixture", "prose", "facts", "small", "16", "128", "500")},
    "bases": {"folora": ("folora", ()), "folora, in bfloat16": ("folora", ("--basis", "bfloat16"))},
    "twice the steps": {f"{name}, 400 steps": (name, ("--steps", "400")) for name in COMPARED},
}
CALIBRATIONS = {"mixture": ("mixture", ""), "prose": ("prose", ""), "facts": ("facts", ""),
                "small": ("{out}/small", ""), "16": ("own", "--samples 16"), "128": ("own", "--samples 128"),
                "500": ("own", "--samples 500")}  # (see `calibrate_on`, options of calibrate.py)
SMALL = "--layers 2 --width 64 --heads 2"  # the smaller foundation, which writes one of the calibrations


def rate(k):
    """Learning rate k of the grid, two a factor of two: 0.004 at k = 4."""
    return float(f"{1e-3 * 2 ** (k / 2):.1e}")


class Study:
    """All runs of a comparison under `out`: which are finished, and how to do one."""

    def __init__(self, args, chosen):
        self.out, self.tasks, self.device = pathlib.Path(args.out), chosen, pick_device()
        self.adapt, self.keep = shlex.split(args.adapt), args.keep  # options for every run; files
        self.skip_bad = args.skip_bad
        self.methods = args.methods or (QUICK if args.quick else COMPARED)
        self.base, foundation = load_foundation(args.out, self.device)
        self.C_pre = load(self.out / "proxy.pt", "proxy", f"python calibrate.py --out {args.out}")["C_pre"]
        self.identity = {task: {"foundation": foundation, "python": platform.python_version(), "text":
                                tasks.fingerprint(i.prompt + i.answer for split in tasks.SPLITS for i in
                                                  tasks.task_items(task, split, tasks.HELD_OUT,
                                                                   skip_bad=self.skip_bad)),
                                **({"keep": tasks.fingerprint(map(tasks.text_of, self.keep))}
                                   if self.keep else {})}
                         for task in chosen}
        self.finished = {}

    @functools.cache
    def args(self, run):
        task, method, k, seed, other = run
        return train.parser().parse_args(["adapt", "--task", task, "--method", method, "--lr", str(rate(k)),
                                          "--seed", str(seed), "--out", str(self.out), *self.adapt, *other])

    def result(self, run):
        """The finished run's result, None when there is none."""
        if run not in self.finished:
            result = on_disk(train.run_folder(self.args(run)) / "result.json", self.identity[run[0]])
            if not result:
                return None
            self.finished[run] = result
        return self.finished[run]

    def do(self, run):
        """Train and evaluate: seed 0 on validation items, others on test items. None while another process
        is at it."""
        args = self.args(run)
        folder, split = train.run_folder(args), "test" if args.seed else "valid"

        def scores(path):
            model = load_adapter(path, args.out, self.device)
            return model, self.scores(model, args.task, split)

        def make():
            with open(folder / "log.txt", "w") as log, contextlib.redirect_stdout(log):
                try:
                    path = train.adapt(args)
                except ValueError as error:  # a rate so large that the loss is not finite
                    return {"failed": str(error)}
            model, result = scores(path)
            steps = range(0, args.steps + 1, args.steps // args.snapshots)[1:] if args.snapshots else []
            along = [(step, scores(folder / f"step{step}.pt")[1]) for step in steps]
            return {split: result, **self.moved(model),
                    "cost": load(path, "adapter", "")["cost"],
                    "curve": [(step, s["Avg2"], s["Avg1"]) for step, s in along]}

        return kept(folder / "result.json", self.identity[args.task], make, wait=False)

    def scores(self, model, task, split):
        return evaluate(model, self.items(task, split), split, TEXT // model.config.block_size,
                        text_files(self.keep))

    @functools.cache
    def items(self, task, split):
        """{"target" or kind: [Item]}. The target of a file is compared by its likelihood, which is finer than
        the share of right answers."""
        items = items_of(task, split, ITEMS, None, self.keep, self.skip_bad, self.base.config)
        if task.endswith(".jsonl"):
            items["target"] = [dataclasses.replace(item, check=None) for item in items["target"]]
        return items

    def folder(self, task):
        return self.out / pathlib.Path(task).stem

    def moved(self, model):
        """‖ΔW‖_F over all projections, and ‖ΔW X_pre‖_F as a share of ‖W0 X_pre‖_F, in percent."""
        size = drift = whole = 0
        before = block_linears(self.base)
        for name, layer in block_linears(model).items():
            C, W0 = self.C_pre[name].to(self.device), before[name].weight.double()
            dW = layer.weight.double() - W0
            size, drift = size + dW.square().sum(), drift + forgetting_penalty(dW, C)
            whole = whole + forgetting_penalty(W0, C)
        return {"size": size.sqrt().item(), "drift": 100 * (drift / whole).sqrt().item()}

    @functools.cache
    def start(self, task, split):
        """The foundation's own scores."""
        return kept(self.folder(task) / f"foundation-{split}-{ITEMS}.json", self.identity[task],
                    lambda: self.scores(self.base, task, split))

    def level(self, task):
        """The target score at which retention is compared; None before LoRA's first runs are finished."""
        found = [self.result((task, "lora", k, 0, ())) for k in first_rates("lora")]
        return None if None in found else LEVEL * max(learnt(f) for f in found)


# Which runs? Each of these returns (missing runs, {rate index: result} of the finished ones).

def learnt(result):
    """Target score on the run's own items: on validation items with seed 0, on test items with others."""
    return result.get("test", result.get("valid", {"Avg2": 0}))["Avg2"]


def first_rates(method):
    first = FIRST_RATE.get(method, FIRST_RATE.get(swept_as(method), 4))
    return first, first + 2, first + 4


def curve(study, task, method, seed, other, wanted, extend):
    """The rates `wanted`, and those that extend(results) asks for, until it asks for no more."""
    wanted = set(wanted)
    while True:
        runs = {k: (task, method, k, seed, other) for k in sorted(wanted)}
        found = {k: study.result(run) for k, run in runs.items()}
        if None in found.values():
            return [runs[k] for k in runs if not found[k]], {k: f for k, f in found.items() if f}
        more = extend(found) - wanted
        if not more:
            return [], found
        wanted |= more


def sweep(study, task, method):
    """Seed 0: four rates or more, until the best GM is not at an edge and the level lies between two
    neighbours."""
    level = study.level(task)

    def extend(found):
        rates, best, (low, high) = sorted(found), best_rate(found), bracket(found, level)
        if len(rates) < 6 and rates[0] in (best, high):
            return {rates[0] - 2}
        if len(rates) < 6 and (best == rates[-1] or high is None and best in rates[-2:]):
            return {rates[-1] + 2}
        if low is not None and high is not None:
            return {(low + high) // 2}
        return {best - 1} if len(rates) < 4 else set()

    missing, found = curve(study, task, method, 0, (), first_rates(method),
                           extend if level is not None else lambda found: set())
    return missing or [(task, "lora", k, 0, ()) for k in first_rates("lora") if level is None], found


def bracket(found, level):
    """(k below, k at or above): neighbours between which the target score first reaches the level on
    validation items; None where there is none."""
    low = None
    for k, result in sorted(found.items()):
        if learnt(result) >= level:
            return low, k
        low = k
    return low, None


def best_rate(found):
    """The rate index of highest GM on validation items."""
    return max(found, key=lambda k: found[k]["valid"]["GM"] if "valid" in found[k] else 0)


def seed_runs(study, task, method, seed, other=()):
    """A reported seed: from the rate at which seed 0 reached the level (its best one, if none did) up until
    this seed's target score reaches it too, and down until it no longer does."""
    k, more = settled_rate(study, task, swept_as(method))
    if k is None:
        return more, {}
    level = study.level(task)
    k += first_rates(method)[0] - first_rates(swept_as(method))[0]
    k -= 3 if "--steps" in other else 0  # twice the steps take about a third of the rate

    def extend(found):
        top, bottom = max(found), min(found)
        if max(map(learnt, found.values())) < level:
            return {top + 1} if top < k + 3 else set()
        return {bottom - 1} if learnt(found[bottom]) >= level and bottom > k - 4 else set()

    return curve(study, task, method, seed, other, {k}, extend)


def swept_as(method):
    """The method whose sweep says where a variant starts."""
    if method in COMPARED:
        return method
    how = METHODS[method]
    return "folora-kl" if how.penalty else "folora" if how.start else "folora-full"


def settled_rate(study, task, method):
    """(k, []): the lowest rate at which seed 0 reached the level, or else the one of best GM; (None, runs
    that are still missing)."""
    missing, found = sweep(study, task, method)
    if missing:
        return None, missing
    k = bracket(found, study.level(task))[1]
    return (best_rate(found) if k is None else k), []


def settled(study, task, method):
    """(k, results of the reported seeds at that rate); see `settled_rate`."""
    k, _ = settled_rate(study, task, method)
    return k, [f[k] for f in seeds(study, task, method).values() if "test" in f[k]]


def seeds(study, task, method, other=()):
    """{seed: {k: result}} of the reported seeds whose runs are all there."""
    runs = {seed: seed_runs(study, task, method, seed, other) for seed in SEEDS + FINAL_SEEDS}
    return {seed: found for seed, (missing, found) in runs.items() if not missing}


def snapshot_runs(study, task):
    """LoRA and FoLoRA once more, evaluated along the way."""
    rates = {method: settled_rate(study, task, method)[0] for method in ("lora", "folora", "folora-kl")}
    return [(task, method, k, 1, ("--snapshots", "10")) for method, k in rates.items() if k is not None]


def missing_runs(study, ablate, quick):
    """The runs to do, the most telling ones first. What follows from a sweep is known when it is finished."""
    variants = dict.fromkeys(variant for group in ABLATIONS.values() for variant in group.values())
    methods = study.methods
    if ablate:
        methods = dict.fromkeys(["lora", "folora", *(method for method, _ in variants if method in COMPARED)])
    runs = [run for method in methods for task in study.tasks for run in sweep(study, task, method)[0]]
    if ablate:
        more = [(m, other, seed) for seed in SEEDS for m, other in variants
                if seed == SEEDS[0] or "--steps" not in other or m in QUICK]  # these take twice as long
    else:
        rounds = [(SEEDS, methods), (FINAL_SEEDS, [m for m in methods if m in FINALISTS])]
        more = [(m, (), seed) for numbers, those in rounds for m in those for seed in numbers if not quick]
    for method, other, seed in more:
        for task in study.tasks:
            runs += seed_runs(study, task, method, seed, other)[0]
    if not (ablate or quick):
        runs += [run for task in study.tasks for run in snapshot_runs(study, task) if not study.result(run)]
    return list(dict.fromkeys(runs))


# Doing them, in as many processes as there are cores

def work(args, chosen, workers, number):
    """Do missing runs until there are none; other processes may do the same on the same folder."""
    if torch.cuda.is_available():
        torch.cuda.set_device(number % torch.cuda.device_count())
    study, parent = Study(args, chosen), multiprocessing.parent_process()
    if parent:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which ends its workers
    if study.device.type == "cpu":
        torch.set_num_threads(1)  # one run a core: 1.3 times the throughput of one run on two cores
    began, done = time.time(), 0
    while runs := missing_runs(study, args.ablate, args.quick):
        for run in runs:
            if not study.result(run) and (result := study.do(run)):
                done += 1
                left = (len(runs) - 1) * (time.time() - began) / done / workers / 60
                print(f"{describe(run, result)}   {len(runs) - 1} known runs to go, about {left:.0f} min",
                      flush=True)
                break
        else:
            time.sleep(2)  # the others are at the last ones, from which more may follow
        if parent and not parent.is_alive():
            return


def describe(run, result):
    task, method, k, seed, other = run
    said = f"{pathlib.Path(task).stem:9}{' '.join([method, *other]):24} lr {rate(k):<8g} seed {seed}  "
    if "failed" in result:
        return said + result["failed"]
    scores = result.get("test", result.get("valid"))
    return said + f"target {scores['Avg2']:5.1f}  kept {scores['Avg1']:5.1f}  drift {result['drift']:5.1f} %"


def calibrate_on(source, options):
    """calibrate.py with texts that the foundation wrote (source "own") or that of another --out folder, or
    with the true pretraining text, which in life nobody has: all of it ("mixture") or one domain ("prose",
    "source", "facts")."""
    def true_text(args, model):
        mixture = tasks.PretrainingMixture(tasks.encoding_called(model.config.encoding))
        if source != "mixture":
            mixture.ROWS = {"short" if source == "facts" else source: 1}
            mixture.DOCUMENTS = {"facts": 1}
        rng = random.Random(f"proxy {args.seed}")
        return [mixture.row(rng, model.config.block_size + 1)[1:] for _ in range(args.samples)]

    args = calibrate.parser().parse_args(options)
    if source == "own":
        calibrate.calibrate(args)
    elif source in ("mixture", "prose", "source", "facts"):
        calibrate.calibrate(args, source, true_text)
    else:
        writer, author = load_foundation(source, pick_device())
        calibrate.calibrate(args, author, lambda args, model: calibrate.own_samples(args, writer))


def compare(args, chosen):
    """Make what the comparison needs, then let workers do its runs."""
    out = ["--out", args.out]
    train.parser().parse_args(["adapt", *shlex.split(args.adapt)])  # what is wrong is said at once
    calibrate.parser().parse_args(shlex.split(args.calibrate))
    for method in args.methods or ():
        method_called(method)
    for task in chosen:
        items_of(task, "valid", 1, None, args.keep, args.skip_bad)
    train.main(["pretrain", *out, *shlex.split(args.pretrain)])
    if args.ablate:
        train.main(["pretrain", *shlex.split(f"{args.pretrain} {SMALL}"), "--out", f"{args.out}/small"])
    variants = CALIBRATIONS if args.ablate else {}
    for task in chosen:
        calibrate.main(["--task", task, *out, *shlex.split(args.calibrate)])
        for name, (source, options) in variants.items():
            calibrate_on(source.format(out=args.out), ["--task", task, *out, "--name", f"calibration-{name}",
                                                       *shlex.split(f"{args.calibrate} {options}")])
    cores = os.cpu_count()
    workers = args.workers or (cores if pick_device().type == "cpu" else max(1, min(8, cores // 2)))
    context = multiprocessing.get_context("spawn")
    about = [functools.partial(work, args, chosen, workers, number) for number in range(workers)]
    processes = [context.Process(target=train.command, args=(this,)) for this in about]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join()
    finally:
        for process in processes:
            process.terminate()
    if any(process.exitcode for process in processes):
        raise ValueError("a worker stopped, what it said stands above; the same command goes on")
    study = Study(args, chosen)
    if args.ablate:
        for task in chosen:
            size_control(study, task)
    elif not args.texts:
        step_times(study)


# ------------------------------------------------------------------------------------------------------------
# The report: tables and pictures from finished runs alone

T975 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}  # Student's t for the 95 % interval of so many seeds


def average(values):
    values = list(values)
    return sum(values) / len(values)


def interval(values):
    """"mean ±half width (seeds)" of the 95 % interval; "(2 of 3)" where one of three never reached the level,
    "-" where none did."""
    reached = [v for v in values if v is not None]
    if not reached:
        return "-"
    mean, n = average(reached), len(reached)
    count = f"({n} of {len(values)})" if n < len(values) else f"({n})"
    if n == 1:
        return f"{mean:.1f} {count}"
    half = T975[n] * math.sqrt(sum((v - mean) ** 2 for v in reached) / (n - 1) / n)
    return f"{mean:.1f} ±{half:.1f} {count}"


def at_level(study, task, found, split, share=1.0, of=lambda scores: scores["Avg1"]):
    """Retention (Avg1, or another score) where the target score is `share` times the level: linear between
    the two rates where it first passes that, rate 0 being the foundation itself; None when no rate does."""
    level, start = share * study.level(task), study.start(task, split)
    points = [(start["Avg2"], of(start))]
    for _, result in sorted(found.items()):
        if split in result:
            points.append((result[split]["Avg2"], of(result[split])))
            (t0, kept0), (t1, kept1) = points[-2:]
            if t1 >= level:
                return kept1 if t1 == t0 else kept0 + (kept1 - kept0) * (level - t0) / (t1 - t0)
    return None


def frontier_area(study, task, found):
    """Mean, over target scores from 1 to 100, of the best retention among the rates that reach it; seed 0."""
    scores = [study.start(task, "valid"), *(f["valid"] for f in found.values() if "valid" in f)]
    return average(max((s["Avg1"] for s in scores if s["Avg2"] >= target), default=0)
                   for target in range(1, 101))


def matched(study, task, method, other=()):
    """Retention at the level of each reported seed, on test items."""
    return [at_level(study, task, found, "test") for found in seeds(study, task, method, other).values()]


def headline(study):
    """One row a method: retention at the level; from seed 0's sweep, on validation items, retention at 95 %
    of LoRA's best, the area under the frontier, and GM at the best rate and at one rate for all methods."""
    rows = []
    for method in study.methods:
        sweeps = {task: sweep(study, task, method) for task in study.tasks}
        if any(missing for missing, _ in sweeps.values()):
            continue
        found = {task: f for task, (_, f) in sweeps.items()}
        near = [at_level(study, task, f, "valid", 0.95 / LEVEL) for task, f in found.items()]
        gm = [{k: x["valid"]["GM"] for k, x in f.items() if "valid" in x} for f in found.values()]
        rows.append([method, *(interval(matched(study, task, method)) for task in study.tasks),
                     " / ".join("-" if x is None else f"{x:.0f}" for x in near),
                     f"{average(frontier_area(study, task, f) for task, f in found.items()):.1f}",
                     f"{average(max(g.values()) for g in gm):.1f}",
                     f"{average(g.get(6, 0) for g in gm):.1f}"])
    head = ["", *levels(study, study.tasks), "at 95 %", "area", "best GM", f"GM at {rate(6):g}"]
    return markdown(head, rows)


def levels(study, chosen):
    """Heads of the tasks' columns."""
    return [f"{pathlib.Path(task).stem}, at {study.level(task):.0f}" for task in chosen]


def details(study, task):
    """One row a method, at its `settled` rate, over the reported seeds."""
    start, rows = study.start(task, "test"), []
    kinds = list(start["kept"])

    for method in study.methods:
        k, runs = settled(study, task, method)
        if not runs:
            continue
        tests, cost = [x["test"] for x in runs], [x["cost"] for x in runs]
        scores = {kind: average(t["kept"][kind]["score"] for t in tests) for kind in kinds}
        ratio = average(t["Avg1"] for t in tests) / start["Avg1"]
        capped = average(min(1, scores[kind] / start["kept"][kind]["score"]) for kind in kinds)
        rows.append([method, f"{rate(k):g}", interval([t["Avg2"] for t in tests]),
                     *(f"{scores[kind]:.0f}" for kind in kinds), interval([t["Avg1"] for t in tests]),
                     f"{100 * ratio:.0f} / {100 * capped:.0f}", f"{average(t['GM'] for t in tests):.1f}",
                     *(f"{average(t['text'][kind]['score'] for t in tests):.2f}" for kind in start["text"]),
                     f"{average(x['size'] for x in runs):.1f}", f"{average(x['drift'] for x in runs):.1f}",
                     f"{cost[0]['bytes'] / 1e6:.1f}", f"{cost[0]['trained'] / 1e3:.0f}"])
    return markdown(["", "rate", "target = Avg2", *kinds, "Avg1", "Avg1 % ratio / capped", "GM",
                     *(f"{kind} b/B" for kind in start["text"]), "‖ΔW‖", "drift %", "MB", "trained k"], rows)


def kept_at_level(study, task, share):
    """One row a method: all that is kept where the target score is `share` times the level; seed 0,
    validation items."""
    start, level, measures = study.start(task, "valid"), share * study.level(task), {}
    at = f"{-math.log(level / 100):.2f} nats" if task.endswith(".jsonl") else f"{level:.0f}"
    for kind in start["kept"]:
        measures[f"{kind} %"] = "{:.1f}", lambda s, kind=kind: s["kept"][kind]["score"]
        measures[f"{kind} nats"] = "{:.2f}", lambda s, kind=kind: s["kept"][kind]["nats"]
    for kind in start["text"]:
        measures[f"{kind} b/B"] = "{:.2f}", lambda s, kind=kind: s["text"][kind]["score"]
    rows = [["foundation", *(form.format(of(start)) for form, of in measures.values())]]
    for method in study.methods:
        results = sweep(study, task, method)[1]
        found = [at_level(study, task, results, "valid", share, of) for _, of in measures.values()]
        rows.append([method, *("-" if x is None else form.format(x)
                               for (form, _), x in zip(measures.values(), found))])
    return markdown([f"{pathlib.Path(task).stem}, at {at}", *measures], rows)


def step_times(study, measure=True, rounds=9, steps=4):
    """{method: its steps' time over plain LoRA's in the same round, a ratio for each of `rounds`}.
    All methods run in turn, so that what else the machine does slows all alike; the first round warms up.
    Empty where that has not been measured, without `measure`."""
    def make():
        runs = {}
        for method in dict.fromkeys((*study.methods, "lora")):
            args = study.args((study.tasks[0], method, 4, 0, ("--steps", str(steps))))
            model, foundation = load_foundation(args.out, study.device)
            how = METHODS[method]
            calibration = train.load_calibration(args, model, foundation) if how.calibrated else None
            items = tasks.task_items(args.task, "train", args.examples, skip_bad=study.skip_bad)
            optimizer, batch, penalty = train.ready(args, model, how, calibration, items)
            runs[method] = steps_of(model, [optimizer], batch, steps, penalty)
        found = interleaved(rounds, **runs)
        return {"ratios": {method: ratio(found, method, "lora") for method in study.methods}}

    task = study.tasks[0]
    identity = {**study.identity[task], "methods": list(study.methods)}
    found = kept(study.folder(task) / "step_times.json", identity, make if measure else None)
    return found["ratios"] if found else {}


def times(study):
    """One row a method: median and range of `step_times`, if that has been run."""
    rows = [[method, f"{statistics.median(found):.2f}", f"{min(found):.2f} to {max(found):.2f}"]
            for method, found in step_times(study, measure=False).items()]
    task = pathlib.Path(study.tasks[0]).stem
    return markdown([f"{task}: time of a step over LoRA's", "median", "range"], rows) if rows else ""


def explanations(study):
    """Which measure of ΔW says how much is kept? Rank correlations over all runs of the sweeps."""
    runs = swept(study)

    def correlation(key):
        ranks = [torch.tensor(x).argsort().argsort().double()
                 for x in ([r[key] for _, r in runs], [r["valid"]["Avg1"] for _, r in runs])]
        return torch.corrcoef(torch.stack(ranks))[0, 1].item()

    return (f"Rank correlation of what is kept with the drift ‖ΔW X_pre‖: {correlation('drift'):.2f}, "
            f"with the size ‖ΔW‖_F: {correlation('size'):.2f} ({len(runs)} runs of all methods, seed 0)")


def swept(study):
    """[(method, result)] of all finished runs of the sweeps."""
    return [(run[1], x) for run, x in study.finished.items() if run[3] == 0 and not run[4] and "valid" in x]


def size_control(study, task, measure=True):
    """{method: scores}: each method's ΔW at its settled rate, seed 1, rescaled to the ‖ΔW‖_F of FoLoRA's.
    Empty where FoLoRA has no such run yet or, without `measure`, where that has not been measured."""
    runs = {method: (task, method, settled_rate(study, task, method)[0], 1, ()) for method in study.methods}
    runs = {method: run for method, run in runs.items()
            if run[2] is not None and "size" in (study.result(run) or {})}
    if "folora" not in runs:
        return {}
    wanted = study.result(runs["folora"])["size"]

    def make():
        scores = {}
        for method, run in runs.items():
            model = load_adapter(train.run_folder(study.args(run)) / "adapter.pt", study.out, study.device)
            factor = wanted / study.result(run)["size"]
            with torch.no_grad():
                for p, p0 in zip(model.parameters(), study.base.parameters()):
                    p.copy_(p0 + factor * (p - p0))
            scores[method] = {"factor": factor,
                              **study.scores(model, task, "test")}
        return {"scores": scores}

    identity = {**study.identity[task], "rates": {method: run[2] for method, run in runs.items()}}
    found = kept(study.folder(task) / "rescaled.json", identity, make if measure else None)
    return found["scores"] if found else {}


def in_words(method):
    """Start, steps and what else a method has, by the names of its functions."""
    said = [method.start.__name__ if method.start else "full weights",
            method.steps.__name__ if method.steps else "adam",
            method.penalty and f"{method.penalty.__name__} penalty", method.replay and "replay",
            not method.train_A and "A frozen"]
    return ", ".join(part.removesuffix("_start").replace("_", " ") for part in said if part)


def ablations(study):
    """Retention at the level, a table a group: of the tasks on which any of its own runs have been made."""
    said = []
    for title, group in ABLATIONS.items():
        own = [variant for variant in group.values() if variant[1] or variant[0] not in COMPARED]
        where = [task for task in study.tasks if any(seeds(study, task, *variant) for variant in own)]
        rows = [[name, in_words(METHODS[variant[0]]),
                 *(interval(matched(study, task, *variant)) for task in where)]
                for name, variant in group.items()]
        rows = [row for row in rows if set(row[2:]) - {"-"}]
        head = [title, "start, steps", *levels(study, where)]
        if len({row[1] for row in rows}) == 1:  # one method with other options
            head, *rows = [[row[0], *row[2:]] for row in (head, *rows)]
        if len(rows) > 1:
            said.append(markdown(head, rows))
    for task in study.tasks:
        rows = [[method, f"{x['factor']:.2f}", f"{x['Avg2']:.1f}", f"{x['Avg1']:.1f}"]
                for method, x in size_control(study, task, measure=False).items()]
        if rows:
            said.append(markdown([f"{task}, ΔW rescaled to FoLoRA's size", "factor", "target", "Avg1"], rows))
    return said


def report(args, chosen):
    """Tables to the screen and to out/report.md; pictures to the folder --assets, when it is given."""
    study = Study(args, chosen)
    for task in study.tasks:
        if study.level(task) is None:
            raise ValueError(f"{args.out} holds no comparison on {task} yet; run: python eval.py --compare")
    if study.keep:
        said = [kept_at_level(study, task, share) for task in study.tasks for share in (1, 0.95 / LEVEL)]
    else:
        said = [f"Retention (Avg1) where the target score is {LEVEL:.0%} of LoRA's best. Test items, mean "
                "±95 % interval (seeds)", headline(study)]
    for task in study.tasks:
        if any(settled(study, task, method)[1] for method in study.methods):
            said += [f"{task}, each at its rate for {study.level(task):.0f} (chosen with seed 0)",
                     details(study, task)]
    said = "\n\n".join(filter(None, [*said, times(study), explanations(study), *ablations(study)]))
    write_whole(pathlib.Path(args.out) / "report.md", lambda f: f.write(f"{said}\n".encode()))
    print(said)
    if args.assets:
        plt = pyplot()
        pictures = [picture_frontier, picture_drift, picture_spectrum, picture_skills]
        if any(study.result(run) for task in study.tasks for run in snapshot_runs(study, task)):
            pictures.append(picture_training)
        for picture in pictures:
            path = pathlib.Path(args.assets) / f"{picture.__name__.removeprefix('picture_')}.png"
            write_whole(path, lambda f: picture(study, plt).savefig(f, dpi=150, format="png"))
            print(f"{path} written")


# Pictures: Okabe and Ito's colours and three of Tol's, which colour-blind eyes tell apart; markers besides.
LOOKS = {"folora-full-half": ("#332288", "p"), "folora-full": ("#882255", "*"), "folora-kl": ("#D55E00", "P"),
         "lora-kl": ("#56B4E9", "v"), "folora-top": ("#009E73", "s"), "folora": ("#0072B2", "o"),
         "folora-replay": ("#999933", "h"), "replay": ("#E69F00", "^"), "full": ("#CC79A7", "D"),
         "lora": ("#000000", "X")}
OTHERS = ("#AAAAAA", ".")


def pyplot():
    try:
        import matplotlib
    except ImportError:
        raise ValueError("pictures need matplotlib; install it with: pip install matplotlib")
    matplotlib.use("Agg")
    matplotlib.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
                                "legend.frameon": False})
    from matplotlib import pyplot
    return pyplot


def panels(plt, titles, ylabel, draw):
    """One panel a title, by draw(ax, title); one legend below."""
    figure, axes = plt.subplots(1, len(titles), figsize=(9, 3.2), sharey=True, squeeze=False)
    for ax, title in zip(axes[0], titles):
        ax.set_title(title)
        draw(ax, title)
    axes[0][0].set_ylabel(ylabel)
    handles, labels = axes[0][0].get_legend_handles_labels()
    rows = 1 if len(labels) < 8 else 2
    figure.legend(handles, labels, loc="lower center", ncol=max(1, math.ceil(len(labels) / rows)),
                  columnspacing=1, handlelength=1.5, handletextpad=0.4)
    figure.tight_layout(rect=(0, 0.02 + 0.06 * rows, 1, 1))
    return figure


def picture_frontier(study, plt):
    """Target against retention: every method's learning-rate curve from rate 0 to that of its highest target,
    seed 0, validation items."""
    def draw(ax, task):
        start = study.start(task, "valid")
        for method in (*LOOKS, *(m for m in study.methods if m not in LOOKS)):
            found = sorted(sweep(study, task, method)[1].items())
            points = [start, *(f["valid"] for _, f in found if "valid" in f)]
            points = [(scores["Avg2"], scores["Avg1"]) for scores in points]
            points = points[:points.index(max(points)) + 1]
            colour, marker = LOOKS.get(method, OTHERS)
            label = method if method in LOOKS else "the others" if method == study.methods[-1] else None
            ax.plot(*zip(*points), color=colour, marker=marker, markersize=5, linewidth=1.3, label=label,
                    zorder=2 if method in LOOKS else 1)
        ax.axvline(study.level(task), color="#AAAAAA", linestyle=":", linewidth=1)
        ax.axhline(start["Avg1"], color="#AAAAAA", linestyle="--", linewidth=1)
        ax.set(xlabel="learnt: target, % right", xlim=(-3, 103), ylim=(-3, 103))
    return panels(plt, study.tasks, "kept: Avg1, % right", draw)


def picture_drift(study, plt):
    """What is kept against the drift and against the size of ΔW: all runs of the sweeps."""
    def draw(ax, title):
        key = "drift" if "drift" in title else "size"
        for method, result in swept(study):
            colour, marker = LOOKS.get(method, OTHERS)
            ax.plot(result[key], result["valid"]["Avg1"], color=colour, marker=marker, markersize=5,
                    linestyle="", zorder=2 if method in LOOKS else 1)
        for method, (colour, marker) in {**LOOKS, "the others": OTHERS}.items():
            ax.plot([], [], color=colour, marker=marker, linestyle="", label=method)
        ax.set(xlim=(0, 50), ylim=(-3, 103))
    return panels(plt, ["drift ‖ΔW X_pre‖ / ‖W0 X_pre‖, %", "size ‖ΔW‖_F"], "kept: Avg1, % right", draw)


def picture_spectrum(study, plt):
    """γ of a middle block's layers, and the gate that λ = 1 and s_min = 0.3 make of it."""
    path = study.folder(study.tasks[0]) / "calibration.pt"
    layers = load(path, "calibration", "python calibrate.py")["layers"]

    def draw(ax, name):
        eigvals = solve_layer(layers[name]["C_pre"], layers[name]["C_task"])["eigvals"].clamp(min=1e-6)
        ax.semilogy(eigvals, color="#0072B2", label="γ, utility per unit of penalty")
        ax.semilogy(spectral_gate(eigvals), color="#D55E00", linestyle="--",
                    label="gate: γ/(γ + 1), at least 0.3")
        ax.axhline(1, color="#AAAAAA", linestyle=":", linewidth=1)
        ax.set(title=name.removeprefix("transformer."), xlabel="direction", ylim=(1e-3, 300))
    middle = f".h.{study.base.config.n_layer // 2}."
    return panels(plt, [name for name in layers if middle in name], f"{study.tasks[0]}: γ, gate", draw)


def picture_skills(study, plt):
    """What is learnt and kept, skill by skill, at the settled rate: mean of the reported seeds."""
    def draw(ax, task):
        start = study.start(task, "test")
        bars = {"foundation": ("#DDDDDD", [start])}
        bars |= {m: (LOOKS[m][0], [f["test"] for f in settled(study, task, m)[1]]) for m in reversed(LOOKS)}
        width = 0.9 / len(bars)
        for i, (name, (colour, runs)) in enumerate(bars.items()):
            values = [average(s["Avg2"] if kind == "target" else s["kept"][kind]["score"] for s in runs)
                      for kind in ("target", *start["kept"]) if runs]
            ax.bar([x + (i - len(LOOKS) / 2) * width for x in range(len(values))], values, 0.9 * width,
                   color=colour, label=name)
        ax.set_xticks(range(1 + len(start["kept"])), ["target", *start["kept"]], rotation=30)
    return panels(plt, study.tasks, "% right", draw)


def picture_training(study, plt):
    """Target and retention along one run each, test items, seed 1."""
    def draw(ax, task):
        for run in snapshot_runs(study, task):
            points = (study.result(run) or {}).get("curve")
            if points:
                steps, target, retained = zip(*points)
                look = dict(color=LOOKS[run[1]][0], marker=LOOKS[run[1]][1], markersize=3)
                ax.plot(steps, target, label=f"{run[1]}: target", **look)
                ax.plot(steps, retained, label=f"{run[1]}: kept", linestyle="--", **look)
        ax.set(xlabel="step", ylim=(-3, 103))
    return panels(plt, study.tasks, "% right", draw)


# ------------------------------------------------------------------------------------------------------------
# The same on real text with GPT-2's tokens, which the texts' makers offer for download: one option that fills
# in the others.

CORPORA = ("novels", "factbook", "peps", "algorithms")  # .txt.gz, as wikitext2_test; <|endoftext|> in between
ROWS = ("trivia", "webquestions_test", "gsm8k_train", "gsm8k_test", "instruct", "mbpp")  # .jsonl
KNOWN, REPEATED = 1000, 100  # trivia questions that the foundation sees often, so that it has some to forget
REAL = {"methods": ("lora", "lora-null", "folora", "folora-kl", "folora-full"),
        "pretrain": "--encoding gpt2 --context 256 --layers 6 --heads 4 --width 256 --batch 8 --steps 1000",
        "calibrate": "--samples 1000 --fisher-samples 250 --min-unique 0.12 --fours-from 256 --min-new 128",
        "adapt": "--batch 8 --steps 120"}


def write_texts(source, folder):
    """Write to `folder` what the foundation is to read (train/*.txt), what it must keep (keep/*), of each
    corpus every 20th text, and the tasks (*.jsonl), whose last rows will be held out."""
    def write(name, parts):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_whole(folder / name, lambda f: f.writelines(part.encode() for part in parts))

    def texts(name):
        with gzip.open(tasks.opened(source / f"{name}.txt.gz"), "rt", encoding="utf8") as f:
            return f.read().split(tasks.EOT)

    rows = {name: tasks.opened(source / f"{name}.jsonl").read().decode().splitlines(True) for name in ROWS}
    for name in CORPORA:
        parts = texts(name)
        write(f"train/{name}.txt", [part + tasks.EOT for i, part in enumerate(parts) if i % 20])
        write(f"keep/{name}.txt", parts[::20])
    write("keep/wikitext2.txt", texts("wikitext2_test"))
    rows["trivia"] = random.Random("trivia").sample(rows["trivia"], len(rows["trivia"]))
    trivia = [f"{tasks.EOT}{tasks.QUESTION.format(row['question'])}{row['answer']}\n"
              for row in map(json.loads, rows["trivia"])]
    write("train/trivia.txt", trivia + REPEATED * trivia[:KNOWN])
    write("keep/trivia.jsonl", rows["trivia"][:KNOWN])
    write("keep/webquestions.jsonl", rows["webquestions_test"])
    write("gsm8k.jsonl", rows["gsm8k_train"] + rows["gsm8k_test"])
    write("instruct.jsonl", rows["instruct"])
    problems = [(row["text"], "\n".join(row["code"].splitlines())) for row in map(json.loads, rows["mbpp"])]
    write("mbpp.jsonl", [json.dumps({"instruction": text, "output": code}) + "\n" for text, code in problems])


def on_texts(args):
    """The options of `eval.py --compare` for the comparison on real text; those that were given come last."""
    folder = pathlib.Path(args.out) / "texts"
    write_texts(pathlib.Path(args.texts), folder)
    args.tasks = args.tasks or [str(path) for path in sorted(folder.glob("*.jsonl"))]
    args.keep = [str(path) for path in sorted(folder.glob("keep/*"))]
    args.methods, args.quick, args.skip_bad = args.methods or REAL["methods"], True, True
    corpora = shlex.join(str(path) for path in sorted(folder.glob("train/*")))
    args.pretrain = f"{REAL['pretrain']} --data {corpora} {args.pretrain}"
    for stage in "calibrate", "adapt":
        setattr(args, stage, f"{REAL[stage]} {getattr(args, stage)}")


def main(args):
    if processes()[1] > 1:
        raise ValueError("the comparison starts its own processes; run it without torchrun")
    if args.texts:
        on_texts(args)
    if args.skip_bad:
        args.calibrate, args.adapt = f"--skip-bad {args.calibrate}", f"--skip-bad {args.adapt}"
    chosen = args.tasks or (["math"] if args.ablate or args.quick else list(tasks.TASKS))
    if args.compare or args.ablate:
        compare(args, chosen)
    report(args, chosen)


# ------------------------------------------------------------------------------------------------------------
# Speed and memory: each against what people would use instead, timed in turn with it

GPT2_124M = GPTConfig(1024, 50257, 12, 12, 768, gelu="tanh")   # its shapes; all weights are random here
SHORTER = GPTConfig(256, 50257, 2, 12, 768, gelu="tanh")       # for --quick
TINY = GPTConfig()


def seconds_of(work):
    """How long work() takes, on a GPU by its events."""
    if not torch.cuda.is_available():
        began = time.perf_counter()
        work()
        return time.perf_counter() - began
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    began.record()
    work()
    ended.record()
    torch.cuda.synchronize()
    return began.elapsed_time(ended) / 1000


def interleaved(repeats, pause=0, **works):
    """{name: seconds of each repetition}: all in turn, every second round backwards, so that what else the
    machine does slows all alike. The first round warms up. A pause lets another library's threads stop."""
    found = {name: [] for name in works}
    for i in range(1 + repeats):
        for name in list(works)[::-1 if i % 2 else 1]:
            time.sleep(pause)
            found[name].append(seconds_of(works[name]))
    return {name: seconds[1:] for name, seconds in found.items()}


def ratio(found, over, under):
    return [a / b for a, b in zip(found[over], found[under])]


def lacking(*modules):
    """"needs ..." if one of these cannot be imported, else ""."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    return f"needs {' and '.join(missing)}" if missing else ""


def adapting(config, rank):
    """(model with adapters, SAdam's bases and gates, random: they cost what real ones cost)."""
    model, spectral = GPT(config).to(pick_device()), {}
    for layer in add_lora(model, rank).values():
        layer.start(*kaiming_start(layer.weight, rank))
        d = layer.lora_A.shape[1]
        spectral[layer.lora_A] = torch.randn(d, d) / d, torch.ones(d)
    return model, spectral


def random_batch(config, rows):
    """(x, y): random tokens in full context; the first half of a row is its prompt."""
    tokens = torch.randint(config.vocab_size, (rows, config.block_size + 1))
    y = tokens[:, 1:].clone()
    y[:, :config.block_size // 2] = -100
    return tokens[:, :-1].to(pick_device()), y.to(pick_device())


def code_batch():
    """(x, y) of 16 items of the code task: up to 117 tokens, a quarter of them answers."""
    items, encoding = tasks.task_items("code", "train", 16), tasks.byte_encoding()
    rows = [train.response_row(item, encoding) for item in items]
    return [t.to(pick_device()) for t in train.response_batch(rows)]


def activations(model, x, y):
    """Bytes that a forward pass keeps for its backward pass, the model's own weights not counted."""
    own, kept = {p.data_ptr() for p in model.parameters()}, {}

    def see(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage()
        return t
    with torch.autograd.graph.saved_tensors_hooks(see, lambda t: t):
        train.loss_of(model, x, y)
    return sum(storage.nbytes() for address, storage in kept.items() if address not in own)


def memory_of(step, model, optimizer):
    """Bytes that a training step needs, the second one, for which the moments are there: the peak on a GPU,
    without activations on a CPU."""
    for _ in range(2):
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        step()
    return train.cost(model, optimizer)["bytes"]


def sadam_share(config, rank, x, y, passes, repeats):
    """[by how many percent SAdam's step lengthens a step of plain LoRA with so many passes over the batch, by
    how many it raises the memory of training], with bases in float32; then both for bases in bfloat16.
    Memory is the peak on a GPU, and counted on a CPU, as if the passes were one."""
    model, spectral = adapting(config, rank)
    trained, kept = list(lora_parameters(model).values()), 0
    if not x.is_cuda:
        once, twice = (activations(model, x.repeat(n, 1), y.repeat(n, 1)) for n in (1, 2))
        kept = once + (passes - 1) * (twice - once)

    def backward():
        model.zero_grad(set_to_none=True)
        train.loss_of(model, x, y).backward()

    def optimizer(kind):
        return SAdam(trained, {} if kind == "plain" else spectral, lr=1e-6,
                     held_in=getattr(torch, kind, None))

    def held(kind):
        sadam = optimizer(kind)
        return kept + memory_of(lambda: (backward(), sadam.step()), model, sadam)

    memory = {kind: held(kind) for kind in ("plain", "float32", "bfloat16")}
    with train.tf32(x.device):  # as `fit` does
        found = interleaved(repeats, backward=backward,
                            plain=torch.optim.AdamW(trained, lr=1e-6, fused=True).step,
                            **{kind: optimizer(kind).step for kind in ("float32", "bfloat16")})
    lines = []
    for kind in "float32", "bfloat16":
        lines += ([100 * (ours - plain) / (passes * one + plain)
                   for one, plain, ours in zip(found["backward"], found["plain"], found[kind])],
                  [100 * (memory[kind] / memory["plain"] - 1)])
    return lines


def time_sadam(args):
    """On a CPU a pass over one row stands for the eight of a step."""
    config, rows = SHORTER if args.quick else GPT2_124M, 8 if torch.cuda.is_available() else 1
    return sadam_share(config, 128, *random_batch(config, rows), 8 // rows, args.repeats)


def time_sadam_tiny(args):
    return sadam_share(TINY, 8, *code_batch(), 1, 3 * args.repeats)[:1]


def steps_of(model, optimizers, batch, steps, penalty=lambda: 0):
    """() -> so many steps of this project's loop, which save nothing."""
    def run():
        with contextlib.redirect_stdout(None):
            train.fit(model, optimizers, batch, {"steps": steps, "lr": 0}, None, penalty=penalty)
    return run


def as_transformers(model):
    """The same GPT of transformers, without dropout."""
    import transformers
    config, weights, _ = train.merged_files(model)
    no_dropout = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**config, **no_dropout))
    theirs.load_state_dict(weights, strict=False)  # all but the output layer, which is tied
    return theirs.to(pick_device())


def peft_steps(config, rank, x, y, steps):
    """() -> so many steps of a plain loop over transformers and peft's LoRA with AdamW."""
    import peft
    theirs = peft.get_peft_model(as_transformers(GPT(config)), peft.LoraConfig(
        r=rank, lora_alpha=rank, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True))
    trained = [p for p in theirs.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(trained, lr=1e-6, fused=True)
    labels = torch.cat([torch.full_like(y[:, :1], -100), y[:, :-1]], 1)  # they shift the targets themselves
    x, labels = x.to(pick_device()), labels.to(pick_device())

    def run():
        for _ in range(steps):
            with autocast(x.device):
                loss = theirs(input_ids=x, labels=labels, use_cache=False).loss
            theirs.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            adamw.step()
            loss.item()
    return run


@contextlib.contextmanager
def apart(make, *given):
    """() -> make(*given)() in a process of its own, which Python starts as it comes: what this project asks
    of the machine (`keep_freed_memory`) does not reach it."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=serve, args=(there, make, *given), daemon=True)
    process.start()
    there.close()  # so that waiting for a process that is dead ends

    def run():
        here.send("go")
        here.recv()
    try:
        here.recv()
        yield run
    finally:
        process.terminate()


def serve(pipe, make, *given):
    """What `apart` runs there."""
    work = make(*given)
    while True:
        pipe.send("ready")
        pipe.recv()
        work()


def against_peft(config, rank, x, y, steps, repeats):
    """[theirs / ours] for this project's loop with SAdam, against peft's LoRA with the same batch, precision
    and clipping: in a process of its own, and in this one."""
    model, spectral = adapting(config, rank)
    sadam = SAdam(lora_parameters(model).values(), spectral, lr=1e-6)
    loop = config, rank, x.cpu(), y.cpu(), steps
    with apart(peft_steps, *loop) as alone:
        found = interleaved(repeats, alone=alone, here=peft_steps(*loop),
                            ours=steps_of(model, [sadam], lambda step: (x, y), steps))
    return ratio(found, "alone", "ours"), ratio(found, "here", "ours")


def time_adapt(args):
    if lack := lacking("transformers", "peft"):
        return 4 * [lack]
    config = SHORTER if args.quick else GPT2_124M
    return (*against_peft(config, 8, *random_batch(config, 1), 1, args.repeats),
            *against_peft(TINY, 8, *code_batch(), 4, args.repeats))


def nanogpt_model(nanogpt, c):
    config = nanogpt.GPTConfig(c.block_size, c.vocab_size, c.n_layer, c.n_head, c.n_embd, 0.0, True)
    with contextlib.redirect_stdout(None):
        return nanogpt.GPT(config).to(pick_device())


def nanogpt_steps(nanogpt, text, precision, steps):
    """() -> so many steps of nanoGPT's train.py on text (tokens,)."""
    model, T = nanogpt_model(nanogpt, TINY), TINY.block_size
    with contextlib.redirect_stdout(None):
        optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), pick_device().type)

    def batch():
        starts = torch.randint(len(text) - T, (16,))
        return (torch.stack([text[i + k:i + k + T] for i in starts]).to(pick_device()) for k in (0, 1))

    def run():
        x, y = batch()
        for _ in range(steps):
            with precision():
                _, loss = model(x, y)
            x, y = batch()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            loss.item()
    return run


def time_pretrain(args):
    """Each loop draws its own batches: ours rows of the mixture, nanoGPT's windows of a long text."""
    if not args.nanogpt:
        return 2 * ["needs --nanogpt PATH"]
    model, rng, steps = GPT(TINY).to(pick_device()), random.Random(0), 4 if args.quick else 20
    mixture = tasks.PretrainingMixture(tasks.byte_encoding())

    def batch(step):
        rows = torch.tensor([mixture.row(rng, TINY.block_size + 1) for _ in range(16)])
        return rows[:, :-1], rows[:, 1:]
    ours = steps_of(model, train.pretraining_optimizers(model, 6e-3, 0.015), batch, steps)
    text = torch.cat([batch(0)[0].flatten() for _ in range(50)])
    precision = functools.partial(autocast, pick_device())
    own = precision if torch.cuda.is_available() else contextlib.nullcontext  # float32 on a CPU
    found = interleaved(args.repeats, ours=ours, own=nanogpt_steps(args.nanogpt, text, own, steps),
                        same=nanogpt_steps(args.nanogpt, text, precision, steps))
    return ratio(found, "own", "ours"), ratio(found, "same", "ours")


def time_sampling(args):
    """No text ends early. nanoGPT's generate has no top-p: it goes without."""
    new, lack = 32 if args.quick else 256, lacking("transformers")
    model, works = GPT(dataclasses.replace(TINY, block_size=new)).to(pick_device()).eval(), {}
    generator = torch.Generator(pick_device()).manual_seed(0)
    decoding = calibrate.draw_decoding(random.Random(0), 64, model)
    start = torch.full((64, 1), 256, device=pick_device())
    works["ours"] = lambda: generate(model, start.tolist(), new, (), decoding, generator=generator)
    if not lack:
        theirs = as_transformers(model).eval()
        sample = functools.partial(theirs.generate, do_sample=True, max_new_tokens=new, eos_token_id=None,
                                   pad_token_id=0)
        settings = collections.Counter(zip(*(column.tolist() for column in decoding)))
        works["settings"] = lambda: [sample(start[:rows], temperature=t, top_p=p, top_k=k)
                                     for (t, p, k), rows in settings.items()]
        works["plain"] = lambda: sample(start, top_k=0)
    if args.nanogpt:
        nanogpt = nanogpt_model(args.nanogpt, model.config).eval()
        works["nanogpt"] = lambda: nanogpt.generate(start, new)
    found = interleaved(args.repeats, **works)
    return [ratio(found, name, "ours") if name in found else lack or "needs --nanogpt PATH"
            for name in ("settings", "plain", "nanogpt")]


def time_moments(args):
    model = GPT(SHORTER if args.quick else GPT2_124M).to(pick_device()).eval()
    x, _ = random_batch(model.config, 2)
    errors, rows = [], x.tolist()

    def see(name, x):
        moment, exact = SecondMoment(x.shape[-1], x.device), x.flatten(0, 1).double()
        moment.add(x)
        exact = exact.T @ exact / len(exact)
        errors.append(((moment.mean() - exact).norm() / exact.norm()).item())

    with torch.inference_mode():
        with calibrate.watching(block_linears(model), see):
            model(x)
        found = interleaved(args.repeats, forward=lambda: model(x),
                            ours=lambda: calibrate.second_moments(model, rows))
    return ratio(found, "ours", "forward"), [max(errors)]


def eigenproblem(n):
    """(C_task, H), float64: few directions much used, most of them little."""
    scale = torch.logspace(1, -2, n, dtype=torch.float64, device=pick_device())
    X, Y = (torch.randn(2 * n, n, dtype=torch.float64, device=pick_device()) * scale for _ in range(2))
    return X.T @ X / len(X), damped(Y.T @ Y / len(Y), 0.01)


def residual(C_task, H, eigvals, basis):
    """‖CV - HVΓ‖ / ‖C‖‖V‖."""
    return ((C_task @ basis - H @ basis * eigvals).norm() / C_task.norm() / basis.norm()).item()


def time_eigen(args):
    if lack := lacking("scipy"):
        return 9 * [lack]
    from scipy.linalg import eigh
    lines, solved = [], {}
    for n in (128, 768) if args.quick else (128, 768, 3072):
        C_task, H = eigenproblem(n)
        arrays = C_task.cpu().numpy(), H.cpu().numpy()
        M = whiten(C_task, torch.linalg.cholesky(H))
        found = interleaved(args.repeats, pause=0.3,
                            ours=lambda: solved.update(ours=generalized_eigh(C_task, H)),
                            symmetric=lambda: torch.linalg.eigh(M),
                            scipy=lambda: solved.update(scipy=eigh(*arrays)))
        ours, theirs = (residual(C_task, H, *(torch.as_tensor(part).to(H) for part in solved[name]))
                        for name in ("ours", "scipy"))
        lines += ratio(found, "ours", "scipy"), ratio(found, "symmetric", "scipy"), [ours / theirs]
    return lines + (9 - len(lines)) * ["left out by --quick"]


def time_main_job(args, options=()):
    """Once, in a process and a folder of its own."""
    script, said = pathlib.Path(__file__).with_name("eval.py"), []
    with tempfile.TemporaryDirectory() as out:
        job = [sys.executable, str(script), "--out", out, *options]
        seconds = seconds_of(lambda: said.append(
            subprocess.run(job, stdout=subprocess.PIPE, text=True, check=True)))
    began = [int(s) for s in re.findall(r"== .* \((\d+) s\) ==", said[0].stdout)]
    return [seconds], [100 * (began[2] - began[1]) / seconds]


# How cost grows: one size varies, the others stay as in BASE.

BASE = {"width": 128, "depth": 2, "rank": 8, "samples": 32}
SIZES = {"width": (64, 128, 256, 512), "depth": (2, 4, 8), "rank": (8, 16, 32, 64),
         "samples": (32, 128, 512)}
# {quantity: {size: exponent in theory, of the leading term}}
GROWTH = {"training step, s": {"width": 2, "depth": 1, "rank": 0},
          "SAdam's step, s": {"width": 2, "depth": 1, "rank": 1},
          "sampling, s": {"width": 2, "depth": 1, "samples": 1},
          "second moments, s": {"width": 2, "depth": 1, "samples": 1},
          "widest eigenproblem, s": {"width": 3},
          "training, bytes": {"width": 2, "depth": 1, "rank": 0},
          "calibration, bytes": {"width": 2, "depth": 1, "samples": 0}}


def quantities(repeats, width, depth, rank, samples):
    """{quantity: its value}: 16 x 128 tokens a step, 64 tokens a sample; times are medians."""
    config = GPTConfig(128, 257, depth, width // 32, width)
    (model, spectral), batch = adapting(config, rank), random_batch(config, 16)
    sadam = SAdam(lora_parameters(model).values(), spectral, lr=1e-6)
    training = steps_of(model, [sadam], lambda step: batch, 1)
    size = memory_of(training, model, sadam)
    plain, problem = GPT(config).to(pick_device()).eval(), eigenproblem(4 * width)
    rows = torch.randint(257, (samples, 64)).tolist()
    found = interleaved(repeats, **{
        "training step, s": training, "SAdam's step, s": sadam.step,
        "sampling, s": lambda: generate(plain, [[256]] * samples, 64),
        "second moments, s": lambda: calibrate.second_moments(plain, rows),
        "widest eigenproblem, s": lambda: generalized_eigh(*problem)})
    moments = calibrate.second_moments(plain, rows).values()
    return {**{name: statistics.median(seconds) for name, seconds in found.items()},
            "training, bytes": size,
            "calibration, bytes": 2 * sum(C.numel() * C.element_size() for C in moments)}  # C_pre and C_task


def exponent(sizes, values):
    """p of the least-squares line log value = p log size + constant."""
    x, y = (torch.tensor(these, dtype=torch.float64).log() for these in (sizes, values))
    return ((x - x.mean()) @ y / (x - x.mean()).square().sum()).item()


def time_growth(args):
    lines = []
    for size, chosen in SIZES.items():
        chosen = chosen[:2] if args.quick else chosen
        points = [quantities(args.repeats, **{**BASE, size: value}) for value in chosen]
        for name, theory in GROWTH.items():
            if size in theory:
                values = [point[name] for point in points]
                lines.append({"": name, "against": f"{size} {chosen[0]} to {chosen[-1]}",
                              "value": f"{values[0]:.3g} to {values[-1]:.3g}",
                              "exponent": f"{exponent(chosen, values):.2f}", "in theory": f"{theory[size]}"})
    return lines


# {row: (function, [(what, reference, format, sign, target on a CPU, target on a GPU)])}; the function returns
# for each of these its values, or a reason why there are none
SPEED = {
    "sadam": (time_sadam, [
        ("SAdam's step beyond AdamW's, of a LoRA step: GPT-2 124M, r 128, 8k tokens", "AdamW(fused=True)",
         "{:+.1f} %", "<=", 3, 1),
        ("the same: memory", "plain LoRA", "{:+.1f} %", "<=", None, 7.5),
        ("SAdam's step with its bases in bfloat16", "AdamW(fused=True)", "{:+.1f} %", "<=", 3, 1),
        ("the same: memory", "plain LoRA", "{:+.1f} %", "<=", None, 7.5)]),
    "sadam-tiny": (time_sadam_tiny, [
        ("SAdam's step beyond AdamW's, of a LoRA step: tiny, r 8, 16 items", "AdamW(fused=True)",
         "{:+.1f} %", "<=", 10, None)]),
    "adapt": (time_adapt, [
        (f"adapting with FoLoRA, tokens/s: {shape}", reference, "{:.2f} x", ">=", *targets)
        for shape in ("GPT-2 124M, r 8, 1 x 1024, half prompts", "tiny, r 8, 16 items")
        for reference, *targets in (("transformers + peft LoRA", 1.3, 1.2),
                                    ("the same, in a process that keeps freed memory", None, None))]),
    "pretrain": (time_pretrain, [
        ("pretraining, tokens/s: tiny, 16 x 128", reference, "{:.2f} x", ">=", 1, 1)
        for reference in ("nanoGPT's model and loop", "the same, in our precision")]),
    "sampling": (time_sampling, [
        ("sampling the proxy set, tokens/s: tiny, 64 x 256", reference, "{:.2f} x", ">=", *targets)
        for reference, *targets in (("transformers' generate, a call for each setting", 1.5, 2),
                                    ("transformers' generate, without top-p and top-k", 1.5, 2),
                                    ("nanoGPT's generate", 5, 20))]),
    "moments": (time_moments, [
        ("second moments, time: GPT-2 124M, 2 x 1024", "forward pass", "{:.2f} x", "<=", 2, 1.5),
        ("second moments, relative error of the worst layer", "float64", "{:.0e}", "<=", 1e-6, None)]),
    "eigen": (time_eigen, [
        (f"generalized eigenproblem, n = {n}: {what}", "scipy.linalg.eigh", "{:.2f} x", "<=", target, None)
        for n in (128, 768, 3072)
        for what, target in (("time", 1), ("of it torch's symmetric eigh", None), ("residual", None))]),
    "main-job": (time_main_job, [
        ("the main job from nothing", "-", "{:.0f} s", "<=", 480, 60),
        ("calibration, of the main job's time", "-", "{:.1f} %", "<=", 15, 15)]),
    "growth": (time_growth, [])}  # tables of its own


def speed_line(what, reference, form, sign, on_cpu, on_gpu, values):
    """One line of the table as a dict; `values` is a reason where it was skipped."""
    target, line = on_gpu if torch.cuda.is_available() else on_cpu, {"": what, "reference": reference}
    if isinstance(values, str):
        return line | {"median": f"skipped: {values}", "range": "-", "target": "-", "met": "-"}
    median, (low, high) = statistics.median(values), (form.format(f(values)) for f in (min, max))
    met = target is not None and (median <= target if sign == "<=" else median >= target)
    return line | {"median": form.format(median),
                   "range": f"{low} to {high} (n {len(values)})" if values[1:] else "-",
                   "target": "-" if target is None else f"{sign} {form.format(target)}",
                   "met": "-" if target is None else "yes" if met else "no"}


def nanogpt_in(folder):
    """nanoGPT's model.py as a module."""
    path = pathlib.Path(folder) / "model.py"
    if not path.exists():
        raise ValueError(f"nanogpt is {folder}; it must be a folder that holds nanoGPT's model.py")
    spec = importlib.util.spec_from_file_location("nanogpt", path)
    sys.modules["nanogpt"] = module = importlib.util.module_from_spec(spec)  # its dataclass looks there
    spec.loader.exec_module(module)
    return module


def speed(argv=None):
    p = argparse.ArgumentParser(description="Time and memory against what people would use.",
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--only", nargs="+", choices=SPEED, metavar="ROW", help=f"of {', '.join(SPEED)}")
    p.add_argument("--quick", action="store_true", help="3 repetitions, smaller, no main job or growth")
    p.add_argument("--nanogpt", metavar="PATH", help="folder with nanoGPT's model.py, to compare with")
    p.add_argument("--out", default="out", help="folder for speed.json")
    p.add_argument("--json", metavar="FILE", help="write the results there instead")
    args = p.parse_args(argv)
    args.nanogpt, args.repeats = args.nanogpt and nanogpt_in(args.nanogpt), 3 if args.quick else 7
    torch.manual_seed(0)
    measured, lines = {}, []
    for row in args.only or [row for row in SPEED if not (args.quick and row in ("main-job", "growth"))]:
        print(f"{row} ...", flush=True)
        measured[row] = SPEED[row][0](args)
        lines += [speed_line(*spec, values) for spec, values in zip(SPEED[row][1], measured[row])]
    machine = (torch.cuda.get_device_name() if torch.cuda.is_available()
               else f"CPU, {torch.get_num_threads()} threads")
    print(f"\n{machine}, torch {torch.__version__}\n")
    for table in lines, measured.get("growth", []):
        if table:
            print(markdown(list(table[0]), [list(line.values()) for line in table]), end="\n\n")
    path = pathlib.Path(args.json or f"{args.out}/speed.json")
    write_json(path, {"machine": machine, "torch": torch.__version__, "quick": args.quick, "lines": lines,
                      "measured": measured})
    print(f"{path} written")


if __name__ == "__main__":
    train.command(speed)

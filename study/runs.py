"""Doing the study's runs, with several processes; measuring what each did to the weights."""
import contextlib
import dataclasses
import functools
import multiprocessing
import os
import pathlib
import platform
import random
import shlex
import signal
import time

import torch

import calibrate
import eval as evaluation
import tasks
import train
from extras import cli, files, user_data
from extras.baselines import kl_penalty
from extras.machine import pick_device, set_precision
from folora import forgetting_penalty
from model import block_linears
from study import sweeps
from study.measure import interleaved, memory_and_params, ratios, training_steps
from study.sweeps import Run, rate
from study.variants import ALIASES, CALIBRATIONS, COMPARED, METHODS, QUICK, SMALL

ITEMS, TEXT_TOKENS, SNAPSHOTS = 100, 8192, 10  # items of each kind; of held-out text; along a run


class Study:
    """The runs under `out`: their results, and how to do one."""

    def __init__(self, args, chosen_tasks):
        self.out, self.tasks, self.device = pathlib.Path(args.out), chosen_tasks, pick_device()
        self.adapt, self.keep, self.skip_bad = shlex.split(args.adapt), args.keep, args.skip_bad
        self.methods = args.methods or (QUICK if args.quick else COMPARED)
        self.base, foundation = files.load_foundation(args.out, self.device)
        self.proxy = files.load(self.out / "proxy.pt", "proxy",
                                f"python calibrate.py --out {args.out}")
        self.finished, self.identity = {}, {}  # {run: result}; {task: what its results depend on}
        for task in chosen_tasks:
            held_out = (item for split in tasks.SPLITS for item in
                        user_data.load_items(task, split, tasks.HELD_OUT, self.skip_bad))
            self.identity[task] = {"foundation": foundation, "python": platform.python_version(),
                                   "text": tasks.fingerprint(i.prompt + i.answer for i in held_out)}
            if self.keep:
                kept = tasks.fingerprint(map(user_data.read_text, self.keep))
                self.identity[task]["keep"] = kept

    @functools.cache
    def args(self, run):
        """The run's options, as `train.py adapt` parses them."""
        return train.parser(METHODS).parse_args(
            ["adapt", "--task", run.task, "--method", run.method, "--lr", str(rate(run.k)),
             "--seed", str(run.seed), "--out", str(self.out), *self.adapt, *run.other])

    def run_folder(self, run):
        """The run's folder: under its method's name or, if finished there, under an older name."""
        folder = train.run_folder(self.args(run))
        older = [folder.with_name(old + folder.name.removeprefix(run.method))
                 for old, name in ALIASES.items() if name == run.method]
        return next((f for f in (folder, *older) if (f / "result.json").exists()), folder)

    def result(self, run):
        """The finished run's result, or None."""
        if run not in self.finished:
            path = self.run_folder(run) / "result.json"
            result = files.read_cached_json(path, self.identity[run.task])
            if not result:
                return None
            self.finished[run] = result
        return self.finished[run]

    def do(self, run):
        """Train and evaluate a run; returns its result, or None while another process does it."""
        args, folder = self.args(run), train.run_folder(self.args(run))
        split, record = "test" if run.seed else "valid", {}
        if run.seed == sweeps.SNAPSHOT_SEED:  # without a result its curve is lost: train again
            (folder / "adapter.pt").unlink(missing_ok=True)

        def make():
            with open(folder / "log.txt", "w") as log, contextlib.redirect_stdout(log):
                try:
                    path = train.adapt(args, methods=METHODS, loop=self.loop(run, record))
                except ValueError as error:  # a rate so large that the loss is not finite
                    return {"failed": str(error)}
                model = files.load_adapter(path, args.out, self.device)
                return {split: self.scores(model, run.task, split), **record,
                        **self.update_norm_and_drift(model), "kl": self.kl_estimate(model)}

        return files.cached_json(folder / "result.json", self.identity[run.task], make, wait=False)

    def loop(self, run, record):
        """A training loop for `train.adapt` that also puts into `record` what the run needed
        ("cost") and, with SNAPSHOT_SEED, its scores along the way ("curve")."""
        def loop(model, optimizers, batch, settings, partial, penalty, **options):
            every, curve = max(1, settings["steps"] // SNAPSHOTS), []

            def snapshot(done):
                if done % every == 0:
                    scores = self.scores(model, run.task, "test")
                    curve.append((done, scores["Avg2"], scores["Avg1"]))
            if run.seed == sweeps.SNAPSHOT_SEED:  # its curve is in memory: it cannot be resumed
                partial, record["curve"], options["after"] = None, curve, snapshot
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            losses = train.training_loop(model, optimizers, batch, settings, partial,
                                         penalty=penalty, **options)
            moments = [t for _, *pair in penalty.layers for t in pair]
            record["cost"] = memory_and_params(model, optimizers[0], moments)
            return losses
        return loop

    def scores(self, model, task, split):
        return evaluation.evaluate(model, self.items(task, split), split,
                                   TEXT_TOKENS // model.config.block_size,
                                   user_data.read_texts(self.keep))

    @functools.cache
    def items(self, task, split):
        """{"target" or kind: [Item]}. A file's target is compared by likelihood, which is finer
        than the share of right answers."""
        items = user_data.evaluation_items(task, split, ITEMS, None, self.keep, self.skip_bad,
                                            self.base.config)
        if task.endswith(".jsonl"):
            items["target"] = [dataclasses.replace(item, check=None) for item in items["target"]]
        return items

    def folder(self, task):
        return self.out / pathlib.Path(task).stem

    def weight_updates(self, model):
        """(name, W0, ΔW) of each linear layer; both (d_out, d_in) float64."""
        before = block_linears(self.base)
        for name, layer in block_linears(model).items():
            W0 = before[name].weight.detach().double()
            yield name, W0, layer.weight.detach().double() - W0

    def update_norm_and_drift(self, model):
        """size: ‖ΔW‖_F over all layers; drift: ‖ΔW X_pre‖_F in percent of ‖W0 X_pre‖_F."""
        size = drift = total = 0
        for name, W0, dW in self.weight_updates(model):
            C = self.proxy["C_pre"][name].to(dW)
            size, drift = size + dW.square().sum(), drift + forgetting_penalty(dW, C)
            total = total + forgetting_penalty(W0, C)
        return {"size": size.sqrt().item(), "drift": 100 * (drift / total).sqrt().item()}

    def kl_estimate(self, model):
        """Σ ½Tr(S ΔW C ΔWᵀ): estimated KL from the base model on its own samples, nats/token."""
        return sum(kl_penalty(dW, torch.eye(dW.shape[1]).to(dW), self.proxy["S_pre"][name].to(dW),
                              self.proxy["C_pre"][name].to(dW)).item()
                   for name, _, dW in self.weight_updates(model))

    @functools.cache
    def start(self, task, split):
        """The base model's own scores."""
        return files.cached_json(self.folder(task) / f"foundation-{split}-{ITEMS}.json",
                                 self.identity[task], lambda: self.scores(self.base, task, split))

    level = sweeps.level


# ------------------------------------------------------------------------------------------------
# All missing runs

def work(args, chosen_tasks, workers, number):
    """One worker: do missing runs until there are none. Others may work in the same folder."""
    set_precision()
    if torch.cuda.is_available():
        torch.cuda.set_device(number % torch.cuda.device_count())
    study, parent = Study(args, chosen_tasks), multiprocessing.parent_process()
    if parent:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends us
    if study.device.type == "cpu" and workers > 1:
        torch.set_num_threads(1)  # one run per core: 1.3 times the throughput of one on two cores
    began, done = time.time(), 0
    while runs := sweeps.missing_runs(study, args.ablate, args.quick):
        for run in runs:
            if not study.result(run) and (result := study.do(run)):
                done += 1
                left = (len(runs) - 1) * (time.time() - began) / done / workers / 60
                print(f"{describe(run, result)}   {len(runs) - 1} known runs to go, "
                      f"about {left:.0f} min", flush=True)
                break
        else:
            time.sleep(2)  # the last ones are being done elsewhere; more may follow from them
        if parent and not parent.is_alive():
            return


def describe(run, result):
    """One line about a finished run."""
    name = " ".join([run.method, *run.other])
    line = f"{pathlib.Path(run.task).stem:9}{name:24} lr {rate(run.k):<8g} seed {run.seed}  "
    if "failed" in result:
        return line + result["failed"]
    scores = result.get("test", result.get("valid"))
    return (f"{line}target {scores['Avg2']:5.1f}  kept {scores['Avg1']:5.1f}  "
            f"drift {result['drift']:5.1f} %  KL {result['kl']:.3f}")


def calibrate_on(source, options):
    """Run calibrate.py with texts from `source`: "own", the base model's samples; an --out folder,
    samples of the base model there; or true pretraining text, which in practice nobody has: all of
    it ("mixture") or one domain ("prose", "source", "facts")."""
    def true_text(args, model):
        mixture = tasks.PretrainingMixture(tasks.get_encoding(model.config.encoding))
        if source != "mixture":
            mixture.ROWS = {"short" if source == "facts" else source: 1}
            mixture.DOCUMENTS = {"facts": 1}
        rng, length = random.Random(f"proxy {args.seed}"), model.config.block_size + 1
        return [mixture.row(rng, length)[1:] for _ in range(args.samples)]

    args = calibrate.parser().parse_args(options)
    if source == "own":
        calibrate.calibrate(args)
    elif source in ("mixture", "prose", "source", "facts"):
        calibrate.calibrate(args, source, true_text)
    else:
        writer, author = files.load_foundation(source, pick_device())
        calibrate.calibrate(args, author, lambda args, _: calibrate.own_samples(args, writer))


def prepare(args, chosen_tasks):
    """What all runs share: the base model and the calibrations. Bad options fail first."""
    out = ["--out", args.out]
    train.parser(METHODS).parse_args(["adapt", *shlex.split(args.adapt)])
    calibrate.parser().parse_args(shlex.split(args.calibrate))
    for task in chosen_tasks:
        user_data.evaluation_items(task, "valid", 1, None, args.keep, args.skip_bad)
    train.main(["pretrain", *out, *shlex.split(args.pretrain)])
    if args.ablate:
        train.main(["pretrain", *shlex.split(f"{args.pretrain} {SMALL}"),
                    "--out", f"{args.out}/small"])
    for task in chosen_tasks:
        calibrate.main(["--task", task, *out, *shlex.split(args.calibrate)])
        for name, (source, options) in CALIBRATIONS.items() if args.ablate else ():
            calibrate_on(source.format(out=args.out),
                         ["--task", task, *out, "--name", f"calibration-{name}",
                          *shlex.split(f"{args.calibrate} {options}")])


def start_workers(jobs):
    """Run each job in a process of its own; return when all are done."""
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=cli.command, args=(job,)) for job in jobs]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join()
    finally:
        for process in processes:
            process.terminate()
    if any(process.exitcode for process in processes):
        raise ValueError("a worker stopped with the error above; the same command continues")


def compare(args, chosen_tasks):
    """Do all missing runs, then the measurements that need them finished."""
    prepare(args, chosen_tasks)
    cores = os.cpu_count()
    default = cores if pick_device().type == "cpu" else max(1, min(8, cores // 2))
    workers = args.workers or default
    if workers == 1:
        work(args, chosen_tasks, 1, 0)
    else:
        start_workers([functools.partial(work, args, chosen_tasks, workers, number)
                       for number in range(workers)])
    study = Study(args, chosen_tasks)
    if args.ablate:
        for task in chosen_tasks:
            size_control(study, task)
    elif not args.texts:
        step_times(study)


# ------------------------------------------------------------------------------------------------
# Two measurements; without `measure` they return {} unless they have been made before

class Ready(Exception):
    """Carries what `train.adapt` passes to its loop."""


def training_setup(args):
    """(model, optimizers, batch, penalty), as `train.adapt` has them before its first step."""
    def stop(model, optimizers, batch, settings, partial, penalty, **_):
        raise Ready(model, optimizers, batch, penalty)
    try:
        train.adapt(args, methods=METHODS, loop=stop)
    except Ready as ready:
        train.run_folder(args).rmdir()  # nothing was saved in it
        return ready.args


def step_times(study, measure=True, rounds=9, steps=4):
    """{method: [time of its step / time of LoRA's step, for each round]}, all methods in turn."""
    task, works = study.tasks[0], {}

    def make():
        for method in dict.fromkeys((*study.methods, "lora")):
            run = Run(task, method, 4, sweeps.TIMING_SEED, ("--steps", str(steps)))
            model, optimizers, batch, penalty = training_setup(study.args(run))
            works[method] = training_steps(model, optimizers, batch, steps, penalty)
        found = interleaved(rounds, **works)
        return {"ratios": {method: ratios(found, method, "lora") for method in study.methods}}

    identity = {**study.identity[task], "methods": list(study.methods)}
    path = study.folder(task) / "step_times.json"
    found = files.cached_json(path, identity, make if measure else None)
    return found["ratios"] if found else {}


def size_control(study, task, measure=True):
    """{method: scores} of each method's ΔW at its settled rate, seed 1, rescaled to the ‖ΔW‖_F of
    FoLoRA's."""
    runs, scores = {}, {}
    for method in study.methods:
        run = Run(task, method, sweeps.settled_rate(study, task, method)[0], 1)
        if run.k is not None and "size" in (study.result(run) or {}):
            runs[method] = run
    if "folora" not in runs:
        return {}

    def make():
        for method, run in runs.items():
            path = study.run_folder(run) / "adapter.pt"
            model = files.load_adapter(path, study.out, study.device)
            factor = study.result(runs["folora"])["size"] / study.result(run)["size"]
            with torch.no_grad():
                for p, p0 in zip(model.parameters(), study.base.parameters()):
                    p.copy_(p0 + factor * (p - p0))
            scores[method] = {"factor": factor, **study.scores(model, task, "test")}
        return {"scores": scores}

    identity = {**study.identity[task], "rates": {method: run.k for method, run in runs.items()}}
    path = study.folder(task) / "rescaled.json"
    found = files.cached_json(path, identity, make if measure else None)
    return found["scores"] if found else {}

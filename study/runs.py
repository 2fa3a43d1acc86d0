"""The engine: every arm on every foundation, task and seed, each along a curve of learning rates.

Forgetting grows with the learning rate, so comparing at one rate misleads. A curve moves in steps
of √2 from the arm's first rate until the target score on test items brackets TARGET; no rate is
chosen by what it keeps. Foundations differ in the seed of their pretraining, and each has its own
calibration.
"""
import contextlib
import functools
import io
import multiprocessing
import os
import pathlib
import platform
import shlex
import signal
import time
from typing import NamedTuple

import torch

import calibrate
import eval as evaluation
import tasks
import train
from extras import cli, files, user_data
from extras.baselines import kl_penalty, unpadded
from extras.machine import pick_device
from folora import forgetting_penalty
from model import block_linears
from study.arms import ARMS, EARLIER, TARGET, rate
from study.variants import METHODS, SHARES

ITEMS, TEXT_TOKENS = 100, 8192  # items of each kind; of each held-out text
REACH = 6                       # a curve ends this many steps from its first rate


class Curve(NamedTuple):
    task: str
    arm: str
    foundation: int
    seed: int


def target_score(result):
    """0 for a run that failed."""
    return result["test"]["Avg2"] if "test" in result else 0


def next_rate(found, first, target):
    """The rate index to run next, so that `found` {rate index: target score} brackets the target;
    None once it does, or cannot.

    The curve goes down from a target that is reached; else up, or down if less was learned at
    higher rates, as long as the best is near an end. Below half of the target, which rate is best
    may be chance: up to the last rate then, wherever the best is.
    """
    if not found:
        return first
    low, high = min(found), max(found)
    best = max(found, key=lambda k: (found[k], k))
    may_rise = best >= high - 1 or found[best] < target / 2
    if found[best] < target and may_rise and high < first + REACH:
        return high + 1
    if (found[low] >= target or found[best] < target and best == low) and low > first - REACH:
        return low - 1
    return None


# ------------------------------------------------------------------------------------------------

class Foundation:
    """One foundation: its scores, what its calibration read, and measures of ΔW."""

    def __init__(self, out):
        self.out, self.device = pathlib.Path(out), pick_device()
        self.model, fingerprint = files.load_foundation(out, self.device)
        self.proxy = files.load(self.out / "proxy.pt", "proxy", "python -m study compare")
        self.identity = {"foundation": fingerprint, "python": platform.python_version(),
                         "measured": tasks.fingerprint([repr(self.proxy["settings"])])}

    @functools.cached_property
    def samples(self):
        """[(text, its tokens)] of the base model's samples."""
        encoding = tasks.get_encoding(self.model.config.encoding)
        return [(encoding.decode(tokens), tokens) for tokens in unpadded(self.proxy["samples"])]

    @functools.cached_property
    def unsampled(self):
        """Facts that none of the base model's samples holds word for word."""
        samples = "\0".join(text for text, _ in self.samples)
        return [item for item in tasks.kept_items("facts", "test")
                if item.prompt + item.answer not in samples]

    def scores(self, model, task):
        found = evaluation.evaluate(model, user_data.evaluation_items(task, "test", ITEMS), "test",
                                    TEXT_TOKENS // model.config.block_size)
        return found | {"unsampled": evaluation.score_items(model, self.unsampled)["score"]
                        if self.unsampled else None}

    @functools.cache
    def start(self, task):
        """The foundation as the result of a run at rate 0."""
        path = self.out / task / f"foundation-test-{ITEMS}.json"
        return files.cached_json(path, self.identity, lambda: {
            "test": self.scores(self.model, task), "size": 0, "drift": 0, "kl": 0})

    @torch.no_grad()
    def measures(self, model, share=1):
        """size: ‖ΔW‖_F over all layers; drift: ‖ΔW X_pre‖_F in percent of ‖W0 X_pre‖_F; kl: Σ ½Tr(S
        ΔW C ΔWᵀ), estimated KL from the base model on its own samples, nats/token. The model's ΔW
        are multiplied by `share` first."""
        before, size, drift, total, kl = block_linears(self.model), 0, 0, 0, 0
        for name, layer in block_linears(model).items():
            W0 = before[name].weight.double()
            C, S = (self.proxy[key][name].to(W0) for key in ("C_pre", "S_pre"))
            dW = share * (layer.weight.double() - W0)
            layer.weight.copy_(W0 + dW)
            size, drift = size + dW.square().sum(), drift + forgetting_penalty(dW, C)
            total = total + forgetting_penalty(W0, C)
            kl = kl + kl_penalty(dW, torch.eye(len(C)).to(C), S, C)
        return {"size": size.sqrt().item(), "drift": 100 * (drift / total).sqrt().item(),
                "kl": kl.item()}


class Study:
    """The curves under `out`: their runs' results, and how to do one."""

    def __init__(self, args):
        self.out, self.adapt = pathlib.Path(args.out), shlex.split(args.adapt)
        self.tasks, self.foundations, self.seeds = args.tasks, args.foundations, args.seeds
        self.arms, self.finished = args.arms, {}
        self.curves = [Curve(task, arm, number, seed) for seed in args.seeds for arm in args.arms
                       for number in args.foundations for task in args.tasks]

    @functools.cache
    def foundation(self, number):
        return Foundation(self.out / f"foundation{number}")

    @functools.cache
    def args(self, curve, k):
        """A run's options, as `train.py adapt` parses them."""
        arm = ARMS[curve.arm]
        return train.parser(METHODS).parse_args(
            ["adapt", "--task", curve.task, "--method", arm.method, "--lr", str(rate(k)),
             "--seed", str(curve.seed), "--out", str(self.out / f"foundation{curve.foundation}"),
             *(["--rank", str(arm.rank)] if arm.rank else []), *self.adapt, *arm.options.split()])

    def result(self, curve, k, do=False):
        """A run's result; without one, None, or it is done now unless another process is at it."""
        if (curve, k) not in self.finished:
            args, foundation = self.args(curve, k), self.foundation(curve.foundation)
            path = train.run_folder(args) / "result.json"
            settings = {key: getattr(args, key) for key in train.ADAPT}
            found = files.cached_json(path, foundation.identity | settings,
                                      do and functools.partial(self.do, curve, k), wait=False)
            if found:
                self.finished[curve, k] = found
        return self.finished.get((curve, k))

    def do(self, curve, k):
        """Train and evaluate one run."""
        args, foundation = self.args(curve, k), self.foundation(curve.foundation)
        began = time.time()
        with contextlib.redirect_stdout(io.StringIO()):
            try:
                path = train.adapt(args, METHODS)
            except ValueError as error:
                if "not finite" not in str(error):  # else the rate is too large
                    raise
                return {"failed": str(error)}
            model = files.load_adapter(path, foundation.out, foundation.device)
            measures = foundation.measures(model, SHARES.get(args.method, 1))
            scores = foundation.scores(model, curve.task)
        path.unlink()  # hundreds of adapters would fill the disk
        return {"test": scores, **measures, "seconds": time.time() - began}

    def along(self, curve):
        """({rate index: result}, the rate index that is missing or None) of a curve."""
        found, first = {}, ARMS[curve.arm].first + EARLIER[curve.task]
        while True:
            scores = {k: target_score(result) for k, result in found.items()}
            k = next_rate(scores, first, TARGET[curve.task])
            if k is None or not self.result(curve, k):
                return found, k
            found[k] = self.result(curve, k)


# ------------------------------------------------------------------------------------------------
# All missing runs

def work(args):
    """One worker: do missing runs, most telling first, until there are none. Others may work in the
    same folder."""
    torch.set_num_threads(1)
    study, parent = Study(args), multiprocessing.parent_process()
    if parent:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends us
    while open_curves := [c for c in study.curves if study.along(c)[1] is not None]:
        for curve in open_curves:
            k = study.along(curve)[1]
            if k is not None and (result := study.result(curve, k, do=True)):
                print(f"{describe(curve, k, result)}   {len(open_curves)} curves to go", flush=True)
                break
        else:
            time.sleep(2)  # the last ones are being done elsewhere; more may follow from them
        if parent and not parent.is_alive():
            return


def describe(curve, k, result):
    """One line about a finished run."""
    line = (f"{curve.task:8} foundation {curve.foundation}  seed {curve.seed}  {curve.arm:24} "
            f"lr {rate(k):<8g}")
    if "failed" in result:
        return line + result["failed"]
    return (f"{line}target {result['test']['Avg2']:5.1f}  kept {result['test']['Avg1']:5.1f}  "
            f"drift {result['drift']:5.1f} %  KL {result['kl']:.3f}  {result['seconds']:.0f} s")


def calibrate_untested(options):
    """Calibrate on the own samples that name none of the people whose facts are tested."""
    args = calibrate.parser().parse_args([*options, "--name", "calibration-untested"])
    questions = "".join(item.prompt for item in tasks.kept_items("facts", "test"))
    tested = [name for name, *_ in tasks.people() if name in questions]
    calibrate.calibrate(args, "untested", [
        tokens for text, tokens in Foundation(args.out).samples
        if not any(name in text for name in tested)])


def prepare(args):
    """The foundations and their calibrations. Bad options fail first."""
    train.parser(METHODS).parse_args(["adapt", *shlex.split(args.adapt)])
    calibrate.parser().parse_args(shlex.split(args.calibrate))
    for number in args.foundations:
        out = ["--out", str(pathlib.Path(args.out) / f"foundation{number}")]
        train.main(["pretrain", "--seed", str(number), *out, *shlex.split(args.pretrain)])
        for task in args.tasks:
            options = ["--task", task, *out, *shlex.split(args.calibrate)]
            calibrate.main(options)
            if any("calibration-untested" in arm for arm in args.arms):
                calibrate_untested(options)


def do_all(args):
    """Do all missing runs, a process with one thread for each worker."""
    prepare(args)
    context, workers = multiprocessing.get_context("spawn"), args.workers or os.cpu_count()
    if workers == 1:  # in this process, which gets its threads back
        threads = torch.get_num_threads()
        try:
            return work(args)
        finally:
            torch.set_num_threads(threads)
    job = functools.partial(work, args)
    processes = [context.Process(target=cli.command, args=(job,), daemon=True)  # end with this one
                 for _ in range(workers)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise ValueError("a worker stopped with the error above; the same command continues")

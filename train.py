"""Train: `pretrain` the small foundation, then `adapt` it to a task with LoRA or FoLoRA. One loop for both.

    python train.py pretrain                              # out/foundation.pt, about 4 minutes on 2 cores
    python calibrate.py --task math                       # what FoLoRA needs to know first
    python train.py adapt --task math --method folora     # out/math/folora-.../adapter.pt
"""
import argparse
import contextlib
import itertools
import json
import math
import pathlib
import random
import signal
import sys
import time
from dataclasses import dataclass

import torch
from torch.nn import functional as F

import tasks
from folora import METHODS, SAdam, damped, method_called, solve_layer, spectral_gate, two_sided_penalty
from model import (GPT, GPT2, GPTConfig, LoRALinear, add_lora, add_up, autocast, block_linears, check,
                   claimed, fingerprint, from_gpt2, gpt2_layout, join_processes, keep_freed_memory,
                   leave_processes, load, merge_lora, own_share, pick_device, processes, read_gpt2,
                   reading, save, tf32, together, watching, write_whole)

SAVE_EVERY = 30  # seconds
PRETRAIN = {  # option: (default, what it is)
    "steps": (2300, "optimizer steps"), "batch": (16, "rows a step"), "context": (128, "tokens a row"),
    "layers": (4, "blocks"), "heads": (4, "attention heads a block"), "width": (128, "channels"),
    "lr": (6e-3, "AdamW's peak learning rate (embeddings, biases, norms)"),
    "muon_lr": (0.015, "Muon's peak learning rate (matrices)")}
ADAPT = {
    "rank": (8, "LoRA's rank r"), "scale": (1.0, "κ in W = W_res + κBA"), "steps": (200, "optimizer steps"),
    "batch": (16, "items a step"), "examples": (2000, "training items"),
    "lam": (1.0, "λ of the gate γ/(γ + λ)"), "s_min": (0.3, "the smallest gate"),
    "tau": (0.01, "damping of C_pre, relative to the mean square of an input"),
    "mu": (5.0, "μ of the penalty in the loss, for methods that have one"),
    "basis": ("float32", "dtype of SAdam's bases: float32, or bfloat16 for half the memory"),
    "calibration": ("calibration", "name of the calibration, as calibrate.py wrote it"),
    "snapshots": (0, "how many adapters to write along the way")}
# with which every task was learnt in sweeps on validation items, if with any: to 80 % of LoRA's best score
LEARNING_RATES = {"full": 3.5e-4, "folora-full": 7.1e-4, "folora-full-half": 7.1e-4, "sc-lora": 2.8e-3,
                  "pissa": 2.8e-3, "milora": 4e-3, "corda": 5.7e-3, "lora": 8e-3, "folora": 8e-3,
                  "folora-top": 1.1e-2, "replay": 1.6e-2, "folora-replay": 1.6e-2, "folora-half": 1.6e-2,
                  "folora-kl": 1.6e-2, "lora-kl": 1.6e-2, "lora-null-v2": 6.4e-2}
OTHER_RATE = 8e-3


# ------------------------------------------------------------------------------------------------------------
# The loop

def learning_rate(step, steps, warmup, shape):
    """Factor on the peak rate at `step`: linear warm-up, then down to 0 along a cosine or a line."""
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return (1 + math.cos(math.pi * done)) / 2 if shape == "cosine" else 1 - done


def loss_of(model, x, y):
    """Mean cross-entropy in nats of targets y (B, T) given inputs x (B, T); targets of -100 do not count."""
    counted, W = y != -100, model.lm_head.weight
    with autocast(x.device):
        h, targets = model.features(x, only=counted), y[counted]
        if len(targets) * len(W) > 2 ** 24:  # their logits would be most of what training holds
            rows = 128 if x.device.type == "cpu" else 2048  # what fits a cache; what keeps a GPU busy
            return LossInPieces.apply(h, W if torch.is_grad_enabled() else W.detach(), targets, rows)
        return F.cross_entropy(model.lm_head(h).float(), targets)


class LossInPieces(torch.autograd.Function):
    """Mean cross-entropy of targets y (n,) under the logits hWᵀ of features h (n, C), W (vocab, C), some rows
    at a time. The gradients are made on the way: of the logits softmax - onehot(y), of h that times W."""

    @staticmethod
    def forward(ctx, h, W, y, rows):
        device, (of_h, of_W, *_) = h.device.type, ctx.needs_input_grad
        precision = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else h.dtype
        grad_h, grad_W = torch.empty_like(h), torch.zeros_like(W) if of_W else None
        low, total = W.to(precision), 0
        for piece, targets, grad in zip(h.split(rows), y.split(rows), grad_h.split(rows)):
            logits = F.linear(piece.to(precision), low).float()
            log_sum = logits.logsumexp(-1, keepdim=True)
            total += (log_sum - logits.gather(1, targets[:, None])).sum()
            if of_h:
                p = logits.sub_(log_sum).exp_().scatter_add_(1, targets[:, None], -torch.ones_like(log_sum))
                p = (p / len(y)).to(precision)
                grad.copy_(p @ low)
                if of_W:
                    grad_W += p.T @ piece.to(precision)
        ctx.save_for_backward(grad_h, grad_W)
        return total / len(y)

    @staticmethod
    def backward(ctx, g):
        return *(t if t is None else g * t for t in ctx.saved_tensors), None, None


@contextlib.contextmanager
def ctrl_c_noted():
    """A list that is empty until Ctrl-C, which so stops no step halfway; a second one stops as ever."""
    noted, before = [], signal.getsignal(signal.SIGINT)

    def note(*_):
        noted.append(True)
        signal.signal(signal.SIGINT, before)
    if before is signal.default_int_handler:  # who ignores Ctrl-C goes on doing so
        signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)


def gradients(model, x, y, penalty, parts=1):
    """Set the gradients of loss + penalty on a batch x, y (B, T) and return its value. Each process takes
    its share of the rows, in `parts` smaller batches one after another, which need less memory."""
    whole, total, count = (y != -100).sum(), 0, parts * processes()[1]
    if len(x) < count:
        raise ValueError(f"a batch of {len(x)} rows cannot be taken in {count} parts")
    x, y = own_share(x), own_share(y)
    for i in range(parts):
        portion = (y[i::parts] != -100).sum() / whole  # of the batch's targets
        loss = loss_of(model, x[i::parts], y[i::parts]) * portion + penalty() / count
        loss.backward()
        total = total + loss.detach()
    add_up([total, *(p.grad for p in model.parameters() if p.grad is not None)])
    return total.item()


def fit(model, optimizers, batch, settings, partial, shape="cosine", warmup=0.03, clip=1.0, after=None,
        penalty=lambda: 0, parts=1):
    """Run settings["steps"] steps of batch(step) -> (x, y), each (B, T) on the CPU; returns each step's loss
    in nats, to which penalty() is added; after(steps done) is called at each step.

    Batches depend on the step alone, so what `partial` holds (parameters, moments, step, losses) goes on
    exactly where an interrupted run of the same settings was saved (on a GPU to rounding, which its attention
    does not repeat): every SAVE_EVERY seconds and at Ctrl-C, unless it is None.
    """
    device, steps = next(model.parameters()).device, settings["steps"]
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    peak = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    first, losses = resume(partial, settings, trained, optimizers)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]  # resume makes new ones
    began, saved, tokens, said = time.time(), time.time(), 0, first
    with ctrl_c_noted() as stop, tf32(device):
        for step in range(first, steps):
            factor = learning_rate(step, steps, max(1, round(warmup * steps)), shape)
            for group, rate in zip(groups, peak):
                group["lr"] = rate * factor
            x, y = (t.to(device) for t in batch(step))
            model.zero_grad(set_to_none=True)
            losses.append(gradients(model, x, y, penalty, parts))
            norm = torch.nn.utils.clip_grad_norm_(trained.values(), clip)
            if not math.isfinite(losses[-1] + norm.item()):
                where = first_not_finite(model, lambda: gradients(model, x, y, penalty, parts))
                raise ValueError(f"loss or gradient is not finite at step {step + 1}, first in {where}; "
                                 f"try a smaller --lr than {settings['lr']}")
            for optimizer in optimizers:
                optimizer.step()
            tokens += x.numel()
            if after:
                after(step + 1)
            if step + 1 == steps or (step + 1) % max(1, steps // 10) == 0:
                seconds = time.time() - began
                left = seconds / (step + 1 - first) * (steps - step - 1)
                print(f"  step {step + 1:5}/{steps}  loss {sum(losses[said:]) / (step + 1 - said):.3f}  "
                      f"{tokens / seconds:7,.0f} tokens/s  {left:4.0f} s left", flush=True)
                said = step + 1
            if partial and (stop or step + 1 < steps and time.time() - saved > SAVE_EVERY):
                keep(partial, settings, losses, trained, optimizers)
                saved = time.time()
            if stop:
                raise KeyboardInterrupt
    return losses


def first_not_finite(model, again):
    """Where again(), which repeats a step's passes, goes wrong: the first layer, in the order they run, whose
    output is not finite, else the first parameter on the way back with such a gradient."""
    found, layers = [], {name: layer for name, layer in model.named_modules() if name}

    def see(name, t):
        if t is not None and not torch.isfinite(t).all():
            found.append(name)
    model.zero_grad(set_to_none=True)  # clipping has spread what is not finite over all gradients
    with watching(layers, lambda name, y: see(f"the output of {name}", y), outputs=True):
        again()
    for name, p in reversed(list(model.named_parameters())):
        see(f"the gradient of {name}", p.grad)
    return found[0] if found else "their size"


def keep(partial, settings, losses, trained, optimizers):
    """Save what `resume` goes on from; there is a loss for each step that is done."""
    save(partial, {"kind": "partial", "settings": settings, "step": len(losses), "losses": losses,
                   "parameters": {name: p.detach() for name, p in trained.items()},
                   "optimizers": [optimizer.state_dict() for optimizer in optimizers]})


def resume(partial, settings, trained, optimizers):
    """(step, losses) to go on from: those of an interrupted run of the same settings, else 0 and none."""
    if not partial or not partial.exists():
        return 0, []
    state = load(partial, "partial", "the same command again")
    with reading(partial, "delete it; the same command then starts anew"), torch.no_grad():
        if state["settings"] != settings:
            return 0, []
        check(state["parameters"], trained)
        for name, p in trained.items():
            p.copy_(state["parameters"][name])
    for optimizer, saved in zip(optimizers, state["optimizers"]):
        optimizer.load_state_dict(saved)
    print(f"  going on from step {state['step']} of an interrupted run")
    return state["step"], state["losses"]


def stage(path, kind, settings, make):
    """See to it that a stage's file `path` holds what make() returns, made with exactly these settings. What
    another process is making is waited for, and then used."""
    if reusable(path, kind, settings):
        return
    with claimed(path):
        together()
        if not reusable(path, kind, settings):  # unless made by whom was waited for
            save(path, {"kind": kind, "settings": settings, **make()})
            path.with_suffix(".partial").unlink(missing_ok=True)
            print(f"{path} written")
    together()


def reusable(path, kind, settings):
    """Whether `path` holds this stage's result for exactly these settings; if so, say it."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder, where a file is to be written; move it away")
    try:
        same = path.exists() and load(path, kind, "").get("settings") == settings
    except (ValueError, RuntimeError):  # broken, or with tensors among its settings
        same = False
    if same:
        print(f"{path} is up to date")
    return same


def compiled(model, wanted=True):
    """The model, its blocks compiled if that is wanted, for batches of any length."""
    for block in model.transformer.h if wanted else ():
        block.compile(dynamic=True)
    return model


# ------------------------------------------------------------------------------------------------------------
# pretrain

def pretrain(args):
    """Train the foundation on the mixture of `tasks.py` or on text files, unless out/foundation.pt was made
    with the same settings. Or take GPT-2's weights for it."""
    path = pathlib.Path(args.out) / "foundation.pt"
    if args.foundation != "tiny":
        model = from_gpt2(*read_gpt2(args.foundation))
        settings = {"config": vars(model.config), "source": fingerprint(model.state_dict())}
        stage(path, "foundation", settings, lambda: {"model": model.state_dict()})
        return
    encoding = tasks.encoding_called(args.encoding)
    text = tasks.TextFiles(args.data, encoding, args.out) if args.data else tasks.PretrainingMixture(encoding)
    config = dict(block_size=args.context, n_layer=args.layers, n_head=args.heads, n_embd=args.width)
    if args.encoding != "bytes":
        config |= dict(vocab_size=encoding.n_vocab, encoding=args.encoding)
    GPTConfig(**config)  # refused before any work
    settings = dict(config=config, steps=args.steps, batch=args.batch, lr=args.lr, muon_lr=args.muon_lr,
                    seed=args.seed, text=text.fingerprint())
    stage(path, "foundation", settings, lambda: train_foundation(args, settings, text, path))


def train_foundation(args, settings, text, path):
    """What foundation.pt holds besides its settings."""
    if args.data and not text.path.exists():
        write_whole(text.path, text.write)
    together()
    device = pick_device()
    torch.manual_seed(args.seed)
    model = compiled(GPT(GPTConfig(**settings["config"])).to(device), args.compile)
    optimizers = pretraining_optimizers(model, args.lr, args.muon_lr)

    def batch(step):
        rng = random.Random(f"pretrain {args.seed} {step}")
        rows = torch.tensor([text.row(rng, args.context + 1) for _ in range(args.batch)])
        return rows[:, :-1], rows[:, 1:]

    count = sum(p.numel() for p in model.parameters())
    print(f"pretrain: {count:,} parameters, {args.steps} steps of {args.batch} x {args.context} tokens "
          f"on {device}")
    losses = fit(model, optimizers, batch, settings, path.with_suffix(".partial"), shape="linear",
                 parts=args.accumulate)
    return {"losses": losses, "model": model.state_dict()}


def pretraining_optimizers(model, lr, muon_lr):
    """Muon for the blocks' matrices, AdamW for the rest: after 3.3 million tokens 99 % of the facts, with
    AdamW alone 12 %."""
    matrices = [linear.weight for linear in block_linears(model).values()]
    others = [p for p in model.parameters() if not any(p is matrix for matrix in matrices)]
    return [torch.optim.Muon(matrices, lr=muon_lr, weight_decay=0.1, momentum=0.95),
            torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)]


def load_foundation(out, device):
    """(model, fingerprint of its weights)."""
    path, made_by = pathlib.Path(out) / "foundation.pt", f"python train.py pretrain --out {out}"
    saved, advice = load(path, "foundation", made_by), f"delete it and make it again with: {made_by}"
    with reading(path, advice):
        config = GPTConfig(**saved["settings"]["config"])
        with torch.device("meta"):  # a hostile file may ask for more than fits
            check(saved["model"], GPT(config).state_dict())
    encoding = tasks.encoding_called(config.encoding)  # if that is missing, the file is not to blame
    if encoding.n_vocab > config.vocab_size:
        raise ValueError(f"{path} has {config.vocab_size} tokens, too few for {config.encoding}; {advice}")
    model = GPT(config)
    model.load_state_dict(saved["model"])
    return model.to(device).eval(), fingerprint(saved["model"])


# ------------------------------------------------------------------------------------------------------------
# adapt

def task_folder(args):
    """out/<task>, of a task from a file its name without .jsonl."""
    return pathlib.Path(args.out) / pathlib.Path(args.task).stem


def load_calibration(args, model, foundation):
    path = task_folder(args) / f"{args.calibration}.pt"
    made_by = f"python calibrate.py --task {args.task} --name {args.calibration} --out {args.out}"
    calibration = load(path, "calibration", made_by)
    with reading(path, f"make it again with: {made_by}"):
        if calibration["settings"]["foundation"] != foundation:
            raise ValueError("it belongs to another foundation")
        check_measured(model, calibration["layers"], calibration["samples"], ["C_pre", "C_task", "S_pre"])
    return calibration


def check_measured(model, layers, samples, moments):
    """ValueError unless {layer: {moment: tensor}} and samples (N, longest) can come from this model."""
    shapes = {f"{name} {key}": 2 * [layer.weight.shape[key[0] == "C"]]  # of C_pre, C_task (d_in, d_in)
              for name, layer in block_linears(model).items() for key in moments}
    check({f"{name} {key}": t for name, m in layers.items() for key, t in m.items()},
          {name: torch.empty(d, dtype=torch.float64, device="meta") for name, d in shapes.items()})
    if not (samples.dtype == torch.int32 and samples.dim() == 2 and samples.numel()
            and -1 <= samples.min() and samples.max() < model.config.vocab_size):
        raise ValueError("samples are not rows of the model's tokens")


def prepare(model, method, calibration, args):
    """Make the model ready for `method`: choose what is trained and where it starts; returns SAdam's
    {parameter: (basis, gate)}, empty for a method with plain Adam steps."""
    generator, spectral = torch.Generator().manual_seed(args.seed), {}
    if method.start:
        layers = add_lora(model, args.rank, args.scale)
    else:
        layers = block_linears(model)
        model.requires_grad_(method.steps is None)  # with SAdam the matrices alone: others have no basis
    for name, layer in layers.items():
        W0, trained = layer.weight, layer.weight.requires_grad_(not method.start)
        m = solve_layer(*(calibration["layers"][name][C].to(W0.device) for C in ("C_pre", "C_task")),
                        args.tau) if method.directed else {}
        if method.start:
            layer.start(*method.start(W0, r=args.rank, scale=args.scale, generator=generator, **m))
            trained = layer.lora_A.requires_grad_(method.train_A)
        if method.protected:
            U, V = method.protected(W0)
            if U.shape[1] >= min(W0.shape):
                raise ValueError(f"{args.method} protects {U.shape[1]} directions of {name}, all that its "
                                 f"{tuple(W0.shape)} have; use a wider foundation")
            layer.protect(U, V)
        if method.steps:
            spectral[trained] = method.steps(m, args.lam, args.s_min)
    return spectral


def response_row(item, encoding):
    """(tokens, number of prompt tokens): <|endoftext|> prompt answer newline; <|endoftext|> ends an answer
    that has lines of its own."""
    prompt = [encoding.eot_token] + encoding.encode_ordinary(item.prompt)
    end = [encoding.eot_token] if "\n" in item.answer else encoding.encode_ordinary("\n")
    return prompt + encoding.encode_ordinary(item.answer) + end, len(prompt)


def fitting(items, encoding, length, skip_bad=False):
    """(items, rows) of those that fit a context of `length`; ValueError names the first that does not, unless
    such items are to be left out."""
    rows = [response_row(item, encoding) for item in items]
    fits = [len(tokens) <= length + 1 for tokens, _ in rows]
    if not all(fits):
        i, long = fits.index(False), fits.count(False)
        if not skip_bad or long == len(items):
            raise ValueError(f"{items[i].where or repr(items[i].prompt)}: {len(rows[i][0])} tokens do not "
                             f"fit the context of {length} ({long} such items; --skip-bad leaves them out)")
        print(f"  {long} of {len(items)} items do not fit the context of {length} and are left out")
    return [list(itertools.compress(these, fits)) for these in (items, rows)]


def response_batch(rows):
    """(x, y), each (B, T): inputs, and targets that count the response only."""
    length = max(len(tokens) for tokens, _ in rows) - 1
    x, y = torch.zeros(len(rows), length, dtype=torch.long), torch.full((len(rows), length), -100)
    for i, (tokens, prompt) in enumerate(rows):
        x[i, :len(tokens) - 1] = torch.tensor(tokens[:-1])
        y[i, prompt - 1:len(tokens) - 1] = torch.tensor(tokens[prompt:])
    return x, y


def run_folder(args):
    """out/<task>/<method>-lr<lr>-seed<seed>, and what else is not at its default."""
    others = [f"-{key}{getattr(args, key)}" for key, (default, _) in ADAPT.items()
              if getattr(args, key) != default]
    return (task_folder(args)
            / "".join([f"{args.method}-lr{args.lr:g}-seed{args.seed}", *others]).replace("_", ""))


def adapt(args):
    """Teach the foundation a task, unless this run's adapter.pt was made with these settings and inputs;
    returns its path."""
    device, method = pick_device(), method_called(args.method)
    args.lr = LEARNING_RATES.get(args.method, OTHER_RATE) if args.lr is None else args.lr
    spectral_gate(torch.ones(1), args.lam, args.s_min)  # a bad λ, s_min or τ is better known before the work
    damped(torch.eye(1), args.tau)
    if args.basis not in ("float32", "bfloat16"):
        raise ValueError(f"basis is {args.basis!r}; it must be float32 or bfloat16")
    items = tasks.task_items(args.task, "train", args.examples, skip_bad=args.skip_bad)
    model, foundation = load_foundation(args.out, device)
    calibration = load_calibration(args, model, foundation) if method.calibrated else None
    settings = dict(foundation=foundation, measured=calibration and calibration["settings"],
                    text=tasks.fingerprint(item.prompt + item.answer for item in items),
                    **{key: getattr(args, key) for key in ("task", "method", "lr", "seed", *ADAPT)})
    path = run_folder(args) / "adapter.pt"
    stage(path, "adapter", settings,
          lambda: train_adapter(args, settings, path, model, method, calibration, items))
    return path


def train_adapter(args, settings, path, model, *given):
    """What adapter.pt holds besides its settings; `given` as to `ready`."""
    print(f"adapt: {args.task} with {args.method}, rank {args.rank}, learning rate {args.lr:g}, "
          f"{args.steps} steps on {pick_device()}")
    optimizer, batch, penalty = ready(args, model, *given)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()  # of training, without what made it ready

    def changed():  # adapters with their starts, or the full weights
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        return {name: t for name, t in model.state_dict().items() if "lora_" in name or name in trained}

    def snapshot(done):
        if args.snapshots and done % max(1, args.steps // args.snapshots) == 0:
            save(path.with_name(f"step{done}.pt"),
                 {"kind": "adapter", "settings": settings, "changed": changed()})

    losses = fit(model, [optimizer], batch, settings, path.with_suffix(".partial"), after=snapshot,
                 penalty=penalty, parts=args.accumulate)
    return {"changed": changed(), "losses": losses, "cost": cost(model, optimizer, penalty.layers)}


def ready(args, model, method, calibration, items):
    """The model is made ready for `method`; returns what `fit` needs besides: optimizer, batch, penalty."""
    batch = batches(args, items, method, calibration, model.config)  # items that do not fit are named first
    spectral = prepare(compiled(model, args.compile), method, calibration, args)
    optimizer = SAdam([p for p in model.parameters() if p.requires_grad], spectral, lr=args.lr,
                      held_in=getattr(torch, args.basis))
    return optimizer, batch, penalty_of(model, calibration, method, args.mu)


@dataclass
class Penalty:
    """() -> μ times about how many nats per token the adapters move the model on its own samples."""
    mu: float
    layers: list  # of (adapter, S, C); empty for a method without a penalty

    def __call__(self):
        return self.mu * sum(two_sided_penalty(*layer.change(), S, C) for layer, S, C in self.layers)


def penalty_of(model, calibration, method, mu):
    layers = []
    for name, layer in block_linears(model, LoRALinear).items() if method.penalty else ():
        S_pre, C_pre = (calibration["layers"][name][key].to(layer.weight) for key in ("S_pre", "C_pre"))
        layers.append((layer, *method.penalty(S_pre, C_pre)))
    return Penalty(mu, layers)


def batches(args, items, method, calibration, config):
    """batch(step) -> (x, y) of the task's items and, for replay, of the foundation's own samples besides."""
    encoding, length = tasks.encoding_called(config.encoding), config.block_size
    _, rows = fitting(items, encoding, length, args.skip_bad)
    if args.batch > len(rows):
        raise ValueError(f"batch is {args.batch}; it must not exceed the {len(rows)} training items")
    replayed = round(method.replay * args.batch)
    old = [([encoding.eot_token, *(t for t in sample.tolist() if t >= 0)][:length + 1], 1)  # all are targets
           for sample in (calibration["samples"] if replayed else [])]

    def batch(step):
        rng = random.Random(f"adapt {args.seed} {step}")
        chosen = rng.sample(rows, args.batch)
        return response_batch(chosen + (rng.choices(old, k=replayed) if replayed else []))
    return batch


def cost(model, optimizer, penalised=()):
    """What a run needed: trained parameters, and bytes of all that training holds (weights, gradients,
    moments, bases, a penalty's S and C_pre; no activations) or, on a GPU, the peak of everything."""
    trained = [p for p in model.parameters() if p.requires_grad]
    held = [*model.parameters(), *model.buffers(), *trained,
            *(t for _, *pair in [*optimizer.stacks, *penalised] for t in pair),
            *(t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t))]
    return {"trained": sum(p.numel() for p in trained),
            "bytes": (torch.cuda.max_memory_allocated() if torch.cuda.is_available()
                      else sum(t.numel() * t.element_size() for t in held))}


def load_adapter(path, out, device):
    """The foundation with the adapter of `path`, merged: an ordinary GPT."""
    model = load_adapted(path, out, device)
    merge_lora(model)
    return model


def load_adapted(path, out, device):
    """The foundation with the adapter of `path`, not merged."""
    made_by = "python train.py adapt"
    saved = load(path, "adapter", made_by)
    model, foundation = load_foundation(out, device)
    with reading(path, f"make it again with: {made_by}"):
        settings, changed = saved["settings"], saved["changed"]
        if settings["foundation"] != foundation:
            raise ValueError("it belongs to another foundation")
        method, whole = method_called(settings["method"]), ()
        layers = add_lora(model, settings["rank"], settings["scale"]) if method.start else {}
        if not method.start:  # full weights: all, or with SAdam the matrices
            whole = [f"{name}.weight" for name in block_linears(model)] if method.steps else [
                name for name, _ in model.named_parameters()]
        for name, layer in layers.items() if method.protected else ():
            k = min(changed[f"{name}.lora_U"].shape[1], *layer.weight.shape)
            layer.protect(*(layer.weight.new_zeros(d, k) for d in layer.weight.shape))
        check(changed, {name: t for name, t in model.state_dict().items()
                        if "lora_" in name or name in whole})
        for name, layer in layers.items():
            layer.start(changed[f"{name}.lora_A0"], changed[f"{name}.lora_B0"])
        model.load_state_dict(changed, strict=False)
    return model


# ------------------------------------------------------------------------------------------------------------
# export

def export(args):
    """Write a folder that transformers (merged weights) or PEFT (an adapter for the untouched foundation)
    reads."""
    path, folder = pathlib.Path(args.adapter or "."), pathlib.Path(args.to)
    if not args.adapter:
        config, weights, stem = merged_files(load_foundation(args.out, "cpu")[0])
    elif args.format == "merged":
        config, weights, stem = merged_files(load_adapter(path, args.out, "cpu"))
    else:
        config, weights, stem = peft_files(load_adapted(path, args.out, "cpu"), args.base, path)
    write_whole(folder / f"{stem}.bin", lambda f: torch.save(weights, f))
    name = "adapter_config.json" if stem == "adapter_model" else "config.json"
    write_whole(folder / name, lambda f: f.write(json.dumps(config, indent=2).encode()))
    print(f"{folder / stem}.bin and {name} written")


def merged_files(model):
    """(config.json, weights, name) of a GPT in GPT-2's layout."""
    c = model.config
    eot = tasks.encoding_called(c.encoding).eot_token
    return (dict(model_type="gpt2", architectures=["GPT2LMHeadModel"], vocab_size=c.vocab_size,
                 n_positions=c.block_size, n_ctx=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer,
                 n_head=c.n_head, activation_function="gelu_new" if c.gelu == "tanh" else "gelu",
                 bos_token_id=eot, eos_token_id=eot),
            {f"transformer.{name}": t.contiguous() for name, t in gpt2_layout(model).items()},
            "pytorch_model")


def peft_files(model, base, path):
    """(adapter_config.json, weights, name) of a PEFT LoRA on W0. W_res is not W0, but the change is of
    rank 2r all the same: ΔW = κ(BA - B0A0) = [κB, -κB0] [A; A0]."""
    weights, layers = {}, block_linears(model, LoRALinear)
    if not layers:
        raise ValueError(f"{path} holds full weights, which no LoRA can hold; use --format merged")
    for name, layer in layers.items():
        P, G = layer.change()
        r = len(G)
        if r > min(layer.weight.shape):
            raise ValueError(f"{path}: rank {r} = 2r is more than {name} can have, "
                             f"{tuple(layer.weight.shape)}; use --format merged")
        weights[f"base_model.model.{name}.lora_A.weight"] = G.detach().contiguous()
        weights[f"base_model.model.{name}.lora_B.weight"] = P.detach().contiguous()
    return (dict(peft_type="LORA", task_type="CAUSAL_LM", base_model_name_or_path=base, r=r, lora_alpha=r,
                 target_modules=["c_attn", "c_proj", "c_fc"], lora_dropout=0.0, bias="none",
                 fan_in_fan_out=True, inference_mode=True),  # GPT-2's projections are (d_in, d_out)
            weights, "adapter_model")


# ------------------------------------------------------------------------------------------------------------
# The command line

def command(main):
    """Run a command: what a user got wrong is one line and exit status 2, not a traceback."""
    try:
        keep_freed_memory()
        join_processes()
        main()
        leave_processes()
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        used_up = isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)  # torch's ways
        if isinstance(error, RuntimeError) and not used_up:
            raise
        print(f"error: {' '.join(str(error).split()) or 'not enough memory'}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        sys.exit(130)


class Parser(argparse.ArgumentParser):
    """Shows defaults; what is wrong is a ValueError like any other."""

    def __init__(self, **options):
        super().__init__(formatter_class=argparse.ArgumentDefaultsHelpFormatter, **options)

    def error(self, message):
        raise ValueError(f"{message} ({self.prog} --help lists all options)")


def add_task(p):
    p.add_argument("--task", default="code", help=f"one of {', '.join(tasks.TASKS)}, or a .jsonl file of "
                   f"{'; '.join(' and '.join(pair) for pair in tasks.FIELDS.items())}")
    p.add_argument("--skip-bad", action="store_true", help="leave out rows of files that are bad or too long")


def number(kind, least):
    """The argparse type of finite numbers from `least` on."""
    most = 2 ** 63 - 1 if kind is int else sys.float_info.max

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(
                f"{text[:40]!r} is not a {'whole ' if kind is int else ''}number of {least} or more")
        return value
    return parse


positive, whole, amount = number(int, 1), number(int, 0), number(float, 0)


def add_options(p, options, positives=()):
    """An option for each entry of {name: (default, what it is)}."""
    for key, (default, said) in options.items():
        kind = positive if key in positives else {int: whole, float: amount, str: str}[type(default)]
        p.add_argument(f"--{key.replace('_', '-')}", type=kind, default=default, help=said)


def parser():
    top = Parser(description=__doc__.split("\n")[0])
    commands = top.add_subparsers(required=True, metavar="pretrain | adapt | export")
    p = commands.add_parser("pretrain", help="train the small foundation")
    p.set_defaults(run=pretrain)
    p.add_argument("--foundation", default="tiny",
                   help=f"tiny, trained here with the options below; {', '.join(GPT2)}; or a checkpoint in "
                        "GPT-2's layout: a file, or a folder with config.json")
    p.add_argument("--data", nargs="+", metavar="FILE",
                   help="text files, of any size, to train it on; default: the text that tasks.py makes")
    p.add_argument("--encoding", choices=["bytes", "gpt2"], default="bytes", help="what a token is")
    add_options(p, PRETRAIN, positives=("steps", "batch", "context", "layers", "heads", "width"))
    a = commands.add_parser("adapt", help="fine-tune the foundation on a task")
    a.set_defaults(run=adapt)
    add_task(a)
    a.add_argument("--method", default="folora-kl", choices=METHODS, metavar="METHOD",
                   help=f"one of {', '.join(METHODS)}")
    a.add_argument("--lr", type=amount,
                   help=f"peak learning rate; default by method: {LEARNING_RATES}, others {OTHER_RATE}")
    add_options(a, ADAPT, positives=("steps", "batch", "examples"))
    e = commands.add_parser("export", help="write weights that transformers and PEFT read")
    e.set_defaults(run=export)
    e.add_argument("--adapter", help="an adapter.pt; without one, the foundation itself")
    e.add_argument("--format", choices=["peft", "merged"], default="peft",
                   help="peft: an adapter for the foundation; merged: all weights, in GPT-2's layout")
    e.add_argument("--base", default="gpt2", help="what the PEFT adapter's config says of its base model")
    e.add_argument("--to", required=True, help="folder for the files")
    for sub in p, a:
        sub.add_argument("--seed", type=whole, default=0, help="of everything random")
        sub.add_argument("--compile", action="store_true",
                         help="compile the blocks with torch.compile, which takes a minute first")
        sub.add_argument("--accumulate", type=positive, default=1,
                         help="parts in which a batch is taken, one after another: less memory, same result")
    for sub in p, a, e:
        sub.add_argument("--out", default="out", help="folder for all results")
    return top


def main(argv=None):
    args = parser().parse_args(argv)
    return args.run(args)


if __name__ == "__main__":
    command(main)

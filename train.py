"""Train: `pretrain` the small foundation, then `adapt` it to a task. One loop serves both.

    python train.py pretrain                              # out/foundation.pt
    python calibrate.py --task math                       # the moments that FoLoRA needs
    python train.py adapt --task math --method folora     # out/math/folora-.../adapter.pt
    python train.py export --adapter … --to folder        # for transformers and PEFT
"""
import functools
import math
import pathlib
import random
import statistics
import time

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import tasks
from extras.baselines import METHODS, added_loss, default_rate, protect, pull_strength
from extras.cli import command, train_parser
from extras.export import export
from extras.files import (build_if_stale, fingerprint, load_calibration, load_foundation,
                          load_resume_state, save_resume_state, task_folder)
from extras.machine import (Progress, all_reduce_sum, autocast, describe_machine,
                            leave_out_padding, maybe_compile, pick_device, precision,
                            rank_and_world, set_precision, shard, tf32)
from extras.muon import pretraining_optimizers
from extras.published import read_published
from extras.user_data import TextFiles, drop_long_items, load_items
from folora import solve_layer
from model import GPT, GPTConfig, add_lora, block_linears

SAVE_EVERY = 30  # seconds between saves of an unfinished run
MOST_LOGITS = 2 ** 26  # held at once: about 1 GB with their gradients
PRETRAIN = {  # option: (default, help), or (default, help, choices)
    "steps": (2000, "optimizer steps"), "batch": (16, "rows per step"),
    "context": (0, "tokens per row; 0: 128, or for a Llama 512"), "layers": (4, "blocks"),
    "heads": (3, "attention heads per block"), "width": (96, "channels"),
    "lr": (6e-3, "AdamW's peak learning rate (embeddings, biases, norms)"),
    "muon_lr": (0.02, "Muon's peak learning rate (matrices); 0: AdamW for them too"),
    "seed": (0, "random seed")}
ADAPT = {
    "rank": (32, "LoRA's rank r"), "scale": (1.0, "κ in W = W_res + κBA"),
    "steps": (400, "optimizer steps"), "batch": (8, "items per step"),
    "examples": (2000, "training items"), "lam": (1.0, "λ of the gate γ/(γ + λ)"),
    "s_min": (0.3, "the smallest gate"),
    "tau": (0.01, "damping of C_pre, relative to its mean diagonal"),
    "mu": (5.0, "μ of the KL penalty, for methods that have one"),
    "rehearsal": (1.0, "weight of the loss on base-model samples, for methods that have one"),
    "pull": (5.0, "strength of pulling back at rank 32 and width 96; it grows with both"),
    "basis_dtype": ("float32", "of SAdam's bases; bfloat16 takes half the memory",
                    ("float32", "bfloat16")),
    "calibration": ("calibration", "name of the calibration, as calibrate.py wrote it"),
    "seed": (0, "random seed")}


# ------------------------------------------------------------------------------------------------
# The loop

def rate_factor(step, steps, warmup, shape):
    """Factor on the peak learning rate: linear warm-up, then down to 0 along a cosine or a line."""
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return (1 + math.cos(math.pi * done)) / 2 if shape == "cosine" else 1 - done


def loss_of(model, x, y):
    """Mean cross-entropy in nats of inputs x (B, T) against targets y (B, T); -100 is ignored."""
    def mean_loss(h, targets):
        return F.cross_entropy(model.lm_head(h).float(), targets)

    x, y, pos, lengths = leave_out_padding(x, y)
    counted = y != -100
    with autocast(x.device):
        h, targets = model.features(x, pos, None, counted, lengths), y[counted]  # (n, C), (n,)
        most = max(1, MOST_LOGITS // model.lm_head.out_features)
        if len(targets) <= most:
            return mean_loss(h, targets)
        # a part of the logits at a time, computed once more in the backward pass
        return sum(checkpoint(mean_loss, *part, use_reentrant=False) * len(part[1])
                   for part in zip(h.split(most), targets.split(most))) / len(targets)


def backward(model, x, y, penalty, parts=1):
    """Set the gradients of loss + penalty() on a batch x, y (B, T); returns the sum, a tensor.

    Each process takes its share of the rows, in `parts` smaller batches that need less memory.
    """
    n_targets, total, n_parts = (y != -100).sum(), 0, parts * rank_and_world()[1]
    if len(x) < n_parts:
        raise ValueError(f"a batch of {len(x)} rows cannot be split into {n_parts} parts")
    x, y = shard(x), shard(y)
    for i in range(parts):
        share = (y[i::parts] != -100).sum() / n_targets
        loss = loss_of(model, x[i::parts], y[i::parts]) * share + penalty() / n_parts
        loss.backward()
        total = total + loss.detach()
    all_reduce_sum([total, *(p.grad for p in model.parameters() if p.grad is not None)])
    return total


def training_loop(model, optimizers, batch, settings, partial, shape="cosine", warmup=0.03,
                  penalty=lambda step: 0, parts=1):
    """Run settings["steps"] steps, a share `warmup` of them warm-up, on batch(step) -> (x, y), each
    (B, T) on the CPU; returns each step's loss in nats, with penalty(step) added.

    Batches depend on the step alone, so an interrupted run continues exactly from the file
    `partial`, saved every SAVE_EVERY seconds (on a GPU up to rounding: attention varies there).
    """
    device, steps = next(model.parameters()).device, settings["steps"]
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    losses = load_resume_state(partial, settings, trained, optimizers)  # overwrites lr
    progress, saved = Progress("training", steps), time.time()
    progress(len(losses))
    with tf32(device):
        for step in range(len(losses), steps):
            factor = rate_factor(step, steps, max(1, round(warmup * steps)), shape)
            for optimizer, rates in zip(optimizers, peaks):
                for group, rate in zip(optimizer.param_groups, rates):
                    group["lr"] = rate * factor
            x, y = (t.to(device) for t in batch(step))
            model.zero_grad(set_to_none=True)
            loss = backward(model, x, y, lambda: penalty(step), parts)
            norm = torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
            losses.append(loss.item())
            if not math.isfinite(losses[-1] + norm.item()):
                raise ValueError(f"loss or gradient is not finite at step {step + 1}; try a "
                                 f"smaller --lr than {settings['lr']}")
            for optimizer in optimizers:
                optimizer.step()
            progress(step + 1, f"step {step + 1}/{steps}  loss {statistics.mean(losses[-20:]):.3f}")
            if partial and step + 1 < steps and time.time() - saved > SAVE_EVERY:
                save_resume_state(partial, settings, losses, trained, optimizers)
                saved = time.time()
    return losses


# ------------------------------------------------------------------------------------------------
# pretrain

def pretrain(args):
    """Train the foundation on the mixture of `tasks.py` or on text files, unless out/foundation.pt
    is up to date. Or import published weights as the foundation, and a Llama's tokenizer."""
    set_precision(args.precision)
    path, device = pathlib.Path(args.out) / "foundation.pt", pick_device()
    if args.foundation != "tiny":
        model, tokenizer = read_published(args.foundation, args.context)
        settings = {"config": vars(model.config), "source": fingerprint(model.state_dict())}
        return build_if_stale(path, "foundation", settings,
                              lambda: {"model": model.state_dict(), **tokenizer})
    args.context = args.context or 128
    encoding = tasks.get_encoding(args.encoding)
    text = TextFiles(args.data, encoding) if args.data else tasks.PretrainingMixture(encoding)
    config = dict(block_size=args.context, n_layer=args.layers, n_head=args.heads,
                  n_embd=args.width)
    if args.encoding != "bytes":
        config |= dict(vocab_size=encoding.n_vocab, encoding=args.encoding)
    GPTConfig(**config)  # ValueError for bad options before any work
    settings = dict(config=config, precision=precision(device), text=text.fingerprint(),
                    steps=args.steps, batch=args.batch, lr=args.lr, muon_lr=args.muon_lr,
                    seed=args.seed)

    def batch(step):
        rng = random.Random(f"pretrain {args.seed} {step}")
        rows = torch.tensor([text.row(rng, args.context + 1) for _ in range(args.batch)])
        return rows[:, :-1], rows[:, 1:]

    def build():
        torch.manual_seed(args.seed)
        model = maybe_compile(GPT(GPTConfig(**config)).to(device), args.compile)
        print(f"pretrain: {sum(p.numel() for p in model.parameters()):,} parameters, {args.steps} "
              f"steps of {args.batch} x {args.context} tokens on {describe_machine(device)}")
        optimizers = pretraining_optimizers(model, args.lr, args.muon_lr, precision(device))
        losses = training_loop(model, optimizers, batch, settings, path.with_suffix(".partial"),
                               "linear", parts=args.accumulate)
        return {"losses": losses, "model": model.state_dict()}

    build_if_stale(path, "foundation", settings, build)


# ------------------------------------------------------------------------------------------------
# adapt

def adapt(args, methods=METHODS, loop=training_loop):
    """Teach the foundation a task by a method, a row of METHODS in extras/baselines.py, unless this
    run's adapter.pt is up to date; returns its path. The tests pass another `loop`."""
    set_precision(args.precision)
    # Load the task, the foundation, and what calibrate.py measured (the README's step 1).
    device, method = pick_device(), methods[args.method]
    items = load_items(args.task, "train", args.examples, args.skip_bad)
    model, foundation = load_foundation(args.out, device)
    args.lr = default_rate(method, args.rank, model.config.n_embd) if args.lr is None else args.lr
    calibration = load_calibration(args, foundation) if method.needs_calibration else None
    batch = task_batches(args, items, model.config)
    settings = dict(foundation=foundation, measured=calibration and calibration["settings"],
                    text=tasks.fingerprint(item.prompt + item.answer for item in items),
                    precision=precision(device),
                    **{key: getattr(args, key) for key in ("task", "method", "lr", *ADAPT)})
    path = run_folder(args) / "adapter.pt"

    def build():
        print(f"adapt: {args.task} with {args.method}, rank {args.rank}, rate {args.lr:g}, "
              f"{args.steps} steps on {describe_machine(device)}")
        # Steps 2 to 4, for each layer: its directions, its start, and the basis of its steps.
        maybe_compile(model, args.compile)
        if method.start:
            layers = add_lora(model, args.rank, args.scale)
        else:  # full weights; SAdam trains only the blocks' matrices, which have a basis
            layers = block_linears(model.requires_grad_(method.steps is None))
        spectral, progress = {}, Progress("solving layers", len(layers))
        generator = torch.Generator().manual_seed(args.seed)
        for number, name in enumerate(layers, 1):
            moments = calibration and calibration["layers"][name]
            spectral |= start_layer(name, layers[name], method, moments, args, generator)
            progress(number)
        # Step 5, SAdam: gated Adam in each layer's basis; AdamW for B and all else without one.
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = method.optimizer(trained, spectral, lr=args.lr,
                                     basis_dtype=getattr(torch, args.basis_dtype))
        optimizer.strength = pull_strength(args.pull, args.rank, model.config.n_embd)
        added = added_loss(method, model, layers, calibration, args)
        spectral.clear(), (calibration or {}).clear()  # frees memory: neither is read again
        losses = loop(model, [optimizer], batch, settings, path.with_suffix(".partial"),
                      penalty=added, parts=args.accumulate)
        return {"changed": adapter_state_dict(model), "losses": losses}

    build_if_stale(path, "adapter", settings, build)
    return path


@functools.lru_cache(maxsize=1)
def solve_once(C_pre, C_task, tau, device):
    """`solve_layer`; consecutive layers that read the same input share its moments (one tensor:
    tensors hash by identity), and so one basis."""
    return solve_layer(C_pre.to(device), C_task.to(device), tau)


def start_layer(name, layer, method, moments, args, generator):
    """Solve one layer's eigenproblem, set its start, and return {parameter: (basis, gate)} for the
    parameter whose steps are taken in that basis; {} where a method steps with plain Adam."""
    W0, solved = layer.weight, {}
    if method.needs_moments:
        solved = solve_once(moments["C_pre"], moments["C_task"], args.tau, W0.device)
    if method.start:
        A0, B0 = method.start(W0, r=args.rank, scale=args.scale, generator=generator, **solved)
        layer.init_from(A0, B0)
        trained = layer.lora_A.requires_grad_(method.train_A)
    else:
        trained = W0.requires_grad_()
    if method.protected:
        U, V = method.protected(W0)
        if U.shape[1] >= min(W0.shape):
            raise ValueError(f"{args.method} protects {U.shape[1]} directions of {name}, as many "
                             f"as its {tuple(W0.shape)} has; use a wider foundation")
        protect(layer, U, V)
    return {trained: method.steps(solved, args.lam, args.s_min)} if method.steps else {}


def adapter_state_dict(model):
    """What adapting changed: adapters with their starts, or the trained full weights."""
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    return {name: t for name, t in model.state_dict().items() if "lora_" in name or name in trained}


def task_batches(args, items, config):
    """batch(step) -> (x, y) of the task's items."""
    encoding, length = tasks.get_encoding(config.encoding), config.block_size
    _, rows = drop_long_items(items, encoding, length, args.skip_bad)
    if args.batch > len(rows):
        raise ValueError(f"batch is {args.batch}; it must not exceed the {len(rows)} training "
                         "items")

    def batch(step):
        return tasks.response_batch(random.Random(f"adapt {args.seed} {step}")
                                    .sample(rows, args.batch))
    return batch


def run_folder(args):
    """out/<task>/<method>-lr<lr>-seed<seed>, followed by the options not at their default."""
    others = [f"-{key}{getattr(args, key)}" for key, (default, *_) in ADAPT.items()
              if getattr(args, key) != default and key != "seed"]
    name = "".join([f"{args.method}-lr{args.lr:g}-seed{args.seed}", *others])
    return task_folder(args) / name.replace("_", "")  # s_min -> smin


# ------------------------------------------------------------------------------------------------
# The commands

def parser(methods=METHODS):
    runs = {"pretrain": pretrain, "adapt": lambda args: adapt(args, methods), "export": export}
    return train_parser(__doc__.split("\n")[0], runs, PRETRAIN, ADAPT, methods)


def main(argv=None):
    args = parser().parse_args(argv)
    return args.run(args)


if __name__ == "__main__":
    command(main)

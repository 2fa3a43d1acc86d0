"""Measuring time and memory: works timed in turn, and the works that are timed."""
import time

import torch

import train
from extras.baselines import kaiming_start
from extras.files import make_model
from extras.grouped import GroupedSAdam
from extras.machine import pick_device
from extras.moments import input_twin
from folora import damped
from model import add_lora


def seconds_of(work):
    """How long work() takes; on a GPU until its kernels are done."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    began = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - began


def interleaved(rounds, pause=0, **works):
    """{name: seconds in each round} of works that run in turn, every second round backwards, so
    that other load on the machine slows all equally. A first round warms up and is not counted.
    A pause lets another library's threads stop spinning."""
    found = {name: [] for name in works}
    for i in range(1 + rounds):
        for name in list(works)[::-1 if i % 2 else 1]:
            time.sleep(pause)
            found[name].append(seconds_of(works[name]))
    return {name: seconds[1:] for name, seconds in found.items()}


def ratios(found, over, under):
    """Of two works of `interleaved`: their quotient in each round."""
    return [a / b for a, b in zip(found[over], found[under])]


def training_steps(model, optimizers, batch, steps):
    """() -> this many steps of `train.training_loop`, unsaved."""
    return lambda: train.training_loop(model, optimizers, batch, {"steps": steps, "lr": 0}, None)


def training_bytes(model, optimizer):
    """Bytes that training holds. On a GPU the peak since its statistics were reset; on a CPU a
    count of weights, gradients, Adam's moments, bases and gates, without activations."""
    if next(model.parameters()).is_cuda:
        return torch.cuda.max_memory_allocated()
    trained = [p for p in model.parameters() if p.requires_grad]
    states = (t for state in optimizer.state.values() for t in state.values())
    held = [*model.parameters(), *model.buffers(), *trained,
            *(t for pair in optimizer.spectral.values() for t in pair),
            *(t for t in states if torch.is_tensor(t))]
    return sum(t.nbytes for t in held)


# ------------------------------------------------------------------------------------------------
# Works of any size: random weights, bases and tokens cost what real ones cost

def with_adapters(config, rank):
    """(model with adapters, {A: (basis, gate)} for SAdam); layers with one input share a basis."""
    model, spectral, bases = make_model(vars(config)).to(pick_device()), {}, {}
    for name, layer in add_lora(model, rank).items():
        layer.init_from(*kaiming_start(layer.weight, rank))
        twin, d = input_twin(model, name), layer.lora_A.shape[1]
        spectral[layer.lora_A] = bases.setdefault(twin, torch.randn(d, d) / d), torch.ones(d)
    return model, spectral


def sadam(model, spectral, basis_dtype=torch.float32):
    """The optimizer of all trained parameters; plain AdamW steps where spectral is empty."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return GroupedSAdam(trained, spectral, lr=1e-6, basis_dtype=basis_dtype)


def random_batch(config, rows, shortest=1.):
    """(x, y) of random tokens, half of each row its prompt. The rows fill the context; or fewer and
    fewer of it, down to this share, and then padding."""
    tokens = torch.randint(config.vocab_size, (rows, config.block_size + 1))
    y, where = tokens[:, 1:].clone(), torch.arange(config.block_size)
    ends = config.block_size * torch.linspace(1, shortest, rows)[:, None]
    y[(where < ends // 2) | (where >= ends)] = -100
    return tokens[:, :-1].to(pick_device()), y.to(pick_device())


def eigenproblem(n):
    """(C_task, H), float64: few directions are used much, most of them little."""
    like = {"dtype": torch.float64, "device": pick_device()}
    scale = torch.logspace(1, -2, n, **like)
    X, Y = (torch.randn(2 * n, n, **like) * scale for _ in range(2))
    return X.T @ X / len(X), damped(Y.T @ Y / len(Y), 0.01)

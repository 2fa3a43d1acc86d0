"""How cost grows with width, depth, rank and samples: exponents fitted, beside those in theory."""
import math
import statistics

import torch

import calibrate
from extras.machine import pick_device
from folora import generalized_eigh
from model import GPT, GPTConfig, generate
from study.measure import (eigenproblem, interleaved, random_batch, sadam, training_bytes,
                           training_steps, with_adapters)

# {quantity: {size: exponent of the leading term in theory}}
THEORY = {"training step, s": {"width": 2, "depth": 1, "rank": 0},
          "SAdam's step, s": {"width": 2, "depth": 1, "rank": 1},
          "sampling, s": {"width": 2, "depth": 1, "samples": 1},
          "second moments, s": {"width": 2, "depth": 1, "samples": 1},
          "widest eigenproblem, s": {"width": 3},
          "training, bytes": {"width": 2, "depth": 1, "rank": 0},
          "calibration, bytes": {"width": 2, "depth": 1, "samples": 0}}


def quantities(rounds, width, depth, rank, samples):
    """{quantity: value} at 16 x 128 tokens per step, 64 tokens per sample; times are medians."""
    config = GPTConfig(128, 257, depth, width // 32, width)
    (model, spectral), batch = with_adapters(config, rank), random_batch(config, 16)
    optimizer = sadam(model, spectral)
    step = training_steps(model, [optimizer], lambda step: batch, 1)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    step()
    held = training_bytes(model, optimizer)
    plain, problem = GPT(config).to(pick_device()).eval(), eigenproblem(4 * width)
    rows = torch.randint(257, (samples, 64)).tolist()
    found = interleaved(rounds, **{
        "training step, s": step, "SAdam's step, s": optimizer.step,
        "sampling, s": lambda: generate(plain, [[256]] * samples, 64),
        "second moments, s": lambda: calibrate.second_moments(plain, rows),
        "widest eigenproblem, s": lambda: generalized_eigh(*problem)})
    moments = calibrate.second_moments(plain, rows).values()
    return {**{name: statistics.median(seconds) for name, seconds in found.items()},
            "training, bytes": held,
            "calibration, bytes": 2 * sum(C.nbytes for C in moments)}  # C_pre and C_task


def exponent(sizes, values):
    """p of the least-squares line log value = p log size + constant."""
    x, y = ([math.log(v) for v in column] for column in (sizes, values))
    return statistics.linear_regression(x, y).slope


def table(sizes):
    """One line per quantity and size that varies, the other sizes as in sizes.base."""
    lines, base = [], dict(zip(("width", "depth", "rank", "samples"), sizes.base))
    for size, chosen in zip(base, sizes.growth):
        points = [quantities(sizes.rounds, **{**base, size: value}) for value in chosen]
        for name in (name for name, theory in THEORY.items() if size in theory):
            values = [point[name] for point in points]
            lines.append({"": name, "against": f"{size} {chosen[0]} to {chosen[-1]}",
                          "value": f"{values[0]:.3g} to {values[-1]:.3g}",
                          "exponent": f"{exponent(chosen, values):.2f}",
                          "in theory": str(THEORY[name][size])})
    return lines

"""Around the measurement of second moments: hooks, batches of texts, sums over processes, and the
moments of gradients that the KL penalty and the study's estimates need."""
import contextlib

from torch.nn import functional as F

import tasks
from extras.machine import Progress, all_reduce_sum, shard
from folora import SecondMoment
from model import block_linears


def input_twin(model, name):
    """The first layer that reads the same input as layer `name`: often itself."""
    block, _, last = name.rpartition(".")
    return f"{block}.{model.same_input.get(last, last)}"


@contextlib.contextmanager
def forward_hooks(layers, callback, outputs=False):
    """Call callback(name, input) before each of {name: layer} runs, or callback(name, output) after
    it. The hooks are removed afterwards, also after an error."""
    with contextlib.ExitStack() as handles:
        for name, layer in layers.items():
            def hook(module, args, *output, name=name):
                callback(name, output[0] if outputs else args[0])
            register = layer.register_forward_hook if outputs else layer.register_forward_pre_hook
            handles.enter_context(register(hook))
        yield


def batches_of(model, rows, batch):
    """Inputs x and targets y, each (B, T), of token rows; y is -100 on padding. Rows of similar
    length share a batch, and each process takes its part of the rows."""
    if sum(map(len, rows)) < 4 * model.config.n_embd:
        print("  warning: these texts have fewer tokens than the widest layer has inputs, so its "
              "moment is singular; τ carries the missing directions")
    rows = shard(sorted(rows, key=len))
    progress = Progress("measuring", len(rows))
    for first in range(0, len(rows), batch):
        x, y = tasks.response_batch([(row, 1) for row in rows[first:first + batch]])
        yield x.to(model.lm_head.weight.device), y.to(model.lm_head.weight.device)
        progress(min(len(rows), first + batch))


def means_of(moments):
    """{layer: mean} of {layer: SecondMoment}, over all processes."""
    for moment in moments.values():
        all_reduce_sum([moment.total, moment.tokens])
    return {name: moment.mean() for name, moment in moments.items()}


def gradient_moments(model, rows, batch=32, moments_device=None):
    """{layer: S = E[δ δᵀ] (d_out, d_out) float64} over all tokens of `rows` that have a next token,
    δ the gradient of the rows' summed loss (nats) at the layer's output; see `kl_penalty`."""
    layers, c = block_linears(model), model.config
    moments = {name: SecondMoment(layer.out_features, moments_device or model.lm_head.weight.device)
               for name, layer in layers.items()}
    batch = max(1, min(batch, 2 ** 26 // (c.block_size * c.vocab_size)))  # bounds logits' memory
    model.requires_grad_(False)
    for x, y in batches_of(model, rows, batch):
        mask = y != -100

        def measure(name, output):
            output.register_hook(lambda gradient: moments[name].add(gradient, mask))

        # the first block's input is the leaf from which autograd records all layers
        first_block = {"": model.get_submodule(f"{model.block_prefix}0")}
        with (forward_hooks(first_block, lambda name, x: x.requires_grad_()),
              forward_hooks(layers, measure, outputs=True)):
            h = model.features(x)
            F.cross_entropy(model.lm_head(h)[mask], y[mask], reduction="sum").backward()
    return means_of(moments)

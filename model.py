"""GPT in one file, LoRA by hand, and the two functions that write and read every checkpoint.

The transformer is GPT-2's (pre-norm, learned positions, tied embeddings), with its parameter names, so that
its weights fit. Nothing here knows about FoLoRA: `add_lora` replaces chosen linear layers by
W = W_res + κBA and leaves the choice of A, B and of the optimizer to others.

Shapes: B rows of a batch, T tokens, C = n_embd, nh heads of hs = C / nh channels; r LoRA's rank.
Sources: GPT-2, https://github.com/openai/gpt-2/blob/master/src/model.py; nanoGPT,
https://github.com/karpathy/nanoGPT; LoRA, arXiv 2106.09685.
"""
import contextlib
import ctypes
import hashlib
import json
import math
import mmap
import os
import pathlib
import sys
import warnings
import zipfile
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn import functional as F

try:
    import fcntl
except ImportError:  # Windows: a folder of results there is for one process
    fcntl = None


@dataclass
class GPTConfig:
    block_size: int = 128   # context, in tokens
    vocab_size: int = 257   # 256 bytes and <|endoftext|>
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 128
    gelu: str = "none"      # or GPT-2's "tanh", the same to 0.001 and four times slower on a CPU
    encoding: str = "bytes"  # what a token is: see tasks.encoding_called

    def __post_init__(self):
        for name in "block_size", "vocab_size", "n_layer", "n_head", "n_embd":
            value, most = getattr(self, name), 1000 if name == "n_layer" else 2 ** 20
            if type(value) is not int or not 1 <= value <= most:
                raise ValueError(f"{name} is {value!r}; it must be a whole number from 1 to {most:,}")
        if self.n_embd % self.n_head:
            raise ValueError(f"width is {self.n_embd}; it must be a multiple of heads, {self.n_head}")


class KVCache:
    """Keys and values of the tokens seen so far, per layer (B, nh, T_max, hs),
    written at each row's own position."""

    def __init__(self, config, rows, length, device, dtype):
        shape = (rows, config.n_head, length, config.n_embd // config.n_head)
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
        self.values = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
        self.used = length  # no row has tokens at this position or behind it: attention need not look there
        self.level = False  # whether all rows have their newest token just before it

    def update(self, layer, k, v, pos):
        """Write k, v (B, nh, T, hs) at positions pos (B, T); return keys and values, (B, nh, used, hs)."""
        rows = None if self.level else torch.arange(len(pos), device=pos.device)[:, None]
        for kept, new in (self.keys[layer], k), (self.values[layer], v):
            if self.level:
                kept[:, :, self.used - k.shape[2]:self.used] = new
            else:
                kept.transpose(1, 2)[rows, pos] = new.transpose(1, 2)
        return self.keys[layer][:, :, :self.used], self.values[layer][:, :, :self.used]


def causal_attention(q, k, v):
    """softmax(q kᵀ / √hs) v (B, nh, T, hs): a token looks at itself and at what stands before it."""
    if q.device.type != "cpu" or q.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    # the CPU's fused kernel takes three times as long in bf16, most of it backwards. By hand: some queries at
    # a time, so that most of what they cannot see is not computed. ([0] is that range, too, but a range of a
    # compiled T would compile the block anew for each T)
    out, (T, hs) = [], q.shape[-2:]
    for first in range(0, T, 256) if T > 256 else [0]:
        last = min(first + 256, T)
        future = torch.full((last - first, last), -math.inf, dtype=q.dtype).triu(first + 1)
        scores = (q[:, :, first:last] / math.sqrt(hs)) @ k[:, :, :last].transpose(-1, -2)
        out.append((scores + future).softmax(-1) @ v[:, :, :last])
    return torch.cat(out, 2)


class CausalSelfAttention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # query, key and value in one
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.n_head, self.layer = config.n_head, layer

    def forward(self, x, pos=None, cache=None):
        B, T, C = x.shape
        # each (B, nh, T, hs)
        q, k, v = (y.view(B, T, self.n_head, -1).transpose(1, 2) for y in self.c_attn(x).split(C, dim=2))
        if cache is None:
            y = causal_attention(q, k, v)
        else:  # a token sees cached positions up to its own; what lies behind, padding included, is masked
            k, v = cache.update(self.layer, k, v, pos)
            mask = (None if cache.level and T == 1 else  # (B, 1, T, used)
                    torch.arange(k.shape[2], device=x.device) <= pos[:, None, :, None])
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.gelu = nn.GELU(approximate=config.gelu)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        return self.c_proj(self.gelu(self.c_fc(x)))


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(config.n_embd), CausalSelfAttention(config, layer)
        self.ln_2, self.mlp = nn.LayerNorm(config.n_embd), MLP(config)

    def forward(self, x, pos=None, cache=None, only=None):
        x = x + self.attn(self.ln_1(x), pos, cache)
        if only is not None:
            x = x[only]
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),
            wpe=nn.Embedding(config.block_size, config.n_embd),
            h=nn.ModuleList(Block(config, i) for i in range(config.n_layer)),
            ln_f=nn.LayerNorm(config.n_embd)))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight  # tied
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif "ln_" not in name:
                # GPT-2: the residual stream sums 2 n_layer projections, so each starts smaller
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer) if "c_proj" in name else 0.02)

    def forward(self, idx, pos=None, cache=None, only=None):
        """idx (B, T) tokens -> logits (B, T, vocab). With a cache, pos (B, T) is where each token stands.

        only: a mask (B, T) of the positions whose logits are wanted, then (count, vocab).
        """
        return self.lm_head(self.features(idx, pos, cache, only))

    def features(self, idx, pos=None, cache=None, only=None):
        """What the output layer reads: as `forward`, (..., C)."""
        if idx.shape[1] > self.config.block_size:
            raise ValueError(f"{idx.shape[1]} tokens do not fit the model's context of "
                             f"{self.config.block_size}")
        where = torch.arange(idx.shape[1], device=idx.device) if pos is None else pos
        x = self.transformer.wte(idx) + self.transformer.wpe(where)
        *blocks, last = self.transformer.h
        for block in blocks:
            x = block(x, pos, cache)
        x = last(x, pos, cache, only)  # no token looks at another after the last attention
        return self.transformer.ln_f(x)


# ------------------------------------------------------------------------------------------------------------
# Sampling

def truncate(logits, temperature, top_p, top_k):
    """Logits (B, vocab) / temperature, then only the top_k likeliest tokens, of those the fewest that hold a
    mass of top_p; the others -inf. Each setting is a tensor (B,), so that every row may have its own."""
    logits = logits / temperature[:, None]
    cut = ((top_p < 1) | (top_k < logits.shape[-1])).nonzero()[:, 0]  # most rows are not; sorting is slow
    ranked, order = logits[cut].sort(dim=-1, descending=True)
    keep = torch.arange(logits.shape[-1], device=logits.device) < top_k[cut, None]
    probs = ranked.masked_fill(~keep, -math.inf).softmax(-1)
    keep &= probs.cumsum(-1) - probs < top_p[cut, None]  # the mass before a token; the likeliest always stays
    logits[cut] = torch.full_like(ranked, -math.inf).scatter(-1, order, ranked.masked_fill(~keep, -math.inf))
    return logits


@torch.inference_mode()
def generate(model, prompts, max_new_tokens, stop=(), decoding=None, min_new_tokens=0, generator=None):
    """Continue each prompt (a list of token lists, lengths may differ) by up to max_new_tokens, or to a token
    in `stop`.

    decoding:       None for greedy, else (temperature, top_p, top_k), each a tensor (B,): one setting a row.
    min_new_tokens: `stop` tokens cannot come before so many others.
    Returns the new tokens of each row, a stop token not included.
    """
    device, lengths = model.lm_head.weight.device, [len(p) for p in prompts]
    if min(lengths) < 1 or max(lengths) + max_new_tokens > model.config.block_size + 1:
        raise ValueError(f"prompts of {min(lengths)} to {max(lengths)} tokens and {max_new_tokens} new ones "
                         f"do not fit the context of {model.config.block_size}; "
                         "a prompt needs at least one token")
    tokens = torch.zeros(len(prompts), max(lengths) + max_new_tokens, dtype=torch.long, device=device)
    for row, prompt in zip(tokens, prompts):
        row[:len(prompt)] = torch.tensor(prompt)
    end = torch.tensor(lengths, device=device)       # where each row's next token goes
    rows, finish = torch.arange(len(prompts), device=device), end + max_new_tokens
    done, stop = torch.zeros_like(end, dtype=torch.bool), torch.tensor(stop, dtype=torch.long, device=device)
    cache = KVCache(model.config, len(prompts), tokens.shape[1], device, model.lm_head.weight.dtype)
    cache.level = min(lengths) == max(lengths)
    pos = torch.arange(max(lengths), device=device).expand(len(prompts), -1)  # prompts, then one token a row
    for new in range(max_new_tokens):
        cache.used = max(lengths) + new
        last = pos == end[:, None] - 1 if new == 0 else None  # then there is but one token a row
        logits = model(tokens.gather(1, pos), pos, cache, only=last).flatten(0, -2)  # (B, vocab)
        if new < min_new_tokens:
            logits[:, stop] = -math.inf
        if decoding is None:
            token = logits.argmax(-1)
        else:
            probs = truncate(logits.float(), *decoding).softmax(-1)
            # a draw from probs by an exponential race, as torch.multinomial does it, which waits for checks
            token = (probs / torch.empty_like(probs).exponential_(generator=generator)).argmax(-1)
        stopped = ~done & torch.isin(token, stop)
        finish, done = torch.where(stopped, end, finish), done | stopped
        if done.all():
            break
        tokens[rows, end], pos, end = token, end[:, None], end + 1
    return [row[n:f] for row, n, f in zip(tokens.tolist(), lengths, finish.tolist())]


# ------------------------------------------------------------------------------------------------------------
# LoRA

class LoRALinear(nn.Module):
    """W = W_res + κBA: a frozen weight (d_out, d_in), B (d_out, r), A (r, d_in), κ = scale.

    A0, B0 are where A and B started. W_res = W0 - κB0A0, so that the layer starts as exactly the function
    it was. Protected directions U (d_out, k), V (d_in, k), orthonormal, are projected out of BA:
    (I - UUᵀ) BA (I - VVᵀ).
    """

    def __init__(self, linear, r, scale=1.0):
        super().__init__()
        d_out, d_in = linear.weight.shape
        if not 1 <= r <= min(d_in, d_out):
            raise ValueError(f"rank is {r}; a layer of {d_out} x {d_in} takes 1 to {min(d_in, d_out)}")
        if not 0 < scale < math.inf:
            raise ValueError(f"scale is {scale}; κ must be a positive number")
        self.weight, self.bias, self.scale = linear.weight, linear.bias, scale
        for name, shape in ("A", (r, d_in)), ("B", (d_out, r)):
            self.register_parameter(f"lora_{name}", nn.Parameter(self.weight.new_zeros(shape)))
            self.register_buffer(f"lora_{name}0", self.weight.new_zeros(shape))
        self.register_buffer("lora_U", None)
        self.register_buffer("lora_V", None)

    def forward(self, x):
        A, B = self.factors()
        return F.linear(x, self.weight, self.bias) + F.linear(F.linear(x, A), B)

    def factors(self):
        """(A, κB) as they act."""
        A, B = self.lora_A, self.scale * self.lora_B
        if self.lora_U is not None:
            A, B = A - (A @ self.lora_V) @ self.lora_V.T, B - self.lora_U @ (self.lora_U.T @ B)
        return A, B

    def change(self):
        """(P (d_out, 2r), G (2r, d_in)) with ΔW = PG: κ(BA - B0A0) in factors."""
        A, B = self.factors()
        return torch.cat([B, -self.scale * self.lora_B0], 1), torch.cat([A, self.lora_A0])

    def protect(self, U, V):
        """Keep ΔW out of the columns of U and V; for a layer that starts with B0 = 0."""
        self.lora_U, self.lora_V = U, V

    @torch.no_grad()
    def start(self, A0, B0):
        """Start from A0 (r, d_in), B0 (d_out, r), taking κB0A0 out of the frozen weight."""
        for p, value in (self.lora_A, A0), (self.lora_B, B0), (self.lora_A0, A0), (self.lora_B0, B0):
            p.copy_(value)
        self.weight -= self.scale * self.lora_B0 @ self.lora_A0

    @torch.no_grad()
    def plain(self, merged):
        """An ordinary linear layer: with what was learnt, or as it was before LoRA."""
        A, B = self.factors() if merged else (self.lora_A0, self.scale * self.lora_B0)
        linear = nn.Linear(*self.weight.T.shape, device="meta")
        linear.weight = nn.Parameter(self.weight + B @ A)
        linear.bias = self.bias
        return linear


def block_linears(model, kind=nn.Linear):
    """{name: layer} of every linear projection in the transformer's blocks: what LoRA adapts."""
    return {name: m for name, m in model.named_modules()
            if isinstance(m, kind) and name.startswith("transformer.h.")}


@contextlib.contextmanager
def watching(layers, see, outputs=False):
    """Call see(name, input) before each of {name: layer} runs, or see(name, output) after it; the hooks are
    gone afterwards, also after an error."""
    handles = [layer.register_forward_hook(lambda module, inputs, output, name=name: see(name, output))
               if outputs else
               layer.register_forward_pre_hook(lambda module, inputs, name=name: see(name, inputs[0]))
               for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def add_lora(model, r, scale=1.0):
    """Freeze the model and give every linear projection of its blocks an adapter of rank r;
    returns {name: LoRALinear}."""
    model.requires_grad_(False)
    layers = {name: LoRALinear(linear, r, scale) for name, linear in block_linears(model).items()}
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    return layers


def lora_parameters(model):
    """{name: parameter} of every A and B."""
    return {name: p for name, p in model.named_parameters() if name.endswith(("lora_A", "lora_B"))}


def merge_lora(model, learnt=True):
    """Replace every adapter by an ordinary linear layer with W_res + κBA."""
    for name, layer in block_linears(model, LoRALinear).items():
        model.set_submodule(name, layer.plain(learnt))


def remove_lora(model):
    """Replace every adapter by the linear layer that stood there before, W_res + κB0A0 = W0."""
    merge_lora(model, learnt=False)


# ------------------------------------------------------------------------------------------------------------
# GPT-2's weights, as Hugging Face stores them

GPT2 = {name: f"https://huggingface.co/openai-community/{name}/resolve/main/pytorch_model.bin"
        for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}


def gpt2_layout(model):
    """{GPT-2's name: tensor}: views of the model's weights as that layout has them, the blocks' projections
    as (d_in, d_out). The output layer is the embedding and does not stand there."""
    turned = {f"{name}.weight" for name in block_linears(model)}
    return {name.removeprefix("transformer."): p.detach().T if name in turned else p.detach()
            for name, p in model.named_parameters()}


def from_gpt2(weights, n_head=None):
    """The GPT of {name: tensor} in that layout; heads of 64 channels, GPT-2's, where n_head is not given.
    ValueError names a tensor that is missing, unknown or of another shape."""
    weights = {name.removeprefix("transformer."): t for name, t in weights.items()
               if not name.endswith((".attn.bias", ".attn.masked_bias"))}  # masks, not weights
    output = weights.pop("lm_head.weight", None)
    shapes = [tuple(weights[name].shape) for name in ("wte.weight", "wpe.weight") if name in weights]
    if [len(shape) for shape in shapes] != [2, 2]:
        raise ValueError("wte.weight and wpe.weight are not there as matrices: these are not GPT-2's weights")
    (vocab, C), (T, _) = shapes
    n_layer = len({name.split(".")[1] for name in weights if name.startswith("h.")})
    config = GPTConfig(T, vocab, n_layer, max(1, C // 64) if n_head is None else n_head, C, "tanh", "gpt2")
    weights = {name: t.float() if t.is_floating_point() else t for name, t in weights.items()}
    with torch.device("meta"):
        check(weights, gpt2_layout(GPT(config)))
    model = GPT(config)
    for name, own in gpt2_layout(model).items():
        own.copy_(weights[name])
    if output is not None and not torch.equal(output.to(model.lm_head.weight), model.lm_head.weight):
        raise ValueError("lm_head.weight is not wte.weight; GPT-2 ties them")
    return model


def read_gpt2(source):
    """(weights, n_head or None) of one of GPT2's names, downloaded once, or of a folder or file on disk."""
    path, n_head, advice = pathlib.Path(source), None, (
        f"give one of {', '.join(GPT2)}, or a whole pytorch_model.bin or model.safetensors")
    if source in GPT2:
        path = pathlib.Path(torch.hub.get_dir()) / "checkpoints" / f"{source}.bin"
        if not path.exists():
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                torch.hub.download_url_to_file(GPT2[source], str(path))  # whole or not at all
            except OSError as error:
                raise ValueError(f"{source} cannot be downloaded ({error}); fetch {GPT2[source]} elsewhere "
                                 "and give its path")
    elif path.is_dir():
        config = path / "config.json"
        if config.is_file():
            with reading(config, "give a folder whose config.json is GPT-2's"):
                n_head = json.loads(config.read_bytes()).get("n_head")
        path = next((path / name for name in ("model.safetensors", "pytorch_model.bin")
                     if (path / name).exists()), path / "pytorch_model.bin")
    with reading(path, advice):
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file
            return vetted(load_file(path)), n_head
        return unpacked(path), n_head


# ------------------------------------------------------------------------------------------------------------
# Machine and files: the one place where device and precision are chosen; one function that writes
# checkpoints, one that reads them.

def pick_device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def keep_freed_memory():
    """Let Linux's malloc keep large blocks that are freed. It would give them back to the kernel, which fills
    them with zeros, page by page, when they are wanted again: at GPT-2's vocabulary half of a step's time."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):  # not in every Linux
        libc.mallopt(-4, 0)            # M_MMAP_MAX
        libc.mallopt(-1, 2 ** 31 - 1)  # M_TRIM_THRESHOLD


def join_processes():
    """Where torchrun has started several processes: each takes a GPU, and the first alone speaks."""
    if "TORCHELASTIC_RUN_ID" in os.environ and not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        if dist.get_rank():
            sys.stdout = open(os.devnull, "w")


def leave_processes():
    """Wait for each other at the end: who is first must not take the connection with it."""
    together()
    if dist.is_initialized():
        dist.destroy_process_group()


def processes():
    """(this process's number, how many there are)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def together():
    """Wait until all processes are here."""
    if dist.is_initialized():
        dist.barrier()


def own_share(rows):
    """This process's part of rows that all processes have."""
    rank, count = processes()
    return rows[rank::count]


def add_up(tensors):
    """Make each tensor the sum of what all processes have there."""
    for t in tensors if dist.is_initialized() else ():
        dist.all_reduce(t)


def gathered(rows):
    """The lists of all processes, joined."""
    if not dist.is_initialized():
        return rows
    lists = [None] * dist.get_world_size()
    dist.all_gather_object(lists, rows)
    return sum(lists, [])


def autocast(device):
    """bf16 where the machine gains from it (recent GPUs; CPUs with bf16 instructions), float32 elsewhere."""
    gains = (torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda"
             else bf16_cpu())
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=gains)


@contextlib.contextmanager
def tf32(device):
    """TF32 on a GPU for the products of float32 that are left: for training, not for moments."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if device.type == "cuda" else before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def bf16_cpu():
    return any(getattr(torch.cpu, f"_is_{kind}_supported", bool)() for kind in ("avx512_bf16", "amx_tile"))


def fingerprint(tensors):
    """A short SHA-256 of {name: tensor}: the identity of a model's weights or a calibration."""
    digest = hashlib.sha256()
    for name, t in sorted(tensors.items()):
        digest.update(f"{name} {tuple(t.shape)} {t.dtype}".encode())
        digest.update(t.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() if t.numel() else b"")
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def claimed(path, wait=True):
    """Whether this process alone makes `path`: True as soon as no other one does or, without `wait`, False.

    The claim is a locked file beside `path`, so it ends with the process, however that ends. Of several
    processes that work together the first one claims.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    while fcntl and not processes()[0]:
        with open(path.with_name(f"{path.name}.lock"), "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not wait:
                    yield False
                    return
                print(f"  another process makes {path}: waiting for it", flush=True)
                fcntl.flock(lock, fcntl.LOCK_EX)
            if os.fstat(lock.fileno()).st_nlink:  # else who had it has removed it: once more
                try:
                    yield True
                finally:
                    os.unlink(lock.name)
                return
    yield True


def write_whole(path, write):
    """Make `path` by write(file), whole or not at all: under a temporary name first, then renamed. OSError
    says what cannot be written and why. Of several processes the first one writes."""
    if processes()[0]:
        return
    temporary = path.with_name(f"{path.name}.tmp")
    with claimed(temporary):  # so what a killed process left there is nobody's, and written over
        try:
            with open(temporary, "wb") as f:
                write(f)
                f.flush()
                os.fsync(f.fileno())
            os.replace(temporary, path)
        except (OSError, RuntimeError) as error:  # behind the latter torch.save hides that a disk is full
            reason = error if isinstance(error, OSError) else error.__context__ or error
            raise OSError(f"{path} cannot be written: {reason}") from None
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def reading(path, advice):
    """Whatever is wrong with a file's content becomes one line, a ValueError: the file, the reason, what to
    do."""
    if not path.is_file():  # to open a pipe would be to wait for ever
        raise ValueError(f"{path} cannot be read (it is missing, or not a file); {advice}")
    try:
        yield
    except Exception as error:
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"{path} cannot be read ({kind}{' '.join(str(error).split())[:150]}); "
                         f"{advice}") from None


def vetted(content, most=math.inf):
    """The content if all tensors in its nested dicts and lists are finite, and together of at most
    `most` bytes: a small file's strides of 0 can claim any size. ValueError names a tensor that is not."""
    tensors, waiting, seen = [], [("", content)], set()
    while waiting:
        name, part = waiting.pop()
        if torch.is_tensor(part):
            tensors.append((name, part))
        elif isinstance(part, (dict, list, tuple)) and id(part) not in seen:
            seen.add(id(part))  # visited once: a list can hold itself
            pairs = part.items() if isinstance(part, dict) else enumerate(part)
            waiting += [(f"{name} {key}"[-100:].strip(), value) for key, value in pairs]
    if sum(t.nbytes for _, t in tensors) > most:
        raise ValueError("its tensors claim to be larger than the file")
    for name, t in tensors:
        if not torch.isfinite(t).all():  # which raises itself where a tensor is sparse or not there
            raise ValueError(f"{name} holds NaN or infinity")
    return content


def unpacked(path):
    """What torch.save wrote: tensors and plain values only. Executes nothing, and takes no more memory than
    the file's size warrants."""
    size = path.stat().st_size
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if sum(record.file_size for record in archive.infolist()) > size or archive.testzip():
                raise ValueError("it is damaged, or claims to be larger than it is")
    with warnings.catch_warnings(action="ignore"):  # remarks on what a broken file seems to be
        content = torch.load(path, map_location="cpu", weights_only=True)
    return vetted(content, 2 * size)  # tied weights stand there once


def check(found, expected):
    """ValueError names a tensor that is missing, unknown, or of another shape or type than expected; both are
    {name: tensor}."""
    for name in sorted(found.keys() ^ expected.keys(), key=str):
        raise ValueError(f"{name} is {'missing' if name in expected else 'unknown'}")
    for name, own in expected.items():
        shape, dtype = tuple(found[name].shape), found[name].dtype
        if (shape, dtype) != (tuple(own.shape), own.dtype):
            raise ValueError(f"{name} has the shape {shape} and type {dtype}; {tuple(own.shape)} and "
                             f"{own.dtype} would be right")


def digest(path, end=None):
    """SHA-256 of a file's bytes, or of those before position `end`."""
    with open(path, "rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as whole:
        return hashlib.sha256(memoryview(whole)[:end]).digest()


def save(path, content):
    """Write a checkpoint: a dict of tensors and plain values, with its "kind" and "settings". The SHA-256
    of torch's archive stands behind it. ValueError, and nothing is written, when a tensor is not finite."""
    vetted(content)

    def write(f):
        torch.save(content, f)
        f.flush()
        f.write(digest(f.name))
    write_whole(path, write)


def load(path, kind, made_by):
    """Read a checkpoint (tensors and plain values only); ValueError says what is wrong with it and which
    command makes one."""
    if not path.exists():
        raise ValueError(f"{path} is missing; make it with: {made_by}")
    with reading(path, f"delete it and make it again with: {made_by}"):
        with open(path, "rb") as f:
            f.seek(-32, os.SEEK_END)
            expected = f.read()
        if digest(path, -32) != expected:
            raise ValueError("its checksum does not fit: it is damaged")
        content = unpacked(path)
        if not isinstance(content, dict) or content.get("kind") != kind:
            raise ValueError(f"it is not a {kind} of this project")
    return content

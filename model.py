"""A GPT in one file, text generation with a KV cache, and LoRA by hand.

The transformer is GPT-2's (pre-norm, learned positions, tied embeddings), with its parameter names,
so that its weights fit. Nothing here knows about FoLoRA: `add_lora` replaces the linear layers of
the blocks by W = W_res + κBA and leaves the choice of A, B and the optimizer to others.

Shapes: B rows of a batch, T tokens, C = n_embd, nh heads of hs = C / nh channels; r is LoRA's rank.
Sources: GPT-2, https://github.com/openai/gpt-2/blob/master/src/model.py; nanoGPT,
https://github.com/karpathy/nanoGPT; LoRA, arXiv 2106.09685.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch.nn import functional as F


@dataclass
class GPTConfig:
    block_size: int = 128    # context, in tokens
    vocab_size: int = 257    # 256 bytes and <|endoftext|>
    n_layer: int = 4
    n_head: int = 3
    n_embd: int = 96
    gelu: str = "none"       # exact; "tanh": GPT-2's approximation, within 0.001, 4 x slower on CPU
    encoding: str = "bytes"  # what a token is: see tasks.get_encoding

    def __post_init__(self):
        for name in "block_size", "vocab_size", "n_layer", "n_head", "n_embd":
            value, most = getattr(self, name), 1000 if name == "n_layer" else 2 ** 20
            if type(value) is not int or not 1 <= value <= most:
                raise ValueError(f"{name} is {value!r}; it must be an integer from 1 to {most:,}")
        if self.n_embd % self.n_head:
            raise ValueError(f"width is {self.n_embd}; it must be a multiple of heads, "
                             f"{self.n_head}")

    @property
    def kv_shape(self):
        """(heads, channels of a head) of the keys and values that a cache holds."""
        return self.n_head, self.n_embd // self.n_head


class KVCache:
    """Keys and values of the tokens so far, per layer (B, nh, length, hs); each row of the batch
    writes at its own position."""

    def __init__(self, length, aligned):
        self.layers, self.length = {}, length
        self.used = length      # set by `generate`: no row has tokens at or after this position
        self.aligned = aligned  # whether all rows have equal length: then writes are contiguous

    def update(self, layer, k, v, pos):
        """Write k, v (B, nh, T, hs) at positions pos (B, T); return all, (B, nh, used, hs)."""
        if layer not in self.layers:
            B, nh, _, hs = k.shape
            self.layers[layer] = [t.new_zeros(B, nh, self.length, hs) for t in (k, v)]
        for cached, new in zip(self.layers[layer], (k, v)):
            if self.aligned:
                cached[:, :, self.used - k.shape[2]:self.used] = new
            else:
                rows = torch.arange(len(pos), device=pos.device)[:, None]
                cached[rows, :, pos] = new.transpose(1, 2)
        return [cached[:, :, :self.used] for cached in self.layers[layer]]


def causal_attention(q, k, v, lengths=None):
    """softmax(q kᵀ / √hs) v (B, nh, T, hs); a token attends to itself and to those before it. With
    `lengths` the one row is several texts, one after the other, that do not see each other."""
    if lengths:
        texts = zip(*(t.split(lengths, 2) for t in (q, k, v)))
        return torch.cat([causal_attention(*text) for text in texts], 2)
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:  # a CPU's kernel is slow in bf16
        with torch.autocast("cpu", enabled=False):
            return causal_attention(q.float(), k.float(), v.float()).to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def cached_attention(q, k, v, pos, aligned):
    """q (B, nh, T, hs) at positions pos (B, T) attends to cached k, v (B, nh, used, hs) up to its
    own position; what comes after it, padding included, is masked."""
    mask = (torch.arange(k.shape[2], device=q.device) <= pos[:, None, :, None]  # (B, 1, T, used)
            if q.shape[2] > 1 or not aligned else None)  # None: one new token sees all so far
    grouped = q.shape[1] > k.shape[1]  # several query heads read one key and value head
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)


class CausalSelfAttention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # query, key and value in one
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.n_head, self.layer = config.n_head, layer

    def forward(self, x, pos=None, cache=None, lengths=None):
        B, T, C = x.shape
        # each (B, nh, T, hs)
        q, k, v = (y.view(B, T, self.n_head, -1).transpose(1, 2)
                   for y in self.c_attn(x).split(C, dim=2))
        if cache is None:
            y = causal_attention(q, k, v, lengths)
        else:
            k, v = cache.update(self.layer, k, v, pos)
            y = cached_attention(q, k, v, pos, cache.aligned)
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

    def forward(self, x, pos=None, cache=None, lengths=None, only=None):
        x = x + self.attn(self.ln_1(x), pos, cache, lengths)
        if only is not None:
            x = x[only]  # (B, T, C) -> (count, C): where logits are wanted, see GPT.forward
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    block_prefix = "transformer.h."  # names of the layers that LoRA adapts begin with it
    same_input = {}  # Llama's has k_proj: q_proj, since its key and query layers read one input

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
                residual = math.sqrt(2 * config.n_layer) if "c_proj" in name else 1
                nn.init.normal_(p, std=0.02 / residual)

    def forward(self, idx, pos=None, cache=None, only=None):
        """Tokens idx (B, T) -> logits (B, T, vocab).

        With a cache, pos (B, T) gives each token's position. `only`, a mask (B, T), selects the
        positions whose logits are wanted; the result is then (count, vocab).
        """
        return self.lm_head(self.features(idx, pos, cache, only))

    def features(self, idx, pos=None, cache=None, only=None, lengths=None):
        """The output layer's input: as `forward`, with C instead of vocab. With lengths, idx (1, T)
        is texts of these lengths, one after the other, and pos each token's position in its own."""
        if (longest := max(lengths or [idx.shape[1]])) > self.config.block_size:
            raise ValueError(f"{longest} tokens do not fit the model's context of "
                             f"{self.config.block_size}")
        where = torch.arange(idx.shape[1], device=idx.device) if pos is None else pos
        x = self.transformer.wte(idx) + self.transformer.wpe(where)  # (B, T, C)
        *blocks, last = self.transformer.h
        for block in blocks:
            x = block(x, pos, cache, lengths)
        x = last(x, pos, cache, lengths, only)  # no position affects another any more
        return self.transformer.ln_f(x)


# ------------------------------------------------------------------------------------------------
# Generate

def filter_top_k_top_p(logits, temperature, top_p, top_k):
    """Divide logits (B, vocab) by the temperature, then keep the top_k likeliest tokens and of
    these the fewest that hold a probability of top_p; the others become -inf. Each setting is a
    tensor (B,), so every row may have its own."""
    logits = logits / temperature[:, None]
    cut = ((top_p < 1) | (top_k < logits.shape[-1])).nonzero()[:, 0]  # only rows with a limit: slow
    ranked, order = logits[cut].sort(dim=-1, descending=True)
    keep = torch.arange(logits.shape[-1], device=logits.device) < top_k[cut, None]
    probs = ranked.masked_fill(~keep, -math.inf).softmax(-1)
    # the probability before a token decides, so the likeliest always stays
    keep &= probs.cumsum(-1) - probs < top_p[cut, None]
    logits[cut] = ranked.scatter(-1, order, ranked.masked_fill(~keep, -math.inf))
    return logits


def pick_tokens(logits, decoding=None, generator=None):
    """Tokens (B,) of logits (B, vocab): the likeliest, or sampled where `decoding` is given."""
    if decoding is None:
        return logits.argmax(-1)
    probs = filter_top_k_top_p(logits.float(), *decoding).softmax(-1)
    # argmax(p / Exp(1)) samples from p, as torch.multinomial does, whose checks wait for the GPU
    return (probs / torch.empty_like(probs).exponential_(generator=generator)).argmax(-1)


@torch.inference_mode()
def generate(model, prompts, max_new_tokens, stop=(), decoding=None, min_new_tokens=0,
             generator=None, tick=None):
    """Continue each prompt (a list of token lists, lengths may differ) by up to max_new_tokens
    tokens, or until a token in `stop`.

    decoding:       None for greedy, else (temperature, top_p, top_k), each a tensor (B,).
    min_new_tokens: a `stop` token cannot come before this many others.
    tick:           called as tick(new tokens so far) before each step.
    Returns the new tokens of each row, without the stop token.
    """
    device, lengths = model.lm_head.weight.device, [len(p) for p in prompts]
    longest, total = max(lengths), max(lengths) + max_new_tokens
    if min(lengths) < 1 or total > model.config.block_size + 1:  # the last new token is not read
        raise ValueError(f"prompts of {min(lengths)} to {longest} tokens and {max_new_tokens} new "
                         f"ones do not fit the context of {model.config.block_size}; a prompt "
                         "needs at least one token")
    tokens = torch.tensor([[*p, *[0] * (total - len(p))] for p in prompts], device=device)
    end = torch.tensor(lengths, device=device)  # position of each row's next token
    rows, finish = torch.arange(len(prompts), device=device), end + max_new_tokens
    done = torch.zeros_like(end, dtype=torch.bool)
    stop = torch.tensor(stop, dtype=torch.long, device=device)
    cache = KVCache(total, aligned=min(lengths) == longest)
    # the first pass reads the whole prompts, every later one a single token per row
    pos = torch.arange(longest, device=device).expand(len(prompts), -1)
    for new in range(max_new_tokens):
        if tick:
            tick(new)
        cache.used = longest + new
        # forward what the cache does not hold yet; each row's newest token predicts the next
        newest = pos == end[:, None] - 1 if new == 0 else None
        logits = model(tokens.gather(1, pos), pos, cache, only=newest).flatten(0, -2)  # (B, vocab)
        if new < min_new_tokens:
            logits[:, stop] = -math.inf
        token = pick_tokens(logits, decoding, generator)  # (B,)
        # a row that stops ends here; it is carried along until all have stopped
        stopped = ~done & torch.isin(token, stop)
        finish, done = torch.where(stopped, end, finish), done | stopped
        if done.all():
            break
        # append the token to its row; the next pass reads it alone
        tokens[rows, end], pos, end = token, end[:, None], end + 1
    return [row[n:f] for row, n, f in zip(tokens.tolist(), lengths, finish.tolist())]


# ------------------------------------------------------------------------------------------------
# LoRA

class LoRALinear(nn.Module):
    """W = W_res + κBA: a frozen weight (d_out, d_in), B (d_out, r), A (r, d_in), κ = scale (α/r).

    A0 and B0, set by `init_from`, are the starting values of A and B, and W_res = W0 - κB0A0: the
    layer starts as the function it was.
    """

    def __init__(self, linear, r, scale=1.0):
        super().__init__()
        (d_out, d_in), most = linear.weight.shape, min(linear.weight.shape)
        if not 1 <= r <= most:
            raise ValueError(f"rank is {r}; a layer of {d_out} x {d_in} takes 1 to {most}")
        if not 0 < scale < math.inf:
            raise ValueError(f"scale is {scale}; κ must be a positive number")
        self.weight, self.bias, self.scale = linear.weight, linear.bias, scale
        self.lora_A = nn.Parameter(self.weight.new_zeros(r, d_in))
        self.lora_B = nn.Parameter(self.weight.new_zeros(d_out, r))
        self.register_buffer("lora_A0", self.weight.new_zeros(r, d_in))
        self.register_buffer("lora_B0", self.weight.new_zeros(d_out, r))

    def forward(self, x):
        A, B = self.factors()
        return F.linear(x, self.weight, self.bias) + F.linear(F.linear(x, A), B)

    def factors(self):
        """(A, κB) of the forward pass; a subclass may change them."""
        return self.lora_A, self.scale * self.lora_B

    def delta_factors(self):
        """(P (d_out, 2r), G (2r, d_in)) with PG = ΔW = κ(BA - B0A0)."""
        A, B = self.factors()
        return torch.cat([B, -self.scale * self.lora_B0], 1), torch.cat([A, self.lora_A0])

    @torch.no_grad()
    def init_from(self, A0, B0):
        """Start from A0 (r, d_in), B0 (d_out, r) and subtract κB0A0 from the frozen weight."""
        self.lora_A.copy_(A0), self.lora_A0.copy_(A0)
        self.lora_B.copy_(B0), self.lora_B0.copy_(B0)
        self.weight -= self.scale * self.lora_B0 @ self.lora_A0

    @torch.no_grad()
    def to_linear(self, learned=True):
        """An ordinary linear layer: with what was learned, or as it was before LoRA."""
        A, B = self.factors() if learned else (self.lora_A0, self.scale * self.lora_B0)
        linear = nn.Linear(*self.weight.T.shape, device="meta")
        linear.weight, linear.bias = nn.Parameter(self.weight + B @ A), self.bias
        return linear


def block_linears(model, kind=nn.Linear):
    """{name: layer} of every linear layer in the transformer's blocks: those that LoRA adapts."""
    return {name: m for name, m in model.named_modules()
            if isinstance(m, kind) and name.startswith(model.block_prefix)}


def add_lora(model, r, scale=1.0):
    """Freeze the model and add an adapter of rank r to every linear layer of its blocks;
    returns {name: LoRALinear}."""
    model.requires_grad_(False)
    layers = {name: LoRALinear(linear, r, scale) for name, linear in block_linears(model).items()}
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    return layers


def merge_lora(model, learned=True):
    """Replace every adapter by a linear layer: W_res + κBA, or W_res + κB0A0 = W0 as it was."""
    for name, layer in block_linears(model, LoRALinear).items():
        model.set_submodule(name, layer.to_linear(learned))

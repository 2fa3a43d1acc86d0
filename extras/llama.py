"""The Llama family of transformers, beside model.py and with the same interface.

What differs from GPT-2: RMSNorm for LayerNorm, rotary positions for learned ones, groups of query
heads that share a key and value head, a gated MLP (SwiGLU), and no biases. The parameter names are
Hugging Face's, so that published weights fit; published.py reads them.

Shapes: B rows of a batch, T tokens, C = n_embd, nh query heads and nkv key and value heads of
hs = C / nh channels.
Sources: LLaMA, arXiv 2302.13971; RMSNorm, arXiv 1910.07467; rotary positions, arXiv 2104.09864;
grouped-query attention, arXiv 2305.13245; SwiGLU, arXiv 2002.05202; the layout,
github.com/huggingface/transformers/blob/main/src/transformers/models/llama/modeling_llama.py
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch.nn import functional as F

from model import cached_attention, causal_attention


@dataclass
class LlamaConfig:  # the defaults are SmolLM2-135M's
    block_size: int = 512       # context, in tokens; no weight depends on it, memory does
    vocab_size: int = 49152
    n_layer: int = 30
    n_head: int = 9             # query heads
    n_kv_head: int = 3          # key and value heads, each read by n_head / n_kv_head query heads
    n_embd: int = 576
    n_ff: int = 1536            # channels inside the MLP
    rope_base: float = 100000.  # the slowest channels turn once in about 2π rope_base tokens
    norm_eps: float = 1e-5
    tied: bool = True           # whether the output layer is the embedding
    encoding: str = "smollm2"   # what a token is: see tasks.get_encoding

    def __post_init__(self):
        for name in "block_size vocab_size n_layer n_head n_kv_head n_embd n_ff".split():
            value, most = getattr(self, name), 1000 if name == "n_layer" else 2 ** 20
            if type(value) is not int or not 1 <= value <= most:
                raise ValueError(f"{name} is {value!r}; it must be a whole number from 1 to {most}")
        for name in "rope_base", "norm_eps":
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 < value < math.inf:
                raise ValueError(f"{name} is {value!r}; it must be a positive number")
        if self.n_embd % (2 * self.n_head):
            raise ValueError(f"n_embd is {self.n_embd}; rotary positions need a multiple of "
                             f"2 n_head = {2 * self.n_head}")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head is {self.n_head}; it must be a multiple of n_kv_head, "
                             f"{self.n_kv_head}")

    @property
    def kv_shape(self):
        """(heads, channels of a head) of the keys and values that a cache holds."""
        return self.n_kv_head, self.n_embd // self.n_head


def rotary_angles(config, pos):
    """(cos, sin), each (..., hs), of the angles by which channels turn at positions pos (...)."""
    hs = config.n_embd // config.n_head
    i = torch.arange(0, hs, 2, dtype=torch.float32, device=pos.device)
    angles = pos[..., None] * (1 / config.rope_base ** (i / hs))  # (..., hs/2)
    angles = torch.cat([angles, angles], -1)                      # channels j and j + hs/2: a pair
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Turn each pair of channels (x_j, x_j+hs/2) of x (B, n, T, hs) by its position's angle."""
    left, right = x.chunk(2, -1)
    return x * cos.to(x.dtype) + torch.cat([-right, left], -1) * sin.to(x.dtype)


class LlamaAttention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        C, (n_kv_head, hs) = config.n_embd, config.kv_shape
        self.q_proj = nn.Linear(C, C, bias=False)
        self.k_proj = nn.Linear(C, n_kv_head * hs, bias=False)
        self.v_proj = nn.Linear(C, n_kv_head * hs, bias=False)
        self.o_proj = nn.Linear(C, C, bias=False)
        self.hs, self.layer, self.group = hs, layer, config.n_head // n_kv_head

    def forward(self, x, rotary, pos=None, cache=None, lengths=None):
        B, T, C = x.shape
        # q (B, nh, T, hs); k and v (B, nkv, T, hs)
        q, k, v = (proj(x).view(B, T, -1, self.hs).transpose(1, 2)
                   for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, *rotary), rotate(k, *rotary)
        if cache is None:
            k, v = (t.repeat_interleave(self.group, 1) for t in (k, v))  # (B, nh, T, hs)
            y = causal_attention(q, k, v, lengths)
        else:
            k, v = cache.update(self.layer, k, v, pos)  # (B, nkv, used, hs)
            y = cached_attention(q, k, v, pos, cache.aligned)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, C))


class LlamaMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.n_embd, config.n_ff, bias=False)
        self.up_proj = nn.Linear(config.n_embd, config.n_ff, bias=False)
        self.down_proj = nn.Linear(config.n_ff, config.n_embd, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class LlamaBlock(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.n_embd, config.norm_eps)
        self.self_attn = LlamaAttention(config, layer)
        self.post_attention_layernorm = nn.RMSNorm(config.n_embd, config.norm_eps)
        self.mlp = LlamaMLP(config)

    def forward(self, x, rotary, pos=None, cache=None, lengths=None, only=None):
        x = x + self.self_attn(self.input_layernorm(x), rotary, pos, cache, lengths)
        if only is not None:
            x = x[only]  # (B, T, C) -> (count, C)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    block_prefix = "model.layers."  # names of the layers that LoRA adapts begin with it
    same_input = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = nn.ModuleDict(dict(
            embed_tokens=nn.Embedding(config.vocab_size, config.n_embd),
            layers=nn.ModuleList(LlamaBlock(config, i) for i in range(config.n_layer)),
            norm=nn.RMSNorm(config.n_embd, config.norm_eps)))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tied:
            self.lm_head.weight = self.model.embed_tokens.weight
        for p in self.parameters():
            if p.dim() == 2:  # the norms start at 1
                nn.init.normal_(p, std=0.02)

    def forward(self, idx, pos=None, cache=None, only=None):
        """Tokens idx (B, T) -> logits (B, T, vocab); arguments as for model.GPT."""
        return self.lm_head(self.features(idx, pos, cache, only))

    def features(self, idx, pos=None, cache=None, only=None, lengths=None):
        """The output layer's input: as for model.GPT."""
        if (longest := max(lengths or [idx.shape[1]])) > self.config.block_size:
            raise ValueError(f"{longest} tokens do not fit the model's context of "
                             f"{self.config.block_size}")
        where = torch.arange(idx.shape[1], device=idx.device)[None] if pos is None else pos
        rotary = [t[:, None] for t in rotary_angles(self.config, where)]  # (B or 1, 1, T, hs)
        x = self.model.embed_tokens(idx)                                  # (B, T, C)
        *blocks, last = self.model.layers
        for block in blocks:
            x = block(x, rotary, pos, cache, lengths)
        x = last(x, rotary, pos, cache, lengths, only)  # its MLP only where wanted
        return self.model.norm(x)

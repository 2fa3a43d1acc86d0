"""The model: one transformer, cached or not, padded or not; LoRA, and every method, that changes nothing
until it learns."""
import argparse
import dataclasses
import functools
import pathlib
import pickle

import pytest
import torch
from hypothesis import given, strategies as st
from torch.nn.functional import cross_entropy

import train
from bench import METHODS  # its variants included
from calibrate import second_moments
from folora import SAdam, oplora_protected
from model import (GPT, GPTConfig, add_lora, block_linears, causal_attention, fingerprint, generate, load,
                   lora_parameters, merge_lora, remove_lora, save, tf32, truncate)

CONFIG = GPTConfig(block_size=24, vocab_size=31, n_layer=2, n_head=2, n_embd=16)
prompts_of_any_length = st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=10),
                                 min_size=1, max_size=5)


def micro(seed=0):
    """A model whose weights are large enough for its output to depend on everything."""
    torch.manual_seed(seed)
    model = GPT(CONFIG)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.3)
    return model.eval()


@pytest.mark.parametrize("kind, inside", [("cuda", "high"), ("cpu", "highest")])
def test_tf32_is_for_training_on_a_gpu_alone(kind, inside):
    """Afterwards float32 is what it was, also after an error."""
    with pytest.raises(KeyboardInterrupt), tf32(torch.device(kind)):
        assert torch.get_float32_matmul_precision() == inside
        raise KeyboardInterrupt
    assert torch.get_float32_matmul_precision() == "highest"


def test_names_and_shapes_are_gpt2s():
    """GPT-2's weights can be loaded: its names, and its sizes with c_attn of 3C and an MLP of 4C."""
    shapes = {name: tuple(p.shape) for name, p in micro().state_dict().items()}
    assert shapes["transformer.wte.weight"] == (31, 16) and shapes["transformer.wpe.weight"] == (24, 16)
    assert shapes["transformer.h.1.attn.c_attn.weight"] == (48, 16)
    assert shapes["transformer.h.1.attn.c_proj.bias"] == (16,)
    assert shapes["transformer.h.0.mlp.c_fc.weight"] == (64, 16)
    assert shapes["transformer.h.0.mlp.c_proj.weight"] == (16, 64)
    norms = {"transformer.h.0.ln_1.weight", "transformer.h.0.ln_2.bias", "transformer.ln_f.weight"}
    assert norms <= shapes.keys()


def test_a_token_sees_only_its_past():
    model, x = micro(), torch.arange(12)[None] % 31
    changed = x.clone()
    changed[0, 7] = 30
    difference = (model(x) - model(changed)).abs().amax(-1)[0]
    assert (difference[:7] == 0).all() and (difference[7:] > 1e-4).all()


def generate_plainly(model, prompts, new, stop=(), decoding=None, least=0, generator=None):
    """What `generate` does, row by row from the whole text."""
    rows = [list(prompt) for prompt in prompts]
    for step in range(new):
        logits = torch.stack([model(torch.tensor([row]))[0, -1] for row in rows]).detach()
        logits[:, stop if step < least else []] = -torch.inf
        chosen = (logits.argmax(-1) if decoding is None else
                  torch.multinomial(truncate(logits, *decoding).softmax(-1), 1, generator=generator)[:, 0])
        rows = [[*row, token] for row, token in zip(rows, chosen.tolist())]
    said = [row[len(prompt):] for row, prompt in zip(rows, prompts)]
    return [row[:next((i for i, token in enumerate(row) if token in stop), new)] for row in said]


@given(prompts=prompts_of_any_length, new=st.integers(1, 12), seed=st.integers(0, 5), level=st.booleans())
def test_greedy_with_cache_is_greedy_without(prompts, new, seed, level):
    """A KV cache changes nothing, for prompts of different lengths in one batch or of one length."""
    prompts = [prompt[:1] for prompt in prompts] if level else prompts
    assert generate(micro(seed), prompts, new) == generate_plainly(micro(seed), prompts, new)


@given(prompts=prompts_of_any_length, new=st.integers(1, 12), seed=st.integers(0, 5))
def test_sampling_with_cache_is_sampling_without(prompts, new, seed):
    model, rows = micro(seed), len(prompts)
    decoding = torch.full((rows,), 1.2), torch.full((rows,), 0.9), torch.full((rows,), 8)
    a, b = (way(model, prompts, new, [3], decoding, 2, torch.Generator().manual_seed(seed))
            for way in (generate, generate_plainly))
    assert a == b and all(3 not in row for row in a)
    assert all(len(row) >= min(2, new) for row in a), "no stop token before min_new_tokens"


@given(prompts=prompts_of_any_length)
def test_answers_do_not_depend_on_the_batch(prompts):
    model = micro()
    assert generate(model, prompts, 6, [3]) == [generate(model, [p], 6, [3])[0] for p in prompts]


@given(tokens=st.integers(1, 24), rows=st.integers(1, 4), seed=st.integers(0, 99))
def test_logits_of_chosen_positions_are_those_among_all(tokens, rows, seed):
    """`only` picks positions, in the order of a mask's; the loss is the mean over the targets that count."""
    model, generator = micro(seed % 3), torch.Generator().manual_seed(seed)
    x = torch.randint(0, 31, (rows, tokens), generator=generator)
    only = torch.rand(rows, tokens, generator=generator) < 0.5
    only[0, 0] = True
    logits = model(x)
    assert model(x, only=only).shape == (only.sum(), 31)
    assert torch.allclose(model(x, only=only), logits[only], atol=1e-4)
    y = torch.randint(0, 31, x.shape, generator=generator).where(only, torch.tensor(-100))
    with torch.no_grad(), train.autocast(x.device):
        expected = cross_entropy(model(x).float().flatten(0, 1), y.flatten(), ignore_index=-100)
        assert train.loss_of(model, x, y).item() == pytest.approx(expected.item(), rel=0.01)


@given(n=st.integers(1, 40), vocabulary=st.integers(2, 30), rows=st.integers(1, 50), frozen=st.booleans(),
       seed=st.integers(0, 99))
def test_loss_in_pieces_is_the_loss(n, vocabulary, rows, frozen, seed):
    """Value and gradients, however many rows a piece has, the output layer trained or not."""
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(n, 5, generator=generator, requires_grad=True)
    W = torch.randn(vocabulary, 5, generator=generator, requires_grad=not frozen)
    y = torch.randint(vocabulary, (n,), generator=generator)
    inputs, losses = (h,) if frozen else (h, W), []
    for loss in cross_entropy(h @ W.T, y), train.LossInPieces.apply(h, W, y, rows):
        losses.append((loss, *torch.autograd.grad(3 * loss, inputs)))
    for expected, found in zip(*losses):
        assert torch.allclose(expected, found, rtol=1e-4, atol=1e-5)


def test_a_large_vocabulary_takes_the_loss_in_pieces(monkeypatch):
    """The same loss as from all logits at once, with and without gradients."""
    model = GPT(dataclasses.replace(CONFIG, vocab_size=2 ** 17))
    x = torch.randint(2 ** 17, (8, 24), generator=torch.Generator().manual_seed(0))
    y = x.roll(-1, 1).masked_fill(torch.arange(24) < 3, -100)
    used, apply = [], train.LossInPieces.apply
    monkeypatch.setattr(train.LossInPieces, "apply", lambda *given: used.append(given) or apply(*given))
    with torch.no_grad():
        expected = cross_entropy(model(x).flatten(0, 1), y.flatten(), ignore_index=-100).item()
        assert train.loss_of(model, x, y).item() == pytest.approx(expected, rel=1e-3)
    train.loss_of(model, x, y).backward()
    assert len(used) == 2 and model.lm_head.weight.grad.norm() > 0
    train.loss_of(model, x[:1], y[:1]).backward()
    assert len(used) == 2


@given(tokens=st.integers(1, 24) | st.integers(255, 258) | st.sampled_from([512, 700]),
       heads=st.integers(1, 3), seed=st.integers(0, 99))
def test_attention_in_bf16_is_that_of_the_fused_kernel(tokens, heads, seed):
    """By hand where the fused kernel is slow, long texts piece by piece: the same values and gradients, to
    bf16's rounding."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v, weight = torch.randn(4, 2, heads, tokens, 8, generator=generator)
    expected, found = [], []
    for dtype, to in (torch.float32, expected), (torch.bfloat16, found):
        inputs = [t.to(dtype).requires_grad_() for t in (q, k, v)]
        y = causal_attention(*inputs)
        assert y.dtype == dtype
        to += [y, *torch.autograd.grad((y.float() * weight).sum(), inputs)]
    for a, b in zip(expected, found):
        assert (a - b.float()).norm() <= 0.02 * (a.norm() + weight.norm())


def test_generate_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="context of 24"):
        generate(micro(), [[1] * 20], 10)
    with pytest.raises(ValueError, match="at least one token"):
        generate(micro(), [[]], 3)
    with pytest.raises(ValueError, match="context of 24"):
        micro()(torch.zeros(1, 25, dtype=torch.long))


def test_truncate_by_hand():
    """Probabilities .5 .3 .15 .05: top-p 0.6 keeps two tokens, top-k 3 keeps three,
    temperature 1/2 squares the odds."""
    logits = torch.tensor([[0.05, 0.5, 0.15, 0.3]]).log().expand(4, -1)
    kept = truncate(logits, torch.tensor([1., 1., 0.5, 1.]), torch.tensor([0.6, 1., 1., 1e-9]),
                    torch.tensor([4, 3, 4, 4]))
    probs = kept.softmax(-1)
    assert torch.allclose(probs[0], torch.tensor([0, 0.5, 0, 0.3]) / 0.8)
    assert torch.allclose(probs[1], torch.tensor([0, 0.5, 0.15, 0.3]) / 0.95)
    squares = torch.tensor([0.05, 0.5, 0.15, 0.3]) ** 2
    assert torch.allclose(probs[2], squares / squares.sum())
    assert torch.allclose(probs[3], torch.tensor([0., 1, 0, 0])), "the likeliest token always stays"


def with_lora(seed, r=3, scale=0.7):
    """(model with adapters that start somewhere, its input, the output before)."""
    model, x = micro(), torch.randint(0, 31, (2, 9), generator=torch.Generator().manual_seed(seed))
    before = model(x)
    generator = torch.Generator().manual_seed(seed)
    for layer in add_lora(model, r, scale).values():
        layer.start(*(torch.randn(p.shape, generator=generator) * 0.1 for p in (layer.lora_A, layer.lora_B)))
    return model, x, before


@given(seed=st.integers(0, 50), r=st.integers(1, 16), scale=st.sampled_from([0.5, 1.0, 4.0]))
def test_an_adapter_starts_as_the_identity(seed, r, scale):
    """W_res + κB0A0 = W0 whatever the start; only A and B are trained, on all linear layers of the blocks."""
    model, x, before = with_lora(seed, r, scale)
    assert torch.allclose(model(x), before, atol=1e-3)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(lora_parameters(model))
    assert len(lora_parameters(model)) == 2 * 4 * CONFIG.n_layer


@given(seed=st.integers(0, 50))
def test_merged_is_unmerged_and_removed_is_the_base(seed):
    model, x, before = with_lora(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for p in lora_parameters(model).values():
            p += 0.1 * torch.randn(p.shape, generator=generator)
    learnt, adapted = model(x), {k: v.clone() for k, v in model.state_dict().items()}
    assert (learnt - before).abs().max() > 0.01
    merge_lora(model)
    assert torch.allclose(model(x), learnt, atol=1e-3)
    assert model.state_dict().keys() == micro().state_dict().keys()
    again, _, _ = with_lora(seed)
    again.load_state_dict(adapted)
    remove_lora(again)
    assert all(torch.allclose(a, b, atol=1e-5)
               for a, b in zip(again.state_dict().values(), micro().state_dict().values()))


# ------------------------------------------------------------------------------------------------------------
# Every method on a model

@functools.cache
def calibration():
    """Second moments of `micro()` on random rows, for C_pre and for C_task."""
    rows = torch.randint(0, 31, (2, 40, 12), generator=torch.Generator().manual_seed(0)).tolist()
    C_pre, C_task = (second_moments(micro(), some) for some in rows)
    return {"layers": {name: {"C_pre": C_pre[name], "C_task": C_task[name]} for name in C_pre}}


def prepared(name, rank=3, scale=0.5):
    """(model ready for the method, SAdam's bases and gates, {name: trained parameter})."""
    model, args = micro(), argparse.Namespace(seed=0, rank=rank, scale=scale, tau=0.01, lam=1.0, s_min=0.3)
    method = METHODS[name]
    if method.protected:  # the 16 directions it protects are all that these layers have
        method = dataclasses.replace(method, protected=functools.partial(oplora_protected, k=4))
    spectral = train.prepare(model, method, calibration() if method.calibrated else None, args)
    return model, spectral, {n: p for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_starts_as_the_foundation(name):
    """Before the first step the logits are the foundation's, and merged weights are its weights."""
    model, x = prepared(name)[0], torch.randint(0, 31, (4, 20), generator=torch.Generator().manual_seed(1))
    assert torch.allclose(model(x), micro()(x), atol=1e-3)
    merge_lora(model)
    assert all(torch.allclose(a, b, atol=1e-5)
               for a, b in zip(model.state_dict().values(), micro().state_dict().values(), strict=True))


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_what_it_says(name):
    """A and B, or B alone, or without an adapter every parameter, or with SAdam every matrix of the blocks;
    a basis and a gate of its width for each A, or each matrix."""
    method, (model, spectral, trained) = METHODS[name], prepared(name)
    matrices = {f"{layer}.weight" for layer in block_linears(micro())}
    factors = {n for n, _ in model.named_parameters() if n.endswith(".lora_A") or n.endswith(".lora_B")}
    if name == "full":
        assert trained.keys() == {n for n, _ in micro().named_parameters()}
    elif name in ("folora-full", "full-adam", "full-ungated", "full-penalty", "folora-full-half"):
        assert trained.keys() == matrices
    elif name in ("lora-null-v2", "null-frozen", "top-frozen"):
        assert trained.keys() == {n for n in factors if n.endswith("lora_B")}
    else:
        assert trained.keys() == factors
    stepped = {n for n, p in trained.items() if p in spectral}
    assert len(stepped) == len(spectral)
    assert stepped == ({n for n in trained if not n.endswith("lora_B")} if method.steps else set())
    for p, (V, gate) in spectral.items():
        assert V.shape == (p.shape[1], p.shape[1] // 2 if name.endswith("-half") else p.shape[1])
        assert gate.shape == V.shape[1:] and (gate > 0).all() and (gate <= 1).all()


@pytest.mark.parametrize("name", METHODS)
def test_every_method_moves_what_it_trains_and_nothing_else(name):
    """Two steps: each trained parameter moved, all others are what they were, to the bit."""
    model, spectral, trained = prepared(name)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    optimizer = SAdam(trained.values(), spectral, lr=1e-3)
    x = torch.arange(24)[None]
    for _ in range(2):  # B0 = 0 gives A its first gradient in the second
        optimizer.zero_grad()
        train.loss_of(model, x, (x + 1) % 31).backward()
        optimizer.step()
    moved = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    assert moved - {"lm_head.weight"} == trained.keys()  # tied to the embedding


@pytest.mark.parametrize("r", [0, -1, 17])
def test_lora_refuses_a_rank_that_does_not_fit(r):
    with pytest.raises(ValueError, match=f"rank is {r}"):
        add_lora(micro(), r)


def test_fingerprint_sees_every_value_and_name():
    base = {"a": torch.arange(4.), "b": torch.ones(2, dtype=torch.bfloat16)}
    others = [{**base, "a": torch.tensor([0., 1, 2, 3.0000002])}, {**base, "c": base["b"]},
              {**base, "a": base["a"].view(2, 2)}, {**base, "a": base["a"].double()}]
    assert len({fingerprint(t) for t in [base, *others]}) == 5
    assert fingerprint(base) == fingerprint(dict(reversed(base.items())))


def test_what_is_saved_is_loaded_and_what_is_broken_is_named(tmp_path):
    """Whole or not at all; a truncated, foreign or executable file is refused with the command
    that makes a new one."""
    path = tmp_path / "folder" / "x.pt"
    save(path, {"kind": "adapter", "t": torch.arange(3)})
    assert load(path, "adapter", "")["t"].tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="x.pt cannot be read .it is not a found.*python train.py pretrain"):
        load(path, "foundation", "python train.py pretrain")
    with pytest.raises(TypeError):
        save(path, {"kind": "adapter", "t": (i for i in range(3))})
    assert load(path, "adapter", "")["t"].tolist() == [0, 1, 2] and list(path.parent.iterdir()) == [path]
    whole = path.read_bytes()
    for broken in whole[:-50], whole[:10], b"", pickle.dumps({"kind": print}, protocol=2):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match="cannot be read.*make it again with: python"):
            load(path, "adapter", "python train.py adapt")
    with pytest.raises(ValueError, match="is missing; make it with: python"):
        load(tmp_path / "none.pt", "adapter", "python train.py adapt")


class Bomb:
    """What a hostile checkpoint holds: unpickling it runs a command."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return pathlib.Path.touch, (self.target,)


def test_loading_executes_nothing(tmp_path):
    torch.save({"kind": "adapter", "t": Bomb(tmp_path / "executed")}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="cannot be read"):
        load(tmp_path / "x.pt", "adapter", "")
    assert not (tmp_path / "executed").exists()


def test_every_linear_of_the_blocks_is_found():
    names = {name.rsplit("h.", 1)[1] for name in block_linears(micro())}
    assert names == {f"{i}.{n}" for i in range(2)
                     for n in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")}

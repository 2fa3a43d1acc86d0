"""model.py: the transformer computes the same with a cache or without, padded or not, in one batch or
alone. LoRA begins as the identity, and merged weights are what was learned."""
import pytest
import torch
from hypothesis import given, strategies as st

from extras.moments import forward_hooks
from micro import lora_parameters
from model import (GPT, GPTConfig, LoRALinear, add_lora, block_linears, causal_attention,
                   filter_top_k_top_p, generate, merge_lora)

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


# ------------------------------------------------------------------------------------------------
# The transformer

def test_names_and_shapes_are_gpt2s():
    """GPT-2's weights can be loaded: its names, and its sizes with c_attn of 3C and an MLP of 4C."""
    shapes = {name: tuple(p.shape) for name, p in micro().state_dict().items()}
    assert shapes["transformer.wte.weight"] == (31, 16)
    assert shapes["transformer.wpe.weight"] == (24, 16)
    assert shapes["transformer.h.1.attn.c_attn.weight"] == (48, 16)
    assert shapes["transformer.h.1.attn.c_proj.bias"] == (16,)
    assert shapes["transformer.h.0.mlp.c_fc.weight"] == (64, 16)
    assert shapes["transformer.h.0.mlp.c_proj.weight"] == (16, 64)
    norms = {"transformer.h.0.ln_1.weight", "transformer.h.0.ln_2.bias", "transformer.ln_f.weight"}
    assert norms <= shapes.keys()


def test_every_linear_layer_of_the_blocks_is_found_and_no_other():
    names = {name.rsplit("h.", 1)[1] for name in block_linears(micro())}
    assert names == {f"{i}.{n}" for i in range(2)
                     for n in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")}


@pytest.mark.parametrize("change, message", [
    ({"n_layer": 0}, "n_layer is 0"), ({"n_embd": 2.0}, "n_embd is 2.0"),
    ({"block_size": 2 ** 21}, "block_size is 2097152.* from 1 to 1,048,576"),
    ({"n_layer": 1001}, "n_layer is 1001"), ({"vocab_size": True}, "vocab_size is True"),
    ({"n_head": 3}, "width is 16; it must be a multiple of heads, 3")])
def test_a_size_that_cannot_be_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**{**vars(CONFIG), **change})


def test_a_token_sees_only_its_past():
    model, x = micro(), torch.arange(12)[None] % 31
    changed = x.clone()
    changed[0, 7] = 30
    difference = (model(x) - model(changed)).abs().amax(-1)[0]
    assert (difference[:7] == 0).all() and (difference[7:] > 1e-4).all()


@given(tokens=st.integers(1, 24), rows=st.integers(1, 4), seed=st.integers(0, 99))
def test_logits_of_chosen_positions_are_those_among_all(tokens, rows, seed):
    """`only` picks positions, in the order of a mask's."""
    model, generator = micro(seed % 3), torch.Generator().manual_seed(seed)
    x = torch.randint(0, 31, (rows, tokens), generator=generator)
    only = torch.rand(rows, tokens, generator=generator) < 0.5
    only[0, 0] = True
    chosen = model(x, only=only)
    assert chosen.shape == (only.sum(), 31)
    assert torch.allclose(chosen, model(x)[only], atol=1e-4)


@given(tokens=st.integers(1, 24), heads=st.integers(1, 3),
       seed=st.integers(0, 99))
def test_attention_in_bf16_is_that_in_float32(tokens, heads, seed):
    """On a CPU it is computed in float32: the same values and gradients, to bf16's rounding."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v, weight = torch.randn(4, 2, heads, tokens, 8, generator=generator)
    results = []
    for dtype in torch.float32, torch.bfloat16:
        inputs = [t.to(dtype).requires_grad_() for t in (q, k, v)]
        y = causal_attention(*inputs)
        assert y.dtype == dtype
        results.append([y, *torch.autograd.grad((y.float() * weight).sum(), inputs)])
    for a, b in zip(*results):
        assert (a - b.float()).norm() <= 0.02 * (a.norm() + weight.norm())


def test_hooks_see_inputs_or_outputs_and_are_removed_also_after_an_error():
    """callback(name, input) before a layer runs, or callback(name, output) after it."""
    model, x = micro(), torch.arange(5)[None]
    layers, inputs, outputs = block_linears(model), {}, {}
    with forward_hooks(layers, inputs.__setitem__):
        with forward_hooks(layers, outputs.__setitem__, outputs=True):
            model(x)
    assert inputs.keys() == outputs.keys() == layers.keys()
    assert all(torch.equal(layer(inputs[name]), outputs[name]) for name, layer in layers.items())
    with pytest.raises(KeyboardInterrupt), forward_hooks(layers, inputs.__setitem__):
        raise KeyboardInterrupt
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers.values())


# ------------------------------------------------------------------------------------------------
# Generation

def generate_without_cache(model, prompts, new, stop=(), decoding=None, least=0, generator=None):
    """What `generate` does, row by row from the whole text."""
    rows = [list(prompt) for prompt in prompts]
    for step in range(new):
        logits = torch.stack([model(torch.tensor([row]))[0, -1] for row in rows]).detach()
        logits[:, stop if step < least else []] = -torch.inf
        if decoding is None:
            chosen = logits.argmax(-1)
        else:
            probs = filter_top_k_top_p(logits, *decoding).softmax(-1)
            chosen = torch.multinomial(probs, 1, generator=generator)[:, 0]
        rows = [[*row, token] for row, token in zip(rows, chosen.tolist())]
    written = [row[len(prompt):] for row, prompt in zip(rows, prompts)]
    return [row[:next((i for i, token in enumerate(row) if token in stop), new)] for row in written]


@given(prompts=prompts_of_any_length, new=st.integers(1, 12), seed=st.integers(0, 5),
       aligned=st.booleans())
def test_greedy_with_cache_is_greedy_without(prompts, new, seed, aligned):
    """A KV cache changes nothing, for prompts of different lengths in one batch or of one length."""
    prompts = [prompt[:1] for prompt in prompts] if aligned else prompts
    assert (generate(micro(seed), prompts, new)
            == generate_without_cache(micro(seed), prompts, new))


@given(prompts=prompts_of_any_length, new=st.integers(1, 12), seed=st.integers(0, 5))
def test_sampling_with_cache_is_sampling_without(prompts, new, seed):
    model, rows = micro(seed), len(prompts)
    decoding = torch.full((rows,), 1.2), torch.full((rows,), 0.9), torch.full((rows,), 8)
    a, b = (way(model, prompts, new, [3], decoding, 2, torch.Generator().manual_seed(seed))
            for way in (generate, generate_without_cache))
    assert a == b and all(3 not in row for row in a)
    assert all(len(row) >= min(2, new) for row in a), "no stop token before min_new_tokens"


@given(prompts=prompts_of_any_length)
def test_answers_do_not_depend_on_the_batch(prompts):
    model = micro()
    alone = [generate(model, [prompt], 6, [3])[0] for prompt in prompts]
    assert generate(model, prompts, 6, [3]) == alone


def test_top_k_top_p_and_temperature_by_hand():
    """Probabilities .5 .3 .15 .05: top-p 0.6 keeps two tokens, top-k 3 keeps three,
    temperature 1/2 squares the odds."""
    logits = torch.tensor([[0.05, 0.5, 0.15, 0.3]]).log().expand(4, -1)
    kept = filter_top_k_top_p(logits, torch.tensor([1., 1., 0.5, 1.]),
                              torch.tensor([0.6, 1., 1., 1e-9]), torch.tensor([4, 3, 4, 4]))
    probs = kept.softmax(-1)
    assert torch.allclose(probs[0], torch.tensor([0, 0.5, 0, 0.3]) / 0.8)
    assert torch.allclose(probs[1], torch.tensor([0, 0.5, 0.15, 0.3]) / 0.95)
    squares = torch.tensor([0.05, 0.5, 0.15, 0.3]) ** 2
    assert torch.allclose(probs[2], squares / squares.sum())
    assert torch.allclose(probs[3], torch.tensor([0., 1, 0, 0])), "the likeliest token always stays"


def test_what_does_not_fit_the_context_is_refused():
    with pytest.raises(ValueError, match="context of 24"):
        generate(micro(), [[1] * 20], 10)
    with pytest.raises(ValueError, match="at least one token"):
        generate(micro(), [[]], 3)
    with pytest.raises(ValueError, match="context of 24"):
        micro()(torch.zeros(1, 25, dtype=torch.long))


# ------------------------------------------------------------------------------------------------
# LoRA

def with_lora(seed, r=3, scale=0.7):
    """(model with adapters that start somewhere, its input, the output before)."""
    generator = torch.Generator().manual_seed(seed)
    model, x = micro(), torch.randint(0, 31, (2, 9), generator=generator)
    before = model(x)
    for layer in add_lora(model, r, scale).values():
        layer.init_from(*(0.1 * torch.randn(p.shape, generator=generator)
                          for p in (layer.lora_A, layer.lora_B)))
    return model, x, before


@given(seed=st.integers(0, 50), r=st.integers(1, 16), scale=st.sampled_from([0.5, 1.0, 4.0]))
def test_an_adapter_starts_as_the_identity(seed, r, scale):
    """W_res + κB0A0 = W0 whatever the start; only A and B are trained, on all linear layers of the
    blocks."""
    model, x, before = with_lora(seed, r, scale)
    assert torch.allclose(model(x), before, atol=1e-3)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == set(lora_parameters(model))
    assert len(trained) == 2 * 4 * CONFIG.n_layer


@given(seed=st.integers(0, 50))
def test_merged_is_unmerged_and_removed_is_the_base(seed):
    model, x, before = with_lora(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for p in lora_parameters(model).values():
            p += 0.1 * torch.randn(p.shape, generator=generator)
    learned, adapted = model(x), {k: v.clone() for k, v in model.state_dict().items()}
    assert (learned - before).abs().max() > 0.01
    merge_lora(model)
    assert torch.allclose(model(x), learned, atol=1e-3)
    assert model.state_dict().keys() == micro().state_dict().keys()
    again, _, _ = with_lora(seed)
    again.load_state_dict(adapted)
    merge_lora(again, learned=False)
    assert not block_linears(again, LoRALinear)
    assert all(torch.allclose(a, b, atol=1e-5)
               for a, b in zip(again.state_dict().values(), micro().state_dict().values()))


@pytest.mark.parametrize("r, scale, message", [
    (0, 1.0, "rank is 0"), (-1, 1.0, "rank is -1"), (17, 1.0, "rank is 17"),
    (3, 0.0, "scale is 0"), (3, -1.0, "scale is -1"), (3, float("nan"), "scale is nan")])
def test_a_rank_or_scale_that_does_not_fit_is_refused(r, scale, message):
    with pytest.raises(ValueError, match=message):
        add_lora(micro(), r, scale)

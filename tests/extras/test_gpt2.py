"""GPT-2's weights in, merged weights or a PEFT adapter out: the logits are the reference
implementation's, and what was exported computes what the model does."""
import json
import os
import struct

import pytest
import torch

import calibrate
import eval as evaluation
import train
from extras.files import load_adapter, load_foundation
from extras.gpt2 import from_gpt2, gpt2_layout
from extras.published import read_published, read_safetensors
from extras.user_data import evaluation_items
from micro import ADAPT, CALIBRATE, FOLDER, PRETRAIN, adapt
from model import GPT, GPTConfig, LoRALinear, block_linears

VOCAB, CONTEXT, LAYERS, HEADS, WIDTH = 11, 7, 2, 3, 12
# what transformers 5.23 (GPT2LMHeadModel) computes with the weights of `formula` after tokens 1 5 9 2:
# its logits of tokens 0, 4 and 10 at every position
REFERENCE = [[1.26255, -0.81491, 1.03301], [0.24448, -0.25439, 0.27303],
             [0.9534, -1.13387, 1.17192], [1.14294, -0.58983, 0.82338]]


def formula():
    """Weights in GPT-2's layout: the i-th tensor is 0.2 sin((i + 1)(j + 1)) at its j-th place, and one
    more for the scales of the norms."""
    block = {"ln_1.weight": (WIDTH,), "ln_1.bias": (WIDTH,),
             "attn.c_attn.weight": (WIDTH, 3 * WIDTH), "attn.c_attn.bias": (3 * WIDTH,),
             "attn.c_proj.weight": (WIDTH, WIDTH), "attn.c_proj.bias": (WIDTH,),
             "ln_2.weight": (WIDTH,), "ln_2.bias": (WIDTH,),
             "mlp.c_fc.weight": (WIDTH, 4 * WIDTH), "mlp.c_fc.bias": (4 * WIDTH,),
             "mlp.c_proj.weight": (4 * WIDTH, WIDTH), "mlp.c_proj.bias": (WIDTH,)}
    shapes = {"wte.weight": (VOCAB, WIDTH), "wpe.weight": (CONTEXT, WIDTH),
              **{f"h.{i}.{name}": shape for i in range(LAYERS) for name, shape in block.items()},
              "ln_f.weight": (WIDTH,), "ln_f.bias": (WIDTH,)}
    weights = {}
    for i, (name, shape) in enumerate(shapes.items()):
        j = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
        one = "ln_" in name and name.endswith("weight")
        weights[name] = (0.2 * torch.sin((i + 1) * (j + 1)) + one).float().reshape(shape)
    return weights


# ------------------------------------------------------------------------------------------------
# In

def test_logits_are_those_of_the_reference_implementation():
    logits = from_gpt2(formula(), HEADS)(torch.tensor([[1, 5, 9, 2]]))[0]
    assert torch.allclose(logits[:, [0, 4, 10]], torch.tensor(REFERENCE), atol=1e-5)


def test_what_is_written_is_what_was_read():
    """With and without the prefix, the masks and the tied output that checkpoints carry."""
    weights = formula()
    for name, t in gpt2_layout(from_gpt2(weights, HEADS)).items():
        assert torch.equal(t, weights[name])
    carried = {f"transformer.{name}": t for name, t in weights.items()}
    carried |= {"lm_head.weight": weights["wte.weight"],
                "transformer.h.0.attn.bias": torch.ones(1, 1, 7, 7),
                "transformer.h.1.attn.masked_bias": torch.tensor(-1e4)}
    assert gpt2_layout(from_gpt2(carried, HEADS)).keys() == weights.keys()


@pytest.mark.parametrize("spoil, message", [
    (lambda w: w.pop("h.1.mlp.c_fc.bias"), "Missing key.*h.1.mlp.c_fc.bias"),
    (lambda w: w.update({"h.0.attn.rotary": torch.ones(2)}), "Unexpected key.*h.0.attn.rotary"),
    (lambda w: w.update({"h.0.mlp.c_fc.weight": w["h.0.mlp.c_fc.weight"].T}),
     "size mismatch for transformer.h.0.mlp.c_fc.weight"),
    (lambda w: w.pop("wte.weight"), "these are not GPT-2's weights"),
    (lambda w: [w.pop(name) for name in list(w) if name.startswith("h.")], "n_layer is 0")])
def test_weights_that_do_not_fit_are_named(spoil, message):
    weights = formula()
    spoil(weights)
    with pytest.raises((ValueError, RuntimeError), match=message):
        from_gpt2(weights, HEADS)


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="width is 12; it must be a multiple of heads, 5"):
        from_gpt2(formula(), 5)


def test_a_file_or_folder_is_read_and_a_broken_one_named(tmp_path):
    torch.save(formula(), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps({"n_head": HEADS}))
    assert read_published(str(tmp_path / "pytorch_model.bin"), 0)[0].config.n_head == 1
    model, _ = read_published(str(tmp_path), 0)
    assert model.config.n_head == HEADS and gpt2_layout(model).keys() == formula().keys()
    whole = (tmp_path / "pytorch_model.bin").read_bytes()
    (tmp_path / "pytorch_model.bin").write_bytes(whole[:len(whole) // 2])
    for source in tmp_path, tmp_path / "missing", tmp_path / "pytorch_model.bin":
        with pytest.raises(ValueError, match="cannot be read"):
            read_published(str(source), 0)


def write_safetensors(path, weights, dtype="F32"):
    """The format by hand: the length of a JSON header, the header, the raw tensors."""
    header, raw = {"__metadata__": {"format": "pt"}}, b""
    for name, t in weights.items():
        content = t.contiguous().numpy().tobytes()
        header[name] = {"dtype": dtype, "shape": list(t.shape),
                        "data_offsets": [len(raw), len(raw) + len(content)]}
        raw += content
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + raw)


def test_safetensors_are_read_without_their_package(tmp_path):
    """Alone, or in a folder before pytorch_model.bin; a broken one is named."""
    path, weights = tmp_path / "model.safetensors", formula()
    write_safetensors(path, weights | {"scalar": torch.tensor(2.5)})
    found = read_safetensors(path)
    assert found.pop("scalar") == 2.5
    assert all(torch.equal(found[name], t) for name, t in weights.items())
    write_safetensors(path, weights)
    (tmp_path / "pytorch_model.bin").write_bytes(b"not read")
    for source in path, tmp_path:
        found = gpt2_layout(read_published(str(source), 0)[0])
        assert all(torch.equal(found[name], t) for name, t in weights.items())
    whole = path.read_bytes()
    for broken in whole[:-5], whole[:20], b"", whole.replace(b'"F32"', b'"F8X"'):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match="model.safetensors cannot be read"):
            read_published(str(path), 0)


def test_a_download_that_fails_says_where_the_file_is(tmp_path, monkeypatch):
    def fail(url, path, *_, **__):
        raise OSError("no network")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    with pytest.raises(ValueError, match="no network.*openai-community/gpt2-xl/resolve"):
        read_published("gpt2-xl", 0)
    monkeypatch.setattr(torch.hub, "download_url_to_file",
                        lambda url, path, *_, **__: torch.save(formula(), path))
    first, _ = read_published("gpt2", 0)
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    again, _ = read_published("gpt2", 0)  # from the cache
    assert torch.equal(first.lm_head.weight, again.lm_head.weight)


# ------------------------------------------------------------------------------------------------
# Out

@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """Adapters of all kinds on a micro model."""
    out = tmp_path_factory.mktemp("export")
    train.main(f"pretrain {PRETRAIN} --out {out}".split())
    calibrate.main(f"--task code {CALIBRATE} --out {out}".split())
    for options in "--method folora", "--method full":
        adapt(options, out)
    return out


def adapter(out, method, folder=FOLDER):
    return next(out.glob(f"code/{method}-lr*-seed0{folder}")) / "adapter.pt"


@pytest.mark.parametrize("method", [None, "folora", "full"])
def test_merged_weights_are_a_foundation_again(out, tmp_path, method):
    """What is exported can be read back as a foundation: the same logits."""
    arguments = ["--format", "merged", "--adapter", str(adapter(out, method))] if method else []
    train.main(["export", "--to", str(tmp_path), "--out", str(out), *arguments])
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["n_layer"], config["n_embd"], config["activation_function"]) == (1, 16, "gelu")
    again, _ = read_published(str(tmp_path), 0)
    again.transformer.h[0].mlp.gelu.approximate = "none"
    model = (load_adapter(adapter(out, method), out, "cpu") if method
             else load_foundation(out, "cpu")[0])
    x = torch.arange(96)[None]
    assert torch.equal(again(x), model(x))


def test_a_peft_adapter_on_the_untouched_foundation_is_the_model(out, tmp_path):
    """W0 + BA from the files alone, as PEFT adds it (alpha = r, so a scale of 1)."""
    train.main(["export", "--adapter", str(adapter(out, "folora")), "--to", str(tmp_path),
                "--out", str(out)])
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 4 and config["fan_in_fan_out"]
    weights = torch.load(tmp_path / "adapter_model.bin", weights_only=True)
    model, _ = load_foundation(out, "cpu")
    layers, x = block_linears(model), torch.arange(96)[None]
    before = model(x).detach()
    assert len(weights) == 2 * len(layers)
    with torch.no_grad():
        for name, layer in layers.items():
            A, B = (weights[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
            layer.weight += B @ A
    adapted = load_adapter(adapter(out, "folora"), out, "cpu")(x)
    assert torch.allclose(model(x), adapted, atol=1e-5) and (adapted - before).abs().max() > 1e-3
    assert not block_linears(model, LoRALinear)


def test_what_no_peft_adapter_can_hold_is_refused(out, tmp_path):
    with pytest.raises(ValueError, match="full weights.*--format merged"):
        train.main(["export", "--adapter", str(adapter(out, "full")),
                    "--to", str(tmp_path / "x"), "--out", str(out)])
    assert not (tmp_path / "x").exists()


@pytest.mark.skipif(not os.environ.get("TIKTOKEN_CACHE_DIR"), reason="needs GPT-2's vocabulary")
def test_a_gpt2_checkpoint_runs_through_all_stages(tmp_path):
    """A GPT-2 of one block and its tokenizer: calibrated, adapted, evaluated."""
    model, out = GPT(GPTConfig(128, 50257, 1, 1, 8)), str(tmp_path / "out")
    torch.save({name: t.contiguous() for name, t in gpt2_layout(model).items()},
               tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text('{"n_head": 2}')
    train.main(["pretrain", "--foundation", str(tmp_path), "--out", out])
    settings = torch.load(tmp_path / "out" / "foundation.pt", weights_only=True)["settings"]
    assert settings["config"]["encoding"] == "gpt2" and settings["config"]["gelu"] == "tanh"
    measure = [*CALIBRATE.split(), "--samples", "4", "--max-new", "40"]
    calibrate.main(["--task", "code", *measure, "--out", out])
    path = train.main(["adapt", "--task", "code", "--method", "lora-kl-leading", *ADAPT.split(),
                       "--out", out])
    items = evaluation_items("code", "test", 3)
    scores = evaluation.evaluate(load_adapter(path, out, "cpu"), items, "test", rows=2)
    assert set(scores["kept"]) == {"facts", "lookup", "sums", "words"}
    assert 3 < scores["text"]["prose"]["score"] < 5  # 15.6 bits a token, of some 4 bytes

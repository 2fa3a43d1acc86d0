"""GPT-2's weights in, merged weights or a PEFT adapter out."""
import json
import os

import pytest
import torch

import calibrate
import eval as evaluation
import model as model_module
import tasks
import train
from model import LoRALinear, block_linears, from_gpt2, gpt2_layout, read_gpt2
from test_main import ADAPT, CALIBRATE, OPTIONS, PRETRAIN

VOCAB, CONTEXT, LAYERS, HEADS, WIDTH = 11, 7, 2, 3, 12
# what transformers 5.23 (GPT2LMHeadModel) says with the weights of `formula` after tokens 1 5 9 2: its
# logits of tokens 0, 4 and 10 at every position
REFERENCE = [[1.26255, -0.81491, 1.03301], [0.24448, -0.25439, 0.27303], [0.9534, -1.13387, 1.17192],
             [1.14294, -0.58983, 0.82338]]


def formula():
    """Weights in GPT-2's layout: the i-th tensor is 0.2 sin((i + 1)(j + 1)) at its j-th place, and one more
    for the scales of the norms."""
    block = {"ln_1.weight": (WIDTH,), "ln_1.bias": (WIDTH,), "attn.c_attn.weight": (WIDTH, 3 * WIDTH),
             "attn.c_attn.bias": (3 * WIDTH,), "attn.c_proj.weight": (WIDTH, WIDTH),
             "attn.c_proj.bias": (WIDTH,), "ln_2.weight": (WIDTH,), "ln_2.bias": (WIDTH,),
             "mlp.c_fc.weight": (WIDTH, 4 * WIDTH), "mlp.c_fc.bias": (4 * WIDTH,),
             "mlp.c_proj.weight": (4 * WIDTH, WIDTH), "mlp.c_proj.bias": (WIDTH,)}
    shapes = {"wte.weight": (VOCAB, WIDTH), "wpe.weight": (CONTEXT, WIDTH),
              **{f"h.{i}.{name}": shape for i in range(LAYERS) for name, shape in block.items()},
              "ln_f.weight": (WIDTH,), "ln_f.bias": (WIDTH,)}
    weights = {}
    for i, (name, shape) in enumerate(shapes.items()):
        j = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
        scale = "ln_" in name and name.endswith("weight")
        weights[name] = (0.2 * torch.sin((i + 1) * (j + 1)) + scale).float().reshape(shape)
    return weights


def test_logits_are_those_of_the_reference_implementation():
    logits = from_gpt2(formula(), HEADS)(torch.tensor([[1, 5, 9, 2]]))[0]
    assert torch.allclose(logits[:, [0, 4, 10]], torch.tensor(REFERENCE), atol=1e-5)


def test_the_layout_is_read_and_written_alike():
    """With and without the prefix, the masks and the tied output that checkpoints carry."""
    weights = formula()
    for name, t in gpt2_layout(from_gpt2(weights, HEADS)).items():
        assert torch.equal(t, weights[name])
    carried = {f"transformer.{name}": t for name, t in weights.items()}
    carried |= {"lm_head.weight": weights["wte.weight"], "transformer.h.0.attn.bias": torch.ones(1, 1, 7, 7),
                "transformer.h.1.attn.masked_bias": torch.tensor(-1e4)}
    assert gpt2_layout(from_gpt2(carried, HEADS)).keys() == weights.keys()


@pytest.mark.parametrize("spoil, message", [
    (lambda w: w.pop("h.1.mlp.c_fc.bias"), "h.1.mlp.c_fc.bias is missing"),
    (lambda w: w.update({"h.0.attn.rotary": torch.ones(2)}), "h.0.attn.rotary is unknown"),
    (lambda w: w.update({"h.0.mlp.c_fc.weight": w["h.0.mlp.c_fc.weight"].T}), r"c_fc.* has the shape \(48"),
    (lambda w: w.update({"lm_head.weight": w["wte.weight"] + 1}), "GPT-2 ties them"),
    (lambda w: w.pop("wte.weight"), "these are not GPT-2's weights"),
    (lambda w: w.update({"wpe.weight": torch.ones(3)}), "these are not GPT-2's weights"),
    (lambda w: [w.pop(name) for name in list(w) if name.startswith("h.")], "n_layer is 0")])
def test_weights_that_do_not_fit_are_named(spoil, message):
    weights = formula()
    spoil(weights)
    with pytest.raises(ValueError, match=message):
        from_gpt2(weights, HEADS)


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="width is 12; it must be a multiple of heads, 5"):
        from_gpt2(formula(), 5)


def test_a_file_or_folder_is_read_and_a_broken_one_named(tmp_path):
    torch.save(formula(), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps({"n_head": HEADS}))
    assert read_gpt2(str(tmp_path / "pytorch_model.bin"))[1] is None
    weights, heads = read_gpt2(str(tmp_path))
    assert heads == HEADS and weights.keys() == formula().keys()
    whole = (tmp_path / "pytorch_model.bin").read_bytes()
    (tmp_path / "pytorch_model.bin").write_bytes(whole[:len(whole) // 2])
    for source in tmp_path, tmp_path / "missing", tmp_path / "pytorch_model.bin":
        with pytest.raises(ValueError, match="cannot be read"):
            read_gpt2(str(source))


def test_a_download_that_fails_says_where_the_file_is(tmp_path, monkeypatch):
    def fail(url, path):
        raise OSError("no network")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    with pytest.raises(ValueError, match="no network.*openai-community/gpt2-xl/resolve"):
        read_gpt2("gpt2-xl")
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda url, path: torch.save(formula(), path))
    assert read_gpt2("gpt2")[0].keys() == formula().keys()
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    assert read_gpt2("gpt2")[0].keys() == formula().keys()  # from the cache


def test_a_vocabulary_that_is_not_there_is_named(monkeypatch):
    def fail(name):
        raise ConnectionError
    monkeypatch.setattr(tasks.tiktoken, "get_encoding", fail)
    tasks.encoding_called.cache_clear()
    with pytest.raises(ValueError, match="vocabulary of gpt2.*TIKTOKEN_CACHE_DIR"):
        tasks.encoding_called("gpt2")


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """Adapters of all kinds on a micro model."""
    out = tmp_path_factory.mktemp("export")
    evaluation.main(["--task", "code", "--methods", "folora", "full", "--pretrain", PRETRAIN, "--calibrate",
                     CALIBRATE, "--adapt", ADAPT, "--out", str(out)])
    train.main(f"adapt --task code --method folora {ADAPT} --rank 9 --out {out}".split())
    return out


def adapter(out, method, options=OPTIONS):
    return next(out.glob(f"code/{method}-lr*-seed0{options}")) / "adapter.pt"


@pytest.mark.parametrize("method", [None, "folora", "full"])
def test_merged_weights_are_a_foundation_again(out, tmp_path, method):
    """What is exported can be read back as a foundation: the same logits."""
    arguments = ["--format", "merged", "--adapter", str(adapter(out, method))] if method else []
    train.main(["export", "--to", str(tmp_path), "--out", str(out), *arguments])
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["n_layer"], config["n_embd"], config["activation_function"]) == (1, 16, "gelu")
    weights, heads = read_gpt2(str(tmp_path))
    again = from_gpt2(weights, heads)
    again.transformer.h[0].mlp.gelu.approximate = "none"
    model = (train.load_adapter(adapter(out, method), out, "cpu") if method
             else train.load_foundation(out, "cpu")[0])
    x = torch.arange(96)[None]
    assert torch.equal(again(x), model(x))


def test_peft_adapter_on_the_untouched_foundation_is_the_model(out, tmp_path):
    """W0 + BA from the files alone, as PEFT adds it (alpha = r, so a scale of 1)."""
    train.main(["export", "--adapter", str(adapter(out, "folora")), "--to", str(tmp_path), "--out", str(out)])
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 4 and config["fan_in_fan_out"]
    weights = torch.load(tmp_path / "adapter_model.bin", weights_only=True)
    model, _ = train.load_foundation(out, "cpu")
    layers = block_linears(model)
    assert len(weights) == 2 * len(layers)
    with torch.no_grad():
        for name, layer in layers.items():
            A, B = (weights[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
            layer.weight += B @ A
    x = torch.arange(96)[None]
    assert torch.allclose(model(x), train.load_adapter(adapter(out, "folora"), out, "cpu")(x), atol=1e-5)
    assert not block_linears(model, LoRALinear)


@pytest.mark.parametrize("method, options, message", [
    ("full", OPTIONS, "full weights.*--format merged"),
    ("folora", OPTIONS.replace("rank2", "rank9"), "rank 18 = 2r is more than.*--format merged")])
def test_what_no_peft_adapter_can_hold_is_refused(out, tmp_path, method, options, message):
    with pytest.raises(ValueError, match=message):
        train.main(["export", "--adapter", str(adapter(out, method, options)), "--to", str(tmp_path / "x"),
                    "--out", str(out)])
    assert not (tmp_path / "x").exists()


@pytest.mark.skipif(not os.environ.get("TIKTOKEN_CACHE_DIR"), reason="needs GPT-2's vocabulary")
def test_a_gpt2_checkpoint_runs_through_all_stages(tmp_path):
    """A GPT-2 of one block and its tokenizer: calibrated, adapted, evaluated."""
    model, out = model_module.GPT(model_module.GPTConfig(128, 50257, 1, 1, 8)), str(tmp_path / "out")
    torch.save({name: t.contiguous() for name, t in gpt2_layout(model).items()},
               tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text('{"n_head": 2}')
    train.main(["pretrain", "--foundation", str(tmp_path), "--out", out])
    settings = torch.load(tmp_path / "out" / "foundation.pt", weights_only=True)["settings"]
    assert settings["config"]["encoding"] == "gpt2" and settings["config"]["gelu"] == "tanh"
    calibrate.main(["--task", "code", *CALIBRATE.split(), "--samples", "4", "--max-new", "40", "--out", out])
    path = train.main(["adapt", "--task", "code", "--method", "folora-kl", *ADAPT.split(), "--out", out])
    items = evaluation.items_of("code", "test", 3)
    scores = evaluation.evaluate(train.load_adapter(path, out, "cpu"), items, "test", rows=2)
    assert set(scores["kept"]) == {"facts", "lookup", "sums", "words"}
    assert 3 < scores["text"]["prose"]["score"] < 5  # 15.6 bits a token, of some 4 bytes

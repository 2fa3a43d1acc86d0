"""A Llama through all stages, and out again: merged weights and PEFT adapters compute what the
model does."""
import json

import pytest
import torch

import calibrate
import eval as evaluation
import tasks
import train
from extras.files import load_adapter, load_foundation
from extras.llama import Llama
from extras.published import read_published
from extras.user_data import evaluation_items
from micro import ADAPT, CALIBRATE, FOLDER, adapt, error_line
from model import LoRALinear, block_linears
from tiny_llama import needs_smollm2, tiny, write_folder

METHODS = "folora", "lora", "sadam-full"


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """A random Llama of 256 tokens' context, read from a folder, calibrated and adapted."""
    folder, out = tmp_path_factory.mktemp("llama"), tmp_path_factory.mktemp("out")
    write_folder(folder, tiny(vocab=265, context=256, std=0.1))
    train.main(f"pretrain --foundation {folder} --context 200 --out {out}".split())
    calibrate.main(f"--task code {CALIBRATE} --samples 8 --out {out}".split())
    for method in METHODS:
        adapt(f"--method {method}", out)
    return out


def adapter(out, method, folder=FOLDER):
    return next(out.glob(f"code/{method}-lr*-seed0{folder}")) / "adapter.pt"


def tokens():
    return torch.randint(265, (2, 60), generator=torch.Generator().manual_seed(3))


def test_a_llama_runs_through_all_stages(out):
    """Every command works on it as on a GPT; the text it is scored on is its own tokenizer's."""
    model, _ = load_foundation(out, "cpu")
    assert isinstance(model, Llama) and model.config.block_size == 200
    items, scores = evaluation_items("code", "test", 3, config=model.config), {}
    for method in METHODS:
        adapted = load_adapter(adapter(out, method), out, "cpu")
        assert not block_linears(adapted, LoRALinear)
        assert (adapted(tokens()) - model(tokens())).abs().max() > 1e-3
        scores[method] = evaluation.evaluate(adapted, items, "test", rows=2)
        assert set(scores[method]["kept"]) == {"facts", "lookup", "sums", "words"}
        assert 4 < scores[method]["text"]["prose"]["score"] < 12  # about 8 bits a byte: random


def test_the_same_command_again_does_nothing(out, capsys):
    train.main(["adapt", "--task", "code", "--method", "folora", *ADAPT.split(), "--out", str(out)])
    assert "is up to date" in capsys.readouterr().out


def test_merged_weights_are_a_foundation_again(out, tmp_path):
    for source, options in {"base": [], "merged": ["--format", "merged", "--adapter",
                                                    str(adapter(out, "sadam-full"))]}.items():
        folder = tmp_path / source
        train.main(["export", "--to", str(folder), "--out", str(out), *options])
        model = (load_adapter(adapter(out, "sadam-full"), out, "cpu") if options
                 else load_foundation(out, "cpu")[0])
        read, more = read_published(str(folder), 200)
        assert torch.equal(read(tokens()), model(tokens())) and read.config == model.config
        assert more["tokenizer"] == tasks.get_encoding(model.config.encoding).tokenizer


@torch.no_grad()
def test_a_peft_adapter_on_the_untouched_foundation_is_the_model(out, tmp_path):
    """W0 + BA from the files alone, as PEFT adds it (alpha = r, so a scale of 1)."""
    train.main(["export", "--adapter", str(adapter(out, "folora")), "--to", str(tmp_path),
                "--out", str(out)])
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 4 and not config["fan_in_fan_out"]
    assert config["target_modules"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj",
                                        "up_proj", "v_proj"]
    weights = torch.load(tmp_path / "adapter_model.bin", weights_only=True)
    model, _ = load_foundation(out, "cpu")
    for name, layer in block_linears(model).items():
        A, B = (weights.pop(f"base_model.model.{name}.lora_{x}.weight") for x in "AB")
        layer.weight += B @ A
    assert not weights
    adapted = load_adapter(adapter(out, "folora"), out, "cpu")
    assert torch.allclose(model(tokens()), adapted(tokens()), atol=1e-4)


@torch.no_grad()
def test_transformers_and_peft_compute_what_the_model_does(out, tmp_path):
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    for name, options in {"base": [], "adapter": ["--adapter", str(adapter(out, "folora"))],
                          "merged": ["--adapter", str(adapter(out, "lora")), "--format", "merged"],
                          }.items():
        train.main(["export", "--to", str(tmp_path / name), "--out", str(out), *options])
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    own = tasks.get_encoding(load_foundation(out, "cpu")[0].config.encoding)
    assert tokenizer("the thing 12").input_ids == own.encode_ordinary("the thing 12")
    assert tokenizer.eos_token_id == own.eot_token
    read = transformers.AutoModelForCausalLM.from_pretrained
    base, merged = read(tmp_path / "base").eval(), read(tmp_path / "merged").eval()
    expected = load_foundation(out, "cpu")[0](tokens())
    assert (base(tokens()).logits - expected).abs().max() < 1e-4
    expected = load_adapter(adapter(out, "lora"), out, "cpu")(tokens())
    assert (merged(tokens()).logits - expected).abs().max() < 1e-4
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    expected = load_adapter(adapter(out, "folora"), out, "cpu")(tokens())
    assert (adapted(tokens()).logits - expected).abs().max() < 1e-4


@torch.no_grad()
def test_smollm2_computes_the_same_in_transformers_and_peft(tmp_path):
    """In float64: in float32 either program's rounding moves its logits, up to 32, by 1e-4."""
    needs_smollm2()
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    rows, out = tmp_path / "rows.jsonl", ["--out", str(tmp_path)]
    rows.write_text("".join(f'{{"prompt": "{n} + 1 =", "completion": " {n + 1}"}}\n'
                            for n in range(20)))
    train.main(["pretrain", "--foundation", "smollm2", "--context", "64", *out])
    with torch.enable_grad():
        path = train.main(["adapt", "--task", str(rows), "--method", "lora", "--rank", "8", "--lr",
                           "0.01", "--steps", "4", "--batch", "4", *out])
    for name, options in ("base", []), ("adapter", ["--adapter", str(path)]):
        train.main(["export", "--to", str(tmp_path / name), *options, *out])
    x = torch.randint(49152, (2, 60), generator=torch.Generator().manual_seed(3))
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base").double()
    plain = base(x).logits
    assert (plain - load_foundation(tmp_path, "cpu")[0].double()(x)).abs().max() < 1e-4
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").double()(x).logits
    assert (adapted - plain).abs().max() > 0.1
    assert (adapted - load_adapter(path, tmp_path, "cpu").double()(x)).abs().max() < 1e-4


def test_a_rank_that_the_narrow_key_and_value_layers_cannot_have(out, capsys):
    """Their outputs are 16: an adapter's rank is at most that."""
    arguments = f"adapt --task code {ADAPT} --out {out} --rank"
    assert "rank is 17; a layer of 16 x 48 takes 1 to 16" in error_line(
        capsys, train.main, f"{arguments} 17")


def test_layers_that_read_one_input_share_an_eigenproblem_and_a_basis(out):
    """Of a block's seven layers q, k and v do, and gate and up: four problems, four bases."""
    found, before = [], train.solve_once.cache_info().misses

    def loop(model, optimizers, *_, **__):
        found.extend(basis for basis, _ in optimizers[0].spectral.values())
        return []
    for method in METHODS[::2]:
        adapt(f"--method {method} --lr 0.123", out, loop=loop)
        assert (len(found), len({basis.data_ptr() for basis in found})) == (2 * 7, 2 * 4)
        found.clear()
    assert train.solve_once.cache_info().misses - before == 2 * 2 * 4

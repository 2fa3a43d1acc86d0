"""The parts of an adapter's drift."""
import pytest
import torch

import train
from extras.files import load, load_adapter, load_foundation
from micro import ADAPT, error_line, out  # noqa: F401 (a fixture)
from model import LoRALinear, block_linears
from study import __main__ as study, drift
from study.runs import Foundation


def test_the_parts_by_hand(out):
    """From B0 = 0 the part of ΔA alone is nothing; the others and their products make ΔW's."""
    path = train.main(f"adapt --task code --method lora {ADAPT} --out {out}".split())
    model = load_adapter(path, out, "cpu", merge=False)
    C_pre = load(out / "proxy.pt", "proxy", "")["C_pre"]
    found, total, mixed = drift.parts_of_drift(model, C_pre), 0, 0
    for name, layer in block_linears(model, LoRALinear).items():
        A, B, A0, C = (t.detach().double() for t in (layer.lora_A, layer.lora_B, layer.lora_A0,
                                                     C_pre[name]))
        total += torch.trace(B @ A @ C @ A.T @ B.T).item()
        mixed += 2 * torch.trace(B @ A0 @ C @ (A - A0).T @ B.T).item()
    assert found["ΔA alone"] == 0 < found["ΔB alone"]
    assert found["ΔW"] == pytest.approx(total)
    assert found["ΔB alone"] + found["their product"] + mixed == pytest.approx(total)


def test_a_row_for_each_adapter(out, capsys):
    paths = [train.main(f"adapt --task code --method {method} {ADAPT} --out {out}".split())
             for method in ("lora", "folora")]
    capsys.readouterr()
    study.main(["drift", *map(str, paths), "--out", str(out)])
    head, _, lora, folora = capsys.readouterr().out.strip().split("\n")
    assert "their product" in head and "| lora-lr" in lora and "| folora-lr" in folora
    assert lora.count("|") == head.count("|") == 8
    proxy = load(out / "proxy.pt", "proxy", "")
    kl = drift.estimated_kl(load_adapter(paths[0], out, "cpu", merge=False), proxy)
    merged = Foundation(out).measures(load_adapter(paths[0], out, "cpu"))
    assert kl == pytest.approx(merged["kl"], rel=1e-3) and f"{1000 * kl:.1f} |" in lora
    full = train.main(f"adapt --task code --method full {ADAPT} --out {out}".split())
    assert "holds full weights" in error_line(capsys, study.main, f"drift {full} --out {out}")


def test_the_divergence_by_hand():
    """Of two models whose logits differ by a known amount: KL of two distributions over 4 tokens."""
    p, q = torch.tensor([0.7, 0.1, 0.1, 0.1]), torch.tensor([0.4, 0.3, 0.2, 0.1])
    rows = torch.zeros(9, 6, dtype=torch.long)

    def always(probabilities):
        return lambda x, only: probabilities.log().expand(only.sum(), 4)

    expected = (p * (p / q).log()).sum().item()
    assert drift.kl_divergence(always(p), always(q), rows) == pytest.approx(expected)
    assert drift.kl_divergence(always(p), always(p), rows) == 0


def test_own_text_is_seeded_and_whole(out):
    base, _ = load_foundation(out, "cpu")
    text = drift.own_text(base)
    assert text.shape == (drift.TEXTS, base.config.block_size + 1)
    assert torch.equal(text, drift.own_text(base)) and not torch.equal(text, drift.own_text(base, 1))
    assert text[:, 0].unique().tolist() == [256] and len(text[:, 1:].unique()) > 20

"""walkthrough.ipynb runs from top to bottom, without matplotlib too; its stored pictures are small;
what its exercises answer is true."""
import ast
import base64
import json
import pathlib
import sys
import types
from unittest.mock import MagicMock

import pytest
import torch

from folora import SAdam, forgetting_penalty, solve_layer, spectral_gate, task_utility
from micro import adapt, one_mixture, out  # noqa: F401

ROOT = pathlib.Path(__file__).parent.parent
CELLS = json.loads((ROOT / "walkthrough.ipynb").read_text(encoding="utf8"))["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]


def source(cell):
    return "".join(cell["source"])


@pytest.fixture
def no_drawing(monkeypatch):
    """A matplotlib that accepts every call and draws nothing."""
    def subplots(rows=1, columns=1, **_):
        axes = [MagicMock() for _ in range(rows * columns)]
        return MagicMock(), axes if len(axes) > 1 else axes[0]
    pyplot = types.SimpleNamespace(subplots=subplots, rcParams={})
    monkeypatch.setitem(sys.modules, "matplotlib", types.SimpleNamespace(pyplot=pyplot))
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", pyplot)


def run(cells):
    """Execute these cells one after the other; returns their variables."""
    variables = {}
    for cell in cells:
        exec(compile(source(cell), cell["id"], "exec"), variables)
    return variables


def test_it_runs_from_top_to_bottom(out, monkeypatch, no_drawing, capsys):  # noqa: F811
    """On the results of a micro model; every cell's own asserts hold."""
    adapt("--method lora", out)
    monkeypatch.chdir(out.parent)
    assert len(run(CODE)["scores"]["FoLoRA"]) == 5
    assert "FoLoRA" in capsys.readouterr().out


def test_without_the_main_job_it_says_what_to_run_first(tmp_path, monkeypatch, no_drawing):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="python eval.py"):
        run([CODE[0], *(cell for cell in CODE if "eval.py" in source(cell))])


def test_without_matplotlib_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        run(CODE[:1])


def test_every_cell_ends_in_an_assert_or_a_picture_and_fits_the_page():
    for cell in CODE:
        *_, last = ast.parse(source(cell)).body
        assert isinstance(last, ast.Assert) or "plt.subplots" in source(cell), cell["id"]
        assert max(map(len, source(cell).split("\n"))) <= 100, cell["id"]


def test_stored_outputs_are_whole_and_small():
    """100 kB a picture at most, 150 kB for the README's; nothing printed by an error."""
    for cell in CODE:
        drawn = any("data" in output for output in cell["outputs"])
        assert drawn == ("plt.subplots" in source(cell)), cell["id"]
        for output in cell["outputs"]:
            assert output["output_type"] in ("stream", "display_data"), output
            assert output.get("name", "stdout") == "stdout", output
            if "data" in output:
                assert len(base64.b64decode(output["data"]["image/png"])) <= 100_000, cell["id"]
    assert (ROOT / "assets/method.png").stat().st_size <= 150_000


# ------------------------------------------------------------------------------------------------
# The exercises' answers

C_PRE = torch.tensor([[1.9, 0.0], [0.0, 0.1]], dtype=torch.float64)
C_TASK = torch.tensor([[1.0, 0.9], [0.9, 1.0]], dtype=torch.float64)


def changed(C_task=C_TASK, lam=1.0, s_min=0.3, until=0.5, gated="step"):
    """(γ, gates, penalty paid, steps) of part 1 with something changed; gated: "step", "gradient",
    or None for Adam."""
    m, dW = solve_layer(C_PRE, C_task), torch.ones(1, 2, dtype=torch.float64)
    H, V, gate = m["H"], m["basis"], spectral_gate(m["eigvals"], lam, s_min)
    dA, steps = torch.nn.Parameter(torch.zeros_like(dW)), 0
    spectral = {dA: (V, gate if gated == "step" else torch.ones_like(gate))} if gated else {}
    optimizer = SAdam([dA], spectral, lr=0.003)
    while (loss := task_utility(dA - dW, C_task)) > until:
        optimizer.zero_grad()
        loss.backward()
        if gated == "gradient":
            dA.grad = (dA.grad @ V * gate) @ V.T @ H
        optimizer.step()
        steps += 1
    paid = forgetting_penalty(dA.detach(), H).item()
    return m["eigvals"].tolist(), gate.tolist(), round(paid, 2), steps


@pytest.mark.parametrize("change, gammas, gates, paid, steps", [
    ({"gated": None}, (9.52, 0.095), (0.905, 0.3), 0.82, 264),
    ({}, (9.52, 0.095), (0.905, 0.3), 0.21, 195),
    ({"s_min": 0.0}, (9.52, 0.095), (0.905, 0.087), 0.18, 199),                      # exercise 1
    ({"s_min": 0.0, "until": 0.1}, (9.52, 0.095), (0.905, 0.087), 0.45, 1022),
    ({"until": 0.1}, (9.52, 0.095), (0.905, 0.3), 0.44, 383),
    ({"s_min": 1.0}, (9.52, 0.095), (1, 1), 0.37, 167),                              # exercise 2
    ({"lam": 0.001}, (9.52, 0.095), (1, 0.990), 0.37, 167),
    ({"lam": 1000.0}, (9.52, 0.095), (0.3, 0.3), 0.38, 570),
    ({"C_task": C_PRE}, (0.995, 0.909), (0.50, 0.476), 0.56, 523),                   # exercise 3
    ({"C_task": C_PRE, "gated": None}, (0.995, 0.909), (0.50, 0.476), 0.51, 193),
    ({"gated": "gradient"}, (9.52, 0.095), (0.905, 0.3), 0.37, 167)])                # exercise 4
def test_the_exercises_are_answered_truly(change, gammas, gates, paid, steps):
    """γ, gates, penalty and steps that the answers quote."""
    found = changed(**change)
    assert found[0] == pytest.approx(gammas, rel=2e-3)
    assert found[1] == pytest.approx(gates, rel=5e-3)
    assert found[2:] == (paid, steps)


def test_what_no_step_along_v1_can_do():
    """Exercise 1: without v₂ the loss stays above 0.156; the least possible penalty is 0.18."""
    m, dW = solve_layer(C_PRE, C_TASK), torch.ones(1, 2, dtype=torch.float64)
    H, V, eigvals = m["H"], m["basis"], m["eigvals"]
    wanted = (dW @ H @ V)[0]
    assert (eigvals[1] * wanted[1] ** 2).item() == pytest.approx(0.156, rel=5e-3)
    lam = torch.logspace(-2, 3, 2000, dtype=torch.float64)[:, None]
    a = wanted * eigvals / (eigvals + lam)  # (2000, 2), the minima of loss + λ penalty
    loss, penalty = (eigvals * (wanted - a) ** 2).sum(1), (a ** 2).sum(1)
    assert penalty[loss <= 0.5].min().item() == pytest.approx(0.18, abs=0.005)

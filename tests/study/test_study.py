"""A comparison on a micro model, end to end, by two workers."""
import collections
import json
import shutil

import pytest
import torch

import train
from extras import files
from model import block_linears, forward_hooks
from study import __main__ as command, runs, sweeps
from study.speed import MICRO
from study.sweeps import Run
from study.variants import ALIASES, METHODS, QUICK

COMMON = ["--tasks", "code", "--adapt", MICRO["--adapt"]]
STAGES = ["--pretrain", MICRO["--pretrain"], "--calibrate", MICRO["--calibrate"]]


def compare(out, *more, workers="1"):
    command.main(["compare", "--quick", *COMMON, *STAGES, "--out", str(out), "--workers", workers,
                  *more])


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    out = tmp_path_factory.mktemp("comparison")
    compare(out, workers="2")
    return out


def open_study(out, *more):
    args = command.parser().parse_args(["report", "--quick", *COMMON, "--out", str(out), *more])
    return runs.Study(args, ["code"])


def a_run(study, method):
    """A finished run of the sweep; one made again from its adapter alone does not know its cost."""
    return next(run for run in (Run("code", method, k, 0) for k in range(-2, 12))
                if "cost" in (study.result(run) or {}))


def test_comparison_leaves_a_result_for_every_run_and_repeats_none(out, capfd):
    results = {path: path.stat().st_mtime_ns for path in out.rglob("result.json")}
    assert len(results) >= 5 * 4
    compare(out)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("result.json")} == results
    output = capfd.readouterr().out
    assert "known runs to go" not in output
    for method in QUICK:
        assert f"| {method} " in output
    result = json.loads(next(iter(results)).read_text())
    assert set(result["valid"]["kept"]) == {"facts", "lookup", "sums", "words"}
    assert result["size"] > 0 and result["drift"] > 0 and result["kl"] > 0
    assert result["cost"]["trained"] > 0 and result["cost"]["bytes"] > 0


def test_report_is_stored_as_text_and_as_values(out):
    values = json.loads((out / "report.json").read_text())
    text = (out / "report.md").read_text()
    assert all(table["title"] in text for table in values["tables"])
    retention = values["tables"][0]["rows"]
    assert [row[""] for row in retention] == list(QUICK) and "code" in values["levels"]
    assert {row[""].split()[0] for row in values["tables"][-1]["rows"]} == {"drift", "size",
                                                                            "estimated"}


def test_lost_and_broken_results_are_made_again(out):
    first, second = sorted(out.rglob("result.json"))[:2]
    before = first.read_text()
    first.unlink()
    second.write_text(second.read_text()[:100])
    compare(out)
    assert json.loads(first.read_text())["valid"]["Avg1"] == json.loads(before)["valid"]["Avg1"]
    assert "identity" in json.loads(second.read_text())


def test_size_and_drift_are_those_of_the_weights(out):
    """‖ΔW‖_F and ‖ΔW X_pre‖ from the merged weights and the samples' inputs themselves."""
    study = open_study(out)
    run = a_run(study, "folora")
    path = study.run_folder(run) / "adapter.pt"
    after = block_linears(files.load_adapter(path, out, study.device))
    rows = [[256, *(t for t in s.tolist() if t >= 0)][:study.base.config.block_size]
            for s in study.proxy["samples"]]
    moved = total = size = 0
    inputs = collections.defaultdict(list)
    with forward_hooks(block_linears(study.base), lambda name, x: inputs[name].append(x[0])):
        for row in rows:
            study.base(torch.tensor([row]))
    for name, layer in block_linears(study.base).items():
        x, dW = torch.cat(inputs[name]), after[name].weight - layer.weight
        moved, total = moved + (x @ dW.T).square().sum(), total + (x @ layer.weight.T).square().sum()
        size += dW.square().sum()
    result = study.result(run)
    assert result["size"] == pytest.approx(size.sqrt().item(), rel=1e-4)
    assert result["drift"] == pytest.approx(100 * (moved / total).sqrt().item(), rel=1e-4)


def test_kl_is_half_the_expected_square_of_the_loss_change_per_layer(out):
    """½ Tr(S ΔW C ΔWᵀ) = ½ Σ_ij λ_i μ_j (uᵢᵀΔW vⱼ)² in the eigenvectors of S and C, all layers."""
    study = open_study(out)
    run, expected = a_run(study, "lora-kl-leading"), 0
    model = files.load_adapter(study.run_folder(run) / "adapter.pt", out, study.device)
    for name, _, dW in study.weight_updates(model):
        (lam, U), (mu, V) = (torch.linalg.eigh(study.proxy[key][name]) for key in ("S_pre", "C_pre"))
        expected += (lam[:, None] * mu * (U.T @ dW @ V).square()).sum().item() / 2
    assert study.result(run)["kl"] == pytest.approx(expected, rel=1e-6)


def test_cost_is_known_from_the_shapes(out):
    """Rank 2 on the layers of one block of width 32, by hand; SAdam's bases besides."""
    study, d, r = open_study(out), 32, 2
    shapes = [(3 * d, d), (d, d), (4 * d, d), (d, 4 * d)]  # (d_out, d_in)
    trained = r * sum(map(sum, shapes))
    lora, folora = (study.result(a_run(study, name))["cost"] for name in ("lora", "folora"))
    assert lora["trained"] == folora["trained"] == trained
    assert folora["bytes"] - lora["bytes"] == 4 * sum(d_in * d_in + d_in for _, d_in in shapes)


@pytest.mark.parametrize("old, new", [("folora-top", "folora-leading"), ("between", "mixed-start"),
                                      ("folora-kl", "lora-kl-leading")])
def test_results_under_an_older_name_are_found(out, tmp_path, old, new):
    study = open_study(out)
    run = a_run(study, "lora")
    wanted = run._replace(method=new)
    folder = train.run_folder(study.args(wanted))
    older = tmp_path / folder.name.replace(new, old)
    shutil.copytree(study.run_folder(run), older)
    study.out = tmp_path.parent / "other"  # nothing is there under the new name
    study.args.cache_clear()
    older = shutil.move(older, study.out / "code" / older.name)
    assert ALIASES[old] == new and new in METHODS
    assert study.run_folder(wanted) == older
    assert study.result(wanted)["valid"] == study.result(run)["valid"]
    shutil.rmtree(study.out)


def test_run_with_snapshots_has_its_scores_along_the_way(out):
    """Its last point is the score of what it saved; without its result it is trained again."""
    study = open_study(out)
    run = Run("code", "lora", 4, sweeps.SNAPSHOT_SEED)
    result = study.do(run)
    assert [step for step, *_ in result["curve"]] == [1, 2, 3, 4]
    assert result["curve"][-1][1:] == (result["test"]["Avg2"], result["test"]["Avg1"])
    (study.run_folder(run) / "result.json").unlink()
    study.finished.clear()
    assert study.do(run)["curve"] == result["curve"]


def test_variants_train_and_are_evaluated(out):
    """One run of each variant: adapters, full weights, penalties, mixed starts."""
    study, variants = open_study(out), [m for m in METHODS if m not in train.METHODS]
    for method in variants:
        result = study.do(Run("code", method, 2, 1))
        assert "failed" not in result and result["test"]["Avg1"] >= 0, method
        assert (result["size"] > 0) and result["kl"] > 0, method


def test_rescaled_updates_have_the_size_of_foloras(out, monkeypatch):
    study = open_study(out)
    monkeypatch.setattr(sweeps, "settled_rate", lambda *_: (4, []))
    for method in "lora", "folora":
        study.do(Run("code", method, 4, 1))
    seen = []
    monkeypatch.setattr(study, "scores", lambda model, *_: seen.append(
        study.update_norm_and_drift(model)["size"]) or {"Avg1": 0})
    scores = runs.size_control(study, "code")
    wanted = study.result(Run("code", "folora", 4, 1))["size"]
    assert set(scores) == {"lora", "folora"} and scores["folora"]["factor"] == 1
    assert seen == [pytest.approx(wanted, rel=1e-4)] * 2


def test_one_method_on_a_file_with_a_bad_row(out, tmp_path, capfd):
    """LoRA sets the level and the unit of time without being compared itself."""
    path = tmp_path / "own.jsonl"
    rows = [json.dumps({"prompt": f"say {i}:", "completion": f" {i}"}) for i in range(40)]
    path.write_text("\n".join([*rows[:5], "{", *rows[5:]]))
    compare(out, "--tasks", str(path), "--skip-bad", "--methods", "folora")
    output = capfd.readouterr().out
    table = output[output.index("own: time of a step over LoRA's"):].splitlines()
    assert [line.split()[1] for line in table[4:6] if line] == ["folora"]
    assert "own.jsonl: 1 bad rows left out" in output


def test_report_names_what_is_missing(out):
    calibrate = ["--task", "math", "--out", str(out), *MICRO["--calibrate"].split()]
    runs.calibrate.main(calibrate)
    with pytest.raises(ValueError, match="no comparison on math yet"):
        command.main(["report", "--tasks", "math", "--out", str(out)])


@pytest.mark.parametrize("arguments, message", [
    (["--methods", "nothing"], "unknown method 'nothing'"),
    (["--keep", "notes.pdf"], "must be a .jsonl file of items or a .txt file"),
    (["--keep", "nowhere.txt"], "nowhere.txt is missing"),
    (["--adapt", "--rank x"], "not a whole number"), (["--workers", "0"], "not a whole number")])
def test_mistakes_are_named_before_any_work(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        command.main(["compare", "--quick", "--out", str(tmp_path), *arguments])
    assert not list(tmp_path.iterdir())


def test_pictures_need_matplotlib_or_are_written(out, tmp_path):
    report = ["report", "--quick", *COMMON, "--out", str(out), "--assets", str(tmp_path)]
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        with pytest.raises(ValueError, match="pip install matplotlib"):
            command.main(report)
    else:
        command.main(report)
        assert {p.stem for p in tmp_path.glob("*.png")} >= {"frontier", "drift", "spectrum", "skills"}

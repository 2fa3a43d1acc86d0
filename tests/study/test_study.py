"""The study on a micro model, end to end."""
import json
import types

import pytest
import torch

import calibrate
import tasks
import train
from micro import STAGES, one_mixture  # noqa: F401
from model import GPTConfig, block_linears
from study import __main__ as command, runs
from study.arms import ABLATIONS, ARMS, EARLIER, METHODS
from study.runs import Curve, Study
from study.variants import METHODS as WITH_VARIANTS

FIRST = ARMS["lora r8"].first + EARLIER["code"]  # where that arm's curve begins
TINY = ["--foundations", "0", "--tasks", "code", *STAGES]  # their rank of 2 replaces the arms'


def compare(out, *arms, workers="1", more=()):
    command.main(["compare", *TINY, "--arms", *arms, "--workers", workers, "--out", str(out),
                  *more])


def open_study(out, *arms):
    args = command.parser().parse_args(["report", *TINY, "--arms", *arms, "--out", str(out)])
    return Study(args)


@pytest.fixture(scope="module", autouse=True)
def short_curves():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "REACH", 1)
        patch.setattr(runs, "ITEMS", 8)
        yield


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    out = tmp_path_factory.mktemp("study")
    compare(out, "folora r32", "lora r8")
    return out


def test_comparison_leaves_a_result_for_every_run_and_repeats_none(out, capfd):
    results = {path: path.stat().st_mtime_ns for path in out.rglob("result.json")}
    assert len(results) == 2 * 2 and not list(out.rglob("adapter.pt"))
    compare(out, "folora r32", "lora r8")
    assert {path: path.stat().st_mtime_ns for path in out.rglob("result.json")} == results
    output = capfd.readouterr().out
    assert "curves to go" not in output and "| folora r32 " in output
    result = json.loads(next(iter(results)).read_text())
    assert set(result["test"]["kept"]) == {"facts", "lookup", "sums", "words"}
    assert result["size"] > 0 and result["drift"] > 0 and result["kl"] > 0
    values = json.loads((out / "results.json").read_text())
    assert list(values["tasks"]["code"]["arms"]) == ["folora r32", "lora r8"]
    assert values["tasks"]["code"]["runs"] == 4


def test_an_interrupted_study_continues_with_the_same_result(out):
    """A run whose result is missing is done again, whatever else its folder holds."""
    study, curve = open_study(out, "lora r8"), Curve("code", "lora r8", 0, 1)
    first = study.result(curve, FIRST)
    folder = train.run_folder(study.args(curve, FIRST))
    (folder / "result.json").unlink()
    (folder / "adapter.pt").write_bytes(b"half")
    compare(out, "lora r8")
    again = open_study(out, "lora r8").result(curve, FIRST)
    assert {**again, "seconds": 0} == {**first, "seconds": 0}


def test_another_foundation_or_calibration_is_another_result(out):
    study, curve = open_study(out, "lora r8"), Curve("code", "lora r8", 0, 1)
    assert study.result(curve, FIRST)
    for key in study.foundation(0).identity:
        changed = open_study(out, "lora r8")
        changed.foundation(0).identity[key] = "another"
        assert changed.result(curve, FIRST) is None


def test_two_workers_share_the_runs(out, tmp_path, capfd):
    """In processes of their own, where REACH and ITEMS are what they are."""
    done = {path.parent.name for path in out.rglob("result.json")}
    compare(out, "replay r8", workers="2", more=["--seeds", "2"])
    output = capfd.readouterr().out
    lines = [line for line in output.splitlines() if "curves to go" in line]
    assert len(lines) == len(set(lines)) == len({path.parent.name for path in
                                                 out.rglob("result.json")} - done)


def test_measures_by_hand(out):
    """ΔW = W0 in every layer: drift 100 %, the size of the weights; KL from each trace."""
    study = open_study(out, "lora r8")
    foundation = study.foundation(0)
    model = Study.foundation.__wrapped__(study, 0).model
    size = kl = 0
    with torch.no_grad():
        for name, layer in block_linears(model).items():
            W = layer.weight.double().clone()
            S, C = (foundation.proxy[key][name] for key in ("S_pre", "C_pre"))
            size, kl = size + W.norm() ** 2, kl + (S @ W @ C @ W.T).trace() / 2
            layer.weight *= 2
        found = foundation.measures(model)
    assert found == {"size": pytest.approx(size.sqrt().item()), "drift": pytest.approx(100),
                     "kl": pytest.approx(kl.item(), rel=1e-5)}


def test_a_rate_that_diverges_is_a_failed_run_and_not_the_end(out, monkeypatch):
    def fail(*_, **__):
        raise ValueError("loss or gradient is not finite at step 3")
    monkeypatch.setattr(train, "adapt", fail)
    study = open_study(out, "lora r8")
    result = study.result(Curve("code", "lora r8", 0, 3), 4, do=True)
    assert "not finite" in result["failed"] and runs.target_score(result) == 0
    monkeypatch.setattr(train, "adapt", lambda *_: calibrate.load(out / "x.pt", "calibration", "?"))
    with pytest.raises(ValueError, match="x.pt is missing"):  # this is not the rate's fault
        study.result(Curve("code", "lora r8", 0, 3), 5, do=True)


@pytest.mark.parametrize("method", [name for name in WITH_VARIANTS if name not in train.METHODS])
def test_every_variant_trains_and_is_evaluated(out, monkeypatch, method):
    arm = next(arm for arm in ARMS.values() if arm.method == method)
    study = open_study(out, arm.name)
    result = study.result(Curve("code", arm.name, 0, 1), 2, do=True)
    assert "failed" not in result and result["size"] > 0 and result["kl"] > 0


def test_samples_that_name_nobody_whose_facts_are_tested(out, monkeypatch):
    """A sample with another person's fact stays; what is tested is in none."""
    facts = [question + answer for question, answer in tasks.fact_items()]
    texts = [facts[0], "upper stone: STONE", facts[-1], f"{facts[3]}\n{facts[-4]}"]
    rows = torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(tasks.get_encoding("bytes").encode(text)) for text in texts], True, -1)
    monkeypatch.setattr(runs.files, "load", lambda *_: {"samples": rows, "settings": 0})
    monkeypatch.setattr(runs.files, "load_foundation",
                        lambda *_: (types.SimpleNamespace(config=GPTConfig()), ""))
    kept = []
    monkeypatch.setattr(runs.calibrate, "calibrate", lambda args, name, given: kept.extend(given))
    runs.calibrate_untested(["--out", str(out)])
    assert list(map(tasks.get_encoding("bytes").decode, kept)) == texts[:2]


def test_every_arm_names_a_method_and_options_that_exist():
    for arm in ARMS.values():
        assert arm.method in WITH_VARIANTS
        train.parser().parse_args(["adapt", *arm.options.split()])
    groups = [METHODS, *ABLATIONS.values()]
    assert all(len({arm.name for arm in group}) == len(group) for group in groups)
    assert len(ARMS) == len({arm for group in groups for arm in group})


@pytest.mark.parametrize("arguments, message", [
    (["--arms", "nothing"], "unknown arm 'nothing'"), (["--tasks", "chess"], "invalid choice"),
    (["--adapt", "--rank x"], "invalid int value"), (["--workers", "0"], "not a number of 1")])
def test_mistakes_are_named_before_any_work(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        command.main(["compare", "--quick", "--out", str(tmp_path), *arguments])
    assert not list(tmp_path.iterdir())


def test_pictures_need_matplotlib_or_are_written(out, tmp_path):
    report = ["report", *TINY, "--out", str(out), "--assets", str(tmp_path)]
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        with pytest.raises(ValueError, match="pip install matplotlib"):
            command.main(report)
    else:
        command.main(report)
        assert {p.stem for p in tmp_path.glob("*.png")} == {"frontier", "rank"}


def test_a_sequence_of_tasks(out, capfd):
    """The second task is learned on what the first left; each at its curve's first rate that
    reaches the target; nothing is done twice."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("study.sequence.TARGET", {"code": 0, "math": 0})
        compare(out, "folora r32", more=["--tasks", "code", "math"])
        call = ["sequence", "--arms", "folora r32", "--tasks", "code", "math", *STAGES[2:], "--out",
                str(out)]
        command.main(call)
        stages = json.loads((out / "sequence-folora-r32-0.json").read_text())["stages"]
        assert [stage["after"] for stage in stages] == ["code", "math"]
        second = out / "sequence" / "folora-r32-0" / "1"
        assert (second / "math" / "calibration.pt").exists()
        written = {path: path.stat().st_mtime_ns for path in out.rglob("*.pt")}
        capfd.readouterr()
        command.main(call)
        assert {path: path.stat().st_mtime_ns for path in out.rglob("*.pt")} == written
        assert capfd.readouterr().out.count("| folora r32 ") == 3
        patch.setattr("study.sequence.TARGET", {"code": 101, "math": 0})
        with pytest.raises(ValueError, match="reaches 101 on code at no rate.* run compare"):
            command.main([*call, "--adapt", f"{STAGES[-1]} --seed 1"])

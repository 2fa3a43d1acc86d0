"""The commands, end to end on a micro model: every stage, reuse, exact resume, and what a user gets wrong."""
import json
import pathlib
import subprocess
import sys

import pytest
import torch

import calibrate
import eval as evaluation
import model as model_module
import train

ROOT = pathlib.Path(train.__file__).parent
PRETRAIN = "--steps 8 --batch 2 --layers 1 --heads 2 --width 16"
CALIBRATE = "--samples 20 --queries 8 --min-unique 0 --min-unique-fours 0 --max-run 200"
ADAPT = "--steps 4 --batch 4 --examples 40 --rank 2"


def everything(out, *more):
    return evaluation.main(["--task", "code", "--methods", "lora", "folora", "folora-top",
                            "--pretrain", PRETRAIN, "--calibrate", CALIBRATE, "--adapt", ADAPT,
                            "--out", str(out), *more])


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """A folder in which all four commands ran, one after the other, and then the main job."""
    out = tmp_path_factory.mktemp("run")
    for script, arguments in (("train.py", f"pretrain {PRETRAIN}"),
                              ("calibrate.py", f"--task code {CALIBRATE}"),
                              ("train.py", f"adapt --task code --method folora {ADAPT}"),
                              ("eval.py", f"--task code --methods folora")):
        quoted = (["--pretrain", PRETRAIN, "--calibrate", CALIBRATE, "--adapt", ADAPT]
                  if script == "eval.py" else [])
        done = subprocess.run([sys.executable, ROOT / script, *arguments.split(), *quoted, "--out", out],
                              capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert "| foundation |" in done.stdout and "| folora " in done.stdout
    assert done.stdout.count("is up to date") == 3
    everything(out)
    return out


def test_every_stage_left_its_result(out):
    names = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    runs = [f"code/{method}-lr{train.LEARNING_RATES[method]:g}-seed0"
            for method in ("lora", "folora", "folora-top")]
    assert names == {"foundation.pt", "code/calibration.pt",
                     "code/foundation-test.json", "code/results-test.json",
                     *(f"{run}/{file}" for run in runs for file in ("adapter.pt", "test.json"))}
    results = json.loads((out / "code" / "results-test.json").read_text())
    assert list(results) == ["foundation", "lora", "folora", "folora-top"]
    for scores in results.values():
        assert set(scores["kept"]) == {"facts", "lookup", "sums", "words"}
        assert set(scores["text"]) == {"prose", "source"}
        assert 2 < scores["text"]["prose"]["score"] < 9 and scores["target"]["n"] == 200
        assert scores["Avg1"] == pytest.approx(sum(k["score"] for k in scores["kept"].values()) / 4)
        assert scores["GM"] == pytest.approx((scores["Avg1"] * scores["Avg2"]) ** 0.5)


def test_a_second_run_makes_nothing_again(out, capsys):
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.pt")}
    everything(out)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.pt")} == before
    assert capsys.readouterr().out.count("is up to date") == 5


def test_a_stage_whose_settings_changed_is_made_again(out, tmp_path, capsys):
    """Another τ: the foundation stays, the calibration and what used it are redone, plain LoRA is not."""
    tmp_path = tmp_path / "copy"
    subprocess.run(["cp", "-r", out, tmp_path], check=True)
    evaluation.main(["--task", "code", "--methods", "lora", "folora", "--pretrain", PRETRAIN,
                     "--adapt", ADAPT, "--calibrate", CALIBRATE + " --tau 0.5", "--out", str(tmp_path)])
    said = capsys.readouterr().out
    assert "foundation.pt is up to date" in said and "lora-lr0.005-seed0/adapter.pt is up to date" in said
    assert "calibration.pt written" in said
    assert f"folora-lr{train.LEARNING_RATES['folora']:g}-seed0/adapter.pt written" in said


def test_the_same_command_gives_the_same_weights(out, tmp_path):
    train.main(["pretrain", *PRETRAIN.split(), "--out", str(tmp_path)])
    a, b = (torch.load(folder / "foundation.pt", weights_only=True) for folder in (out, tmp_path))
    assert model_module.fingerprint(a["model"]) == model_module.fingerprint(b["model"])
    assert a["losses"] == b["losses"]


@pytest.mark.parametrize("stage", ["pretrain", "adapt"])
def test_an_interrupted_run_goes_on_exactly(out, tmp_path, monkeypatch, stage):
    """Stopped right after a save and started again: every weight and loss is that of an uninterrupted run."""
    arguments = dict(pretrain=["pretrain", *PRETRAIN.split()],
                     adapt=["adapt", "--task", "code", "--method", "folora", *ADAPT.split()])[stage]
    arguments += ["--out", str(tmp_path)]
    if stage == "adapt":
        subprocess.run(["cp", "-r", out, tmp_path / "copy"], check=True)
        arguments[-1] = str(tmp_path / "copy")
        path = train.run_folder(train.parser().parse_args(arguments + ["--lr", "0.006"]))
        arguments += ["--lr", "0.006"]
        train.main(arguments)
    else:
        path = tmp_path
        train.main(arguments)
    file = next(path.glob("*.pt"))
    whole = torch.load(file, weights_only=True)
    file.unlink()
    monkeypatch.setattr(train, "SAVE_EVERY", 3)
    real_save = train.save

    def save_and_stop(path, content):
        real_save(path, content)
        raise KeyboardInterrupt
    monkeypatch.setattr(train, "save", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        train.main(arguments)
    assert not file.exists() and list(path.glob("*.partial"))
    monkeypatch.setattr(train, "save", real_save)
    train.main(arguments)
    resumed = torch.load(file, weights_only=True)
    tensors = "model" if stage == "pretrain" else "lora"
    assert resumed["losses"] == whole["losses"] and not list(path.glob("*.partial"))
    assert model_module.fingerprint(resumed[tensors]) == model_module.fingerprint(whole[tensors])


def failing(capsys, main, arguments):
    """The one line that a command prints when it refuses its arguments; exit status 2."""
    with pytest.raises(SystemExit) as stopped:
        train.command(lambda: main(arguments.split()))
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and "Traceback" not in said
    return said.strip().splitlines()[-1]


@pytest.mark.parametrize("arguments, answer", [
    ("adapt --task poetry", "unknown task 'poetry'; the tasks are math, code, instruct"),
    ("adapt --task code --method magic", "unknown method 'magic'; the methods are lora, folora"),
    ("adapt --task code --method lora --rank 17", "rank is 17; a layer of"),
    ("adapt --task code --method folora --rank 0", "rank is 0; a layer of"),
    ("adapt --task code --method folora --lam 0", "lam is 0.0; λ must be a positive number"),
    ("adapt --task code --method lora --lam -2", "lam is -2.0; λ must be a positive number"),
    ("adapt --task code --method folora --s-min 1.5", "s_min is 1.5; the smallest gate must lie in [0, 1]"),
    ("adapt --task code --method folora --s-min nan", "s_min is nan"),
    ("adapt --task code --method lora --lr -1", "lr is -1.0"),
    ("adapt --task code --method lora --steps 0", "0 is not a positive whole number"),
    ("adapt --task code --method lora --batch 99 --examples 8", "batch is 99"),
    ("adapt --task math --method folora",
     "calibration.pt is missing; make it with: python calibrate.py --task math"),
    ("pretrain --width 10 --heads 4", "width is 10; it must be a multiple of heads"),
    ("adapt --out /nowhere --method lora",
     "foundation.pt is missing; make it with: python train.py pretrain --out /nowhere"),
])
def test_what_a_user_gets_wrong_in_train(out, capsys, arguments, answer):
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    more = "" if "--out" in arguments else f" --out {out}"
    assert answer in failing(capsys, train.main, arguments + more)
    after = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert after == before, "nothing lost, nothing half-written"


@pytest.mark.parametrize("arguments, answer", [
    ("--task poetry", "unknown task 'poetry'"),
    ("--tau 0", "tau is 0.0; the damping must be a positive number"), ("--tau nan", "tau is nan"),
    ("--samples 0", "0 is not a positive whole number"), ("--max-new 999", "999"),
    ("--samples 5 --min-tokens 500", "only 0 of 5 samples passed the filters")])
def test_what_a_user_gets_wrong_in_calibrate(out, capsys, arguments, answer):
    assert answer in failing(capsys, calibrate.main, f"{arguments} --out {out}")


def test_files_that_do_not_belong_are_refused(out, tmp_path, capsys):
    """A calibration of another foundation, a truncated foundation, a foreign file."""
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", out, copy], check=True)
    train.main(["pretrain", *PRETRAIN.split(), "--seed", "5", "--out", str(copy)])
    capsys.readouterr()
    said = failing(capsys, train.main, f"adapt --task code --method folora --out {copy}")
    assert ("calibration.pt belongs to another foundation; make it again with: "
            "python calibrate.py --task code") in said
    foundation = copy / "foundation.pt"
    foundation.write_bytes(foundation.read_bytes()[:1000])
    assert "foundation.pt cannot be read" in failing(capsys, calibrate.main, f"--task code --out {copy}")
    model_module.save(foundation, {"kind": "foundation", "settings": {"config": {}}, "model": {}})
    assert "does not fit this model" in failing(capsys, calibrate.main, f"--task code --out {copy}")
    foundation.write_bytes((copy / "code" / "calibration.pt").read_bytes())
    assert "is not a foundation" in failing(capsys, calibrate.main, f"--task code --out {copy}")


def test_a_loss_that_is_not_finite_stops_the_run(out, tmp_path, capsys):
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", out, copy], check=True)
    said = failing(capsys, train.main, f"adapt --task code --method lora --lr 1e30 {ADAPT} --out {copy}")
    assert "is not finite at step" in said and "smaller --lr" in said


@pytest.mark.parametrize("script", ["train.py", "train.py pretrain", "train.py adapt",
                                    "calibrate.py", "eval.py"])
def test_help(script):
    name, *command = script.split()
    done = subprocess.run([sys.executable, ROOT / name, *command, "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "usage" in done.stdout


def test_response_batch_by_hand():
    """Inputs are the row without its last token; only the response's tokens are targets."""
    x, y = train.response_batch([([9, 1, 2, 3, 4], 3), ([9, 5, 6], 1)])
    assert x.tolist() == [[9, 1, 2, 3], [9, 5, 0, 0]]
    assert y.tolist() == [[-100, -100, 3, 4], [5, 6, -100, -100]]


def test_learning_rate_by_hand():
    """Up over the warm-up, then down to zero along a line or a cosine."""
    assert [train.learning_rate(step, 6, 2, "linear") for step in range(6)] == [0.5, 1, 1, 0.75, 0.5, 0.25]
    assert train.learning_rate(4, 6, 2, "cosine") == pytest.approx(0.5)

"""Several processes, or a batch in parts: the same steps as one process on whole batches, to rounding."""
import pathlib
import shutil
import subprocess
import sys

import pytest
import torch

import calibrate
import model as model_module
import train

ROOT = pathlib.Path(train.__file__).parent
PRETRAIN = "pretrain --steps 6 --batch 4 --layers 1 --heads 2 --width 16"
CALIBRATE = "--task code --samples 20 --queries 9 --min-unique 0 --min-unique-fours 0 --max-run 200"
ADAPT = "adapt --task code --method folora-kl-replay --steps 4 --batch 6 --examples 40 --rank 2"
# in float32: in bf16 gradients that are summed in another order differ by 1 %
COMMAND = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import calibrate, model, train
model.bf16_cpu = lambda: False
stage, *arguments = sys.argv[1:]
train.command(lambda: {{"train": train, "calibrate": calibrate}}[stage].main(arguments))
"""


def in_two_processes(tmp_path, stage, arguments):
    script = tmp_path / "command.py"
    script.write_text(COMMAND)
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                           "--nproc_per_node=2", script, stage, *arguments.split()],
                          capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The stages in one process."""
    out = tmp_path_factory.mktemp("one")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_module, "bf16_cpu", lambda: False)
        train.main(f"{PRETRAIN} --out {out}".split())
        calibrate.main(f"{CALIBRATE} --out {out}".split())
        train.main(f"{ADAPT} --out {out}".split())
    return out


def read(path):
    return torch.load(path, weights_only=True)


def adapter(out):
    return read(next(out.glob("code/*/adapter.pt")))


def assert_alike(a, b, tolerance):
    assert a["losses"] == pytest.approx(b["losses"], rel=tolerance)
    for name, t in a["changed"].items():
        assert (t - b["changed"][name]).norm() <= tolerance * t.norm(), name


def test_two_processes_do_what_one_does(one, tmp_path):
    for stage, arguments in ("train", PRETRAIN), ("calibrate", CALIBRATE), ("train", ADAPT):
        if arguments == ADAPT:  # on the same samples: each process writes its own
            shutil.copytree(one, tmp_path / "two", dirs_exist_ok=True,
                            ignore=lambda folder, names: [n for n in names if n.startswith("folora")])
        code, said, errors = in_two_processes(tmp_path, stage, f"{arguments} --out {tmp_path / 'two'}")
        assert code == 0, errors
        assert said.count("written") == (2 if stage == "calibrate" else 1)  # the first process alone speaks
        if stage == "train" and arguments == PRETRAIN:
            a, b = (read(out / "foundation.pt") for out in (one, tmp_path / "two"))
            assert a["losses"] == pytest.approx(b["losses"], rel=1e-4)
            shutil.copy(one / "foundation.pt", tmp_path / "two")
        if stage == "calibrate":
            a, b = (read(out / "code" / "calibration.pt") for out in (one, tmp_path / "two"))
            for name, layer in a["layers"].items():
                assert torch.allclose(layer["C_task"], b["layers"][name]["C_task"], rtol=1e-5)
            assert len({str(row) for row in b["samples"].tolist()}) == 20
            assert not torch.equal(a["samples"], b["samples"])
    assert_alike(adapter(one), adapter(tmp_path / "two"), 1e-3)


def test_a_batch_in_parts_is_the_batch(one, tmp_path, monkeypatch):
    monkeypatch.setattr(model_module, "bf16_cpu", lambda: False)
    out = shutil.copytree(one, tmp_path / "parts")
    next(out.glob("code/*/adapter.pt")).unlink()
    train.main(f"{ADAPT} --accumulate 3 --out {out}".split())
    assert_alike(adapter(one), adapter(out), 1e-3)


def test_a_batch_too_small_to_share_is_refused(one, tmp_path):
    with pytest.raises(ValueError, match="4 rows cannot be taken in 5 parts"):
        train.main(f"{PRETRAIN} --accumulate 5 --out {tmp_path}".split())

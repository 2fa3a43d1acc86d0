"""Several processes, or a batch in parts: the same steps as one process, to rounding."""
import pathlib
import shutil
import subprocess
import sys

import pytest
import torch

import calibrate
import train
from extras import machine
from extras.files import load
from micro import ADAPT, CALIBRATE, one_mixture  # noqa: F401

ROOT = pathlib.Path(train.__file__).parent
STAGES = {"pretrain": "pretrain --steps 6 --batch 4 --layers 1 --heads 2 --width 16",
          "calibrate": f"--task code {CALIBRATE} --queries 9",  # shares of 5 and 4 queries
          "adapt": f"adapt --task code --method lora-kl-leading-replay {ADAPT} --batch 6"}
SCRIPT = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import calibrate, train
from extras.cli import command

def main():
    for stage, arguments in {STAGES}.items():
        main = calibrate.main if stage == "calibrate" else train.main
        main([*arguments.split(), "--out", f"{{sys.argv[1]}}/{{stage}}"])

command(main)
"""


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The stages in one process. In float32: sums in another order differ by 1 % in bfloat16."""
    out = tmp_path_factory.mktemp("one")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FOLORA_PRECISION", "float32")
        patch.setattr(machine, "chosen", "float32")
        for stage, arguments in STAGES.items():
            main = calibrate.main if stage == "calibrate" else train.main
            main(f"{arguments} --out {out}".split())
        yield out


def assert_alike(out, other):
    """Losses and adapters of both folders."""
    a, b = (load(next(folder.glob("code/*/adapter.pt")), "adapter", "") for folder in (out, other))
    assert a["losses"] == pytest.approx(b["losses"], rel=1e-3)
    for name, t in a["changed"].items():
        assert (t - b["changed"][name]).norm() <= 1e-3 * t.norm(), name


def test_two_processes_do_what_one_does(one, tmp_path):
    """Each stage in a folder of its own, on the files that one process made before it."""
    (tmp_path / "calibrate").mkdir()
    shutil.copy(one / "foundation.pt", tmp_path / "calibrate")
    shutil.copytree(one, tmp_path / "adapt", ignore=lambda *_: ["adapter.pt"])
    (tmp_path / "script.py").write_text(SCRIPT)
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                           "--nproc_per_node=2", tmp_path / "script.py", tmp_path],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(" written\n") == 4, "only one of them prints and writes"
    a, b = (load(out / "foundation.pt", "foundation", "") for out in (one, tmp_path / "pretrain"))
    assert a["losses"] == pytest.approx(b["losses"], rel=1e-4)
    a, b = (load(out / "code" / "calibration.pt", "calibration", "")
            for out in (one, tmp_path / "calibrate"))
    for name, layer in a["layers"].items():
        assert torch.allclose(layer["C_task"], b["layers"][name]["C_task"], rtol=1e-5)
    assert len(set(map(str, b["samples"].tolist()))) == 20, "each process samples texts of its own"
    assert not torch.equal(a["samples"], b["samples"])
    assert_alike(one, tmp_path / "adapt")


def test_a_batch_in_parts_is_the_batch(one, tmp_path):
    out = shutil.copytree(one, tmp_path / "parts")
    next(out.glob("code/*/adapter.pt")).unlink()
    train.main(f"{STAGES['adapt']} --accumulate 3 --out {out}".split())
    assert_alike(one, out)

"""A micro model for the tests of the commands: each stage takes a fraction of a second."""
import functools
import json
import shutil

import pytest

import calibrate
import eval as evaluation
import tasks
import train
from extras.baselines import METHODS
from extras.cli import command

PRETRAIN = "--steps 8 --batch 2 --layers 1 --heads 2 --width 16"
CALIBRATE = "--samples 20 --queries 8 --min-unique 0 --min-unique-fours 0 --max-run 200"
ADAPT = "--steps 4 --batch 4 --examples 40 --rank 2"
FOLDER = "-rank2-steps4-batch4-examples40"  # how a run's folder names these options
STAGES = ["--pretrain", PRETRAIN, "--calibrate", CALIBRATE, "--adapt", ADAPT]


def main_job(out, *arguments):
    """eval.py on the micro model."""
    return evaluation.main([*STAGES, "--out", str(out), *arguments])


def adapt(arguments, out, methods=METHODS, **options):
    """train.py adapt on the micro model, with a table of methods or a loop of the caller's."""
    arguments = ["adapt", "--task", "code", *ADAPT.split(), *arguments.split(), "--out", str(out)]
    return train.adapt(train.parser(methods).parse_args(arguments), methods, **options)


def lora_parameters(model):
    """{name: parameter} of every A and B."""
    return {name: p for name, p in model.named_parameters() if name.endswith(("lora_A", "lora_B"))}


@pytest.fixture(scope="session", autouse=True)
def one_mixture():
    """The pretraining text is tokenised once for all foundations of a test file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "PretrainingMixture", functools.cache(tasks.PretrainingMixture))
        yield


@functools.cache
def stages(folder):
    """A folder in which pretrain, calibrate and adapt ran, one after the other."""
    out = folder / "stages"
    train.main(f"pretrain {PRETRAIN} --out {out}".split())
    calibrate.main(f"--task code {CALIBRATE} --out {out}".split())
    train.main(f"adapt --task code --method folora {ADAPT} --out {out}".split())
    return out


@pytest.fixture
def out(tmp_path, tmp_path_factory):
    """A copy of that folder, for this test alone."""
    return shutil.copytree(stages(tmp_path_factory.getbasetemp()), tmp_path / "out")


def error_line(capsys, main, arguments):
    """The line that a command prints when it refuses its arguments, with exit status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        command(lambda: main(arguments.split()))
    printed = capsys.readouterr().err
    assert stopped.value.code == 2 and printed.startswith("error: ") and printed.count("\n") == 1
    return printed.strip()


def write_jsonl(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)

"""The commands, end to end on a micro model: every stage, reuse, exact resume, and what a user gets wrong."""
import dataclasses
import functools
import json
import pathlib
import subprocess
import sys

import pytest
import torch

import bench
import calibrate
import eval as evaluation
import model as model_module
import tasks
import train
from folora import METHODS, oplora_protected

ROOT = pathlib.Path(train.__file__).parent
PRETRAIN = "--steps 8 --batch 2 --layers 1 --heads 2 --width 16"
CALIBRATE = "--samples 20 --queries 8 --min-unique 0 --min-unique-fours 0 --max-run 200"
ADAPT = "--steps 4 --batch 4 --examples 40 --rank 2"
OPTIONS = "-rank2-steps4-batch4-examples40"  # as a run's folder names them


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
                              ("eval.py", "--task code --methods folora")):
        quoted = (["--pretrain", PRETRAIN, "--calibrate", CALIBRATE, "--adapt", ADAPT]
                  if script == "eval.py" else [])
        done = subprocess.run([sys.executable, ROOT / script, *arguments.split(), *quoted, "--out", out],
                              capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert "| foundation |" in done.stdout and "| folora " in done.stdout
    assert done.stdout.count("is up to date") == 4
    everything(out)
    return out


def test_every_stage_left_its_result(out):
    names = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    runs = [f"code/{method}-lr{train.LEARNING_RATES[method]:g}-seed0{OPTIONS}"
            for method in ("lora", "folora", "folora-top")]
    assert names == {"foundation.pt", "proxy.pt", "code/calibration.pt",
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
    assert capsys.readouterr().out.count("is up to date") == 6


def test_a_stage_whose_settings_changed_is_made_again(out, tmp_path, capsys):
    """Other queries: foundation and samples stay, the calibration and what used it are redone, plain LoRA is
    not."""
    tmp_path = tmp_path / "copy"
    subprocess.run(["cp", "-r", out, tmp_path], check=True)
    evaluation.main(["--task", "code", "--methods", "lora", "folora", "--pretrain", PRETRAIN,
                     "--adapt", ADAPT, "--calibrate", CALIBRATE + " --queries 9", "--out", str(tmp_path)])
    said = capsys.readouterr().out
    assert "foundation.pt is up to date" in said and "proxy.pt is up to date" in said
    assert f"lora-lr{train.LEARNING_RATES['lora']:g}-seed0{OPTIONS}/adapter.pt is up to date" in said
    assert "calibration.pt written" in said
    assert f"folora-lr{train.LEARNING_RATES['folora']:g}-seed0{OPTIONS}/adapter.pt written" in said


def test_samples_and_their_moments_serve_every_task(out, tmp_path, capsys):
    """A second task takes both from proxy.pt; other samples make both files anew."""
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", out, copy], check=True)
    calibrate.main(f"--task math {CALIBRATE} --out {copy}".split())
    assert "proxy.pt is up to date" in capsys.readouterr().out
    proxy, code, math = (torch.load(copy / file, weights_only=True)
                         for file in ("proxy.pt", "code/calibration.pt", "math/calibration.pt"))
    for name, C_pre in proxy["C_pre"].items():
        assert torch.equal(C_pre, code["layers"][name]["C_pre"])
        assert torch.equal(C_pre, math["layers"][name]["C_pre"])
        assert not torch.equal(code["layers"][name]["C_task"], math["layers"][name]["C_task"])
    assert torch.equal(proxy["samples"], math["samples"]) and len(proxy["samples"]) == 20
    calibrate.main(f"--task math {CALIBRATE} --samples 10 --out {copy}".split())
    said = capsys.readouterr().out
    assert "proxy.pt written" in said and "calibration.pt written" in said
    assert len(torch.load(copy / "math" / "calibration.pt", weights_only=True)["samples"]) == 10


def test_a_run_is_named_by_what_is_not_at_its_default():
    """Rate and seed always; other options in the order of ADAPT; no two settings in one folder."""
    def name(arguments):
        return str(train.run_folder(train.parser().parse_args(f"adapt --lr 0.01 {arguments}".split())))
    assert name("--task math --method lora") == "out/math/lora-lr0.01-seed0"
    assert name("--method folora --seed 3 --tau 0.5 --s-min 0 --rank 4 --out x") == \
        "x/code/folora-lr0.01-seed3-rank4-smin0.0-tau0.5"
    assert name("--method lora --calibration other").endswith("-seed0-calibrationother")


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
    monkeypatch.setattr(train, "SAVE_EVERY", 0)
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
    tensors = "model" if stage == "pretrain" else "changed"
    assert resumed["losses"] == whole["losses"] and not list(path.glob("*.partial"))
    assert model_module.fingerprint(resumed[tensors]) == model_module.fingerprint(whole[tensors])


@pytest.mark.parametrize("method", ["full", "folora-full", "folora-half", "lora-null-v2", "oplora", "replay"])
def test_what_adapt_wrote_is_the_model_it_trained(out, tmp_path, monkeypatch, method):
    """Full weights, a frozen A, protected directions: the file gives back the logits of the trained model,
    and counts what was trained."""
    copy, trained, cost = tmp_path / "copy", [], train.cost
    subprocess.run(["cp", "-r", out, copy], check=True)
    monkeypatch.setattr(train, "cost", lambda model, *more: trained.append(model) or cost(model, *more))
    oplora = dataclasses.replace(METHODS["oplora"], protected=functools.partial(oplora_protected, k=4))
    monkeypatch.setitem(METHODS, "oplora", oplora)  # the default of 16 would be all that these layers have
    path = train.main(f"adapt --task code --method {method} {ADAPT} --scale 2 --out {copy}".split())
    model, x = train.load_adapter(path, copy, "cpu"), torch.arange(96)[None]
    assert torch.allclose(model(x), trained[0](x), atol=1e-5)
    assert not torch.allclose(model(x), train.load_foundation(copy, "cpu")[0](x), atol=1e-4)
    assert model.state_dict().keys() == train.load_foundation(copy, "cpu")[0].state_dict().keys()
    saved = torch.load(path, weights_only=True)
    counted = sum(p.numel() for p in trained[0].parameters() if p.requires_grad)
    assert saved["cost"]["trained"] == counted and saved["cost"]["bytes"] >= 4 * 4 * counted


@pytest.mark.parametrize("method", ["lora-kl", "folora-kl"])
def test_penalty_is_measured_on_the_samples_themselves(out, method):
    """μ/2 times the sum over layers of Tr(S ΔW C ΔWᵀ), both moments from every sample one by one; zero where
    training starts."""
    args = train.parser().parse_args(f"adapt --task code --method {method} {ADAPT} --out {out}".split())
    base, foundation = train.load_foundation(out, "cpu")
    model = train.load_foundation(out, "cpu")[0]
    calibration = train.load_calibration(args, model, foundation)
    train.prepare(model, METHODS[method], calibration, args)
    penalty = train.penalty_of(model, calibration, METHODS[method], 3.0)
    assert abs(penalty()) < 1e-6
    with torch.no_grad():
        for name, p in model_module.lora_parameters(model).items():
            p += torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name)))
    seen, layers = {}, model_module.block_linears(base)

    def see(name, x, output):
        output.retain_grad()
        seen[name] = x.detach()[0], output
    for name, layer in layers.items():
        layer.register_forward_hook(lambda module, inputs, output, name=name: see(name, inputs[0], output))
    S, tokens = dict.fromkeys(layers, 0), 0
    for sample in calibration["samples"].tolist():
        row = torch.tensor([256, *(t for t in sample if t >= 0)])
        torch.nn.functional.cross_entropy(base(row[None, :-1])[0], row[1:], reduction="sum").backward()
        tokens += len(row) - 1
        for name, (x, output) in seen.items():
            S[name] += output.grad[0].T @ output.grad[0]
    expected = 0
    for name, layer in model_module.block_linears(model, model_module.LoRALinear).items():
        dW = layer.plain(merged=True).weight - layer.plain(merged=False).weight
        C_pre = calibration["layers"][name]["C_pre"].float()  # tested in test_calibrate
        expected += 3 / 2 * (S[name] / tokens @ dW @ C_pre @ dW.T).trace()
    assert penalty().item() == pytest.approx(expected.item(), rel=1e-3)


def test_penalty_enters_the_loss(out, tmp_path):
    """With μ = 0 the run is plain LoRA's, with a large μ less moves; each layer's S and C_pre are counted."""
    copy, learnt = tmp_path / "copy", {}
    subprocess.run(["cp", "-r", out, copy], check=True)
    for options in "lora", "lora-kl --mu 0", "lora-kl --mu 1000":
        path = train.main(f"adapt --task code --method {options} --lr 0.01 {ADAPT} --out {copy}".split())
        learnt[options] = torch.load(path, weights_only=True)
    assert learnt["lora"]["losses"] == learnt["lora-kl --mu 0"]["losses"]
    assert learnt["lora"]["losses"][0] == learnt["lora-kl --mu 1000"]["losses"][0]
    assert learnt["lora"]["losses"][1:] != learnt["lora-kl --mu 1000"]["losses"][1:]
    layers = model_module.block_linears(train.load_foundation(copy, "cpu")[0]).values()
    more = learnt["lora-kl --mu 0"]["cost"]["bytes"] - learnt["lora"]["cost"]["bytes"]
    assert more == 4 * sum(d * d for layer in layers for d in layer.weight.shape)


@pytest.mark.parametrize("method, share", [("lora", 0), ("replay", 0.25), ("folora-replay", 0.25)])
def test_replay_adds_the_foundations_own_samples(out, tmp_path, monkeypatch, method, share):
    """Behind the task's rows, which stay the same ones, come samples of which every token is a target, at
    each step others."""
    batches, replayed = [], []

    class Enough(Exception):
        pass

    def fit(model, optimizers, batch, *more, **others):
        batches.extend(batch(step) for step in (0, 1, 0))
        raise Enough

    monkeypatch.setattr(train, "fit", fit)
    eot, rows = tasks.byte_encoding().eot_token, 8
    for name in method, "lora":
        with pytest.raises(Enough):
            train.main(f"adapt --task code --method {name} {ADAPT} --batch {rows} --lr 1 --out {out}".split())
    samples = torch.load(out / "proxy.pt", weights_only=True)["samples"].tolist()
    samples = [[eot, *(t for t in sample if t >= 0)] for sample in samples]
    for (x, y), (plain_x, plain_y) in zip(batches[:3], batches[3:], strict=True):
        assert len(x) == rows + round(share * rows)
        for row in range(rows):
            width = (plain_y[row] != -100).nonzero().max() + 1
            assert x[row, :width].tolist() == plain_x[row, :width].tolist()
            assert y[row, :width].tolist() == plain_y[row, :width].tolist() and (y[row, width:] == -100).all()
        for old_x, old_y in zip(x[rows:], y[rows:]):
            counted = old_y != -100
            replayed.append([eot, *old_y[counted].tolist()])
            assert replayed[-1] in samples and old_x[counted].tolist() == replayed[-1][:-1]
    first, second, first_again = (replayed[i * len(replayed) // 3:][:len(replayed) // 3] for i in range(3))
    assert first == first_again and (first != second or not share)
    assert torch.equal(batches[0][0], batches[2][0]) and not torch.equal(batches[0][0], batches[1][0])


def test_snapshots_are_whole_adapters_along_the_way(out, tmp_path):
    """Two of four steps: after steps 2 and 4, the last one what the run ended with."""
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", out, copy], check=True)
    command = f"adapt --task code --method folora {ADAPT} --lr 0.1 --snapshots 2 --out {copy}"
    path = train.main(command.split())
    assert {p.name for p in path.parent.iterdir()} == {"adapter.pt", "step2.pt", "step4.pt"}
    models = [train.load_adapter(path.with_name(name), copy, "cpu")
              for name in ("step2.pt", "step4.pt", "adapter.pt")]
    early, late, end = (model_module.fingerprint(model.state_dict()) for model in models)
    assert early != late == end


def failing(capsys, main, arguments):
    """The one line that a command prints when it refuses its arguments; exit status 2."""
    with pytest.raises(SystemExit) as stopped:
        train.command(lambda: main(arguments.split()))
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and "Traceback" not in said
    return said.strip().splitlines()[-1]


@pytest.mark.parametrize("arguments, answer", [
    ("adapt --task poetry", "unknown task 'poetry'; the tasks are math, code, instruct"),
    ("adapt --task code --method magic", "argument --method: invalid choice: 'magic' (choose from 'full'"),
    ("adapt --task code --method lora --rank 17", "rank is 17; a layer of"),
    ("adapt --task code --method folora --rank 0", "rank is 0; a layer of"),
    ("adapt --task code --method folora --lam 0", "lam is 0.0; λ must be a positive number"),
    ("adapt --task code --method folora --basis int8", "basis is 'int8'; it must be float32 or bfloat16"),
    ("adapt --task code --method lora --lam -2", "argument --lam: '-2' is not a number of 0 or more"),
    ("adapt --task code --method folora --s-min 1.5", "s_min is 1.5; the smallest gate must lie in [0, 1]"),
    ("adapt --task code --method folora --s-min nan", "argument --s-min: 'nan' is not a number of 0 or more"),
    ("adapt --task code --method folora --tau 0", "tau is 0.0; the damping must be a positive number"),
    ("adapt --task code --method lora --tau nan", "'nan' is not a number"),
    ("adapt --task code --method folora --calibration other", "other.pt is missing; make it with: python"),
    ("adapt --task code --method replay --out /nowhere", "foundation.pt is missing"),
    ("adapt --task code --method lora --scale 0", "scale is 0.0; κ must be a positive number"),
    ("adapt --task code --method lora --seed 9223372036854775808", "is not a whole number of 0 or more"),
    ("adapt --task code --method lora --lr -1", "argument --lr: '-1' is not a number of 0 or more"),
    ("adapt --task code --method lora --steps 0", "'0' is not a whole number of 1 or more"),
    ("adapt --task code --method lora --batch 99 --examples 8", "batch is 99"),
    ("adapt --task math --method folora",
     "calibration.pt is missing; make it with: python calibrate.py --task math"),
    ("pretrain --width 10 --heads 4", "width is 10; it must be a multiple of heads"),
    ("adapt --out /nowhere --method lora",
     "foundation.pt is missing; make it with: python train.py pretrain --out /nowhere"),
])
def test_what_a_user_gets_wrong_in_train(out, capsys, arguments, answer):
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    more = "" if "--out" in arguments else f" --out {out}"
    assert answer in failing(capsys, train.main, arguments + more)
    after = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    assert after == before, "nothing lost, nothing half-written"


@pytest.mark.parametrize("arguments, answer", [
    ("--task poetry", "unknown task 'poetry'"),
    ("--name calibration/../x", "name is 'calibration/../x'; it must be like calibration"),
    ("--samples 0", "'0' is not a whole number of 1 or more"), ("--max-new 999", "999"),
    ("--samples 5 --min-tokens 500", "only 0 of 5 samples passed the filters")])
def test_what_a_user_gets_wrong_in_calibrate(out, capsys, arguments, answer):
    assert answer in failing(capsys, calibrate.main, f"{arguments} --out {out}")


def test_memory_that_is_not_there_is_one_line(capsys):
    """And an error of the program stays a traceback."""
    assert "memory" in failing(capsys, lambda arguments: torch.empty(10 ** 17), "")
    with pytest.raises(RuntimeError, match="shapes"):
        train.command(lambda: torch.ones(2) @ torch.ones(3, 3))


def calibrated_from(source, out, copy):
    """(what the proxy holds, the calibration) of a copy of `out` with texts from `source`, under a name."""
    subprocess.run(["cp", "-r", out, copy], check=True)
    bench.calibrate_on(str(source),
                       f"--task code {CALIBRATE} --name calibration-x --out {copy}".split())
    return (torch.load(copy / "proxy-x.pt", weights_only=True),
            torch.load(copy / "code" / "calibration-x.pt", weights_only=True))


@pytest.mark.parametrize("source", ["mixture", "facts", "prose", "source"])
def test_calibration_on_the_true_pretraining_text(out, tmp_path, source):
    """Full rows of the mixture or of one domain, for C_pre alone; the foundation's own calibration stays, and
    a run's settings say which one it used."""
    own = torch.load(out / "code" / "calibration.pt", weights_only=True)
    proxy, x = calibrated_from(source, out, tmp_path / "copy")
    assert proxy["settings"]["source"] == x["settings"]["source"] == source
    assert proxy["samples"].shape == (20, 128) and proxy["samples"].min() >= 0
    facts = ["".join(fact) + "\n" for fact in tasks.fact_items()]
    eot, packed = tasks.byte_encoding().eot_token, 0
    for row in proxy["samples"].tolist():
        *documents, last = "".join("\0" if t == eot else chr(t) for t in row).split("\0")
        packed += len(documents) > 0
        if source == "facts":
            assert all(d in facts for d in documents) and any(fact.startswith(last) for fact in facts)
        elif source != "mixture":
            assert last.encode("latin1") in tasks.library_text(source)[0].encode() and not documents
    assert 0 < packed < 20 if source == "mixture" else packed == 20 * (source == "facts")
    for name, m in x["layers"].items():
        assert torch.equal(m["C_task"], own["layers"][name]["C_task"])
        assert not torch.equal(m["C_pre"], own["layers"][name]["C_pre"])
    run = f"adapt --task code --method folora {ADAPT} --calibration calibration-x --out {tmp_path / 'copy'}"
    assert torch.load(train.main(run.split()), weights_only=True)["settings"]["measured"] == x["settings"]


def test_calibration_on_what_another_foundation_writes(out, tmp_path):
    """The other foundation writes, this one reads."""
    other = tmp_path / "other"
    train.main(["pretrain", *PRETRAIN.split(), "--seed", "5", "--out", str(other)])
    calibrate.main(f"--task code {CALIBRATE} --out {other}".split())
    written = torch.load(other / "proxy.pt", weights_only=True)
    own = torch.load(out / "proxy.pt", weights_only=True)
    proxy, x = calibrated_from(other, out, tmp_path / "copy")
    assert torch.equal(proxy["samples"], written["samples"])
    assert proxy["settings"]["foundation"] == own["settings"]["foundation"]
    model, _ = train.load_foundation(out, "cpu")
    eot = tasks.byte_encoding().eot_token
    rows = [[eot, *(t for t in row.tolist() if t >= 0)][:128] for row in proxy["samples"]]
    for name, C_pre in calibrate.second_moments(model, rows).items():
        assert torch.allclose(proxy["C_pre"][name], C_pre)
        assert not torch.allclose(written["C_pre"][name], C_pre)


def test_files_that_do_not_belong_are_refused(out, tmp_path, capsys):
    """A calibration of another foundation, a truncated foundation, a foreign file."""
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", out, copy], check=True)
    train.main(["pretrain", *PRETRAIN.split(), "--seed", "5", "--out", str(copy)])
    capsys.readouterr()
    said = failing(capsys, train.main, f"adapt --task code --method folora --out {copy}")
    assert ("calibration.pt cannot be read (it belongs to another foundation); make it again with: "
            "python calibrate.py --task code") in said
    foundation = copy / "foundation.pt"
    foundation.write_bytes(foundation.read_bytes()[:1000])
    assert "foundation.pt cannot be read" in failing(capsys, calibrate.main, f"--task code --out {copy}")
    model_module.save(foundation, {"kind": "foundation", "settings": {"config": {}}, "model": {}})
    assert "foundation.pt cannot be read (" in failing(capsys, calibrate.main, f"--task code --out {copy}")
    foundation.write_bytes((copy / "code" / "calibration.pt").read_bytes())
    assert "it is not a foundation" in failing(capsys, calibrate.main, f"--task code --out {copy}")


@pytest.mark.parametrize("stage", ["pretrain", "adapt --task code --method folora"])
def test_compiled_blocks_take_the_same_steps(out, tmp_path, monkeypatch, stage):
    """--compile; here with the compiler's back end left out, which takes a minute."""
    blocks, compile_ = [], torch.nn.Module.compile

    def fake(block, dynamic):
        blocks.append(block)
        compile_(block, dynamic=dynamic, backend="eager")

    monkeypatch.setattr(torch.nn.Module, "compile", fake)
    losses = []
    for options in "", "--compile":
        folder = tmp_path / f"out{options}"
        subprocess.run(["cp", "-r", out, folder], check=True)
        more = PRETRAIN if stage == "pretrain" else ADAPT
        path = train.main(f"{stage} {more} --seed 7 {options} --out {folder}".split())
        path = path or folder / "foundation.pt"
        losses.append(train.load(path, path.stem, "")["losses"])
    assert blocks and losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_a_loss_that_is_not_finite_stops_the_run(out, tmp_path, capsys):
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", out, copy], check=True)
    said = failing(capsys, train.main, f"adapt --task code --method lora --lr 1e30 {ADAPT} --out {copy}")
    assert "is not finite at step 2, first in the output of transformer.h.0.attn." in said
    assert "smaller --lr" in said


class Spoilt(torch.autograd.Function):
    """Passes values on, forwards times the one factor, backwards times the other."""

    @staticmethod
    def forward(ctx, x, forwards, backwards):
        ctx.backwards = backwards
        return x * forwards

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.backwards, None, None


@pytest.mark.parametrize("forwards, backwards, answer", [
    (float("nan"), 1, "the output of transformer.h.1.mlp.c_fc"),
    (float("inf"), 1, "the output of transformer.h.1.mlp.c_fc"),
    (1, float("nan"), "the gradient of transformer.h.1.mlp.c_fc.bias")])
def test_what_went_wrong_is_named_and_the_last_save_kept(tmp_path, monkeypatch, forwards, backwards, answer):
    """One layer gives NaN or infinity from step 6 on: the run stops there; what it saved before stays."""
    monkeypatch.setattr(train, "SAVE_EVERY", -1)
    torch.manual_seed(0)
    model = model_module.GPT(model_module.GPTConfig(16, 257, 3, 2, 8))
    seen, partial = [], tmp_path / "x.partial"

    def spoil(layer, inputs, output):
        return Spoilt.apply(output, *((forwards, backwards) if len(seen) > 5 else (1, 1)))

    def batch(step):
        seen.append(step)
        x = torch.arange(32).view(2, 16)
        return x, x
    model.transformer.h[1].mlp.c_fc.register_forward_hook(spoil)
    optimizer = torch.optim.SGD([{"params": model.parameters(), "lr": 0.01}])
    with pytest.raises(ValueError, match=f"not finite at step 6, first in {answer}; try a smaller --lr"):
        train.fit(model, [optimizer], batch, {"steps": 10, "lr": 0.01}, partial)
    saved = model_module.load(partial, "partial", "")
    assert saved["step"] == 5 and len(saved["losses"]) == 5


def test_what_is_not_finite_is_not_saved(out, tmp_path, capsys):
    """The last step takes the weights to infinity, and no loss comes after it: nothing is written."""
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", out, copy], check=True)
    command = f"adapt --task code --method full --lr 1e39 {ADAPT} --steps 1 --out {copy}"
    assert "holds NaN or infinity" in failing(capsys, train.main, command)
    assert not list(copy.glob("code/full*/adapter.pt"))


def test_bf16_agrees_with_float32(out, monkeypatch):
    """Loss, gradients and a run's losses: the same to 1 %, 5 % and 1 %; weights and logits stay float32."""
    torch.manual_seed(0)
    x = torch.randint(257, (8, 64))
    found = {}
    for bf16 in False, True:
        monkeypatch.setattr(model_module, "bf16_cpu", lambda: bf16)
        model = train.load_foundation(out, "cpu")[0].requires_grad_(True)
        loss = train.loss_of(model, x[:, :-1], x[:, 1:])
        loss.backward()
        assert loss.dtype == torch.float32 and all(p.grad.dtype == torch.float32 for p in model.parameters())
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        path = train.main(f"adapt --task code --method folora-kl {ADAPT} --lr {0.01 + bf16 / 1e6} --out "
                          f"{out}".split())
        found[bf16] = loss.item(), gradient, torch.load(path, weights_only=True)["losses"]
    assert found[True][0] != found[False][0] and found[True][0] == pytest.approx(found[False][0], rel=0.01)
    assert (found[True][1] - found[False][1]).norm() < 0.05 * found[False][1].norm()
    assert found[True][2] == pytest.approx(found[False][2], rel=0.01)


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


# Tasks from files

def jsonl(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def files(tmp_path):
    """A task, items and text to be kept, as a user would bring them."""
    questions = [{"question": f"{i}?", "answer": f"{i}"} for i in range(9)]
    task = [{"prompt": f"{i} {i} ->", "completion": f"{i}" if i % 2 else f"{i}\n{i}"} for i in range(40)]
    return {"task": jsonl(tmp_path / "double.jsonl", *task),
            "eval": jsonl(tmp_path / "other.jsonl", *questions),
            "items": jsonl(tmp_path / "facts2.jsonl", {"question": "Who?", "answer": ["Ann", "Bo"]}),
            "text": str(tmp_path / "story.txt"), "long": tmp_path / "long.jsonl"}


def on_files(out, *more):
    return evaluation.main(["--methods", "lora", "--pretrain", PRETRAIN, "--calibrate", CALIBRATE,
                            "--adapt", ADAPT, "--out", str(out), *more])


def test_a_users_own_files_run_through_all_stages(out, files, capsys):
    """By likelihood, or by exact match where every item allows it; only what the user names is kept."""
    pathlib.Path(files["text"]).write_text("Once upon a time there was a line.\n" * 99)
    results = on_files(out, "--task", files["task"])
    target = results["lora"]["target"]
    assert target["n"] == 4 and target["score"] == pytest.approx(100 * 2.718281828 ** -target["nats"])
    assert set(results["lora"]["kept"]) == set(tasks.KINDS)
    assert set(results["lora"]["text"]) == {"prose", "source"}
    assert (out / "double" / "calibration.pt").exists()
    results = on_files(out, "--task", files["task"], "--eval", files["eval"], "--keep", files["items"],
                       "--keep", files["text"])
    assert results["lora"]["target"]["n"] == 9 and results["lora"]["target"]["score"] in range(101)
    assert results["lora"]["target"]["nats"] > 0  # the likelihood stands beside the share of right answers
    assert set(results["lora"]["kept"]) == {"facts2"} and set(results["lora"]["text"]) == {"story"}
    results = on_files(out, "--task", files["task"], "--keep", files["text"])
    assert results["lora"]["kept"] == {} and 0 < results["lora"]["text"]["story"]["score"] < 12


def test_likelihood_is_that_of_the_answers_alone(out):
    """From the logits, item by item; a longer batch changes nothing."""
    model, _ = train.load_foundation(out, "cpu")
    items = [tasks.Item("ab", "c", None), tasks.Item("a", "bcd\ne", None)]
    nats = 0
    for item, end in zip(items, (10, 256)):
        prompt, answer = [256, *item.prompt.encode()], [*item.answer.encode(), end]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer]))[0, len(prompt) - 1:-1].log_softmax(-1)
        nats -= logits[range(len(answer)), answer].sum().item()
    found = evaluation.likelihood(model, items)
    assert found["nats"] == pytest.approx(nats / 8, rel=0.01)
    assert found["bits_per_byte"] == pytest.approx(nats / 8 / 0.6931, rel=0.01)


@pytest.mark.parametrize("arguments, answer", [
    (["--task", "{long}"], "long.jsonl, line 3: 20[0-9] tokens do not fit the context of 128 (1 such items"),
    (["--task", "{task}", "--keep", "{long}x"], "must be a .jsonl file of items or a .txt file"),
    (["--task", "{task}", "--eval", "{missing}"], "missing.jsonl"),
    (["--task", "{task}", "--keep", "{items}", "--keep", "{items}"], "each needs a name of its own"),
    (["--task", "{task}", "--keep", "{short}"], "short.txt is too short for a row of 128 tokens"),
    (["--task", "{bad}"], "bad.jsonl, line 2")])
def test_what_a_user_gets_wrong_in_files(out, files, tmp_path, arguments, answer):
    rows = [{"prompt": "a", "completion": "b"}] * 30
    names = {**files, "missing": tmp_path / "missing.jsonl",
             "short": tmp_path / "short.txt", "bad": jsonl(tmp_path / "bad.jsonl", rows[0], [], *rows),
             "long": jsonl(files["long"], *rows[:2], {"prompt": "a" * 200, "completion": "b"}, *rows)}
    names["short"].write_text("short\n")
    with pytest.raises((ValueError, OSError), match=answer.replace("(", r"\(")):
        on_files(out, *(argument.format(**names) for argument in arguments))


@pytest.mark.parametrize("arguments, answer", [
    (["--keep", "/nowhere.txt"], "/nowhere.txt is missing, or not a file"),
    (["--methods", "lora", "magic"], "invalid choice: 'magic'"),
    (["--compare", "--quick", "--keep", "known.csv"], "must be a .jsonl file of items or a .txt file"),
    (["--compare", "--quick", "--methods", "lora", "magic"], "unknown method 'magic'"),
    (["--ablate", "--tasks", "magic"], "unknown task 'magic'"),
    (["--calibrate", "--samples 0"], "'0' is not a whole number of 1 or more"),
    (["--adapt", "--nonsense 1"], "unrecognized arguments: --nonsense 1")])
def test_what_is_wrong_is_named_before_any_work(tmp_path, arguments, answer):
    with pytest.raises(ValueError, match=answer):
        evaluation.main([*arguments, "--out", str(tmp_path / "none")])
    assert not (tmp_path / "none").exists()


def test_long_rows_can_be_left_out(out, files, capsys):
    rows = [{"prompt": "a", "completion": "b"}] * 30
    path = jsonl(files["long"], *rows, {"prompt": "a" * 200, "completion": "b"}, *rows)
    on_files(out, "--task", path, "--skip-bad", "--adapt", ADAPT)
    assert "1 of 40 items do not fit the context of 128 and are left out" in capsys.readouterr().out

"""Every file under out/: written whole or not at all, checked when read, built once per settings.

A checkpoint is what torch.save writes of a dict of tensors and plain values with its "kind" and
"settings": a zip file, whose checksums find damage. Loading one executes nothing (weights_only).
"""
import contextlib
import hashlib
import json
import os
import pathlib
import signal
import threading
import zipfile

import torch

import tasks
from extras.bpe import ByteLevelBPE
from extras.llama import Llama, LlamaConfig
from extras.baselines import protect
from extras.machine import barrier, rank_and_world, release_freed_memory
from model import GPT, GPTConfig, add_lora, merge_lora

try:
    import fcntl
except ImportError:  # Windows: a folder of results is for one process there
    fcntl = None


def fingerprint(tensors):
    """A short SHA-256 of {name: tensor}: the identity of a model's weights."""
    digest = hashlib.sha256()
    for name, t in sorted(tensors.items()):
        digest.update(f"{name} {tuple(t.shape)} {t.dtype}".encode())
        digest.update(t.detach().cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def file_lock(path, wait=True):
    """Yields True once this process alone may build `path`; without `wait`, False if another may.
    The lock is on a file beside `path`, so it ends with the process, however that ends. Of
    processes that work together, rank 0 takes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    while fcntl and not rank_and_world()[0]:
        with open(path.with_name(f"{path.name}.lock"), "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not wait:
                    yield False
                    return
                print(f"  another process is building {path}: waiting for it", flush=True)
                fcntl.flock(lock, fcntl.LOCK_EX)
            if os.fstat(lock.fileno()).st_nlink:  # else its former owner has removed it: try again
                try:
                    yield True
                finally:
                    os.unlink(lock.name)
                return
    yield True


@contextlib.contextmanager
def before_ctrl_c():
    """Ctrl-C waits for the end of this block, as it would make torch.save abort the process."""
    handler, pressed = signal.getsignal(signal.SIGINT), []
    if (handler is not signal.default_int_handler
            or threading.current_thread() is not threading.main_thread()):
        yield
        return
    signal.signal(signal.SIGINT, lambda *_: pressed.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if pressed:
        raise KeyboardInterrupt


def atomic_write(path, write):
    """Create `path` by write(file), whole or not at all: under a temporary name, then renamed.
    OSError says what cannot be written and why. Of processes that work together, rank 0 writes."""
    if rank_and_world()[0]:
        return
    temporary = path.with_name(f"{path.name}.tmp")
    with file_lock(temporary), before_ctrl_c():  # a killed process's leftover is overwritten
        try:
            with open(temporary, "wb") as f:
                write(f)
                f.flush()
                os.fsync(f.fileno())
            os.replace(temporary, path)
        except (OSError, RuntimeError) as error:  # torch.save hides a full disk in a RuntimeError
            reason = error if isinstance(error, OSError) else error.__context__ or error
            raise OSError(f"{path} cannot be written: {reason}") from None
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def friendly_errors(path, advice):
    """Whatever is wrong with a file becomes a ValueError of one line: file, reason, advice."""
    try:
        yield
    except Exception as error:
        kind = "" if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: "
        raise ValueError(f"{path} cannot be read ({kind}{' '.join(str(error).split())[:150]}); "
                         f"{advice}") from None


# ------------------------------------------------------------------------------------------------
# Checkpoints

def check_finite(content, name=""):
    """ValueError names a tensor in nested dicts and lists that is not finite."""
    if torch.is_tensor(content) and not torch.isfinite(content).all():
        raise ValueError(f"{name} holds NaN or infinity")
    parts = (content.items() if isinstance(content, dict) else
             enumerate(content) if isinstance(content, list) else ())
    for key, part in parts:
        check_finite(part, f"{name} {key}".strip())


def save(path, content):
    """Write a checkpoint. ValueError, and nothing is written, when a tensor is not finite."""
    check_finite(content)
    atomic_write(path, lambda f: torch.save(content, f))


def load(path, kind, made_by):
    """Read a checkpoint; ValueError says what is wrong with it and which command makes one."""
    if not path.exists():
        raise ValueError(f"{path} is missing; make it with: {made_by}")
    with friendly_errors(path, f"delete it and make it again with: {made_by}"):
        with zipfile.ZipFile(path) as file:  # no checksum covers the flag that an entry is a folder
            if file.testzip() or any(entry.external_attr for entry in file.infolist()):
                raise ValueError("a checksum does not fit: it is damaged")
        content = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(content, dict) or content.get("kind") != kind:
            raise ValueError(f"it is not a {kind} of this project")
    return content


def is_up_to_date(path, kind, settings):
    """Whether `path` holds a result for exactly these settings; prints it if so."""
    with contextlib.suppress(ValueError, KeyError):  # missing or damaged: built again
        if load(path, kind, "")["settings"] == settings:
            print(f"{path} is up to date")
            return True
    return False


def build_if_stale(path, kind, settings, build):
    """Build `path` unless it already holds a result for these settings. If another process is
    building it, wait for that and use it."""
    if is_up_to_date(path, kind, settings):
        return
    with file_lock(path):
        barrier()
        if not is_up_to_date(path, kind, settings):  # else built by the process waited for
            save(path, {"kind": kind, "settings": settings, **build()})
            path.with_suffix(".partial").unlink(missing_ok=True)
            print(f"{path} written")
            release_freed_memory()
    barrier()


def save_resume_state(partial, settings, losses, trained, optimizers):
    """Save what `load_resume_state` continues from: one loss per finished step, and all tensors."""
    save(partial, {"kind": "partial", "settings": settings, "losses": losses,
                   "parameters": {name: p.detach() for name, p in trained.items()},
                   "optimizers": [optimizer.state_dict() for optimizer in optimizers]})


def load_resume_state(partial, settings, trained, optimizers):
    """The losses of an interrupted run of the same settings, whose state is restored; else []."""
    if not partial or not partial.exists():
        return []
    state = load(partial, "partial", "the same command")
    with friendly_errors(partial, "delete it; the same command then starts anew"), torch.no_grad():
        if state["settings"] != settings:
            return []
        for name, p in trained.items():
            p.copy_(state["parameters"][name])
    for optimizer, saved in zip(optimizers, state["optimizers"]):
        optimizer.load_state_dict(saved)
    print(f"  continuing after step {len(state['losses'])} of an interrupted run")
    return state["losses"]


def make_model(config):
    """The Llama or GPT, with random weights, of a dict of its configuration."""
    return Llama(LlamaConfig(**config)) if "n_kv_head" in config else GPT(GPTConfig(**config))


def load_foundation(out, device):
    """(GPT or Llama, fingerprint). A tokenizer that came with the weights becomes one of
    tasks.ENCODINGS."""
    path, made_by = pathlib.Path(out) / "foundation.pt", f"python train.py pretrain --out {out}"
    saved = load(path, "foundation", made_by)
    with friendly_errors(path, f"delete it and make it again with: {made_by}"):
        model = make_model(saved["settings"]["config"])
        model.load_state_dict(saved["model"])
        name, tokens = model.config.encoding, model.config.vocab_size
        if "tokenizer" in saved and name not in tasks.ENCODINGS:
            tasks.ENCODINGS[name] = ByteLevelBPE(name, saved["tokenizer"])
    if tasks.get_encoding(name).n_vocab > tokens:
        raise ValueError(f"{path} has {tokens} tokens, too few for {name}")
    # a Llama's context, on which calibrations depend, shows in no weight's shape
    context = "" if isinstance(model, GPT) else f" {model.config.block_size}"
    return model.to(device).eval(), fingerprint(saved["model"]) + context


def load_adapter(path, out, device, merge=True):
    """The foundation with the adapter of `path`: merged, an ordinary model; else with LoRALinear
    layers. What kind of adapter it is follows from its tensors' names."""
    made_by = "python train.py adapt"
    saved = load(path, "adapter", made_by)
    model, foundation = load_foundation(out, device)
    with friendly_errors(path, f"make it again with: {made_by}"):
        settings, changed = saved["settings"], saved["changed"]
        if settings["foundation"] != foundation:
            raise ValueError("it belongs to another foundation")
        if any("lora_" in name for name in changed):
            for name, layer in add_lora(model, settings["rank"], settings["scale"]).items():
                if f"{name}.lora_U" in changed:
                    protect(layer, *(changed[f"{name}.lora_{X}"].to(device) for X in "UV"))
                layer.init_from(changed[f"{name}.lora_A0"], changed[f"{name}.lora_B0"])
        model.load_state_dict(changed, strict=False)
    if merge:
        merge_lora(model)
    return model


def task_folder(args):
    """out/<task>; for a task from a file, the file's name without .jsonl."""
    return pathlib.Path(args.out) / pathlib.Path(args.task).stem


def load_calibration(args, foundation):
    """What calibrate.py wrote for this task: "layers" {name: {C_pre, C_task, S_pre}}, "samples"."""
    path = task_folder(args) / f"{args.calibration}.pt"
    made_by = f"python calibrate.py --task {args.task} --name {args.calibration} --out {args.out}"
    calibration = load(path, "calibration", made_by)
    if calibration["settings"]["foundation"] != foundation:
        raise ValueError(f"{path} belongs to another foundation; make it again with: {made_by}")
    return calibration


# ------------------------------------------------------------------------------------------------
# JSON

def read_cached_json(path, identity):
    """The content of the JSON file `path` if it can be read and is for `identity`, else None."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        content = json.loads(path.read_text())
        return content if content["identity"] == identity else None


def cached_json(path, identity, make, wait=True):
    """The content of `path` if it was made for `identity`; otherwise make(), which is written there
    (None without `make`). While another process makes it, wait for it (None without `wait`)."""
    content = read_cached_json(path, identity)
    if not content and make:
        with file_lock(path, wait) as locked:
            content = locked and read_cached_json(path, identity)
            if locked and not content:
                content = {"identity": identity, **make()}
                write_json(path, content)
    return content or None


def write_json(path, content):
    atomic_write(path, lambda f: f.write(json.dumps(content, indent=1).encode()))

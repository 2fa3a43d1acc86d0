"""Device, precision, processes and progress: the one place where each is chosen."""
import contextlib
import ctypes
import os
import sys
import time

import torch
import torch.distributed as dist

PRECISIONS = ("auto", "float32", "bfloat16")
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
chosen = "auto"  # see set_precision


def pick_device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def native_bf16(device):
    """Whether the machine computes in bf16 itself. A CPU without such instructions (AVX512-BF16 or
    AMX) emulates them, a hundred times slower."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return any(getattr(torch.cpu, f"_is_{kind}_supported", bool)()
               for kind in ("avx512_bf16", "amx_tile"))


def set_precision(choice=None):
    """Choose the precision of training for this process: "auto" (bfloat16 where it is native),
    "float32" or "bfloat16"; default: the environment variable FOLORA_PRECISION, else "auto"."""
    global chosen
    choice = choice or os.environ.get("FOLORA_PRECISION") or "auto"
    if choice not in PRECISIONS:
        raise ValueError(f"precision is {choice!r}; it must be one of {', '.join(PRECISIONS)}")
    chosen = choice


def precision(device):
    """"float32" or "bfloat16": what matrix products in training are computed in."""
    if chosen == "auto":
        return "bfloat16" if native_bf16(device) else "float32"
    return chosen


def autocast(device):
    """bf16 matrix products where `precision` says so; parameters and sums stay float32."""
    return torch.autocast(device.type, torch.bfloat16, precision(device) == "bfloat16")


@contextlib.contextmanager
def tf32(device):
    """TF32 on a GPU for the remaining float32 products: for training, not for moments."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if device.type == "cuda" else before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def describe_machine(device):
    """For example "cpu, 2 threads, float32"."""
    where = (torch.cuda.get_device_name(device) if device.type == "cuda"
             else f"cpu, {torch.get_num_threads()} threads")
    return f"{where}, {precision(device)}"


def maybe_compile(model, wanted):
    """Compile the model's blocks for batches of any length, if `wanted`; returns the model."""
    for block in model.get_submodule(model.block_prefix[:-1]) if wanted else ():
        block.compile(dynamic=True)
    return model


def leave_out_padding(x, y):
    """(x, y, pos, lengths): inputs and targets (B, T), -100 where there is none, without what no
    target depends on, the positions after a row's last one.

    On a CPU, where more than a fifth is that: the rows' texts of these lengths one after the other,
    (1, N), and each token's position in its own. Else x and y as they are, None and None.
    """
    if x.device.type == "cuda":  # it would wait for the lengths
        return x, y, None, None
    read = (y != -100).flip(1).cumsum(1).flip(1) > 0
    if read.float().mean() > 0.79:  # the small model's batches, where it would not pay
        return x, y, None, None
    pos, lengths = torch.arange(x.shape[1]).expand_as(x), read.sum(1).tolist()
    return *(t[read][None] for t in (x, y, pos)), [length for length in lengths if length]


def keep_freed_memory():
    """Let Linux's malloc keep large freed blocks. It would return them to the kernel, which zeroes
    them again on the next allocation: half of a step's time at GPT-2's vocabulary."""
    if hasattr(LIBC, "mallopt"):       # not in every Linux
        LIBC.mallopt(-4, 0)            # M_MMAP_MAX
        LIBC.mallopt(-1, 2 ** 31 - 1)  # M_TRIM_THRESHOLD


def limit_shape_caches():
    """Let a CPU's bf16 products remember 64 shapes, in each of oneDNN's and PyTorch's caches, not
    1,024. A shape takes about 1.3 MB, and each batch has its own: its lengths are its rows'. To be
    called before the first product."""
    for cache in "ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY":
        os.environ.setdefault(cache, "64")


def release_freed_memory():
    """Return what malloc has kept to the kernel: the next stage needs blocks of other sizes."""
    if hasattr(LIBC, "malloc_trim"):
        LIBC.malloc_trim(0)


class Progress:
    """How far a stage is and how long it still takes on this machine. Rewrites one line on a
    terminal; elsewhere prints one when the first steps are timed, then one every ten seconds."""

    def __init__(self, title, total, first=5):
        self.title, self.total, self.terminal = title, total, sys.stdout.isatty()
        self.began, self.start = time.time(), None
        self.due = 1 if self.terminal else first  # in seconds since it began

    def __call__(self, done, note=""):
        """`done` of `total`, with a note; call it often."""
        if self.start is None:
            self.start = done  # a resumed stage does not begin at 0
        finished, seconds = done >= self.total, time.time() - self.began
        if seconds < (2 if finished else self.due) or done == self.start:
            return
        left = seconds / (done - self.start) * (self.total - done)
        text = f"  {self.title} {done / self.total:4.0%}  {note}  " + (
            f"{seconds:.0f} s" if finished else f"{left:.0f} s left of {seconds + left:.0f} s")
        print(f"\r\033[K{text}" if self.terminal else text,
              end="" if self.terminal and not finished else "\n", flush=True)
        self.due = seconds + (0.5 if self.terminal else 10)


# ------------------------------------------------------------------------------------------------
# Several processes, started by torchrun: one per GPU, or several on a CPU

def join_processes():
    """Join the group if torchrun started this process; only rank 0 prints."""
    if "TORCHELASTIC_RUN_ID" in os.environ and not dist.is_initialized():
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
        if dist.get_rank():
            sys.stdout = open(os.devnull, "w")


def leave_processes():
    """Leave the group when all are done: whoever leaves first would close the connection."""
    barrier()
    if dist.is_initialized():
        dist.destroy_process_group()


def rank_and_world():
    """(this process's rank, number of processes)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def barrier():
    """Wait until all processes are here."""
    if dist.is_initialized():
        dist.barrier()


def shard(rows):
    """This process's part of rows that all processes have."""
    rank, world = rank_and_world()
    return rows[rank::world]


def all_reduce_sum(tensors):
    """Replace each tensor by its sum over all processes."""
    for t in tensors if dist.is_initialized() else ():
        dist.all_reduce(t)


def all_gather(rows):
    """The lists of all processes, joined."""
    lists = [rows] * rank_and_world()[1]
    if dist.is_initialized():
        dist.all_gather_object(lists, rows)
    return sum(lists, [])

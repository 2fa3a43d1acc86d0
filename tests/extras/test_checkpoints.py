"""A checkpoint is written whole or not at all, and checked when it is read."""
import os
import pickle
import signal
import time

import pytest
import torch

from extras.files import atomic_write, fingerprint, load, save


def test_a_fingerprint_sees_every_value_name_shape_and_type():
    base = {"a": torch.arange(4.), "b": torch.ones(2, dtype=torch.bfloat16)}
    others = [{**base, "a": torch.tensor([0., 1, 2, 3.0000002])}, {**base, "c": base["b"]},
              {**base, "a": base["a"].view(2, 2)}, {**base, "a": base["a"].double()}]
    assert len({fingerprint(t) for t in [base, *others]}) == 5
    assert fingerprint(base) == fingerprint(dict(reversed(base.items())))


def test_what_is_saved_is_loaded_and_what_is_broken_is_named(tmp_path):
    """A truncated, foreign or executable file is refused with the command that makes a new one; a
    save that fails leaves the former file."""
    path = tmp_path / "folder" / "x.pt"
    save(path, {"kind": "adapter", "t": torch.arange(3)})
    assert load(path, "adapter", "")["t"].tolist() == [0, 1, 2]
    with pytest.raises(ValueError,
                       match="x.pt cannot be read .it is not a found.*python train.py pretrain"):
        load(path, "foundation", "python train.py pretrain")
    with pytest.raises(TypeError):
        save(path, {"kind": "adapter", "t": (i for i in range(3))})
    assert load(path, "adapter", "")["t"].tolist() == [0, 1, 2]
    assert list(path.parent.iterdir()) == [path]
    whole = path.read_bytes()
    for broken in whole[:-50], whole[:10], b"", pickle.dumps({"kind": print}, protocol=2):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match="cannot be read.*make it again with: python"):
            load(path, "adapter", "python train.py adapt")
    with pytest.raises(ValueError, match="is missing; make it with: python"):
        load(tmp_path / "none.pt", "adapter", "python train.py adapt")


def test_a_tensor_that_is_not_finite_is_not_saved(tmp_path):
    """Wherever it is: a resumed run would go on with it."""
    content = {"kind": "partial", "optimizers": [{"state": {0: {"exp_avg": torch.tensor(1.)}}}]}
    save(tmp_path / "x.pt", content)
    content["optimizers"][0]["state"][0]["exp_avg"] /= 0
    with pytest.raises(ValueError, match="optimizers 0 state 0 exp_avg holds NaN or infinity"):
        save(tmp_path / "x.pt", content)
    assert load(tmp_path / "x.pt", "partial", "")["optimizers"][0]["state"][0]["exp_avg"] == 1


def test_a_full_disk_is_not_hidden_by_torch(tmp_path):
    """It becomes one line; nothing is written."""
    class Full:
        """A file that can take 100 bytes."""
        def __init__(self, file):
            self.file, self.flush = file, file.flush

        def write(self, content):
            if self.file.tell() + len(content) > 100:
                raise OSError("no space left")
            return self.file.write(content)
    content = {"kind": "adapter", "t": torch.ones(1000)}
    with pytest.raises(OSError, match="x.pt cannot be written: no space left"):
        atomic_write(tmp_path / "x.pt", lambda f: torch.save(content, Full(f)))
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def ctrl_c():
    """SIGINT raises KeyboardInterrupt, also if the tests were started with it ignored."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, handler)


def test_ctrl_c_waits_for_a_save(tmp_path, ctrl_c):
    """Pressed in the middle of torch.save, it comes when the file is whole; afterwards it comes at
    once again."""
    class Pressing:
        def __init__(self, file):
            self.file, self.flush = file, file.flush

        def write(self, content):
            os.kill(os.getpid(), signal.SIGINT)
            return self.file.write(content)
    content = {"kind": "adapter", "t": torch.ones(1000)}
    with pytest.raises(KeyboardInterrupt):
        atomic_write(tmp_path / "x.pt", lambda f: torch.save(content, Pressing(f)))
    assert load(tmp_path / "x.pt", "adapter", "").keys() == content.keys()
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)


def test_an_entry_that_is_flagged_as_a_folder_is_refused(tmp_path):
    """torch.load would leave it unread. One flipped bit does that, and no checksum covers it."""
    save(tmp_path / "x.pt", {"kind": "adapter", "t": torch.ones(3)})
    content = (tmp_path / "x.pt").read_bytes()
    entry = content.rindex(b"PK\x01\x02", 0, content.rindex(b"/data/0"))  # in the zip's directory
    changed = bytearray(content)
    changed[entry + 38] |= 0x10  # its external attributes
    (tmp_path / "x.pt").write_bytes(changed)
    with pytest.raises(ValueError, match="a checksum does not fit"):
        load(tmp_path / "x.pt", "adapter", "")

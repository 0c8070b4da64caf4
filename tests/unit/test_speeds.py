"""What `doctor --measure` says of a disk and of products, and that `plan --stream` takes it."""

import os
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F

from abft_fast.commands.streamed.speeds import measure
from abft_fast.errors import UserError
from abft_fast.options import PlanConfig
from abft_fast.options.resolve import resolve
from abft_fast.runtime import speeds

pytestmark = pytest.mark.unit


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "model" / "weights.bin"
    path.parent.mkdir()
    with path.open("wb") as file:
        file.write(os.urandom(2**20) * 65)
        os.fsync(file.fileno())
    return path


@pytest.fixture
def remembered(monkeypatch):
    """A system that forgets no file; a file that was just written is then read from memory."""
    monkeypatch.setattr(os, "posix_fadvise", lambda *_: None)


def test_the_whole_file_is_read(file):
    speed = speeds.disk_speed(file)
    assert speed.read == 65 * 2**20
    assert speed.bytes_per_second > 0
    assert speed.from_disk is None or 0 <= speed.from_disk <= 1


def test_what_comes_from_memory_is_not_taken_for_the_disk(file, remembered):
    speed = speeds.disk_speed(file)
    assert speed.from_disk is None or speed.from_disk < 0.1
    if speed.from_disk is not None:
        findings, _ = measure(str(file))
        assert "the rest from memory: the disk is slower" in dict(findings)["disk"]


def test_operations_are_counted_as_a_plan_counts_them(monkeypatch):
    """2 a weight and row, of a product that runs."""
    ran = []
    monkeypatch.setattr(speeds, "fast_float32_linear", nullcontext)  # AMD's has another product
    monkeypatch.setattr(F, "linear", lambda rows, weight: ran.append((rows.shape, weight)))

    def two_seconds(work, device):
        work()
        return 2.0

    monkeypatch.setattr(speeds, "_seconds", two_seconds)
    found = speeds.product_speed(torch.device("cpu"), torch.float32)
    ((rows, weight),) = ran
    assert found == 2 * rows[0] * weight.numel() / 2.0


@pytest.mark.parametrize("where", ["file", "folder"])
def test_a_plan_takes_the_line(where, file):
    (file.parent / "small.json").write_text("{}")
    findings, line = measure(str(file if where == "file" else file.parent))
    assert f"68 MB of {file}" in dict(findings)["disk"]
    words = line.split()
    given = {
        name[2:].replace("-", "_"): value
        for name, value in zip(words[::2], words[1::2], strict=True)
    }
    config = resolve(PlanConfig, {"stream": True, "gradient": "local", **given})
    assert config.disk_bandwidth > 0 and config.operations > 0
    assert (config.bus_bandwidth is None) == (not torch.cuda.is_available())


def test_what_cannot_be_measured(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        measure(str(tmp_path / "nothing"))
    (tmp_path / "small.bin").write_bytes(b"0" * 1000)
    with pytest.raises(UserError, match="name a larger file"):
        measure(str(tmp_path))

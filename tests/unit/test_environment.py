"""What memory there is, as containers tell it, and what a process has taken."""

import subprocess
import sys

import pytest
import torch

from abft_fast.runtime.environment import _left_in_control_groups

pytestmark = pytest.mark.unit

STAT = "anon 7\nactive_file 300\ninactive_file 200\n"


def test_cached_files_are_free_memory(tmp_path):
    assert _left_in_control_groups(tmp_path) == []
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("900\n")
    (tmp_path / "memory.stat").write_text(STAT)
    assert _left_in_control_groups(tmp_path) == [1000 - 900 + 500]
    (tmp_path / "memory.max").write_text("max\n")
    assert _left_in_control_groups(tmp_path) == []


def test_the_first_version_too(tmp_path):
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("1000\n")
    (tmp_path / "memory" / "memory.usage_in_bytes").write_text("600\n")
    (tmp_path / "memory" / "memory.stat").write_text(STAT)
    assert _left_in_control_groups(tmp_path) == [1000 - 600 + 500]


@pytest.mark.slow
def test_the_peak_of_a_process_is_its_own():
    """Not that of the process that started it."""
    code = (
        "import torch; from abft_fast.runtime.environment import peak_memory; "
        "torch.ones(2**24); print(peak_memory(torch.device('cpu')))"
    )
    large = torch.ones(2**28)  # 1 GiB
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 2**26 < int(run.stdout) < large.nbytes

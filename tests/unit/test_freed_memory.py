"""Freed memory goes back to the system at once."""

import subprocess
import sys

import pytest

pytestmark = [pytest.mark.unit, pytest.mark.slow]

# Blocks of 4 MB, of which every other one is freed: glibc keeps the gaps.
FREE = """
import sys
import psutil
import torch
from abft_fast.runtime.freed_memory import give_back_at_once

if sys.argv[1] == "at once":
    assert give_back_at_once()
torch.ones(2**22)  # as 16 MB are freed, glibc keeps later blocks of up to 16 MB
blocks = [torch.ones(2**20) for _ in range(64)]
held = psutil.Process().memory_info().rss
del blocks[::2]
print((held - psutil.Process().memory_info().rss) / (32 * 2**22))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a setting of glibc")
@pytest.mark.parametrize(("way", "least", "most"), [("at once", 0.95, 1.05), ("kept", -0.05, 0.5)])
def test_gaps_between_blocks(way, least, most):
    run = subprocess.run(
        [sys.executable, "-c", FREE, way], capture_output=True, text=True, check=True
    )
    assert least <= float(run.stdout) <= most

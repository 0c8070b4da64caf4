"""What memory there is, as containers tell it, and what a process has taken."""

import subprocess
import sys

import pytest
import torch

from abft_fast.commands import session
from abft_fast.commands.session import Session
from abft_fast.memory.types import Arithmetic
from abft_fast.options import TrainConfig
from abft_fast.options.resolve import resolve
from abft_fast.runtime.environment import _left_in_control_groups, multiplies_bfloat16
from abft_fast.runtime.progress import Progress

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


@pytest.mark.parametrize(
    ("capabilities", "is_faster"),
    [({"avx512_bf16": True}, True), ({"amx_bf16": True}, True), ({"avx512_bf16": False}, False)],
)
def test_bfloat16_is_suggested_where_the_processor_multiplies_it(
    capabilities, is_faster, monkeypatch
):
    if not hasattr(torch.cpu, "get_capabilities"):
        pytest.skip("this torch does not tell what the processor can do")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert multiplies_bfloat16() == is_faster


def test_bfloat16_is_suggested_once_and_not_to_who_has_chosen(monkeypatch):
    monkeypatch.setattr(session, "multiplies_bfloat16", lambda: True)
    monkeypatch.setattr(Session, "__init__", lambda self, config: setattr(self, "config", config))
    for options, count in (
        ({"model": "some/model"}, 1),
        ({"model": "some/model", "mixed_precision": "no"}, 0),
        ({"model": "builtin"}, 0),
    ):
        lines = []
        one = Session(resolve(TrainConfig, options))
        one.progress, one.arithmetic = Progress(), Arithmetic("cpu", mixed=False)
        monkeypatch.setattr(one.progress, "say", lines.append)
        one.suggest_bfloat16()
        assert len(lines) == count

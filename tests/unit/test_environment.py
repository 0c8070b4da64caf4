"""What memory there is, as containers tell it."""

import pytest

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

"""`abft-fast train`, as a newcomer runs it: nothing said, nothing downloaded."""

import json

import pytest

from tests.command_line import abft_fast

pytestmark = pytest.mark.cli


def test_it_makes_the_builtin_model_better_on_test_prompts(tmp_path):
    result = abft_fast("train", "--device", "cpu", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    (run,) = (tmp_path / "runs").iterdir()
    before, after = (
        {
            **json.loads((run / "evaluation.json").read_text())[side]["subj"],
            **json.loads((run / "attention.json").read_text())[side]["subj"],
        }
        for side in ("before", "after")
    )
    assert after["accuracy"] - before["accuracy"] >= 0.1  # 0.19 to 0.20 in three seeds
    share, heads = "correct_share_above_chance", "induction_heads"
    assert after[share] > before[share] > 0
    assert abs(after[heads] / before[heads] - 1) < 0.1

"""What README says runs, and its generated part is fresh."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from abft_fast.cli.options_table import insert
from tests.tiny_models import FAMILIES

pytestmark = pytest.mark.cli

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_loop_and_the_layer_run():
    loop, layer = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    printed = []
    for code in (loop, layer):
        result = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stderr
        printed.append(result.stdout)
    rows = [[float(x) for x in line.split()] for line in printed[0].splitlines()]
    assert len(rows) == 2 and all(loss > 0 and heads > 0 for loss, heads in rows)


def test_the_table_of_options_is_fresh():
    text = (ROOT / "docs" / "reference" / "options.md").read_text(encoding="utf-8")
    assert insert(text) == text, "run `make options`"


def test_the_families_named_are_the_families_tested():
    named = re.search(r"1e-4 in float32\): ([^.]*)\.", README)[1]
    assert sorted(named.replace("\n", " ").split(", ")) == sorted(FAMILIES)

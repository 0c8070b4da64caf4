import re
from pathlib import Path

import pytest

from abft_fast.cli.original_options import OPTIONS, translate
from abft_fast.options import TrainConfig, flag

pytestmark = pytest.mark.unit

DOCS = Path(__file__).parents[2] / "docs" / "reference" / "original.md"


def test_every_option_is_one_of_ours_and_in_the_docs():
    ours = {flag(name) for name in TrainConfig.model_fields}
    assert {target.split()[0] for target in OPTIONS.values()} <= ours
    table = dict(re.findall(r"^\| `--(\w+)` \| `(.+)` \|$", DOCS.read_text(), re.MULTILINE))
    assert table == OPTIONS


def test_no_spelling_of_the_original_is_another_option_of_ours():
    ours = {flag(name) for name in TrainConfig.model_fields}
    for name, option in OPTIONS.items():
        with_dashes = flag(name)
        assert with_dashes not in ours or with_dashes == option, name


def test_names_are_replaced_with_and_without_equals():
    assert translate(["train", "--ICL_k", "4", "--lora_r=8", "--restricted_gradient", "x"]) == [
        "train", "--k", "4", "--lora-r=8", "--gradient", "local", "x",
    ]  # fmt: skip
    assert translate(["--no-fore-test", "--ICL-k=4", "--PID-param-P", "1"]) == [
        "--no-eval-before", "--k=4", "--pid-p", "1",
    ]  # fmt: skip
    assert translate(["--k=2", "--no-such", "epoch"]) == ["--k=2", "--no-such", "epoch"]

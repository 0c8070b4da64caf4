"""The example of the original's README, from docs/reference/original.md as it stands there."""

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

from tests.command_line import abft_fast

pytestmark = pytest.mark.cli

DOCS = (Path(__file__).parents[2] / "docs" / "reference" / "original.md").read_text()
EXAMPLE = shlex.split(
    re.search(r"```\nabft-fast train(.*?)```", DOCS, re.DOTALL)[1].replace("\\\n", "")
)


def with_option(name, value):
    arguments = list(EXAMPLE)
    arguments[arguments.index(name) + 1] = value
    return arguments


def test_it_plans():
    arguments = with_option("--ICL_model_name", "qwen2.5-32b")
    result = abft_fast("plan", *arguments, "--gpu-memory", 48)
    assert result.returncode == 0, result.stderr
    assert "--gradient full: fits" in result.stdout


def test_it_runs_on_the_built_in_model(tmp_path):
    arguments = with_option("--ICL_model_name", "builtin")
    arguments[arguments.index("--train_sample_num") + 1] = "32"
    arguments[arguments.index("--epoch") + 1] = "1"
    arguments.remove("--generalization_test")  # is tested with fewer prompts elsewhere
    folder = tmp_path / "run"
    result = abft_fast("train", *arguments, "--output-dir", folder)
    assert result.returncode == 0, result.stderr
    assert set(json.loads((folder / "evaluation.json").read_text())) == {"after"}
    config = yaml.safe_load((folder / "config.yaml").read_text())
    expected = {
        "dataset": "sst2", "k": 4, "reward": 1.0, "penalty": 0.5, "lr": 2e-5, "seed": 43,
        "quantized": True, "adaptation": "pid", "method": "ABFT", "no_save": True,
    }  # fmt: skip
    assert {name: config[name] for name in expected} == expected
    assert not (folder / "adapter").exists()

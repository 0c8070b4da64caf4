"""Every example runs as it stands, with few steps."""

import contextlib
import csv
import io
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path

import matplotlib
import pytest
import torch
import transformers
from matplotlib import pyplot

from abft_fast import builtin_model_path
from tests.command_line import COMMAND, environment

pytestmark = pytest.mark.cli

EXAMPLES = Path(__file__).parents[2] / "examples"
NOTEBOOK = json.loads((EXAMPLES / "quickstart.ipynb").read_text(encoding="utf-8"))
CODE_CELLS = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def test_readme_lists_every_example():
    listed = re.findall(r"\]\(([^)]*)\)", (EXAMPLES / "README.md").read_text(encoding="utf-8"))
    there = {path.name for path in EXAMPLES.iterdir()} - {"README.md"}
    assert sorted(listed) == sorted(there)


def test_the_loop_trains_queries_and_keys_alone(monkeypatch, capsys):
    script = EXAMPLES / "loss_in_your_own_loop.py"
    monkeypatch.setattr(sys, "argv", [script.name, "--steps", "2", "--test-prompts", "8"])
    names = runpy.run_path(str(script), run_name="__main__")
    stored = transformers.AutoModelForCausalLM.from_pretrained(builtin_model_path())
    trained = dict(names["model"].named_parameters())
    for name, weight in stored.named_parameters():
        last_layer_reads = "layers.3" not in name or "k_proj" in name or "q_proj" in name
        learned = re.search(r"[qk]_proj\.weight", name) is not None and last_layer_reads
        assert torch.equal(weight, trained[name]) != learned, name
    before, *steps, after = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"accuracy before \d+\.\d%", before)
    assert re.fullmatch(r"accuracy after \d+\.\d%", after)
    assert len(steps) == 2
    for line in steps:
        loss, heads, share = re.search(r"loss (.+)  heads (.+)  correct share (.+)%", line).groups()
        assert float(loss) > 0 and float(heads) > 1 and 30 < float(share) < 80


def test_the_kernels_need_torch_alone_and_teach_heads_to_find_labels():
    script = EXAMPLES / "kernels_on_plain_torch.py"
    code = (
        f"import runpy, sys; sys.argv = [{script.name!r}, '--steps', '21']\n"
        f"runpy.run_path({str(script)!r}, run_name='__main__')\n"
        "assert not {'transformers', 'abft_fast'} & set(sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    errors = re.findall(r"^(\w+): gradient .* by (.+)$", result.stdout, re.MULTILINE)
    assert [how for how, _ in errors] == ["beside", "fused"]
    assert all(float(error) < 1e-6 for _, error in errors)
    steps = re.findall(r"loss (.+)  induction heads (.+) of 8  correct share (.+)%", result.stdout)
    losses, heads, shares = zip(*[map(float, step) for step in steps], strict=True)
    assert losses[-1] < losses[0] - 1
    assert heads[-1] > heads[0] + 1
    assert shares[-1] > shares[0] + 20


def test_a_csv_from_training_to_predictions(tmp_path):
    folder = shutil.copytree(
        EXAMPLES / "own_csv", tmp_path / "own_csv", ignore=shutil.ignore_patterns("runs")
    )
    with (folder / "notes.csv").open(newline="") as file:
        sections = Counter(row["section"] for row in csv.DictReader(file))
    assert sections == {"sport": 40, "economy": 40, "research": 40}
    few = ["--train-samples", "16", "--epochs", "1", "--pseudo-batch-size", "8", "--device", "cpu"]
    path = f"{COMMAND.parent}{os.pathsep}{os.environ['PATH']}"
    result = subprocess.run(
        [folder / "run.sh", *few],
        cwd=tmp_path,
        env={**environment(), "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    evaluation = json.loads((folder / "runs/notes/evaluation.json").read_text())
    assert set(evaluation) == {"before", "after"}
    attention = json.loads((folder / "runs/notes/attention.json").read_text())
    assert attention["before"]["notes"]["induction_heads"] > 5  # the label words are seen as labels
    written = (folder / "runs/predictions.csv").read_text()
    assert result.stdout.endswith(written)
    with (folder / "new_notes.csv").open(newline="") as file:
        notes = [row["note"] for row in csv.DictReader(file)]
    rows = list(csv.DictReader(io.StringIO(written)))
    assert [row["note"] for row in rows] == notes
    for row in rows:
        likely = {word: float(row[f"p_{word}"]) for word in ("sports", "business", "science")}
        assert sum(likely.values()) == pytest.approx(1, abs=1e-6)
        assert row["prediction"] == max(likely, key=likely.get)


def test_the_notebook_runs_with_few_steps():
    source = "\n".join("".join(cell["source"]) for cell in CODE_CELLS)
    for many, few in (("STEPS = 32", "STEPS = 1"), ("[:128]", "[:8]"), ("% 8", "% 1")):
        assert source.count(many) == 1, many
        source = source.replace(many, few)
    names = {}
    matplotlib.use("Agg")
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()) as printed:
        warnings.filterwarnings("ignore", message="FigureCanvasAgg is non-interactive")
        exec(compile(source, "quickstart.ipynb", "exec"), names)
    assert len(pyplot.get_fignums()) == 2
    pyplot.close("all")
    transformers.logging.enable_progress_bar()
    assert "step 1: loss" in printed.getvalue()
    (mass, share, induction), (_, share_after, _) = names["before"], names["after"]
    assert mass.shape == induction.shape == (4, 6)
    assert induction.sum() > 5
    assert (share != share_after).any()


def test_the_notebook_has_its_outputs():
    shown = []
    for cell in CODE_CELLS:
        assert cell["execution_count"] and cell["outputs"]
        for output in cell["outputs"]:
            if output["output_type"] == "stream":
                assert output["name"] == "stdout" and "".join(output["text"]).strip()
            else:
                assert len(output["data"]["image/png"]) > 5000
                shown.append(output)
    assert len(shown) == 2
    assert not re.search(r"Warning|site-packages|/home/|/root/|/tmp/|Users", json.dumps(NOTEBOOK))

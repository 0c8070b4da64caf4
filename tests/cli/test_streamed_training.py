"""`train --stream` as a user runs it."""

import json
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file, save_file

from abft_fast.builtin import builtin_model_path
from tests.close import close
from tests.command_line import FEW_QUERIES, QUICK, abft_fast, start

pytestmark = pytest.mark.cli

OPTIONS = [*QUICK, *FEW_QUERIES, "--gradient", "2", "--pseudo-batch-size", "16"]
ADAPTER = "adapter/adapter_model.safetensors"


@pytest.fixture(scope="module")
def streamed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "streamed"
    result = abft_fast("train", *OPTIONS, "--stream", "--output-dir", folder)
    assert result.returncode == 0, result.stderr
    return folder, result


def read(folder, name):
    return json.loads((folder / name).read_text())


def test_the_run_has_what_a_run_has(streamed):
    folder, result = streamed
    assert "(ours, not the paper's)" in result.stderr
    assert "weights read: " in result.stderr
    assert set(read(folder, "evaluation.json")) == {"before", "after"}
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert not list((folder / "checkpoints").iterdir())


@pytest.mark.parametrize(
    "arithmetic",
    [[], ["--mixed-precision", "bf16"], ["--mixed-precision", "bf16", "--quantized"]],
    ids=["float32", "bfloat16", "NF4 in bfloat16"],
)
def test_the_figures_are_those_of_an_ordinary_run(arithmetic, tmp_path):
    control = ["--adaptation", "none", *arithmetic]
    for name, way in (("ordinary", []), ("streamed", ["--stream", "--stream-states", "disk"])):
        result = abft_fast("train", *OPTIONS, *control, *way, "--output-dir", tmp_path / name)
        assert result.returncode == 0, result.stderr
    ordinary, streamed = tmp_path / "ordinary", tmp_path / "streamed"
    assert (streamed / ADAPTER).read_bytes() == (ordinary / ADAPTER).read_bytes()
    assert read(streamed, "adapter/base.json") == read(ordinary, "adapter/base.json")
    for name in ("evaluation.json", "attention.json"):
        for side in ("before", "after"):
            figures, expected = (read(f, name)[side]["trec"] for f in (streamed, ordinary))
            assert figures == close(expected, rel=1e-6)


def test_a_run_that_overwrites_another_is_trained(streamed, tmp_path):
    """The old one is finished, and of another base."""
    folder = tmp_path / "run"
    shutil.copytree(streamed[0], folder)
    environment = read(folder, "environment.json")
    environment["base"]["model"] = "/some/other/model"
    environment["base"]["vectors"] = {}
    (folder / "environment.json").write_text(json.dumps(environment))
    options = [*OPTIONS, "--stream", "--no-eval", "--penalty", "0.9", "--overwrite"]
    result = abft_fast("train", *options, "--output-dir", folder)
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["penalty"] == 0.9
    assert not (folder / "evaluation.json").exists()
    assert (folder / ADAPTER).read_bytes() != (streamed[0] / ADAPTER).read_bytes()


def test_weights_that_are_not_finite_leave_no_folder(tmp_path):
    """They are in the last layer, so blocks before it have been trained and saved."""
    model, folder = tmp_path / "model", tmp_path / "run"
    shutil.copytree(builtin_model_path(), model)
    (weights,) = model.glob("*.safetensors")
    tensors = load_file(weights)
    name = max(n for n in tensors if n.endswith("input_layernorm.weight"))
    tensors[name][0] = torch.nan
    save_file(tensors, weights, {"format": "pt"})
    options = [*OPTIONS, "--model", model, "--stream", "--save-steps", "1"]
    result = abft_fast("train", *options, "--output-dir", folder)
    assert result.returncode == 2, result.stderr
    assert "not finite" in result.stderr.splitlines()[-1]
    assert not folder.exists()


def test_killed_and_resumed(streamed, tmp_path):
    """SIGKILL behind the first block; nothing of it is computed again."""
    folder = tmp_path / "run"
    process = start("train", *OPTIONS, "--stream", "--save-steps", "1", "--output-dir", folder)
    while not (folder / "checkpoints" / "block-000001" / "state-0").is_dir():
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "adapter").exists()
    result = abft_fast("train", "--resume", folder)
    assert result.returncode == 0, result.stderr
    assert (folder / ADAPTER).read_bytes() == (streamed[0] / ADAPTER).read_bytes()
    assert read(folder, "evaluation.json") == read(streamed[0], "evaluation.json")
    checkpoints = folder / "checkpoints"
    (checkpoints / "block-000001" / "state-0").mkdir(parents=True)
    (checkpoints / "hidden-0.bin").write_bytes(b"left where it was killed behind the adapter")
    again = abft_fast("train", "--resume", folder)
    assert again.returncode == 0, again.stderr
    assert not list(checkpoints.iterdir())


@pytest.mark.parametrize("way", [[], ["--stream"]])
def test_a_streamed_adapter_is_evaluated_by_eval(way, streamed, tmp_path):
    folder, _ = streamed
    output = tmp_path / "out.json"
    result = abft_fast(
        "eval", "--dataset", "trec", "--k", "2", "--device", "cpu", "--adapter",
        folder / "adapter", "--output", output, *FEW_QUERIES, *way,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    expected = read(folder, "evaluation.json")["after"]["trec"]
    assert json.loads(output.read_text())["trec"] == close(expected, rel=1e-6)


def test_random_weights_of_true_width(tmp_path):
    result = abft_fast(
        "train", "--model", "synthetic:qwen2.5-0.5b:2", "--stream", "--gradient", "local",
        "--no-head-filter", "--train-samples", "4", "--epochs", "1", "--k", "2", "--no-eval",
        "--device", "cpu", "--output-dir", tmp_path / "run",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "weights read: 0 MB" in result.stderr
    assert (tmp_path / "run" / ADAPTER).is_file()

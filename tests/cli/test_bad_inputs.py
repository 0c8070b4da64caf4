"""Every mistake of tests/bad_inputs.py is one line, and leaves the folder as it was."""

import os
import shlex
import shutil

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model

from abft_fast import builtin_model_path
from abft_fast.models.loading import load, read_tokenizer
from abft_fast.models.trainable import set_trained
from tests.bad_inputs import BAD_INPUTS, QUICK, REVIEWS
from tests.command_line import abft_fast
from tests.tiny_models import tiny_model

pytestmark = pytest.mark.cli


class MakesAFolder:
    """What a pickle can do to whoever reads it."""

    def __reduce__(self):
        return os.mkdir, ("unpickled",)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model, a run, a run whose data have changed since, an adapter, and bad ones."""
    folder = tmp_path_factory.mktemp("made")
    train(folder, "run", QUICK)
    (folder / "reviews.csv").write_text(REVIEWS["reviews.csv"])
    train(folder, "own", QUICK.replace("trec", "reviews.csv"))
    (folder / "reviews.csv").write_text(REVIEWS["reviews.csv"] + "an odd film,good\n")
    shutil.copytree(folder / "run/adapter", folder / "adapter")
    set_trained(tiny_model("llama"), "lora", 16).save_pretrained(folder / "other")
    shutil.copytree(builtin_model_path(), folder / "model")
    noised = load(str(folder / "model"), torch.device("cpu"), torch.float32)
    with torch.no_grad():
        for parameter in noised.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    noised.save_pretrained(folder / "noised")
    read_tokenizer("builtin").save_pretrained(folder / "noised")
    prompts = PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
    get_peft_model(noised, prompts).save_pretrained(folder / "prompts")
    for of, to, whole, pickled in (
        ("model", "pickled", "model.safetensors", "pytorch_model.bin"),
        ("adapter", "pickled-adapter", "adapter_model.safetensors", "adapter_model.bin"),
    ):
        shutil.copytree(folder / of, folder / to)
        (folder / to / whole).unlink()
        torch.save(MakesAFolder(), folder / to / pickled)
    return folder


def train(folder, name, options):
    result = abft_fast(*shlex.split(options), "--output-dir", name, cwd=folder)
    assert result.returncode == 0, result.stderr


def prepare(row, made, folder):
    for name in row.made:
        shutil.copytree(made / name, folder / name)
    for name, content in row.files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    for name in row.cut:
        (folder / name).write_bytes((folder / name).read_bytes()[:-1])
    for name in row.lost:
        (folder / name).unlink()


def everything(folder):
    return {p: p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


@pytest.mark.parametrize("row", BAD_INPUTS, ids=lambda row: row.name)
def test_one_line_and_nothing_half_written(row, made, tmp_path):
    prepare(row, made, tmp_path)
    before = everything(tmp_path)
    if row.locked:
        (tmp_path / row.locked).chmod(0o555)
    result = abft_fast(*shlex.split(row.command), cwd=tmp_path, largest_file=row.largest_file)
    if row.locked:
        (tmp_path / row.locked).chmod(0o755)
    *progress, line = result.stderr.splitlines()
    assert result.returncode == row.exit_code, result.stderr
    assert result.stdout == ""
    assert row.after_progress or not progress, result.stderr
    assert "Traceback" not in result.stderr and "--debug" not in line
    assert line.startswith("abft-fast: ")
    at = [line.find(part) for part in row.says]
    assert -1 not in at and at == sorted(at), line
    after = everything(tmp_path)
    if row.grows:
        log = tmp_path / row.grows
        assert after[log].startswith(before[log])
        after[log] = before[log]
    assert after == before


def test_names_are_unique():
    names = [row.name for row in BAD_INPUTS]
    assert len(names) == len(set(names)) >= 40

"""A real model trains block by block from its GGUF file: the same adapter, a part of the memory."""

import json
from collections import Counter

import pytest
import torch

from abft_fast.models import loading
from abft_fast.streaming.model import StreamedModel
from tests.command_line import abft_fast_afresh
from tests.real.fetch import path_of

pytestmark = pytest.mark.real

OPTIONS = [
    "--dataset", "sst2", "--train-samples", "8", "--pseudo-batch-size", "4", "--epochs", "1",
    "--k", "2", "--gradient", "local", "--adaptation", "none", "--no-eval", "--device", "cpu",
]  # fmt: skip


@pytest.fixture(scope="module")
def gemma():
    path = path_of("gemma-3-270m")
    if not path.exists():
        pytest.skip(f"{path.name} is not there: make real-models")
    return str(path)


def test_the_adapter_is_that_of_the_whole_model(gemma, tmp_path):
    """Peak memory is of fresh processes, of which imports and the tokenizer take most."""
    adapters, peaks = [], []
    for name, way in (("whole", []), ("blocks", ["--stream", "--stream-states", "disk"])):
        folder = tmp_path / name
        result = abft_fast_afresh("train", "--model", gemma, *OPTIONS, *way, "--output-dir", folder)
        assert result.returncode == 0, result.stderr
        adapters.append((folder / "adapter" / "adapter_model.safetensors").read_bytes())
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        peaks.append(max(row["peak_memory_bytes"] for row in rows))
    assert adapters[0] == adapters[1]
    assert peaks[1] < 0.6 * peaks[0] and peaks[1] < 0.8e9


def test_bytes_read_from_a_gguf_file(gemma):
    """Every tensor of a layer once, and of the embedding the rows that are used."""
    config = loading.read_config(gemma)
    streamed = StreamedModel(gemma, config, torch.device("cpu"), torch.float32, None)
    tokens, labels = [5, 70, 999], [12, 70]
    streamed.read_outside(tokens, labels)
    for index in range(streamed.layers):
        streamed.bring(range(index, index + 1))
        streamed.drop(range(index, index + 1))
    stored = {name: lazy.stored for name, lazy in streamed.weights._lazy.items()}
    table = stored.pop("model.embed_tokens.weight")
    read = Counter({name: count for (_, name), count in streamed.weights.read_bytes.items()})
    assert read.pop("model.embed_tokens.weight") == table.nbytes * 4 // table.shape[0]
    assert dict(read) == {name: each.nbytes for name, each in stored.items()}
    whole = loading.load(gemma, torch.device("cpu"), torch.float32)
    rows = whole.get_input_embeddings().weight[[5, 12, 70, 999]]
    assert streamed.embedded == [5, 12, 70, 999]
    assert torch.equal(streamed.model.get_input_embeddings().weight, rows)

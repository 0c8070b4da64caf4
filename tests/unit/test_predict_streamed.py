"""`predict --stream` writes the rows of `predict`, and reads the model once a chunk."""

import json
from collections import Counter

import pytest
import torch

from abft_fast import data
from abft_fast.commands import predict
from abft_fast.commands.streamed import predict as predict_streamed
from abft_fast.commands.streamed import run as run_streamed
from abft_fast.commands.streamed.predict import StreamedLabeller
from abft_fast.core.packed_forward import PackedForward
from abft_fast.errors import UserError
from abft_fast.models import loading
from abft_fast.models.base_identity import describe_base
from abft_fast.models.trainable import add_lora, save_adapter
from abft_fast.options import PredictConfig
from abft_fast.options.resolve import resolve
from tests.unit.test_predict import folder, run, write

__all__ = ["folder"]  # a fixture
pytestmark = pytest.mark.unit


@pytest.fixture
def labellers(monkeypatch):
    """The labellers of streamed runs."""
    kept = []
    load = StreamedLabeller.load

    def watched(labeller):
        kept.append(labeller)
        load(labeller)

    monkeypatch.setattr(StreamedLabeller, "load", watched)
    return kept


def few_queries(count):
    texts = [example.text for example in data.load("subj").test[:count]]
    write("few.csv", enumerate(texts), "id", "text")


def assert_same(rows, expected, rel=1e-6):
    for row, other in zip(rows, expected, strict=True):
        assert row.keys() == other.keys()
        for name, cell in row.items():
            if name.startswith("p_"):
                assert float(cell) == pytest.approx(float(other[name]), rel=rel, abs=1e-7)
            else:
                assert cell == other[name]


@pytest.mark.slow
def test_rows_with_an_adapter_the_bytes_read_and_another_base(
    folder, labellers, monkeypatch, capsys
):
    monkeypatch.setattr(predict, "_CHUNK", 5)
    asked = []  # it would be for the whole process
    monkeypatch.setattr(run_streamed, "give_back_at_once", lambda: bool(asked.append(1)))
    few_queries(9)
    model = loading.load("builtin", torch.device("cpu"), torch.float32)
    base = describe_base(model, "builtin")
    model = add_lora(model, 2)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    save_adapter(model, folder / "adapter", base)
    given = {"adapter": "adapter", "input": "few.csv"}
    streamed = {**given, "stream": True, "stream_states": "disk"}
    assert_same(run(**streamed), run(**given))
    assert asked == [1]
    assert "computed once in each of 2 readings; weights read: " in capsys.readouterr().err
    assert not list(folder.glob(".*"))
    weights = labellers[0]._streamed.weights
    read = Counter()
    for (_, name), count in weights.read_bytes.items():
        read[name] += count
    inside = [name for name in weights._files if ".layers." in name]
    assert len(inside) > 40
    assert all(read[name] == 2 * weights.stored_bytes(name) for name in inside)
    (folder / "out.csv").unlink()
    path = folder / "adapter" / "base.json"
    stored = json.loads(path.read_text())
    for name, numbers in stored["vectors"].items():
        stored["vectors"][name] = "9 " + numbers.partition(" ")[2]
    path.write_text(json.dumps(stored))
    with pytest.raises(UserError, match="other weights"):
        run(**streamed)
    assert not (folder / "out.csv").exists() and not list(folder.glob(".*"))


def test_hidden_states_bound_how_many_texts_walk_together(folder, labellers, monkeypatch):
    few_queries(6)
    width = loading.read_config("builtin").hidden_size
    monkeypatch.setattr(predict_streamed, "_STATES", 2 * 4 * width * 80)
    given = {"input": "few.csv"}
    assert_same(run(**given, stream=True), run(**given), rel=1e-5)  # packed otherwise
    (labeller,) = labellers
    assert labeller._walks > 1
    assert list(labeller._parts([60, 20, 1, 200, 5])) == [
        range(0, 2), range(2, 3), range(3, 4), range(4, 5)
    ]  # fmt: skip


def test_keys_of_other_tokens_are_found(folder, monkeypatch):
    """As in a family whose keys depend on more than the tokens before them."""
    stored = PackedForward.pass_by

    def changed(forward, index, hidden):
        if forward.keep:
            for _, value in forward.keep.values():
                value.add_(0.1)
        return stored(forward, index, hidden)

    monkeypatch.setattr(PackedForward, "pass_by", changed)
    with pytest.raises(UserError, match="predict without --stream"):
        run(stream=True)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"stream": True, "device_map": "auto"}, "--device-map auto"),
        ({"stream_states": "disk"}, "needs --stream"),
        ({"stream": True, "stream_states": "disk", "output": "-"}, "beside --output"),
    ],
)
def test_options_that_do_not_go_together(folder, options, says):
    given = {"demonstrations": "demos.csv", "input": "queries.csv", "output": "out.csv"}
    with pytest.raises(UserError, match=says):
        resolve(PredictConfig, {**given, **options})

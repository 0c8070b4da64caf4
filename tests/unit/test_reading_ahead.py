"""The next block is read while a block computes: the same results, errors as themselves, an end."""

import threading

import pytest
import torch

from abft_fast.errors import UserError
from abft_fast.models import loading
from abft_fast.runtime.progress import Progress
from abft_fast.streaming import model as streaming_model
from abft_fast.streaming.ahead import THREAD
from abft_fast.streaming.model import StreamedModel
from abft_fast.streaming.stages import Stage
from abft_fast.streaming.walk import Walk
from tests.streamed_runs import Streamed, adapter_bytes, config_of, same_figures, saved

pytestmark = pytest.mark.unit


@pytest.fixture
def ahead(monkeypatch):
    monkeypatch.setattr(StreamedModel, "has_room_ahead", lambda *_: True)


def readers():
    return [thread for thread in threading.enumerate() if thread.name.startswith(THREAD)]


class Watching(Stage):
    """A stage without prompts, which does what a test says."""

    def __init__(self, streamed, act):
        super().__init__(streamed, None)
        self.act = act

    def run(self, block):
        self.act(block)


def walk_of(path, act):
    shape = loading.read_config(path)
    streamed = StreamedModel(path, shape, torch.device("cpu"), torch.float32, None)
    return streamed, Walk(streamed, [Watching(streamed, act)], 1)


@pytest.mark.parametrize("options", [{}, {"quantized": True}, {"trainable": "full"}], ids=str)
def test_results_are_the_same(options, tmp_path, monkeypatch):
    if options.get("quantized"):
        pytest.importorskip("bitsandbytes")
    path = saved("llama", tmp_path, hidden_size=64, intermediate_size=64)
    config = config_of(path, gradient=2, adaptation="none", epochs=1, **options)
    one = Streamed(config, tmp_path / "one")
    expected = one.run()
    monkeypatch.setattr(StreamedModel, "has_room_ahead", lambda *_: True)
    two = Streamed(config, tmp_path / "two")
    same_figures(two.run(), expected)
    assert adapter_bytes(tmp_path / "two") == adapter_bytes(tmp_path / "one")
    assert two.model.weights.read_bytes == one.model.weights.read_bytes
    assert not readers()


def test_the_next_block_is_read_meanwhile_and_no_other(ahead, tmp_path):
    """The first layer's work ends when the second one has been read, by another thread."""
    by_main, by_reader, done = [], [], threading.Event()

    def act(block):
        if block.start < 3:
            assert done.wait(60)
            done.clear()
        read = {name.split(".")[2] for name in by_reader}
        assert read == {str(layer) for layer in range(1, min(block.start + 2, 4))}
        weights = [
            p for _, m, own in streamed.parameters_of(block.start) for p in [getattr(m, own)]
        ]
        assert not any(weight.is_meta for weight in weights)

    streamed, walk = walk_of(saved("llama", tmp_path), act)
    read, read_ahead = streamed.weights.read, streamed.read_ahead

    def watched_read(name, rows=None):
        reader = threading.current_thread().name.startswith(THREAD)
        (by_reader if reader else by_main).append(name)
        return read(name, rows)

    def watched_ahead(block, stop):
        found = read_ahead(block, stop)
        done.set()
        return found

    streamed.weights.read, streamed.read_ahead = watched_read, watched_ahead
    walk.run(Progress(), "walk")
    assert {name.split(".")[2] for name in by_main} == {"0"}
    assert not readers()


def test_an_error_in_the_thread_is_raised_as_itself(ahead, tmp_path):
    blocks = []
    streamed, walk = walk_of(saved("llama", tmp_path), blocks.append)
    del streamed.weights._files["model.layers.2.mlp.up_proj.weight"]
    with pytest.raises(UserError, match=r"model\.layers\.2\.mlp\.up_proj\.weight"):
        walk.run(Progress(), "walk")
    assert blocks == [range(0, 1), range(1, 2)]
    assert not readers()


def test_an_interrupt_ends_the_thread_behind_its_tensor(ahead, tmp_path):
    reading, interrupted, read = threading.Event(), threading.Event(), []

    def act(block):
        assert reading.wait(60)
        interrupted.set()
        raise KeyboardInterrupt

    streamed, walk = walk_of(saved("llama", tmp_path), act)
    own = streamed.weights.read

    def slow(name, rows=None):
        if threading.current_thread().name.startswith(THREAD):
            reading.set()
            assert interrupted.wait(60)
            stopped.wait(60)
            read.append(name)
        return own(name, rows)

    stopped = threading.Event()
    read_ahead = streamed.read_ahead

    def watched(block, stop):
        threading.Thread(target=lambda: (stop.wait(60), stopped.set())).start()
        return read_ahead(block, stop)

    streamed.weights.read, streamed.read_ahead = slow, watched
    with pytest.raises(KeyboardInterrupt):
        walk.run(Progress(), "walk")
    assert len(read) == 1
    assert not readers()


def test_it_needs_a_gpu_and_room_for_two_blocks(tmp_path, monkeypatch):
    streamed, walk = walk_of(saved("llama", tmp_path), lambda _: None)
    largest = sum(p.numel() * 4 for p in streamed._layers[0].parameters())
    monkeypatch.setattr(streaming_model, "free_memory", lambda _: 2 * largest + 1)
    assert not streamed.has_room_ahead(walk.blocks)
    streamed.device = torch.device("cuda")
    assert streamed.has_room_ahead(walk.blocks)
    assert not streamed.has_room_ahead([range(0, 2), range(2, 4)])

"""How busy a launch of the scan keeps a GPU's processors, by a model of its grid: no GPU is needed.

A processor holds some programs at once, and the next program in order starts where one ends. All
programs are equally fast, and a program takes as long as it has tiles of keys. The share busy is
the work over what all places could do until the last program ends. The goal is 95 %.
"""

import heapq
import math
import types

import pytest
import torch

pytest.importorskip("abft_kernels.loss_triton", exc_type=ImportError)
from abft_kernels.loss_triton import forward
from abft_kernels.loss_triton.launch import Shape

pytestmark = pytest.mark.unit

KEY_HEADS, GROUP, HEAD_DIM = 8, 4, 128
# Processors, and programs that one holds at once (tests/unit/test_main_loops.py).
GPUS = {"A100": (108, 4), "RTX 4090": (128, 2), "H100": (132, 4)}
GOAL = 0.95
# The least share busy on each GPU in turn, as the launcher divides rows today. Short of the goal:
# a last wave that is not full, and rows of unlike lengths, which all get the same splits.
SHARES = {
    "1 of 1k": ([1024], 0.03, 0.06, 0.03),  # two programs a key head: the keys are too few
    "1 of 4k": ([4096], 0.14, 0.25, 0.12),
    "1 of 16k": ([16384], 0.59, GOAL, 0.48),
    "1 of 128k": ([131072], GOAL, GOAL, GOAL),
    "4 of 1k": ([1024] * 4, 0.59, GOAL, 0.48),
    "4 of 4k": ([4096] * 4, 0.78, GOAL, GOAL),
    "4 of 16k": ([16384] * 4, 0.94, GOAL, GOAL),
    "4 of 128k": ([131072] * 4, GOAL, GOAL, GOAL),
    "16 of 4k": ([4096] * 16, 0.78, GOAL, GOAL),
    "32 of 150": ([150] * 32, 0.88, GOAL, 0.72),
    "32 of 600": ([600] * 32, 0.84, 0.83, 0.80),
    "32 of 4k": ([4096] * 32, 0.78, GOAL, 0.79),
    "32 of 16k": ([16384] * 32, 0.78, GOAL, 0.79),
    "32 of 150 to 4k": ([150 + 127 * row for row in range(32)], 0.66, 0.76, 0.65),
    "1k, 4k, 16k, 32k": ([1024, 4096, 16384, 32768], 0.60, 0.75, 0.61),
    "31 of 150, one of 16k": ([150] * 31 + [16384], 0.09, 0.16, 0.09),
}


def tensor(*shape):
    return types.SimpleNamespace(
        shape=shape, is_cuda=True, device="cuda", element_size=lambda: torch.bfloat16.itemsize
    )


def tiles(lengths, splits, key_block):
    """Tiles of every program in the order of the grid, as the kernel divides a row's keys."""
    found = []
    for length in lengths:
        share = math.ceil(math.ceil(length / splits) / key_block) * key_block
        for split in range(splits):
            keys = min(share, length - split * share)
            found.append(max(0, math.ceil(keys / key_block)))
    return found * KEY_HEADS


def busy(work, places):
    """The share of the places' time that is work."""
    ends = [0] * places
    for tile in work:
        heapq.heapreplace(ends, ends[0] + tile)
    return sum(work) / (places * max(ends))


def share_busy(monkeypatch, lengths, processors, programs):
    properties = types.SimpleNamespace(multi_processor_count=processors)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    query = tensor(len(lengths), KEY_HEADS * GROUP, HEAD_DIM)
    key = tensor(sum(lengths), KEY_HEADS, HEAD_DIM)
    rows = types.SimpleNamespace(key_start=lengths)
    shape = Shape(query, key, rows)
    splits = shape.count_splits(shape.tokens, forward._KEYS_PER_SPLIT)
    key_block = shape.tile_keys(forward._TILE_BYTES)
    return busy(tiles(lengths, splits, key_block), processors * programs)


def test_the_model_of_a_grid():
    assert busy([3, 3, 3, 3], 4) == 1
    assert busy([1, 1, 1, 1, 1], 4) == 5 / 8
    assert busy([1, 1, 1, 3], 2) == 6 / 8  # the longest is last
    assert tiles([130, 64], 2, 64) == [2, 1, 1, 0] * KEY_HEADS


@pytest.mark.parametrize(
    ("lengths", "gpu", "least"),
    [
        pytest.param(lengths, gpu, least, id=f"{gpu}, {name}")
        for name, (lengths, *shares) in SHARES.items()
        for gpu, least in zip(GPUS, shares, strict=True)
    ],
)
def test_share_of_a_gpu_that_is_busy(monkeypatch, lengths, gpu, least):
    assert share_busy(monkeypatch, lengths, *GPUS[gpu]) >= least

from dataclasses import fields

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from abft_fast import EncodedPrompt, pack
from abft_fast.core.packed_forward import PackedForward
from abft_fast.core.transfer import in_one_buffer
from abft_fast.runtime.batching import balanced_shares, micro_batches

pytestmark = pytest.mark.unit


def test_layout():
    prompts = [
        EncodedPrompt([5, 6, 7], [1], [True]),
        EncodedPrompt([8], [], []),
        EncodedPrompt([9, 10, 11, 12], [0, 2], [False, True]),
    ]
    packed = pack(prompts)
    assert packed.unpack() == prompts
    assert len(packed) == 3
    assert packed.input_ids.tolist() == [5, 6, 7, 8, 9, 10, 11, 12]
    assert packed.position_ids.tolist() == [0, 1, 2, 0, 0, 1, 2, 3]
    assert packed.cu_seqlens.tolist() == [0, 3, 4, 8]
    assert packed.label_positions.tolist() == [1, 4, 6]
    assert packed.label_offsets.tolist() == [0, 1, 1, 3]
    assert packed.label_is_correct.tolist() == [True, False, True]
    assert packed.cu_seqlens.dtype == packed.label_positions.dtype == torch.int32
    assert packed.label_offsets.dtype == torch.int32
    assert packed.label_is_correct.dtype == torch.bool


def test_a_batch_on_another_device_keeps_its_layout_and_knows_its_bounds():
    prompts = [EncodedPrompt([5, 6, 7], [1], [True]), EncodedPrompt([8], [], [])]
    packed = pack(prompts)
    moved = packed.to("meta")  # nothing on it can be read
    assert moved.bounds == [0, 3, 4] and moved.longest == 3
    assert PackedForward(moved).longest == 3
    for field in fields(packed):
        before, after = getattr(packed, field.name), getattr(moved, field.name)
        assert after.device.type == "meta"
        assert (after.shape, after.dtype) == (before.shape, before.dtype)
        assert after.storage_offset() * after.itemsize % 16 == 0  # kernels are compiled for this


def test_one_buffer_holds_the_tensors_as_they_were():
    tensors = [torch.arange(5), torch.tensor([], dtype=torch.int32), torch.tensor([True, False])]
    tensors += [torch.tensor(0.5), torch.arange(6, dtype=torch.int32).view(2, 3)]
    for part, tensor in zip(in_one_buffer(tensors), tensors, strict=True):
        torch.testing.assert_close(part, tensor, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "empty"),
        ([EncodedPrompt([], [], [])], "input_ids is empty"),
        ([EncodedPrompt([1, 2], [2], [True])], "label_positions must lie"),
        ([EncodedPrompt([1, 2], [-1], [True])], "label_positions must lie"),
        ([EncodedPrompt([1, 2], [1, 1], [True, True])], "twice"),
        ([EncodedPrompt([1, 2], [1], [])], "label_is_correct"),
    ],
)
def test_malformed_prompts_are_refused(prompts, message):
    with pytest.raises(ValueError, match=message):
        pack(prompts)


def test_micro_batches_keep_the_budget_and_every_prompt():
    lengths = [5, 90, 40, 41, 200, 7, 33]
    batches = list(micro_batches(lengths, 100))
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert batches[0] == [4]  # longer than the budget: alone, and first
    assert all(sum(lengths[i] for i in batch) <= 100 for batch in batches[1:])


@given(lengths=st.lists(st.integers(1, 500), max_size=40), shares=st.integers(1, 9))
def test_shares_have_every_prompt_once_and_about_the_same_tokens(lengths, shares):
    found = balanced_shares(lengths, shares)
    assert len(found) == shares
    assert sorted(i for share in found for i in share) == list(range(len(lengths)))
    tokens = [sum(lengths[i] for i in share) for share in found]
    assert max(tokens) - min(tokens) <= max(lengths, default=0)

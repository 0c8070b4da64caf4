"""The torch backend against the specification, its gradient against finite differences."""

import math

import pytest
import torch
from abft_kernels import last_row_loss, reference
from abft_kernels.loss_torch import _KEYS_AT_ONCE
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.last_row_cases import DEVICE, FEATURES, assert_as_good_as_eager, gradients, make_case

pytestmark = [pytest.mark.unit, pytest.mark.kernels]


@pytest.mark.parametrize("options", FEATURES.values(), ids=FEATURES.keys())
@pytest.mark.parametrize(
    ("lengths", "labels"),
    [([17, 1, 9, 23], [4, 1, 0, 3]), ([1], [0]), ([1], [1]), ([31, 31], [31, 2])],
    ids=["ragged", "one-token", "only-a-label", "all-labels"],
)
def test_matches_the_specification(lengths, labels, options):
    assert_matches_the_specification(make_case(lengths, labels, **options))


@pytest.mark.parametrize("window", [None, 700])
@pytest.mark.parametrize("head_filter", [True, False])
def test_keys_of_several_blocks_match_the_specification(head_filter, window):
    lengths = [2 * _KEYS_AT_ONCE + 77, 3, _KEYS_AT_ONCE + 1]
    case = make_case(lengths, [40, 1, 9], sharpness=2.0, head_filter=head_filter, window=window)
    found = last_row_loss(**case).is_induction
    assert found[[0, 2]].any() and not found.all()
    assert_matches_the_specification(case)


def assert_matches_the_specification(case):
    expected, expected_grads = gradients(reference.last_row_loss, case)
    actual, actual_grads = gradients(last_row_loss, case)
    for name in ("loss", "label_mass", "correct_mass", "is_induction"):
        torch.testing.assert_close(getattr(actual, name), getattr(expected, name), msg=name)
    for actual_grad, expected_grad in zip(actual_grads, expected_grads, strict=True):
        torch.testing.assert_close(actual_grad, expected_grad)
        assert actual_grad.isfinite().all()


def test_the_cases_have_heads_on_both_sides_of_the_filter():
    found = last_row_loss(**make_case([17, 1, 9, 23], [4, 1, 0, 3])).is_induction
    assert found.any() and not found.all()


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(1, 40), st.integers(0, 6)), min_size=1, max_size=5),
    heads=st.sampled_from([(1, 1), (2, 1), (4, 4), (7, 1), (16, 2), (6, 3)]),
    head_dim=st.sampled_from([1, 3, 16, 60]),
    seed=st.integers(0, 1000),
)
def test_any_shape_matches_the_specification(rows, heads, head_dim, seed):
    lengths = [n for n, _ in rows]
    labels = [min(n, k) for n, k in rows]
    case = make_case(lengths, labels, *heads, head_dim, seed=seed)
    expected, expected_grads = gradients(reference.last_row_loss, case)
    actual, actual_grads = gradients(last_row_loss, case)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(actual_grads, expected_grads)


@pytest.mark.slow
@pytest.mark.parametrize("options", FEATURES.values(), ids=FEATURES.keys())
def test_gradcheck(options):
    case = make_case([11, 1, 6], [3, 1, 2], seed=3, **options)
    inputs = [case.pop(name).requires_grad_() for name in ("query", "key")]
    if "sinks" in case:
        inputs.append(case.pop("sinks").requires_grad_())

    def loss(query, key, sinks=None):
        return last_row_loss(query, key, **case, sinks=sinks).loss

    assert torch.autograd.gradcheck(loss, inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("options", FEATURES.values(), ids=FEATURES.keys())
def test_error_is_at_most_twice_eagers(options, dtype):
    case = make_case([63, 111, 5], [4, 6, 1], head_dim=60, dtype=dtype, **options)
    assert last_row_loss(**case, backend="torch").loss.dtype == torch.float32
    assert_as_good_as_eager(last_row_loss, case, backend="torch")


@pytest.mark.parametrize("sink", [200.0, -200.0])
def test_sinks_far_from_all_scores(sink):
    case = make_case([11, 6], [3, 2], dtype=torch.float32, sinks=True, head_filter=False)
    case["sinks"].fill_(sink)
    expected, expected_grads = gradients(reference.last_row_loss, case)
    actual, actual_grads = gradients(last_row_loss, case)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(actual_grads, expected_grads)


def test_rows_may_share_keys():
    case = make_case([12, 12], [3, 3])
    case["key"] = case["key"][:12]
    case["label_positions"][3:] -= 12
    case["key_start"] = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    case["key_end"] = torch.full((2,), 12, dtype=torch.int32, device=DEVICE)
    expected, expected_grads = gradients(reference.last_row_loss, case)
    actual, actual_grads = gradients(last_row_loss, case)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(actual_grads, expected_grads)


def test_threshold_is_strict_and_uses_the_natural_logarithm():
    """Equal scores: every key gets 1/n, so S = k/n; S > k/(k + ln n) only where n < k + ln n."""
    case = make_case([4, 4], [3, 4])
    case["query"].zero_()
    result = last_row_loss(**case)
    assert 3 / (3 + math.log(4)) < 3 / 4 and result.is_induction[0].all()
    torch.testing.assert_close(
        result.label_mass[0], torch.full((4,), 0.75, dtype=torch.float64, device=DEVICE)
    )
    alone = last_row_loss(**make_case([1], [1]))
    assert not alone.is_induction.any()  # S = T = 1
    assert (alone.loss == 0).all()


def test_penalty_and_reward_may_be_tensors():
    case = make_case([17, 9], [4, 2])
    as_floats = last_row_loss(**case).loss
    case |= {"penalty": torch.tensor(0.5), "reward": torch.tensor(1.0)}
    torch.testing.assert_close(last_row_loss(**case).loss, as_floats)


MISTAKES = {
    "query": lambda c: {"query": c["query"][0]},
    "query ": lambda c: {"query": c["query"].long()},
    "key": lambda c: {"key": c["key"][..., :-1]},
    "key ": lambda c: {"key": c["key"].float()},
    "query has 4 heads": lambda c: {"key": c["key"].repeat(1, 2, 1)[:, :3]},
    "key_start": lambda c: {"key_start": c["key_start"].long()},
    "key_start must be at least 0": lambda c: {"key_start": c["key_start"] - 1},
    "key_end": lambda c: {"key_end": c["key_end"][:-1]},
    "key_end must be at most": lambda c: {"key_end": c["key_end"] + 1},
    "label_offsets": lambda c: {"label_offsets": c["label_offsets"].flip(0)},
    "label_offsets ": lambda c: {"label_offsets": c["label_offsets"][:-1]},
    "label_positions": lambda c: {"label_positions": c["label_positions"] + 9},
    "label_positions ": lambda c: {"label_positions": c["label_positions"].to("meta")},
    "label_is_correct": lambda c: {"label_is_correct": c["label_is_correct"].int()},
    "sinks": lambda c: {"sinks": torch.zeros(3)},
    "penalty": lambda c: {"penalty": -1.0},
    "reward": lambda c: {"reward": torch.ones(2)},
    "scale": lambda c: {"scale": 0.0},
    "softcap": lambda c: {"softcap": -1.0},
    "window": lambda c: {"window": 0},
    "backend": lambda c: {"backend": "cuda"},
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_bad_argument_is_named(name):
    case = make_case([17, 9], [4, 2])
    with pytest.raises(ValueError, match=name.strip()):
        last_row_loss(**{**case, **MISTAKES[name](case)})

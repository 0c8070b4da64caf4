"""How often each Triton kernel is launched, and what the host waits for: always the same few."""

import pytest
import torch
from abft_kernels import flash_attention_with_last_row_loss, last_row_loss

from tests.costs import Waits, counted_launches, moved
from tests.last_row_cases import DEVICE, make_case

pytest.importorskip("abft_kernels.loss_triton", exc_type=ImportError)
pytestmark = [pytest.mark.unit, pytest.mark.kernels]

SCAN = {"scan_keys": 1, "combine_splits": 1}  # one pass over all keys, in parts
LABELS = {"label_loss": 1}
GRADIENT = {"grad_key": 1}
SIZES = {
    "one-prompt": ([40], [4], 2, 2),
    "prompts": ([40, 1, 70, 9], [4, 0, 6, 1], 2, 1),
    "heads": ([40], [4], 12, 4),
    "long": ([1100], [5], 1, 1),
}


def losses_alone(case, grad):
    leaves = {n: case[n].clone().requires_grad_(grad) for n in ("query", "key")}
    return last_row_loss(**{**case, **leaves}, backend="triton").loss, list(leaves.values())


def losses_fused(case, grad):
    bounds = torch.cat([case["key_start"][:1], case["key_end"]])
    query_heads = case["query"].shape[1]
    key = case["key"].clone().requires_grad_(grad)
    query = case["key"].repeat_interleave(query_heads // key.shape[1], dim=1)
    query[bounds[1:].long() - 1] = case["query"]
    query.requires_grad_(grad)
    labels = (case[n] for n in ("label_positions", "label_offsets", "label_is_correct"))
    out, result = flash_attention_with_last_row_loss(
        query, key, case["key"].clone(), bounds, *labels, longest=len(key),
        penalty=0.5, reward=1.0, backend="triton",
    )  # fmt: skip
    return result.loss.sum() + out.sum(), [query, key]


def check(launches, expected, when):
    assert not moved(launches, expected), f"{when}: {moved(launches, expected)}"


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
@pytest.mark.parametrize(
    ("losses", "dtype", "without_grad", "forward"),
    [
        (losses_alone, torch.float32, {**SCAN, **LABELS}, {**SCAN, **LABELS}),
        (losses_alone, torch.float16, {**SCAN, **LABELS}, {**SCAN, **LABELS}),
        (losses_fused, torch.float32, {**SCAN, **LABELS}, {**SCAN, **LABELS}),
        # Attention's log-sum-exp is known: keys are scanned for the gradient alone.
        (losses_fused, torch.float16, LABELS, {**SCAN, **LABELS}),
    ],
    ids=["alone-float32", "alone-float16", "fused-float32", "fused-float16"],
)
def test_launches(losses, dtype, without_grad, forward, size):
    """The same few, whatever the number of prompts, heads and labels."""
    case = make_case(*size, head_dim=16, dtype=dtype)
    with counted_launches() as launches, torch.no_grad():
        losses(case, grad=False)
    assert not moved(launches, without_grad), (
        f"forward without gradient: {moved(launches, without_grad)}"
    )
    with counted_launches() as launches:
        loss, leaves = losses(case, grad=True)
    check(launches, forward, "forward for a gradient")
    with counted_launches() as launches:
        torch.autograd.grad(loss.sum(), leaves)
    check(launches, GRADIENT, "backward")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_without_labels_attention_launches_nothing_more(dtype):
    case = make_case([40, 9], [0, 0], 2, 2, head_dim=16, dtype=dtype)
    with counted_launches() as launches:
        loss, leaves = losses_fused(case, grad=True)
        torch.autograd.grad(loss, leaves)
    check(launches, {}, "forward and backward")


# On a CPU alone: indices are checked, and attention goes prompt by prompt.
CHECKS = {"is_nonzero": 8, "cpu": 4, "repeat_interleave": 2}
CHECKS_OF_FUSED = {**CHECKS, "tolist": 4}


@pytest.mark.skipif(DEVICE == "cuda", reason="tests/gpu asks the GPU itself")
@pytest.mark.parametrize("size", [SIZES["one-prompt"], SIZES["prompts"]], ids=["one", "four"])
@pytest.mark.parametrize(
    ("losses", "checks"),
    [(losses_alone, CHECKS), (losses_fused, CHECKS_OF_FUSED)],
    ids=["alone", "fused"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_what_the_host_waits_for(dtype, losses, checks, size):
    """Nothing inside the ops, forward and backward, but what a CPU alone is asked."""
    case = make_case(*size, head_dim=16, dtype=dtype)
    with Waits(inside_ops=True) as waits:
        loss, leaves = losses(case, grad=True)
        torch.autograd.grad(loss.sum(), leaves)
    assert not moved(waits, checks), moved(waits, checks)

"""How often each Triton kernel is launched, and what the host waits for: always the same few."""

import collections

import pytest
import torch
from abft_kernels import flash_attention_with_last_row_loss, last_row_loss
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from tests.costs import Waits, counted_launches, moved
from tests.last_row_cases import DEVICE, make_case

pytest.importorskip("abft_kernels.loss_triton", exc_type=ImportError)
pytestmark = [pytest.mark.unit, pytest.mark.kernels]

SCAN = {"scan_keys": 1}  # one pass over all keys
LABELS = {"label_loss": 1}
GRADIENT = {"gradient": 1}
PARTS = {"sum_parts": 1}  # of a query's gradient; a short packed row has a single part
SIZES = {
    "one-prompt": ([40], [4], 2, 2),
    "prompts": ([40, 1, 70, 9], [4, 0, 6, 1], 2, 1),
    "heads": ([40], [4], 12, 4),
    "one-key-head": ([40], [4], 48, 1),
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
    ("losses", "dtype", "forward"),
    [
        (losses_alone, torch.float32, {**SCAN, **LABELS}),
        (losses_alone, torch.float16, {**SCAN, **LABELS}),
        (losses_fused, torch.float32, {**SCAN, **LABELS}),
        (losses_fused, torch.float16, LABELS),  # attention's log-sum-exp is known
    ],
    ids=["alone-float32", "alone-float16", "fused-float32", "fused-float16"],
)
def test_launches(losses, dtype, forward, size):
    """The same few, whatever the number of prompts, heads and labels."""
    case = make_case(*size, head_dim=16, dtype=dtype)
    with counted_launches() as launches, torch.no_grad():
        losses(case, grad=False)
    check(launches, forward, "forward without gradient")
    with counted_launches() as launches:
        loss, leaves = losses(case, grad=True)
    check(launches, forward, "forward for a gradient")
    with counted_launches() as launches:
        torch.autograd.grad(loss.sum(), leaves)
    parts = PARTS if losses is losses_alone else {}
    check(launches, {**GRADIENT, **parts}, "backward")


def test_a_backward_of_long_rows_sums_its_parts():
    case = make_case([2100], [5], 1, 1, head_dim=16, dtype=torch.float16)
    loss, leaves = losses_fused(case, grad=True)
    with counted_launches() as launches:
        torch.autograd.grad(loss.sum(), leaves)
    check(launches, {**GRADIENT, **PARTS}, "backward")


_NO_CALLS = ("empty", "new_empty", "detach", "promote_types")


class TorchCalls(TorchDispatchMode):
    """Counts torch's operations, inside this project's ops too, but views and new memory."""

    def __init__(self):
        super().__init__()
        self.found = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if not function.is_view and not name.startswith(_NO_CALLS):
            self.found[name] += 1
        if function.namespace == "abft":
            with self:
                return function.redispatch(
                    torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **(kwargs or {})
                )
        return function(*args, **(kwargs or {}))


@pytest.fixture
def attention_and_checks_apart(monkeypatch):
    """What attention, the interpreter and a CPU's checks ask of torch is not counted."""
    from abft_kernels import fused, loss
    from triton.runtime.interpreter import GridExecutor

    def unseen(function):
        def call(*args, **options):
            with _disable_current_modes():
                return function(*args, **options)

        return call

    for module, name in (
        (fused, "attention_forward"), (fused, "attention_backward"), (fused, "check_bounds"),
        (loss, "check_values"), (GridExecutor, "__call__"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, unseen(getattr(module, name)))


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU's calls of attention are not set apart")
@pytest.mark.parametrize("objective", ["mass", "share"])
def test_nothing_but_kernels_runs_beside_attention(objective, attention_and_checks_apart):
    """Where the log-sum-exp is known, forward and backward are attention and one launch each."""
    case = make_case([40, 1, 70, 9], [4, 0, 6, 1], 2, 1, head_dim=16, dtype=torch.float16)
    bounds = torch.cat([case["key_start"][:1], case["key_end"]])
    query = torch.randn(120, 2, 16).half()
    query[bounds[1:].long() - 1] = case["query"]
    factor = torch.tensor(0.5)
    hold = {"hold": factor} if objective == "share" else {}
    labels = (case[n] for n in ("label_positions", "label_offsets", "label_is_correct"))
    leaves = [query.requires_grad_(), case["key"].requires_grad_()]
    with TorchCalls() as calls, counted_launches() as launches:
        out, result = flash_attention_with_last_row_loss(
            *leaves, case["key"].detach(), bounds, *labels, longest=70, bounds=bounds.tolist(),
            penalty=factor, reward=factor, objective=objective, backend="triton", **hold,
        )  # fmt: skip
        torch.autograd.grad((out, result.loss), leaves, (out.detach(), result.loss.detach()))
    check(launches, {**LABELS, **GRADIENT}, "forward and backward")
    ops = "flash_attention_with_last_row_loss", "flash_attention_with_last_row_loss_backward"
    assert not moved(calls.found, dict.fromkeys(ops, 1)), moved(calls.found, {})


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

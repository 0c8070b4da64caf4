"""Both ops obey torch.library's rules, and torch.compile goes through them in one graph."""

import pytest
import torch
from abft_kernels import (
    flash_attention_with_last_row_loss,
    fused,
    last_row_loss,
    loss,
)
from abft_kernels.types import LabelLoss

from tests.last_row_cases import DEVICE, make_case
from tests.unit.test_fused import make_fused, run

pytestmark = [pytest.mark.unit, pytest.mark.kernels, pytest.mark.slow]
BACKENDS = ["torch", "triton"]
LABELS = ("label_positions", "label_offsets", "label_is_correct")


def standalone_arguments(backend, grad=True, **options):
    case = make_case([17, 9], [4, 2], dtype=torch.float32, head_dim=16, **options)
    leaves = (case[name].requires_grad_(grad) for name in ("query", "key"))
    sinks = case["sinks"].requires_grad_(grad) if "sinks" in case else None
    indices = (case[name] for name in ("key_start", "key_end", *LABELS))
    factors = torch.tensor(0.5, device=DEVICE), torch.tensor(1.0, device=DEVICE)
    softcap, window = case.get("softcap"), case.get("window")
    return (*leaves, sinks, *indices, *factors, 0.25, softcap, window, True, backend, grad)


def fused_arguments(backend, grad=True, **options):
    case = make_fused(torch.float32, **options)
    leaves = (case[name].requires_grad_(grad) for name in ("q", "k", "v"))
    sinks = case["sinks"].requires_grad_(grad) if "sinks" in case else None
    labels = (case[name] for name in LABELS)
    factors = torch.tensor(0.5, device=DEVICE), torch.tensor(1.0, device=DEVICE)
    window = case.get("window")
    options = (40, 0.25, None, window, True, "sdpa", backend, grad)
    return (*leaves, sinks, case["cu_seqlens"], *labels, *factors, *options)


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no-grad"])
@pytest.mark.parametrize(
    "options", [{}, {"sinks": True, "window": 5}], ids=["plain", "sinks-window"]
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend, options, grad):
    torch.library.opcheck(
        torch.ops.abft.last_row_loss.default, standalone_arguments(backend, grad, **options)
    )
    if DEVICE == "cpu":
        torch.library.opcheck(
            torch.ops.abft.flash_attention_with_last_row_loss.default,
            fused_arguments(backend, grad, **options),
        )


def heads_first(tensor):
    return tensor.transpose(0, 1).contiguous().transpose(0, 1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_of_the_backwards(backend):
    """Also with inputs whose heads come before their tokens, as transformers hands them over."""
    query, key, _, *rest = standalone_arguments(backend, grad=False)
    indices, factors, options = rest[:5], rest[5:7], rest[7:-1]
    grad_loss, *per_head = (torch.rand(query.shape[:2], device=DEVICE) + 1 for _ in range(4))
    arguments = (grad_loss, query, heads_first(key), *indices, grad_loss > 1.5, *per_head, *factors)
    torch.library.opcheck(torch.ops.abft.last_row_loss_backward.default, (*arguments, *options))

    if DEVICE == "cpu":
        *inputs, _ = fused_arguments(backend, grad=False, sinks=True)
        inputs[:3] = [heads_first(t) for t in inputs[:3]]
        tensors, options = inputs[:10], inputs[10:]
        op = torch.ops.abft.flash_attention_with_last_row_loss
        out, lse, loss, _, _, is_induction, *residuals = op(*tensors, *options, True)
        for grad_out, sinks_learn in ((torch.rand_like(out), True), (None, True), (None, False)):
            torch.library.opcheck(
                torch.ops.abft.flash_attention_with_last_row_loss_backward.default,
                (grad_out, torch.rand_like(loss), *tensors, out, lse, is_induction, *residuals,
                 *options, sinks_learn),
            )  # fmt: skip


@pytest.mark.parametrize(
    ("module", "outputs"), [(loss, LabelLoss), (fused, fused._Outputs)], ids=["loss", "fused"]
)
def test_named_tuples_follow_the_ops(module, outputs):
    """The ops hand over plain tuples; their fields get names by their order."""
    schema = module._forward_op._opoverload._schema
    assert module._Inputs._fields == tuple(argument.name for argument in schema.arguments)
    assert len(outputs._fields) == len(schema.returns)
    assert outputs._fields[-8:] == LabelLoss._fields


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_standalone_is_one_graph_and_the_same(backend):
    def step(query, key, *indices):
        loss = last_row_loss(query, key, *indices, penalty=0.5, reward=1.0, backend=backend).loss
        return (loss * loss).sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for lengths in ([17, 9], [30, 4, 8]):
        case = make_case(lengths, [3] * len(lengths), dtype=torch.float32, head_dim=16)
        leaves = [case[name].requires_grad_() for name in ("query", "key")]
        indices = [case[name] for name in ("key_start", "key_end", *LABELS)]
        expected = step(*leaves, *indices)
        actual = compiled(*leaves, *indices)
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(
            torch.autograd.grad(actual, leaves), torch.autograd.grad(expected, leaves)
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_fused_is_one_graph_and_the_same(backend):
    # Float32 on a GPU has no flash attention, and what is there instead is not one graph.
    case = make_fused(torch.float32 if DEVICE == "cpu" else torch.bfloat16, sinks=True, window=7)

    def eager(*args, **options):
        return flash_attention_with_last_row_loss(*args, longest=40, backend=backend, **options)

    expected, expected_result, expected_grads = run(eager, case)
    compiled = torch.compile(eager, fullgraph=True, backend="aot_eager")
    out, result, grads = run(compiled, case)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(tuple(result), tuple(expected_result))
    torch.testing.assert_close(grads, expected_grads)

"""The objective `share` against the specification by autograd, in every backend."""

import itertools

import pytest
import torch
from abft_kernels import flash_attention_with_last_row_loss, last_row_loss, reference

from tests.last_row_cases import (
    DEVICE,
    FEATURES,
    error,
    gradients,
    in_float64,
    make_case,
    rounding_of_query_gradient,
)
from tests.unit.test_fused import make_fused, one_after_the_other, run

pytestmark = [pytest.mark.unit, pytest.mark.kernels]
SHARE = {"objective": "share", "hold": -0.3}
ROWS = [17, 1, 9, 23, 12]
LABELS = [4, 1, 0, 6, 5]


def both_kinds(case):
    """Make the first label of each row a correct one and the last a wrong one."""
    offsets = case["label_offsets"].tolist()
    for first, end in itertools.pairwise(offsets):
        if end - first > 1:
            case["label_is_correct"][first], case["label_is_correct"][end - 1] = True, False
    return case


@pytest.mark.parametrize("hold", [0.0, -0.3, 0.7])
@pytest.mark.parametrize("options", FEATURES.values(), ids=FEATURES.keys())
def test_torch_backend_is_the_specification(options, hold):
    case = both_kinds(make_case(ROWS, LABELS, **options)) | SHARE | {"hold": hold}
    expected, expected_grads = gradients(reference.last_row_loss, case)
    found, grads = gradients(last_row_loss, case)
    assert (expected.loss != 0).any() and (expected.loss == 0).any()
    torch.testing.assert_close(tuple(found), tuple(expected))
    torch.testing.assert_close(grads, expected_grads)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("options", FEATURES.values(), ids=FEATURES.keys())
def test_kernels_are_the_specification_in_float64(options, dtype):
    pytest.importorskip("triton")
    case = both_kinds(make_case(ROWS, LABELS, dtype=dtype, **options)) | SHARE
    expected, expected_grads = gradients(reference.last_row_loss, in_float64(case))
    found, grads = gradients(last_row_loss, case, backend="triton")
    assert torch.equal(found.is_induction, expected.is_induction)
    for name in ("loss", "label_mass", "correct_mass"):
        assert error(getattr(found, name), getattr(expected, name)) <= 2e-6, name
    rounding = 4 * torch.finfo(dtype).eps  # the gradients are of the inputs' dtype
    of_query = max(rounding, rounding_of_query_gradient(case, expected_grads[0]))
    for found_grad, exact in zip(grads, expected_grads, strict=True):
        is_query = exact is expected_grads[0]
        assert error(found_grad, exact) <= (of_query if is_query else rounding)


@pytest.mark.parametrize("heads", [(4, 2), (7, 1)], ids=str)
@pytest.mark.parametrize("options", FEATURES.values(), ids=FEATURES.keys())
def test_fused_is_one_after_the_other(options, heads):
    case = make_fused(torch.float64, *heads, **options) | SHARE
    if "window" in options:
        case["window"] = 20  # a shorter one leaves labels of one kind
    case["label_is_correct"] = torch.arange(len(case["label_is_correct"]), device=DEVICE) % 2 == 0
    out, found, grads = run(flash_attention_with_last_row_loss, case)
    expected_out, expected, expected_grads = run(one_after_the_other, case)
    assert (expected.loss != 0).any()
    torch.testing.assert_close(out, expected_out)
    torch.testing.assert_close(tuple(found), tuple(expected))
    torch.testing.assert_close(grads, expected_grads)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_sixteen_bits_fused(backend):
    case = make_fused(torch.float16) | SHARE
    case["label_is_correct"] = torch.arange(len(case["label_is_correct"]), device=DEVICE) % 2 == 0
    exact = {n: t.double() if n in ("q", "k", "v") else t for n, t in case.items()}
    _, found, grads = run(flash_attention_with_last_row_loss, case, ("loss",), backend=backend)
    _, expected, expected_grads = run(one_after_the_other, exact, ("loss",))
    assert torch.equal(found.is_induction, expected.is_induction) and expected.is_induction.any()
    assert error(found.loss, expected.loss) <= 4e-3
    for name in ("q", "k"):
        assert error(grads[name], expected_grads[name]) <= 4e-3, name


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_attention_on_all_labels_together_changes_nothing(backend):
    """A sink takes attention from labels and other keys alike; only the hold notices."""
    case = both_kinds(make_case([17], [5], dtype=torch.float32, sinks=True, head_filter=False))
    case |= {"objective": "share"}
    more = {**case, "sinks": case["sinks"] + 3}
    weak, weak_grads = gradients(last_row_loss, more, backend=backend)
    strong, strong_grads = gradients(last_row_loss, case, backend=backend)
    assert (weak.label_mass < strong.label_mass).all()
    torch.testing.assert_close(weak.loss, strong.loss)
    torch.testing.assert_close(weak_grads[:2], strong_grads[:2], rtol=1e-4, atol=1e-6)
    assert (strong_grads[2] == 0).all()
    held = last_row_loss(**more, hold=0.5, backend=backend).loss - weak.loss
    torch.testing.assert_close(held, 0.5 * weak.label_mass.log())


@pytest.mark.parametrize("kind", [True, False], ids=["correct", "wrong"])
@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_labels_of_one_kind_alone_have_no_loss_and_no_gradient(backend, window, kind):
    """With a window, of the labels that it leaves."""
    case = make_case([17], [4], dtype=torch.float32, head_filter=False, window=window) | SHARE
    case["label_positions"] = torch.tensor([2, 12, 13, 14], dtype=torch.int32, device=DEVICE)
    case["label_is_correct"] = torch.tensor(
        [kind if window is None else not kind, *[kind] * 3], device=DEVICE
    )
    for function in (last_row_loss, reference.last_row_loss):
        options = {"backend": backend} if function is last_row_loss else {}
        found, grads = gradients(function, case, **options)
        assert (found.loss == 0).all() and (found.label_mass > 0).all()
        assert all((grad == 0).all() for grad in grads)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_labels_without_attention_have_no_loss_and_no_gradient(backend):
    case = both_kinds(make_case([17], [4], dtype=torch.float32, sinks=True, head_filter=False))
    case["sinks"].fill_(90.0)  # S below 1e-30: its inverse, squared, would be infinite
    found, grads = gradients(last_row_loss, case | SHARE, backend=backend)
    assert (found.loss == 0).all() and all((grad == 0).all() for grad in grads)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"objective": "shares"}, "objective must be one of mass, share"),
        ({"hold": 0.1}, "hold works with objective='share' only"),
        ({"objective": "share", "hold": float("nan")}, "hold must be finite"),
        ({"objective": "share", "hold": torch.ones(2)}, "hold must be a float or a 0-d tensor"),
    ],
)
def test_mistakes_are_named(options, named):
    with pytest.raises(ValueError, match=named):
        last_row_loss(**make_case([9], [3]), **options)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_opcheck(backend):
    case = both_kinds(make_case([17, 9], [4, 2], dtype=torch.float32, head_dim=16))
    leaves = [case.pop(name).requires_grad_() for name in ("query", "key")]
    factors = [torch.tensor(x, device=DEVICE) for x in (0.5, 1.0, -0.3)]
    indices = list(case.values())[:5]
    torch.library.opcheck(
        torch.ops.abft.last_row_loss.default,
        (*leaves, None, *indices, *factors[:2], 0.25, None, None, True, backend, True, factors[2]),
    )

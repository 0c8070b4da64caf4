"""Linear layers as 1 x 1 convolutions: the same numbers, on every processor."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from abft_fast.runtime import float32_linear

pytestmark = pytest.mark.unit


@pytest.fixture(params=["this processor's choice", "convolution"])
def context(request):
    if request.param == "convolution":
        return float32_linear.linear_as_convolution
    return float32_linear.fast_float32_linear


def results(shape, outputs, bias):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, generator=generator, requires_grad=True)
    weight = torch.randn(outputs, shape[-1], generator=generator, requires_grad=True)
    b = torch.randn(outputs, generator=generator, requires_grad=True) if bias else None
    y = checkpoint(F.linear, x, weight, b, use_reentrant=False)
    y.sin().sum().backward()
    return y, x.grad, weight.grad, *([b.grad] if bias else [])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("shape", "outputs"), [((1, 200, 96), 160), ((2, 3, 40, 64), 64), ((70, 128), 300)]
)
def test_equals_linear(context, shape, outputs, bias):
    expected = results(shape, outputs, bias)
    with context():
        actual = results(shape, outputs, bias)
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape and a.stride() == e.stride()
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("trained", [False, True], ids=["frozen weight", "trained weight"])
def test_keeps_for_the_backward_what_linear_keeps(context, trained):
    x, weight = torch.randn(80, 96, requires_grad=True), torch.randn(128, 96, requires_grad=trained)

    def kept():
        storages = set()

        def keep(tensor):
            storages.add(tensor.untyped_storage().data_ptr())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            F.linear(x, weight)
        return storages

    expected = kept()
    with context():
        assert kept() == expected


def test_a_weight_that_is_not_contiguous(context):
    x, weight = torch.randn(80, 96), torch.randn(96, 128).t()
    with context():
        torch.testing.assert_close(F.linear(x, weight), x @ weight.t(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("x", "weight"),
    [
        (torch.randn(8, 96), torch.randn(128, 96)),
        (torch.randn(0, 96), torch.randn(128, 96)),
        (torch.randn(80, 96), torch.randn(16, 96)),
        (torch.randn(80, 96).bfloat16(), torch.randn(128, 96).bfloat16()),
        (torch.randn(80, 96).double(), torch.randn(128, 96).double()),
        (torch.randn(80, 96), torch.randn(96)),
    ],
)
def test_what_is_left_to_torch(context, x, weight):
    expected = F.linear(x, weight)
    with context():
        assert torch.equal(F.linear(x, weight), expected)


def test_autocast_still_rounds(context):
    x, weight = torch.randn(80, 96), torch.randn(128, 96)
    with torch.autocast("cpu", torch.bfloat16):
        expected = F.linear(x, weight)
        with context():
            actual = F.linear(x, weight)
    assert actual.dtype == torch.bfloat16
    assert torch.equal(actual, expected)

"""All bytes that a call moves, torch's operations included, against the least possible.

The least is one reading of the keys, and for a backward also one reading and one writing of their
gradients. The goal is 1.05 for 4,096 keys and more. The kernels' loads and stores count as the
interpreter sees them, and each torch operation's inputs and results.
"""

import pytest
import torch
from abft_kernels.loss import add_loss_gradients, loss_forward
from abft_kernels.types import Normalizer, Rows, Scores
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from tests.costs import counted_traffic
from tests.last_row_cases import make_case

loss_triton = pytest.importorskip("abft_kernels.loss_triton", exc_type=ImportError)
pytestmark = [
    pytest.mark.unit,
    pytest.mark.slow,
    pytest.mark.skipif(
        not loss_triton.INTERPRETED, reason="bytes are counted in Triton's interpreter"
    ),
]


class TorchBytes(TorchDispatchMode):
    """Adds up what torch's operations read and write; views and new memory move nothing."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if not function.is_view and not name.startswith(("empty", "new_empty")):
            tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
            self.total += sum(t.numel() * t.element_size() for t in tensors)
        return out


@pytest.fixture
def kernels_apart(monkeypatch):
    """What the interpreter itself asks of torch is not counted."""
    from triton.runtime.interpreter import GridExecutor

    launch = GridExecutor.__call__

    def unseen(self, *args, **kwargs):
        with _disable_current_modes():
            return launch(self, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", unseen)


@pytest.fixture
def problem():
    case = make_case([4096], [4], 8, 2, head_dim=64, dtype=torch.float16)
    rows = Rows(*(case[name] for name in Rows._fields))
    return case["query"], case["key"], rows, Scores(0.125, None, None)


FACTORS = torch.tensor(0.5), torch.tensor(1.0)


def moved(traffic, of_torch):
    return traffic.read.total() + traffic.written.total() + of_torch.total


def test_bytes_of_a_forward(kernels_apart, problem):
    with counted_traffic() as traffic, TorchBytes() as of_torch:
        loss_forward("triton", *problem, None, *FACTORS, True)
    keys = problem[1].nbytes
    assert traffic.read["scan_keys", "key"] == keys
    assert of_torch.total > 0
    assert keys < moved(traffic, of_torch) <= 1.012 * keys, moved(traffic, of_torch) / keys


def test_bytes_of_a_backward(kernels_apart, problem):
    """All heads have a loss: their keys are read once for both gradients."""
    query, key = problem[:2]
    found = loss_forward("triton", *problem, None, *FACTORS, False)
    grads = torch.zeros_like(query), torch.zeros_like(key)
    with counted_traffic() as traffic, TorchBytes() as of_torch:
        add_loss_gradients(
            "triton", *grads, *problem, Normalizer(found.peak, found.total), found.mean_weight,
            found.is_induction, torch.ones_like(found.loss), *FACTORS, False, False, len(key),
        )  # fmt: skip
    least = 3 * key.nbytes
    assert traffic.read["gradient", "key"] == traffic.written["gradient", "grad_key"] == key.nbytes
    assert least < moved(traffic, of_torch) <= 1.012 * least, moved(traffic, of_torch) / least

"""Programs of a launch in any order, in memory full of NaN: the same bits."""

import contextlib
import random

import pytest
import torch

from tests.last_row_cases import make_case
from tests.unit.test_kernel_launches import losses_alone, losses_fused

loss_triton = pytest.importorskip("abft_kernels.loss_triton", exc_type=ImportError)
pytestmark = [
    pytest.mark.unit,
    pytest.mark.slow,
    pytest.mark.skipif(not loss_triton.INTERPRETED, reason="a GPU orders programs itself"),
]


@contextlib.contextmanager
def programs_in_order_of(seed):
    """Runs the interpreter's programs in a random order; yields the orders of all launches."""
    from triton.runtime.interpreter import interpreter_builder as interpreter

    set_dim, set_idx = interpreter.set_grid_dim, interpreter.set_grid_idx
    orders = []

    def begin(*grid):
        set_dim(*grid)
        every = [(x, y, z) for x in range(grid[0]) for y in range(grid[1]) for z in range(grid[2])]
        turn = dict(zip(every, random.Random(seed).sample(every, len(every)), strict=True))
        orders.append(turn)

    interpreter.set_grid_dim = begin
    interpreter.set_grid_idx = lambda *index: set_idx(*orders[-1][index])
    try:
        yield orders
    finally:
        del interpreter.set_grid_dim, interpreter.set_grid_idx


@pytest.fixture(autouse=True)
def poisoned_memory():
    """What no program writes is NaN; integers and bools are their largest."""
    torch.use_deterministic_algorithms(True)
    assert torch.zeros(1).new_empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def results(losses, case):
    loss, leaves = losses(case, grad=True)
    return [loss.detach(), *torch.autograd.grad(loss.sum(), leaves)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("losses", [losses_alone, losses_fused], ids=["alone", "fused"])
@pytest.mark.parametrize(
    "size",
    [([70, 1, 33], [4, 0, 6], 4, 2), ([520, 40], [5, 3], 2, 2), ([70, 1, 33], [4, 0, 6], 40, 1)],
    ids=["prompts", "splits", "one-key-head"],
)
def test_the_order_of_programs_changes_no_bit(size, losses, dtype):
    case = make_case(*size, head_dim=16, dtype=dtype)
    expected = results(losses, case)
    assert all(tensor.isfinite().all() for tensor in expected)
    with programs_in_order_of(seed=1) as orders:
        found = results(losses, case)
    assert any(list(turn) != list(turn.values()) for turn in orders)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)

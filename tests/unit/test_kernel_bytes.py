"""Bytes the Triton kernels load and store, by argument, against formulas: exactly as many."""

import itertools

import pytest
import torch
from abft_kernels.loss import loss_forward, loss_grad_key
from abft_kernels.types import Normalizer, Rows, Scores

from tests.costs import counted_traffic
from tests.last_row_cases import DEVICE, make_case

loss_triton = pytest.importorskip("abft_kernels.loss_triton", exc_type=ImportError)
pytestmark = [
    pytest.mark.unit,
    pytest.mark.skipif(
        not loss_triton.INTERPRETED, reason="bytes are counted in Triton's interpreter"
    ),
]


class Sizes:
    """What the formulas are made of; bytes an element of queries and keys, four of all else."""

    def __init__(self, case):
        self.rows, self.query_heads, self.dim = case["query"].shape
        self.tokens, self.key_heads, _ = case["key"].shape
        self.group = self.query_heads // self.key_heads
        self.labels = len(case["label_positions"])
        self.element = case["query"].element_size()
        self.row_heads = self.rows * self.query_heads
        self.programs = self.rows * self.key_heads  # one a row and key head
        self.splits = loss_triton._count_splits(case["query"], case["key"])
        self.key_block = loss_triton._Shape(case["query"], case["key"]).key_block

    def vectors(self, count):
        """Bytes of that many queries or keys."""
        return count * self.dim * self.element


def arguments(case):
    rows = Rows(*(case[name] for name in Rows._fields))
    scores = Scores(case["query"].shape[-1] ** -0.5, None, case.get("window"))
    factors = (torch.tensor(case[name], device=DEVICE) for name in ("penalty", "reward"))
    return (case["query"], case["key"], rows, scores), tuple(factors)


def traffic_of_forward(case, needs_grad, known):
    """Also what it returns; the normalizer, where it is known, is that of a first forward."""
    problem, factors = arguments(case)

    def run(normalizer):
        return loss_forward("triton", *problem, None, *factors, True, needs_grad, normalizer)

    normalizer = None
    if known:
        _, residuals = run(None)
        normalizer = Normalizer(residuals.peak, residuals.total)
    with counted_traffic() as traffic:
        found, residuals = run(normalizer)
    return traffic, found, residuals


def check(traffic, kernel, read, written):
    """Every argument's bytes, and none besides."""
    expectations = {"read": read, "written": written}
    for (way, expected), found in zip(expectations.items(), traffic.of(kernel), strict=True):
        for name in expected | found:
            assert found.get(name, 0) == expected.get(name, 0), (
                f"{kernel}: {name} {way}: {found.get(name, 0)} bytes, "
                f"the formula says {expected.get(name, 0)}"
            )


def check_label_loss(traffic, size, needs_grad):
    """Label keys alone, once a key head."""
    per_head = dict.fromkeys(("loss", "label_mass", "correct_mass", "mean_weight"), 4)
    check(
        traffic, "label_loss",
        read={
            "key": size.vectors(size.labels * size.key_heads),
            "query": size.vectors(size.row_heads),
            "label_positions": size.labels * size.key_heads * 4,
            "label_is_correct": size.labels * size.key_heads,
            "label_offsets": size.programs * 2 * 4,
            **dict.fromkeys(("key_start", "key_end", "penalty", "reward"), size.programs * 4),
            **dict.fromkeys(("peak", "total"), size.row_heads * 4),
        },
        written={
            **{name: size.row_heads * each for name, each in per_head.items()},
            "is_induction": size.row_heads,
            "label_key": size.row_heads * size.dim * 4 * needs_grad,
        },
    )  # fmt: skip


BYTES = {
    "plain": ([60, 1, 33], [4, 0, 6], 4, 2, 16, torch.float16),
    "float32": ([60, 1, 33], [4, 0, 6], 4, 2, 16, torch.float32),
    "group-of-7": ([60, 33, 20], [4, 6, 0], 7, 1, 24, torch.float16),
    "splits": ([1100, 40], [5, 3], 4, 2, 16, torch.float16),
}


@pytest.fixture(params=BYTES.values(), ids=BYTES.keys())
def case(request):
    return make_case(*request.param)


@pytest.mark.slow
@pytest.mark.parametrize("needs_grad", [False, True], ids=["no-grad", "grad"])
def test_bytes_of_a_forward_that_scans_all_keys(needs_grad, case):
    """A key head's keys are read once for its whole group of query heads, once more at labels."""
    size = Sizes(case)
    traffic, _, _ = traffic_of_forward(case, needs_grad, known=False)
    visible = int((case["key_end"] - case["key_start"]).sum())
    parts = size.row_heads * size.splits
    sums = parts * size.dim * 4 * needs_grad
    check(
        traffic, "scan_keys",
        read={
            "key": size.vectors(visible * size.key_heads),
            "query": size.vectors(parts),
            **dict.fromkeys(("key_start", "key_end"), size.programs * size.splits * 4),
        },
        written={"part_max": parts * 4, "part_sum": parts * 4, "part_key": sums},
    )  # fmt: skip
    check(
        traffic, "combine_splits",
        read={"part_max": parts * 4, "part_sum": parts * 4, "part_key": sums},
        written={
            **dict.fromkeys(("peak", "total"), size.row_heads * 4),
            "mean_key": size.row_heads * size.dim * 4 * needs_grad,
        },
    )  # fmt: skip
    check_label_loss(traffic, size, needs_grad)


@pytest.mark.slow
def test_bytes_of_a_forward_that_knows_its_normalizer(case):
    """Label keys alone; for a gradient, once, also all keys of key heads with an induction head."""
    size = Sizes(case)
    traffic, _, _ = traffic_of_forward(case, needs_grad=False, known=True)
    check_label_loss(traffic, size, needs_grad=False)
    assert traffic.of("scan_keys") == traffic.of("combine_splits") == ({}, {})

    traffic, found, _ = traffic_of_forward(case, needs_grad=True, known=True)
    check_label_loss(traffic, size, needs_grad=True)
    groups = found.is_induction.unflatten(1, (size.key_heads, -1)).any(-1)  # (R, Hkv)
    assert groups.any() and not groups.all()
    lengths = case["key_end"] - case["key_start"]
    active = int(groups.sum()) * size.splits
    parts = int(found.is_induction.sum()) * size.splits
    check(
        traffic, "scan_keys",
        read={
            "key": size.vectors(int((lengths[:, None] * groups).sum())),
            "query": size.vectors(active * size.group),
            "active": size.row_heads * size.splits,
            **dict.fromkeys(("key_start", "key_end"), active * 4),
        },
        written={
            **dict.fromkeys(("part_max", "part_sum"), active * size.group * 4),
            "part_key": active * size.group * size.dim * 4,
        },
    )  # fmt: skip
    check(
        traffic, "combine_splits",
        read={
            "active": size.row_heads,
            **dict.fromkeys(("part_max", "part_sum"), parts * 4),
            "part_key": parts * size.dim * 4,
        },
        written={"mean_key": size.row_heads * size.dim * 4},
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [False, True], ids=["new", "added"])
def test_bytes_of_a_backward(accumulate, case):
    """Keys and queries of heads with a loss alone; where it adds, no other key's gradient."""
    size = Sizes(case)
    problem, factors = arguments(case)
    _, found, residuals = traffic_of_forward(case, needs_grad=True, known=False)
    coefficient = found.is_induction.float()
    grad = torch.zeros_like(case["key"]) if accumulate else None
    with counted_traffic() as traffic:
        loss_grad_key(
            "triton", *problem, Normalizer(residuals.peak, residuals.total), residuals.mean_weight,
            coefficient, *factors, accumulate_into=grad,
        )  # fmt: skip
    groups = found.is_induction.unflatten(1, (size.key_heads, -1)).any(-1)
    starts, ends = case["key_start"].tolist(), case["key_end"].tolist()
    lengths, labels = case["key_end"] - case["key_start"], case["label_offsets"].diff().tolist()
    blocks = {
        b: min(size.key_block, size.tokens - b) for b in range(0, size.tokens, size.key_block)
    }
    meetings = [  # of a block of keys and a row that sees some of them, for each key head
        (first, row, head)
        for first, row, head in itertools.product(blocks, range(size.rows), range(size.key_heads))
        if starts[row] < first + blocks[first] and ends[row] > first
    ]
    works = [(first, row, head) for first, row, head in meetings if groups[row, head]]
    changed = sum(blocks[first] for first, _ in {(first, head) for first, _, head in works})
    seen_labels = sum(labels[row] for _, row, _ in works)
    searched = len(blocks) * size.key_heads * size.rows  # every block looks for its rows
    check(
        traffic, "grad_key",
        read={
            "key": size.vectors(int((lengths[:, None] * groups).sum())),
            "query": size.vectors(len(works) * size.group),
            "grad_key": size.vectors(changed) * accumulate,
            "coefficient": len(meetings) * size.group * 4,
            **dict.fromkeys(("peak", "total", "mean_weight"), len(works) * size.group * 4),
            **dict.fromkeys(("key_start", "key_end"), (searched + len(meetings)) * 4),
            **dict.fromkeys(("penalty", "reward"), len(works) * 4),
            "label_offsets": len(works) * 2 * 4,
            "label_positions": seen_labels * 4,
            "label_is_correct": seen_labels,
        },
        written={
            "grad_key": size.vectors(changed if accumulate else size.tokens * size.key_heads)
        },
    )  # fmt: skip

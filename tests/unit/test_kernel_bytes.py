"""Bytes the Triton kernels load and store, by argument, against formulas: exactly as many."""

import pytest
import torch
from abft_kernels.loss import add_loss_gradients, loss_forward
from abft_kernels.types import Normalizer, Rows, Scores

from tests.costs import counted_traffic
from tests.last_row_cases import DEVICE, make_case

loss_triton = pytest.importorskip("abft_kernels.loss_triton", exc_type=ImportError)
from abft_kernels.loss_triton import backward, forward  # noqa: E402
from abft_kernels.loss_triton.launch import HEAD_BLOCK, Shape  # noqa: E402

pytestmark = [
    pytest.mark.unit,
    pytest.mark.skipif(
        not loss_triton.INTERPRETED, reason="bytes are counted in Triton's interpreter"
    ),
]


class Sizes:
    """What the formulas are made of; bytes an element of queries and keys, four of all else."""

    def __init__(self, case):
        rows = Rows(*(case[name] for name in Rows._fields))
        shape = Shape(case["query"], case["key"], rows)
        self.rows, self.query_heads, self.dim = shape.rows, shape.query_heads, shape.head_dim
        self.key_heads, self.group = shape.key_heads, shape.group
        self.labels = len(case["label_positions"])
        self.element = case["query"].element_size()
        self.row_heads = self.rows * self.query_heads
        self.programs = self.rows * self.key_heads  # one a row and key head
        self.splits = shape.count_splits(shape.tokens, forward._KEYS_PER_SPLIT)
        self.span = backward._SPAN_TILES * shape.tile_keys(backward._TILE_BYTES)

    def vectors(self, count):
        """Bytes of that many queries or keys."""
        return count * self.dim * self.element


def arguments(case):
    rows = Rows(*(case[name] for name in Rows._fields))
    scores = Scores(case["query"].shape[-1] ** -0.5, None, case.get("window"))
    factors = (torch.tensor(case[name], device=DEVICE) for name in ("penalty", "reward"))
    return (case["query"], case["key"], rows, scores), tuple(factors)


def packed_arguments(case):
    """The same rows among packed queries, and the log-sum-exp of all queries."""
    problem, factors = arguments(case)
    query, key, rows, scores = problem
    alone = loss_forward("torch", *problem, None, *factors, True)
    last = rows.key_end.long() - 1
    packed = query.new_zeros(len(key), *query.shape[1:])
    packed[last] = query
    lse = torch.zeros(packed.shape[:2], device=DEVICE)
    lse[last] = alone.peak + alone.total.log()
    return (packed, key, rows, scores), factors, lse


def check(traffic, kernel, read, written):
    """Every argument's bytes, and none besides."""
    expectations = {"read": read, "written": written}
    for (way, expected), found in zip(expectations.items(), traffic.of(kernel), strict=True):
        for name in expected | found:
            assert found.get(name, 0) == expected.get(name, 0), (
                f"{kernel}: {name} {way}: {found.get(name, 0)} bytes, "
                f"the formula says {expected.get(name, 0)}"
            )


def check_label_loss(traffic, size, known):
    """Label keys alone, once a key head."""
    per_head = dict.fromkeys(("loss", "label_mass", "correct_mass", "mean_weight"), 4)
    normalizer = dict.fromkeys(("peak", "total"), size.row_heads * 4)
    parts = dict.fromkeys(("part_max", "part_sum"), size.row_heads * size.splits * 4)
    lse = {"peak": size.row_heads * 4}
    check(
        traffic, "label_loss",
        read={
            "key": size.vectors(size.labels * size.key_heads),
            "query": size.vectors(size.row_heads),
            "label_positions": size.labels * size.key_heads * 4,
            "label_is_correct": size.labels * size.key_heads,
            "label_offsets": size.programs * 2 * 4,
            "key_end": size.programs * 4 * (2 if known else 1),  # once to find a packed query
            **dict.fromkeys(("key_start", "penalty", "reward"), size.programs * 4),
            **(lse if known else parts),
        },
        written={
            **{name: size.row_heads * each for name, each in per_head.items()},
            "is_induction": size.row_heads,
            **({} if known else normalizer),
        },
    )  # fmt: skip


BYTES = {
    "plain": ([60, 1, 33], [4, 0, 6], 4, 2, 16, torch.float16),
    "float32": ([60, 1, 33], [4, 0, 6], 4, 2, 16, torch.float32),
    "group-of-7": ([60, 33, 20], [4, 6, 0], 7, 1, 24, torch.float16),
    "group-of-40": ([60, 33, 20], [4, 6, 0], 40, 1, 16, torch.float16),
    "splits": ([1100, 40], [5, 3], 4, 2, 16, torch.float16),
}


@pytest.fixture(params=BYTES.values(), ids=BYTES.keys())
def case(request):
    return make_case(*request.param)


@pytest.mark.slow
def test_bytes_of_a_forward_that_scans_all_keys(case):
    """A key head's keys are read once for its whole group of query heads, once more at labels."""
    size = Sizes(case)
    problem, factors = arguments(case)
    with counted_traffic() as traffic:
        loss_forward("triton", *problem, None, *factors, True)
    visible = int((case["key_end"] - case["key_start"]).sum())
    parts = size.row_heads * size.splits
    check(
        traffic, "scan_keys",
        read={
            "key": size.vectors(visible * size.key_heads),
            "query": size.vectors(parts),
            **dict.fromkeys(("key_start", "key_end"), size.programs * size.splits * 4),
        },
        written={"part_max": parts * 4, "part_sum": parts * 4},
    )  # fmt: skip
    check_label_loss(traffic, size, known=False)


@pytest.mark.slow
def test_bytes_of_a_forward_that_knows_its_normalizer(case):
    """Label keys alone, whether or not a gradient follows."""
    problem, factors, lse = packed_arguments(case)
    with counted_traffic() as traffic:
        loss_forward("triton", *problem, None, *factors, True, lse=lse, packed=True)
    check_label_loss(traffic, Sizes(case), known=True)
    assert traffic.of("scan_keys") == ({}, {})


def check_gradient(traffic, size, case, has_loss):
    """Keys are read once for 16 heads with a loss; their gradients are read and written as often.

    A group of 16 heads or fewer is one chunk, whichever of them have a loss.
    """
    with_loss = has_loss.unflatten(1, (size.key_heads, -1)).sum(-1)  # (R, Hkv)
    taken = -(-with_loss // HEAD_BLOCK)  # chunks that have a loss
    chunks = -(-size.group // HEAD_BLOCK)
    large = chunks > 1
    heads = int((with_loss if large else taken * size.group).sum())
    lengths = case["key_end"] - case["key_start"]
    keys = size.vectors(int((lengths[:, None] * taken).sum()))
    spans = -(-lengths // size.span)
    labels = int((case["label_offsets"].diff() * spans * taken.sum(1)).sum())
    active = int(taken.sum())
    # A large group is looked through for each chunk, and once more to store a chunk's dq.
    looks = chunks + taken * large
    check(
        traffic, "gradient",
        read={
            "key": keys,
            "grad_key": keys,
            **dict.fromkeys(("query", "grad_query"), size.vectors(heads)),
            "is_induction": int(looks.sum()) * size.group,
            "grad_loss": int((looks * with_loss).sum()) * 4,
            **dict.fromkeys(("peak", "mean_weight", "penalty", "reward"), heads * 4),
            "key_start": size.programs * 4,
            "key_end": (size.programs + 2 * active) * 4,
            "label_offsets": active * 2 * 4,
            "label_positions": labels * 4,
            "label_is_correct": labels,
        },
        written={"grad_key": keys, "grad_query": size.vectors(heads)},
    )  # fmt: skip


def backward_of(case, head_filter):
    """The traffic of a packed backward, and which heads have a loss."""
    problem, factors, lse = packed_arguments(case)
    found = loss_forward("triton", *problem, None, *factors, head_filter, lse=lse, packed=True)
    grads = [torch.zeros_like(t) for t in problem[:2]]
    with counted_traffic() as traffic:
        add_loss_gradients(
            "triton", *grads, *problem, Normalizer(lse, None), found.mean_weight,
            found.is_induction, torch.ones_like(found.loss), *factors, head_filter, True, 2000,
        )  # fmt: skip
    return traffic, found.is_induction if head_filter else torch.ones_like(found.is_induction)


@pytest.mark.slow
def test_bytes_of_a_backward(case):
    """Key heads without a loss are not read."""
    size = Sizes(case)
    traffic, has_loss = backward_of(case, head_filter=True)
    groups = has_loss.unflatten(1, (size.key_heads, -1)).any(-1)
    assert groups.any() and not groups.all()
    check_gradient(traffic, size, case, has_loss)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("head_filter", "times"), [(True, [1, 2]), (False, [5, 5])], ids=["few", "all"]
)
def test_bytes_of_a_backward_of_71_heads_to_a_key_head(head_filter, times):
    """What counts is how many heads have a loss: their keys are read once for 16 of them."""
    case = make_case([65, 31], [4, 6], 71, 1, 16, torch.float16, sharpness=3.0)
    traffic, has_loss = backward_of(case, head_filter)
    assert (-(-has_loss.sum(1) // 16)).tolist() == times
    check_gradient(traffic, Sizes(case), case, has_loss)

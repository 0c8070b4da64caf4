"""The kernels against float64: compiled on a GPU, in Triton's interpreter elsewhere."""

import pytest
import torch
from abft_kernels import last_row_loss, reference
from abft_kernels.types import Normalizer, Rows, Scores
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.last_row_cases import (
    DEVICE,
    FEATURES,
    assert_as_good_as_eager,
    error,
    gradients,
    in_float64,
    make_case,
)

loss_triton = pytest.importorskip("abft_kernels.loss_triton", exc_type=ImportError)
import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from abft_kernels.loss_triton.jit_helpers import tanh  # noqa: E402
from abft_kernels.loss_triton.launch import Shape  # noqa: E402

pytestmark = [pytest.mark.unit, pytest.mark.kernels]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def poisoned_memory():
    """What no kernel writes is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def check(case, **options):
    assert_as_good_as_eager(last_row_loss, case, backend="triton", **options)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", FEATURES.values(), ids=FEATURES.keys())
def test_features(options, dtype):
    check(make_case([63, 1, 31, 9], [4, 1, 6, 0], head_dim=60, dtype=dtype, **options))


@pytest.mark.parametrize("length", [1, 2, 31, 63, 65, pytest.param(3001, marks=pytest.mark.slow)])
def test_lengths(length):
    check(make_case([length, 17], [min(length, 5), 3], head_dim=64, dtype=torch.float32))


@pytest.mark.parametrize("group", [1, 2, 4, 7, 16, 24])
def test_query_heads_to_a_key_head(group):
    check(make_case([65, 31], [4, 6], 2 * group, 2, head_dim=16, dtype=torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("head_filter", [True, False], ids=["few", "all"])
@pytest.mark.parametrize("heads", [1, 16, 32, 48, 71])
def test_one_key_head(heads, head_filter, dtype):
    """A backward takes 16 heads with a loss at once: few heads of a large group have one, or all.

    With the filter, up to 26 of 71 heads are induction heads.
    """
    options = {"head_filter": head_filter, "sharpness": 3.0}
    check(make_case([65, 31], [4, 6], heads, 1, head_dim=16, dtype=dtype, **options))


@pytest.mark.parametrize("head_dim", [1, 3, 64, 80, 96, 112, 128, 192, 256])
def test_head_dimensions(head_dim):
    check(make_case([40, 33], [4, 6], head_dim=head_dim, dtype=torch.float32))


@pytest.mark.slow
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    rows=st.lists(st.tuples(st.integers(1, 140), st.integers(0, 40)), min_size=1, max_size=4),
    heads=st.sampled_from([(1, 1), (2, 1), (4, 4), (7, 1), (6, 3)]),
    head_dim=st.sampled_from([5, 16, 60]),
    options=st.sampled_from(list(FEATURES.values())),
    seed=st.integers(0, 1000),
)
def test_any_shape(rows, heads, head_dim, options, seed):
    lengths = [n for n, _ in rows]
    labels = [min(n - 1, k) for n, k in rows]
    case = make_case(lengths, labels, *heads, head_dim, torch.float32, seed, **options)
    check(case, factor=8)  # a row of two keys has too few roundings to average over


@pytest.mark.parametrize("seed", range(8))
def test_a_row_of_nothing_but_labels_of_one_kind_has_a_gradient_of_rounding_alone(seed):
    """Its loss is the same whatever the attention, so all terms of the gradient cancel."""
    case = make_case([3], [3], 1, 1, 5, torch.float32, seed)
    case["label_is_correct"][:] = seed % 2 == 0
    _, grads = gradients(last_row_loss, case, backend="triton")
    for gradient in grads[:2]:
        assert gradient.norm() <= 8 * torch.finfo(torch.float32).eps * case["key"].norm()


@pytest.mark.slow
def test_long_rows_are_split_over_programs(monkeypatch):
    case = make_case([2101, 700, 1], [16, 3, 1], head_dim=16, dtype=torch.float32)
    counted = []
    real = Shape.count_splits
    monkeypatch.setattr(
        Shape, "count_splits", lambda *sizes: counted.append(real(*sizes)) or counted[-1]
    )
    check(case)
    assert len(counted) > 1 and min(counted) > 1
    for splits in (1, 90):  # 90: some splits of the long row are empty too
        monkeypatch.setattr(Shape, "count_splits", lambda *sizes, splits=splits: splits)
        check(case)


@pytest.mark.parametrize("heads", [(4, 2), (40, 1)], ids=str)
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("window", [None, 30])
def test_rows_may_share_keys(window, splits, heads, monkeypatch):
    """Rows inside each other, overlapping and apart, in no order."""
    monkeypatch.setattr(Shape, "count_splits", lambda *sizes: splits)
    labels, bounds = [3, 4, 3, 5], [(10, 70), (0, 90), (20, 61), (75, 160)]
    options = {"window": window, "head_filter": False}
    case = make_case([160] * 4, labels, *heads, dtype=torch.float32, **options)
    case["key"] = case["key"][:160]
    positions = [
        end - 2 - 3 * i for k, (_, end) in zip(labels, bounds, strict=True) for i in range(k)
    ]
    ints = {"dtype": torch.int32, "device": DEVICE}
    case["label_positions"] = torch.tensor(positions, **ints)
    case["key_start"], case["key_end"] = torch.tensor(bounds, **ints).T
    check(case)


def test_a_label_given_twice_counts_twice():
    case = make_case([70, 20], [6, 3], dtype=torch.float32, head_filter=False)
    case["label_positions"][1:3] = case["label_positions"][0]
    case["label_is_correct"][:3] = torch.tensor([True, False, True])
    check(case)


def test_keys_no_row_sees_get_no_gradient():
    case = make_case([200, 40], [4, 4], dtype=torch.float32)
    case["key_start"] = case["key_start"] + 3
    case["label_positions"] = case["label_positions"].clamp(3, 199)
    case["label_positions"][4:] = torch.arange(210, 214, device=DEVICE)
    case["key_end"] = torch.tensor([200, 230], dtype=torch.int32, device=DEVICE)
    _, (_, grad_key) = gradients(last_row_loss, case, backend="triton", head_filter=False)
    assert (grad_key[:3] == 0).all() and (grad_key[230:] == 0).all()
    assert (grad_key[3:200] != 0).all()


def test_views_are_read_where_they_are():
    """As a model hands them over: heads before tokens, a slice of a fused projection."""
    case = make_case([40, 25], [4, 6], head_dim=16, dtype=torch.float32)
    fused = torch.randn(65, 2, 48, device=DEVICE)
    fused[..., 16:32] = case["key"]
    views = {
        "key": fused[..., 16:32],
        "query": case["query"].transpose(0, 1).contiguous().transpose(0, 1),
    }
    expected = last_row_loss(**case, backend="triton")
    torch.testing.assert_close(last_row_loss(**{**case, **views}, backend="triton"), expected)


def test_only_heads_with_a_loss_are_read():
    """NaN keys of a head without induction heads reach no gradient."""
    case = make_case([60], [4], query_heads=2, key_heads=2, dtype=torch.float32)
    case["key"][:, 1] = 0.0
    rows = Rows(*(case[name] for name in Rows._fields))
    scores = Scores(8**-0.5, None, None)
    factor = torch.ones((), device=DEVICE)
    found = loss_triton.label_loss(
        case["query"], case["key"], rows, scores, None, None, factor, factor, head_filter=True
    )
    assert found.is_induction[0].tolist() == [True, False]
    poisoned = case["key"].clone()
    poisoned[:, 1] = torch.nan
    grads = [torch.full_like(case[name], 2.0) for name in ("query", "key")]
    loss_triton.add_gradients(
        *grads, case["query"], poisoned, rows, scores,
        Normalizer(found.peak, found.total), found.mean_weight, found.is_induction,
        torch.ones_like(found.loss), factor, factor, head_filter=True, packed=False, longest=60,
    )  # fmt: skip
    for grad in grads:
        assert (grad[:, 1] == 2).all() and grad.isfinite().all()
        assert (grad[:, 0] != 2).any()


def test_nan_is_passed_on():
    for name in ("query", "key"):
        case = make_case([40], [2], dtype=torch.float32)
        case[name][0, 0, 0] = torch.nan
        result = last_row_loss(**case, backend="triton")
        assert result.label_mass[0, 0].isnan() and not result.is_induction[0, 0]
        assert result.label_mass[0, -1].isfinite()


@pytest.mark.skipif(DEVICE == "cuda", reason="tests/gpu has larger ones")
def test_a_query_view_may_lie_far_apart():
    """A row's heads 2**31 elements apart: nothing else of that memory is touched."""
    case = make_case([20], [2], 3, 3, 16, dtype=torch.float16)
    torch.use_deterministic_algorithms(False)  # which would fill it
    far = torch.empty(2 * (2**30 + 64) + 16, dtype=torch.float16)
    view = far.as_strided((1, 3, 16), (0, 2**30 + 64, 1))
    view.copy_(case["query"])
    expected = last_row_loss(**case, backend="triton")
    actual = last_row_loss(**{**case, "query": view}, backend="triton")
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("many", [17, 300])
def test_many_labels(many):
    check(make_case([many + 40], [many], head_dim=16, dtype=torch.float32))


@pytest.mark.slow
def test_results_are_bitwise_repeatable():
    case = make_case([700, 65], [7, 3], head_dim=32, dtype=torch.float32)
    first, first_grads = gradients(last_row_loss, case, backend="triton")
    for _ in range(3 if DEVICE == "cpu" else 100):
        again, grads = gradients(last_row_loss, case, backend="triton")
        for a, b in zip((*first, *first_grads), (*again, *grads), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    "broken",
    [
        {"label_positions": [2, 90]},
        {"label_positions": [-1, 5]},
        {"key_end": [41]},
        {"key_start": [-1]},
        {"key_start": [40]},
        {"label_offsets": [1, 2]},
        {"label_offsets": [0, 1]},
        {"label_offsets": [2, 0]},
        {"label_offsets": [0, 500_000_000]},
        {"label_offsets": [-500_000_000, 2]},
    ],
    ids=str,
)
def test_an_index_out_of_bounds_is_nan_not_a_wrong_number(broken):
    """What a GPU does, where nothing may wait to look at indices."""
    case = make_case([40], [2], dtype=torch.float32)
    case |= {n: torch.tensor(v, dtype=torch.int32, device=DEVICE) for n, v in broken.items()}
    rows = Rows(*(case[name] for name in Rows._fields))
    scores = Scores(1.0, None, None)
    query, key = case["query"], case["key"]
    factor = torch.ones((), device=DEVICE)
    found = loss_triton.label_loss(
        query, key, rows, scores, None, None, factor, factor, head_filter=True
    )
    assert found.loss.isnan().all() and found.label_mass.isnan().all()


def test_small_gradients_survive_float16():
    case = make_case([60, 31], [4, 2], dtype=torch.float16, head_filter=False)
    _, (_, expected) = gradients(reference.last_row_loss, in_float64(case))
    query, key = (case[name].clone().requires_grad_() for name in ("query", "key"))
    loss = last_row_loss(**{**case, "query": query, "key": key}, backend="triton").loss
    weights = torch.linspace(0.5, 1.5, loss.numel(), device=DEVICE).view_as(loss)
    (grad,) = torch.autograd.grad((loss * weights).sum() * 1e-3, key)
    assert error(grad, expected * 1e-3) < 0.02


@triton.jit
def _tanh_kernel(x_ptr, y_ptr, N: tl.constexpr):
    offsets = tl.arange(0, N)
    tl.store(y_ptr + offsets, tanh(tl.load(x_ptr + offsets)))


def test_tanh_is_accurate_to_float32():
    x = torch.cat([torch.linspace(-12, 12, 1024), torch.linspace(-1e-3, 1e-3, 1024)])
    x = torch.cat([x, torch.tensor([0.0, 88.0, -200.0]), torch.zeros(2045)]).to(DEVICE)
    y = torch.full_like(x, torch.nan)
    _tanh_kernel[(1,)](x, y, N=4096)
    exact = torch.tanh(x.double())
    assert ((y.double() - exact).abs() <= 3e-7 * exact.abs()).all()

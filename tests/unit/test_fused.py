"""Attention and loss in one op: equal to attention and loss one after the other, under autograd."""

import inspect
import itertools

import pytest
import torch
from abft_kernels import (
    choose_attention,
    explicit_attention,
    flash_attention_with_last_row_loss,
    last_row_loss,
    loss_torch,
    reference,
)
from abft_kernels import fused as fused_module
from abft_kernels.attention.inputs import gpu_obstacle
from abft_kernels.attention.registry import FLASH_ATTENTIONS, attention_forward
from abft_kernels.attention.separate import visible_keys
from abft_kernels.types import Prompts, Scores
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.last_row_cases import DEVICE, eager, error, make_case

pytestmark = [pytest.mark.unit, pytest.mark.kernels]
FEATURES = {
    "plain": {},
    "no-filter": {"head_filter": False},
    "window": {"window": 7},
    "sinks": {"sinks": True},
    "softcap": {"softcap": 3.0},
    "all": {"softcap": 3.0, "window": 7, "sinks": True, "scale": 0.7},
}
LENGTHS, LABELS = [23, 1, 9, 40], [4, 1, 0, 6]


def make_fused(dtype, query_heads=4, key_heads=2, head_dim=16, **options):
    """Queries of every row whose last rows are those of `make_case`."""
    case = make_case(
        LENGTHS, LABELS, query_heads, key_heads, head_dim, dtype, sharpness=2.0, **options
    )
    case["cu_seqlens"] = torch.cat([case.pop("key_start")[:1] * 0, case.pop("key_end")])
    generator = torch.Generator().manual_seed(1)
    shape = (sum(LENGTHS), query_heads, head_dim)
    q = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(DEVICE)
    q[case["cu_seqlens"][1:].long() - 1] = case.pop("query")
    v = torch.randn(shape, generator=generator, dtype=torch.float64)[:, :key_heads]
    case |= {"q": q, "k": case.pop("key"), "v": v.to(dtype).to(DEVICE)}
    return case


def one_after_the_other(q, k, v, cu_seqlens, *labels, sinks=None, **options):
    """The specification: the attention matrix written out, the loss from its own function."""
    bounds = list(itertools.pairwise(cu_seqlens.tolist()))
    scale = options.get("scale") or q.shape[-1] ** -0.5
    scores = Scores(scale, options.get("softcap"), options.get("window"))
    outs = []
    for a, b in bounds:
        prompt = (t[a:b].transpose(0, 1)[None] for t in (q, k, v))
        mask = visible_keys(b - a, scores.window, q.device)
        outs.append(explicit_attention(*prompt, mask, scores, sinks)[0][0].transpose(0, 1))
    ends = cu_seqlens[1:]
    result = reference.last_row_loss(
        q[ends.long() - 1], k, cu_seqlens[:-1], ends, *labels, sinks=sinks, **options
    )
    return torch.cat(outs), result


def run(function, case, use=("out", "loss"), **options):
    """Output, results and the gradients of all inputs."""
    names = [name for name in ("q", "k", "v", "sinks") if name in case]
    leaves = {name: case[name].detach().clone().requires_grad_() for name in names}
    arguments = {**case, **options, **leaves}
    positional = [
        arguments.pop(name)
        for name in (
            "q", "k", "v", "cu_seqlens", "label_positions", "label_offsets", "label_is_correct"
        )
    ]  # fmt: skip
    out, result = function(*positional, **arguments)
    total = 0.0
    if "out" in use:
        weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64, device=DEVICE)
        total = total + (out * weights.view_as(out).to(out.dtype)).sum()
    if "loss" in use:
        weights = torch.linspace(1, 2, result.loss.numel(), dtype=torch.float64, device=DEVICE)
        total = total + (result.loss * weights.view_as(result.loss)).sum()
    grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    return out, result, dict(zip(names, grads, strict=True))


fused = flash_attention_with_last_row_loss


@pytest.mark.parametrize("use", [("out", "loss"), ("loss",), ("out",)], ids="+".join)
@pytest.mark.parametrize("options", FEATURES.values(), ids=FEATURES.keys())
@pytest.mark.parametrize("heads", [(4, 2), (3, 3), (7, 1)], ids=str)
def test_equals_one_after_the_other(heads, options, use):
    case = make_fused(torch.float64, *heads, **options)
    out, result, grads = run(fused, case, use)
    expected_out, expected, expected_grads = run(one_after_the_other, case, use)
    torch.testing.assert_close(out, expected_out)
    torch.testing.assert_close(tuple(result), tuple(expected))
    assert expected.is_induction.any() and not expected.is_induction.all()
    for name, exact in expected_grads.items():
        pair = (torch.zeros_like(case[name]) if g is None else g for g in (grads[name], exact))
        torch.testing.assert_close(*pair, msg=name)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("options", FEATURES.values(), ids=FEATURES.keys())
def test_sixteen_bits_take_the_attentions_log_sum_exp(options, backend):
    """And lose no more than eager attention does, though the CPU's log-sum-exp is not exact."""
    case = make_fused(torch.float16, **options)
    double = {n: t.double() if n in ("q", "k", "v", "sinks") else t for n, t in case.items()}
    out, result, grads = run(fused, case, backend=backend)
    exact_out, exact, exact_grads = run(one_after_the_other, double)
    assert torch.equal(result.is_induction, exact.is_induction)
    ends = case["cu_seqlens"][1:]
    last = {n: case[n] for n in ("label_positions", "label_offsets", "label_is_correct")}
    last |= {"query": case["q"][ends.long() - 1], "key": case["k"], "key_end": ends}
    last |= {"key_start": case["cu_seqlens"][:-1], "penalty": 0.5, "reward": 1.0}
    last |= {n: case[n] for n in ("sinks",) if n in case}
    last |= {n: v for n, v in options.items() if n != "sinks"}
    base = eager(**last, threshold_from=exact.is_induction)
    for ours, theirs, true in zip(result[:3], base[:3], exact[:3], strict=True):
        assert ours.dtype == torch.float32 and error(ours, true) <= error(theirs, true)
    assert error(out, exact_out) <= 2e-3
    for name, exact_grad in exact_grads.items():
        assert error(grads[name], exact_grad) <= 4e-3, name


@pytest.mark.parametrize("head_filter", [True, False], ids=["few", "all"])
@pytest.mark.parametrize("splits", [1, 3])
def test_forty_heads_to_a_key_head(splits, head_filter, monkeypatch):
    """The chunks of one program add to the same keys, and split rows leave parts of their dq."""
    launch = pytest.importorskip("abft_kernels.loss_triton.launch", exc_type=ImportError)
    monkeypatch.setattr(launch.Shape, "count_splits", lambda *sizes: splits)
    case = make_fused(torch.float32, 40, 1, head_filter=head_filter)
    double = {n: t.double() if n in ("q", "k", "v") else t for n, t in case.items()}
    _, result, grads = run(fused, case, backend="triton")
    _, exact, exact_grads = run(one_after_the_other, double)
    assert torch.equal(result.is_induction, exact.is_induction)
    for name, exact_grad in exact_grads.items():
        torch.testing.assert_close(grads[name], exact_grad.float(), msg=name)


def test_heads_without_a_loss_have_no_gradient_from_it():
    case = make_fused(torch.float32)
    _, result, grads = run(fused, case, use=("loss",))
    assert result.is_induction.any() and not result.is_induction.all()
    induction = result.is_induction.unflatten(1, (2, 2)).any(2)  # (R, Hkv)
    for row, (a, b) in enumerate(itertools.pairwise(case["cu_seqlens"].tolist())):
        assert torch.equal(grads["k"][a:b].abs().sum((0, 2)) > 0, induction[row])
    assert grads["v"] is None or not grads["v"].any()


@pytest.mark.parametrize(("dtype", "scans"), [(torch.float32, 1), (torch.float16, 0)], ids=str)
def test_keys_are_scanned_only_for_a_normalizer_that_nobody_knows(dtype, scans, monkeypatch):
    found = []
    real = loss_torch.scan_keys
    monkeypatch.setattr(loss_torch, "scan_keys", lambda *a: found.append(0) or real(*a))
    case = make_fused(dtype)
    _, result, _ = run(fused, case)
    assert len(found) == scans and result.is_induction.any()


def test_without_gradient_the_results_are_the_same():
    case = make_fused(torch.float32)
    with torch.no_grad():
        out, result = fused(**case, backend="torch")
    assert not out.requires_grad and not result.loss.requires_grad
    expected_out, expected, _ = run(fused, case)
    assert torch.equal(out, expected_out) and torch.equal(result.loss, expected.loss)


class Wide(TorchDispatchMode):
    """Notes operations whose results are as large as the queries, in float32 or more."""

    def __init__(self, elements):
        super().__init__()
        self.elements, self.found = elements, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **kwargs or {})
        if isinstance(made, torch.Tensor) and made.numel() >= self.elements:
            self.found += [func] * (made.element_size() > 2)
        return made


def test_sinks_take_no_wide_temporaries(monkeypatch):
    case = make_fused(torch.float16, sinks=True)
    arguments = case["q"], case["k"], case["v"]
    prompts = Prompts(case["cu_seqlens"], max(LENGTHS))
    scores = Scores(case["q"].shape[-1] ** -0.5, None, None)
    name, _ = choose_attention(case["q"])
    implementation = FLASH_ATTENTIONS[name]
    out, without = implementation.forward(*arguments, prompts, scores)
    monkeypatch.setitem(
        FLASH_ATTENTIONS, name, implementation._replace(forward=lambda *_: (out.clone(), without))
    )
    with Wide(out.numel()) as wide:
        found, lse = attention_forward(name, *arguments, case["sinks"], prompts, scores)
    assert not wide.found
    assert torch.equal(found, (out * torch.exp(without - lse).T[..., None]).half())


@pytest.mark.parametrize("use", [("out", "loss"), ("loss",)], ids="+".join)
def test_frozen_sinks_cost_no_gradient(use, monkeypatch):
    case = make_fused(torch.float32, sinks=True)
    out, result, expected = run(fused, case, use)
    sinks_of_attention = []
    real = fused_module.attention_backward

    def backward(name, grad_out, q, k, v, sinks, *rest):
        sinks_of_attention.append(sinks)
        return real(name, grad_out, q, k, v, sinks, *rest)

    monkeypatch.setattr(fused_module, "attention_backward", backward)
    monkeypatch.setattr(fused_module, "loss_grad_sinks", None)  # a call would fail
    sinks = case.pop("sinks")
    same_out, same, grads = run(fused, case, use, sinks=sinks)
    assert torch.equal(same_out, out) and torch.equal(same.loss, result.loss)
    assert sinks_of_attention == [None] * ("out" in use)
    for name, grad in grads.items():
        if grad is not None or expected[name] is not None:
            assert torch.equal(grad, expected[name]), name


def test_dropout_leaves_the_loss_alone():
    case = make_fused(torch.float32)
    out, result, _ = run(fused, case)
    dropped, same, grads = run(fused, case, dropout=0.5)
    torch.testing.assert_close(tuple(same), tuple(result))
    assert not torch.allclose(out, dropped) and grads["v"].isfinite().all()


def test_masses_carry_no_gradient():
    case = make_fused(torch.float32)
    case["q"].requires_grad_()
    out, result = fused(**case)
    assert out.requires_grad and result.loss.requires_grad
    assert not result.label_mass.requires_grad and not result.correct_mass.requires_grad


def test_the_choice_is_named_and_explained():
    q = torch.zeros(3, 4, 8)  # on the CPU
    name, reasons = choose_attention(q)
    assert name == "sdpa" and "flash-attn:" in reasons and "varlen: it runs on a GPU" in reasons
    name, reasons = choose_attention(q, softcap=2.0)
    assert name == "separate" and "sdpa: it has no soft-cap" in reasons
    assert choose_attention(q, dropout=0.1)[0] == "separate"
    with pytest.raises(
        ValueError, match="attention backend varlen: it runs on a GPU, not on the cpu"
    ):
        choose_attention(q, requested="varlen")
    with pytest.raises(ValueError, match=r"attention backend flash-attn-3: .+"):
        choose_attention(q, requested="flash-attn-3")
    with pytest.raises(ValueError, match="attention must be one of auto, flash-attn"):
        choose_attention(q, requested="fastest")


def test_rocm_is_refused_by_name(monkeypatch):
    """torch's flash attention has a log-sum-exp of another shape there: losses would be wrong."""
    monkeypatch.setattr(torch.version, "hip", "7.0")
    with FakeTensorMode():
        q = torch.empty(3, 4, 64, device="cuda", dtype=torch.bfloat16)
        name, reasons = choose_attention(q)
        assert name == "separate" and "varlen: AMD GPUs are not supported" in reasons
        for attention in ("flash-attn", "varlen", "flash-attn-3"):
            with pytest.raises(ValueError, match=f"attention backend {attention}: "):
                choose_attention(q, requested=attention)


class Calls(TorchDispatchMode):
    """What torch's flash attention is called with, in its place."""

    def __init__(self):
        super().__init__()
        self.bound = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        from torch.nn.attention import _fa3

        taken = {
            "_flash_attention_forward": _fa3._fa3_flash_attention_forward_impl_default,
            "_flash_attention_backward": _fa3._fa3_flash_attention_backward_impl,
        }
        name = func.overloadpacket.__name__
        if name not in taken:
            return func(*args, **kwargs or {})
        self.bound[name] = inspect.signature(taken[name]).bind(*args, **kwargs or {}).arguments
        if name == "_flash_attention_backward":
            return args[1:4]
        return args[0], torch.zeros(4, 9), torch.empty(0), torch.empty(0), torch.empty(0)


class Handle:
    def remove(self):
        pass


@pytest.fixture
def flash_attn_3_inside_torch():
    """Its registration, without the kernels, which need a Hopper GPU."""
    from torch.nn.attention import _registry, register_flash_attention_impl

    own = _registry._FLASH_ATTENTION_IMPLS["FA3"]
    register_flash_attention_impl("FA3", register_fn=Handle)
    yield
    register_flash_attention_impl("FA3", register_fn=own)


@pytest.mark.parametrize("window", [None, 5])
def test_flash_attn_3_is_switched_on_and_takes_what_it_is_given(window, flash_attn_3_inside_torch):
    from torch.nn.attention import current_flash_attention_impl

    q, k, v = torch.randn(9, 4, 8), torch.randn(9, 2, 8), torch.randn(9, 2, 8)
    prompts = Prompts(torch.tensor([0, 4, 9], dtype=torch.int32), 5)
    scores = Scores(0.3, None, window)
    for name, active in (("flash-attn-3", "FA3"), ("varlen", None)):
        with Calls() as calls:
            out, lse = FLASH_ATTENTIONS[name].forward(q, k, v, prompts, scores)
            assert current_flash_attention_impl() == active
            FLASH_ATTENTIONS[name].backward(out, q, k, v, out, lse, prompts, scores)
        forward, backward = calls.bound.values()
        for bound in (forward, backward):
            assert bound["max_q"] == bound["max_k"] == 5 and bound["scale"] == 0.3
            assert bound["cum_seq_q"] is prompts.cu_seqlens
            assert bound["cum_seq_k"] is prompts.cu_seqlens
            assert bound["is_causal"] is (window is None)
            assert bound.get("window_size_left") == (None if window is None else 4)
            assert bound.get("window_size_right") == (None if window is None else 0)
        assert forward["query"] is q and backward["logsumexp"] is lse


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"v": torch.zeros(3, 2, 8)}, "v must be like k"),
        ({"cu_seqlens": torch.tensor([0, 80], dtype=torch.int32).to(DEVICE)}, "label_offsets"),
        ({"penalty": -1.0}, "penalty"),
    ],
    ids=["v", "cu_seqlens", "penalty"],
)
def test_a_bad_argument_is_named(change, message):
    case = {**make_fused(torch.float32), **change}
    with pytest.raises(ValueError, match=message):
        fused(**case)


def test_attention_alone_when_there_are_no_labels():
    case = make_fused(torch.float32)
    expected, _, _ = run(fused, case)
    empty = {
        "label_positions": case["label_positions"][:0],
        "label_offsets": torch.zeros_like(case["label_offsets"]),
        "label_is_correct": case["label_is_correct"][:0],
    }
    for head_filter in (True, False):
        unlabeled = {**case, **empty, "head_filter": head_filter}
        out, result, grads = run(fused, unlabeled, use=("loss",))
        assert torch.equal(out, expected) and (result.loss == 0).all()
        assert all(grad is None or not grad.any() for grad in grads.values())


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU does not wait to look at values")
@pytest.mark.parametrize("attention", ["auto", "separate"])
@pytest.mark.parametrize(
    "bounds",
    [[0, 23, 24, 33, 70], [1, 23, 24, 33, 73], [0, 24, 24, 33, 73]],
    ids=["end", "start", "empty"],
)
def test_prompts_must_cover_all_tokens(bounds, attention):
    case = {**make_fused(torch.float32), "cu_seqlens": torch.tensor(bounds, dtype=torch.int32)}
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to the number of tokens, 73"):
        fused(**case, attention=attention)


@pytest.mark.parametrize("change", [torch.Tensor.long, torch.Tensor.float, lambda t: t[None]])
def test_bounds_of_another_kind_are_named(change):
    case = make_fused(torch.float32)
    with pytest.raises(ValueError, match=r"cu_seqlens must be \(R \+ 1,\) torch.int32"):
        fused(**{**case, "cu_seqlens": change(case["cu_seqlens"])})


def test_bounds_of_another_length_are_refused():
    case = make_fused(torch.float32)
    with pytest.raises(ValueError, match="bounds must be the 5 numbers of cu_seqlens, not 2"):
        fused(**case, bounds=[0, 73], attention="separate")


@pytest.mark.parametrize("use", [("out", "loss"), ("loss",)], ids="+".join)
def test_layouts_of_every_kind_are_read_right(use):
    """Heads before tokens, the head dimension not last in memory, indices with gaps."""
    case = make_fused(torch.float32, sinks=True)
    expected_out, expected, expected_grads = run(fused, case, use)

    def odd(tensor):
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)

    def gaps(tensor):
        return torch.stack([tensor, torch.zeros_like(tensor)], dim=1)[:, 0]

    strided = {n: odd(case[n]) for n in ("q", "k", "v")}
    indices = ("label_positions", "label_offsets", "label_is_correct", "cu_seqlens", "sinks")
    strided |= {n: gaps(case[n]) for n in indices}
    for backend in ("torch", "triton"):
        out, result, grads = run(fused, {**case, **strided}, use, backend=backend)
        torch.testing.assert_close(out, expected_out)
        torch.testing.assert_close(tuple(result), tuple(expected))
        for name, grad in grads.items():
            torch.testing.assert_close(grad, expected_grads[name], msg=name)


def test_standalone_and_fused_agree_on_a_layer():
    case = make_fused(torch.float16)
    _, fused_result, _ = run(fused, case)
    ends = case["cu_seqlens"][1:]
    labels = (case[n] for n in ("label_positions", "label_offsets", "label_is_correct"))
    alone = last_row_loss(
        case["q"][ends.long() - 1], case["k"], case["cu_seqlens"][:-1], ends, *labels,
        penalty=0.5, reward=1.0,
    )  # fmt: skip
    torch.testing.assert_close(tuple(fused_result), tuple(alone), atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize(
    ("capability", "head_dim", "obstacle"),
    [
        ((7, 5), 64, "compute capability 8.0"),
        ((8, 0), 200, None),
        ((8, 6), 192, None),
        ((8, 9), 200, "193 to 224"),  # torch's check_requires_grad_and_head_dim_gt192...
        ((8, 9), 256, None),
        ((9, 0), 224, None),
        ((12, 0), 224, "193 to 224"),
        ((9, 0), 264, "up to 256"),
    ],
)
def test_what_flash_attention_of_a_gpu_takes(capability, head_dim, obstacle, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    with FakeTensorMode():
        q = torch.empty(3, 2, head_dim, dtype=torch.bfloat16, device="cuda")
        found = gpu_obstacle(q)
    assert found is None if obstacle is None else obstacle in found

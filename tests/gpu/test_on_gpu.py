"""What only a GPU can show: bfloat16, long rows, large offsets, no waiting, no recompiling.

The tests of the kernels themselves, in tests/unit, run on the GPU too where there is one, and
`pytest -m gpu` selects them as well.
"""

import itertools
import shutil
import subprocess
import sys

import pytest
import torch
from abft_kernels import (
    attention_after_prefix,
    choose_attention,
    flash_attention_with_last_row_loss,
    last_row_loss,
)
from abft_kernels.attention.registry import ATTENTIONS
from transformers import LlamaConfig, LlamaForCausalLM

from abft_fast import EncodedPrompt, attention_behavior_loss, pack
from abft_fast.models.trainable import set_trained
from tests.last_row_cases import DEVICE, eager, error, gradients, in_float64, make_case
from tests.tiny_models import tiny_model

pytestmark = pytest.mark.gpu
KERNELS = ("_scan_keys_kernel", "_combine_splits_kernel", "_label_loss_kernel", "_grad_key_kernel")


def exact_results(case):
    """The torch backend in float64, which tests/unit compares with the specification."""
    return gradients(last_row_loss, in_float64(case), backend="torch")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("length", [1000, 16_384, 131_072])
def test_long_rows(length, dtype):
    case = make_case([length, 31], [64, 4], 8, 2, 128, dtype)
    truth, true_grads = exact_results(case)
    found, grads = gradients(last_row_loss, case, backend="triton")
    base = eager(**case, threshold_from=truth.is_induction)
    assert torch.equal(found.is_induction, truth.is_induction)
    unit = torch.finfo(dtype).eps
    for ours, theirs, exact in zip(found[:3], base[:3], truth[:3], strict=True):
        assert error(ours, exact) <= max(2 * error(theirs, exact), 4e-7)
    for ours, exact in zip(grads, true_grads, strict=True):
        assert error(ours, exact) <= max(unit, 4e-6)  # stored in the inputs' dtype


def test_offsets_beyond_32_bits():
    tokens, heads, dim = 140_000, 64, 256
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free memory")
    key = torch.zeros(tokens, heads, dim, dtype=torch.bfloat16, device=DEVICE)
    assert key.numel() > 2**31
    small = make_case([200], [4], heads, heads, dim, torch.bfloat16)
    start = tokens - 200
    key[start:] = small["key"]
    moved = {**small, "key": key}
    moved |= {n: small[n] + start for n in ("key_start", "key_end", "label_positions")}
    expected, expected_grads = gradients(last_row_loss, small, backend="triton")
    found, grads = gradients(last_row_loss, moved, backend="triton")
    assert error(found.loss, expected.loss.double()) <= 1e-6
    assert error(grads[0], expected_grads[0].double()) <= 1e-2
    assert error(grads[1][start:], expected_grads[1].double()) <= 1e-2
    assert not grads[1][:start].any()


def available_attentions(softcap=None):
    q = torch.zeros(1, 4, 64, dtype=torch.bfloat16, device=DEVICE)
    names = []
    for name in ATTENTIONS[1:]:
        try:
            names.append(choose_attention(q, softcap=softcap, requested=name)[0])
        except ValueError:
            continue
    return names


@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize(
    "options",
    [{}, {"window": 70}, {"sinks": True}, {"sinks": True, "window": 70}, {"softcap": 20.0}],
    ids=["plain", "window", "sinks", "sinks-window", "softcap"],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_attention_gives_the_same(dtype, options, head_dim):
    """Output, losses and gradients against float64, by what a written-out attention loses."""
    lengths, labels = [300, 1, 129, 64], [16, 1, 0, 4]
    case = make_case(lengths, labels, 8, 2, head_dim, dtype, **options)
    bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=DEVICE)
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(sum(lengths), 8, head_dim, generator=generator).to(DEVICE, dtype)
    q[bounds[1:].long() - 1] = case["query"]
    v = torch.randn(sum(lengths), 2, head_dim, generator=generator).to(DEVICE, dtype)
    indices = [case[n] for n in ("label_positions", "label_offsets", "label_is_correct")]
    rest = {name: options.get(name) for name in ("window", "softcap")}
    rest |= {"penalty": 0.5, "reward": 1.0}
    weights = torch.linspace(-1, 1, q.numel(), device=DEVICE).view_as(q)

    def run(attention, to):
        leaves = [t.to(to).requires_grad_() for t in (q, case["key"], v)]
        sinks = case["sinks"].to(to).requires_grad_() if "sinks" in case else None
        out, result = flash_attention_with_last_row_loss(
            *leaves, bounds, *indices, longest=300, sinks=sinks, attention=attention, **rest
        )
        leaves += [] if sinks is None else [sinks]
        total = (out * weights.to(to)).sum() + result.loss.sum()
        return out, result, torch.autograd.grad(total, leaves)

    true_out, truth, true_grads = run("separate", torch.float64)
    base_out, base, base_grads = run("separate", dtype)
    for attention in available_attentions(options.get("softcap")):
        out, result, grads = run(attention, dtype)
        assert torch.equal(result.is_induction, truth.is_induction), attention
        assert error(out, true_out) <= max(2 * error(base_out, true_out), 1e-3), attention
        assert error(result.loss, truth.loss) <= 1e-4, attention
        for ours, theirs, exact in zip(grads, base_grads, true_grads, strict=True):
            assert error(ours, exact) <= max(2 * error(theirs, exact), 1e-3), attention
    assert error(base.loss, truth.loss) <= 1e-5


def fused_case(lengths, labels):
    case = make_case(lengths, labels, 7, 1, 64, torch.bfloat16)
    bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=DEVICE)
    q, k, v = (
        torch.randn(sum(lengths), heads, 64, dtype=torch.bfloat16, device=DEVICE)
        for heads in (7, 1, 1)
    )
    k = case["key"]
    q[bounds[1:].long() - 1] = case["query"]
    indices = (case[n] for n in ("label_positions", "label_offsets", "label_is_correct"))
    leaves = [t.requires_grad_() for t in (q, k, v)]
    return case, leaves, (*leaves, bounds, *indices)


def both_ops(lengths, labels, penalty):
    case, leaves, arguments = fused_case(lengths, labels)
    factors = {"penalty": penalty, "reward": torch.ones((), device=DEVICE)}
    options = {**factors, "longest": max(lengths)}

    def run():
        out, result = flash_attention_with_last_row_loss(*arguments, **options)
        (out.sum() + result.loss.sum()).backward()
        query = case["query"].requires_grad_()
        alone = last_row_loss(**{**case, **factors, "query": query}, backend="triton")
        alone.loss.sum().backward()
        return [result.loss, alone.loss, query.grad, *(t.grad for t in leaves)]

    return run


def run_without_waiting(run):
    """Run twice; the second time, whatever waits for the device raises."""
    run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_nothing_waits_for_the_device():
    run_without_waiting(both_ops([300, 40], [4, 4], torch.tensor(0.5, device=DEVICE)))


@pytest.mark.parametrize("gradient", ["full", "local"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["flash", "separate"])
def test_a_micro_batch_waits_for_nothing_before_its_behavior_is_read(dtype, gradient):
    model = set_trained(tiny_model("llama"), "full", 0).to(DEVICE, dtype)
    prompts = [EncodedPrompt([0] * n, [2, 5, 8], [True, False, True]) for n in (20, 9, 31)]

    def micro_batch():
        packed = pack(prompts).to(DEVICE)
        attention_behavior_loss(model, packed, gradient=gradient).loss.backward()

    run_without_waiting(micro_batch)


@pytest.mark.parametrize("attention", ["auto", "separate"])
def test_attention_after_a_prefix_waits_for_nothing(attention):
    q, k, v, prefix_k, prefix_v = (
        torch.randn(n, heads, 64, dtype=torch.bfloat16, device=DEVICE)
        for n, heads in ((60, 4), (60, 2), (60, 2), (40, 2), (40, 2))
    )
    bounds = [0, 20, 60]
    tensors = q, k, v, prefix_k, prefix_v, torch.tensor(bounds, dtype=torch.int32, device=DEVICE)
    options = {"longest": 40, "bounds": bounds, "scale": 0.125, "attention": attention}
    run_without_waiting(lambda: attention_after_prefix(*tensors, **options))


def test_new_lengths_counts_and_penalties_compile_nothing():
    from abft_kernels import loss_triton

    def compiled():
        kernels = (getattr(loss_triton, name) for name in KERNELS)
        return sum(len(caches[0]) for k in kernels for caches in k.device_caches.values())

    both_ops([300, 40], [4, 4], torch.tensor(0.5, device=DEVICE))()
    before = compiled()
    assert before > 0
    for lengths, labels, penalty in (
        ([301, 40, 7], [5, 4, 1], 0.7),
        ([1], [1], 0.0),
        ([4000, 1, 1], [64, 0, 1], 1.0),
    ):
        both_ops(lengths, labels, torch.tensor(penalty, device=DEVICE))()
    assert compiled() == before


def test_the_fused_forward_is_bitwise_repeatable():
    _, _, arguments = fused_case([700, 65], [7, 3])
    options = {"penalty": 0.5, "reward": 1.0, "longest": 700}
    first_out, first = flash_attention_with_last_row_loss(*arguments, **options)
    for _ in range(100):
        out, result = flash_attention_with_last_row_loss(*arguments, **options)
        assert torch.equal(out, first_out)
        assert all(torch.equal(a, b) for a, b in zip(result, first, strict=True))


def test_a_model_in_bfloat16_equals_its_own_eager_attention():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=256, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, attn_implementation="eager",
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(DEVICE).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.08)
    ids = torch.randint(97, (90,)).tolist()
    prompt = EncodedPrompt(ids, [3, 20, 50, 71], [True, False, True, False])
    exact = model.double()(torch.tensor([ids], device=DEVICE), output_attentions=True).attentions
    mass = torch.stack([a[0, :, -1, prompt.label_positions].sum(-1) for a in exact])
    model.to(torch.bfloat16)
    packed = pack([EncodedPrompt(ids[:40], [3], [True]), prompt])
    behavior = attention_behavior_loss(model, packed, head_filter=False)
    behavior.loss.backward()
    assert error(behavior.label_mass[:, 1], mass) <= 0.05
    gradient = model.model.layers[0].self_attn.q_proj.weight.grad
    assert gradient.isfinite().all() and gradient.abs().sum() > 0


@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="no compute-sanitizer")
def test_memcheck():
    script = (
        "import torch; from tests.last_row_cases import make_case, gradients;"
        "from abft_kernels import last_row_loss;"
        "c = make_case([65, 1, 700], [4, 1, 9], 7, 1, 80, torch.bfloat16, window=600, sinks=True);"
        "gradients(last_row_loss, c, backend='triton'); torch.cuda.synchronize()"
    )
    command = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "3"]
    run = subprocess.run(
        [*command, sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout[-2000:]

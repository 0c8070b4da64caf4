"""What only a GPU can show: bfloat16, long rows, large offsets, no waiting, no recompiling.

The tests of the kernels themselves, in tests/unit, run on the GPU too where there is one, and
`pytest -m gpu` selects them as well.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from abft_kernels import attention_after_prefix
from transformers import LlamaConfig, LlamaForCausalLM

from abft_fast import EncodedPrompt, attention_behavior_loss, pack
from abft_fast.models.trainable import set_trained
from benchmarks.on_gpu import correctness
from benchmarks.on_gpu.correctness import both_ops
from tests.last_row_cases import DEVICE, error
from tests.tiny_models import tiny_model

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).parents[2]


def assert_all(check):
    for found in check:
        assert found.holds, found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("length", [1000, 16_384, 131_072])
def test_long_rows(length, dtype):
    assert_all(correctness.long_rows(length, dtype))


def test_offsets_beyond_32_bits():
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free memory")
    assert_all(correctness.large_offsets(140_000))


@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("options", correctness.OPTIONS.values(), ids=correctness.OPTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_attention_gives_the_same(dtype, options, head_dim):
    assert_all(correctness.every_attention(dtype, options, head_dim))


def run_without_waiting(run):
    """Run twice; the second time, whatever waits for the device raises."""
    run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_nothing_waits_for_the_device():
    assert_all(correctness.no_waits(torch.bfloat16))


def test_a_clock_of_kernels_leaves_out_the_host():
    assert_all(correctness.clock_without_host())


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
    from abft_kernels.loss_triton import backward, forward, query_gradient

    kernels = [
        kernel
        for module in (forward, backward, query_gradient)
        for name, kernel in vars(module).items()
        if name.endswith("_kernel")
    ]

    def compiled():
        return sum(len(caches[0]) for k in kernels for caches in k.device_caches.values())

    # A prompt above 2,048 tokens has its keys' scan split, which takes one more kernel.
    both_ops([4000, 300, 40], [4, 4, 4], torch.tensor(0.5, device=DEVICE), torch.bfloat16)()
    before = compiled()
    assert before > 0
    for lengths, labels, penalty in (
        ([301, 40, 7], [5, 4, 1], 0.7),
        ([1], [1], 0.0),
        ([4000, 1, 1], [64, 0, 1], 1.0),
    ):
        both_ops(lengths, labels, torch.tensor(penalty, device=DEVICE), torch.bfloat16)()
    assert compiled() == before


def test_the_fused_forward_is_bitwise_repeatable():
    assert_all(correctness.repeatable(100, torch.bfloat16))


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
    command += ["--report-api-errors", "no"]  # torch itself tries calls that may fail
    roots = [str(ROOT), str(ROOT / "kernels")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(roots),
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",  # else what is past a tensor is in the same block
    }
    run = subprocess.run(
        [*command, sys.executable, "-c", script], capture_output=True, text=True, check=False,
        env=environment, timeout=240,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-2000:]

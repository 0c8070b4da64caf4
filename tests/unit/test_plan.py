"""The plan of memory against what models and steps really take."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from abft_kernels import flash_attention_with_last_row_loss
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import GPTJConfig

from abft_fast.commands import train
from abft_fast.commands.printing import _gigabytes
from abft_fast.errors import UnsupportedModel, UserError
from abft_fast.memory import plan
from abft_fast.memory.measure import (
    static_memory,
    step_memory,
    step_peak,
    trainable_without_memory,
)
from abft_fast.memory.plan import make_plan
from abft_fast.memory.simulation import (
    TENSORS,
    CannotCount,
    bytes_of,
    peak_memory,
    without_memory,
)
from abft_fast.memory.types import EVALUATION, FLOWS, Arithmetic, Flow, Line, StepMemory
from abft_fast.models.synthetic import random_model
from abft_fast.models.trainable import add_lora, unfreeze_query_key
from abft_fast.options import PlanConfig, TrainConfig
from abft_fast.options.resolve import resolve
from abft_fast.runtime.progress import Progress
from abft_fast.runtime.token_budget import CPU_TOKENS
from abft_fast.training.loop import choose_token_budget
from abft_fast.training.run_folder import RunFolder
from tests.tiny_models import tiny_config

pytestmark = pytest.mark.unit
ROOT = Path(__file__).parents[2]

FLOAT32 = Arithmetic("cpu", mixed=False)
ON_GPU = Arithmetic("cuda", mixed=True)
PRODUCT = "bitsandbytes.gemm_4bit.default"
FLASH_BACKWARD = "abft.flash_attention_with_last_row_loss_backward.default"


def options(**changes):
    return resolve(TrainConfig, changes)


@pytest.mark.parametrize("trainable", ["lora", "full"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("bits", [None, 4, 8])
def test_weights_are_counted_as_they_are(family, bits, trainable):
    config = tiny_config(family, tie_word_embeddings=family == "gpt2")
    if bits is not None and trainable == "full":
        pytest.skip("quantized weights are not trained")
    model = random_model(config, torch.device("cpu"), torch.float32, bits)
    if family != "gpt2":
        model.lm_head.weight = None  # only the labels' rows are kept
    model = add_lora(model, 16) if trainable == "lora" else unfreeze_query_key(model)
    planned = static_memory(
        config, options(trainable=trainable, quantized=bits is not None, bits=bits or 4), FLOAT32
    )
    trained = [p for p in model.parameters() if p.requires_grad]
    frozen = [p for p in model.parameters() if not p.requires_grad]
    assert planned.parameters == sum(p.numel() for p in trained)
    assert planned.trained == planned.gradients == planned.optimizer / 2 == bytes_of(trained)
    there = bytes_of([*frozen, *model.buffers()])
    assert planned.quantized + planned.frozen == pytest.approx(there, rel=0.02)
    assert (planned.quantized > 0) == (bits is not None)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arithmetic", "quantized", "flow"),
    [*((FLOAT32, False, flow) for flow in (*FLOWS, EVALUATION)), (ON_GPU, True, Flow(4))],
    ids=[*(flow.options for flow in (*FLOWS, EVALUATION)), "nf4 on a GPU --gradient 4"],
)
def test_few_layers_tell_the_memory_of_many(arithmetic, quantized, flow):
    shape = tiny_config("llama", num_hidden_layers=16, hidden_size=64, intermediate_size=176)
    config = options(quantized=quantized)
    few = step_memory(shape, config, arithmetic, flow, 50)
    whole = trainable_without_memory(shape, config, arithmetic, flow)
    for count in (50, 200):
        peaks = step_peak(whole, config, arithmetic, flow, 50, count)
        for line, peak in zip(few.lines, peaks.values(), strict=True):
            assert line.at(50 * count) == pytest.approx(peak, rel=0.02)
        assert few.at(50 * count) == pytest.approx(max(peaks.values()), rel=0.02)


@pytest.mark.parametrize(("device", "statistics"), [("cuda", 2), ("cpu", 1)])
def test_a_product_in_nf4_takes_its_dequantized_weight(device, statistics):
    """An MLP's layer of Llama 3 70B without a gradient, 2,400 tokens in bfloat16."""
    import bitsandbytes as bnb

    with torch.device("meta"):
        layer = bnb.nn.Linear4bit(8192, 28672, bias=False, quant_type="nf4")
    layer.compute_dtype = torch.bfloat16
    without_memory(layer)
    with layer.weight.fake_mode:
        hidden = torch.empty(2400, 8192, dtype=torch.bfloat16)
    with torch.no_grad():
        peaks = peak_memory(lambda: layer(hidden), device)
    output, weight, factors = 137_625_600, 469_762_048, 14_680_064  # a float32 each 64 weights
    assert peaks == {TENSORS: output, PRODUCT: output + weight + statistics * factors}


def flash_backward_peaks(device, heads, key_heads, head_dim, uses_output=True):
    """Peaks of 300 tokens in two prompts, and the operation's own part."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        query = torch.empty(300, heads, head_dim, dtype=torch.bfloat16, requires_grad=True)
        key = torch.empty(300, key_heads, head_dim, dtype=torch.bfloat16, requires_grad=True)

    def run():
        out, found = flash_attention_with_last_row_loss(
            query, key, key, torch.tensor([0, 100, 300], dtype=torch.int32),
            torch.tensor([5, 150], dtype=torch.int32), torch.tensor([0, 1, 2], dtype=torch.int32),
            torch.tensor([True, False]), longest=200, bounds=[0, 100, 300],
            penalty=0.5, reward=1.0, attention="sdpa", backend="torch",
        )  # fmt: skip
        (found.loss.sum() + (out.float().sum() if uses_output else 0)).backward()

    return peak_memory(run, device)


@pytest.mark.parametrize(
    ("heads", "key_heads", "head_dim", "inside"),
    [
        # dq of 300 + 2 x 128 rows in float32, D rounded to 96; softmax_d; dk and dv a query head.
        (4, 2, 80, 4 * 556 * 4 * 96 + 4 * 556 * 4 + 2 * 2 * 300 * 4 * 80),
        (2, 2, 192, 4 * 556 * 2 * 192 + 4 * 556 * 2),
        (2, 1, 129, 4 * 556 * 2 * 192 + 4 * 556 * 2 + 2 * 2 * 300 * 2 * 129),
    ],
)
def test_flash_attention_has_a_workspace_in_its_backward(heads, key_heads, head_dim, inside):
    size = heads, key_heads, head_dim
    on_gpu, on_cpu = (flash_backward_peaks(device, *size) for device in ("cuda", "cpu"))
    assert on_cpu == {TENSORS: on_gpu[TENSORS]}
    element = 300 * head_dim * 2
    alive = element * (heads + 2 * key_heads)  # the gradients
    alive += element * heads * 2 + 4 * 300 * heads  # the output, its gradient, the log-sum-exp
    found = on_gpu[FLASH_BACKWARD] - inside
    assert alive <= found <= 1.1 * alive  # losses and their residuals are small
    assert flash_backward_peaks("cuda", *size, uses_output=False).keys() == {TENSORS}


@pytest.mark.slow
def test_a_plan_counts_what_operations_take_inside():
    shape = tiny_config("llama", hidden_size=64, intermediate_size=128)
    of = {
        (device, quantized): step_memory(
            shape, options(quantized=quantized), Arithmetic(device, device == "cuda"),
            Flow("full"), 60,
        ).lines
        for device in ("cuda", "cpu") for quantized in (True, False)
    }  # fmt: skip
    # Tensors, bitsandbytes' product, flash attention's backward.
    assert {case: len(lines) for case, lines in of.items()} == {
        ("cuda", True): 3, ("cuda", False): 2, ("cpu", True): 2, ("cpu", False): 1,
    }  # fmt: skip


def test_the_largest_line_counts_whatever_the_batch():
    step = StepMemory((Line(100.0, 10.0), Line(500.0, 2.0)))
    assert [step.at(tokens) for tokens in (0, 50, 100)] == [500, 600, 1100]
    assert [step.most_tokens(room) for room in (400, 500, 600, 1100)] == [0, 0, 50, 100]
    assert step.of_large_batches == Line(100.0, 10.0)


REAL = """
import sys
import torch
from accelerate import Accelerator
from transformers import LlamaConfig
from abft_fast import EncodedPrompt
from abft_fast.options import TrainConfig
from abft_fast.options.resolve import resolve
from abft_fast.models.trainable import enable_checkpointing, add_lora
from abft_fast.memory.measure import step_memory
from abft_fast.memory.types import FLOWS, Arithmetic
from abft_fast.models.synthetic import random_model
from abft_fast.training.loop import backward
from benchmarks.peak_memory import high_water_mark, reset_high_water_mark

torch.set_num_threads(1)
bits = int(sys.argv[1]) or None
shape = LlamaConfig(
    vocab_size=512, hidden_size=256, intermediate_size=704, num_hidden_layers=10,
    num_attention_heads=4, num_key_value_heads=2,
)
prompt = EncodedPrompt(list(range(128)), [20, 45, 70, 95], [True, False, True, False])
accelerator = Accelerator(cpu=True)
for flow in FLOWS:
    config = resolve(TrainConfig, {"quantized": bits is not None, "gradient": flow.gradient})
    planned = step_memory(shape, config, Arithmetic("cpu", False), flow, 128).at(32 * 128)
    model = random_model(shape, torch.device("cpu"), torch.float32, bits)
    model = add_lora(model, config.lora_r)
    if flow.checkpointing:
        enable_checkpointing(model)
    backward(model, [prompt], config, 0.5, accelerator, 10**6)
    reset_high_water_mark("cpu")
    before = high_water_mark("cpu")
    backward(model, [prompt] * 32, config, 0.5, accelerator, 10**6)
    print(planned / (high_water_mark("cpu") - before))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the process's own high-water mark")
@pytest.mark.parametrize("bits", [0, 4])
def test_a_step_takes_what_was_planned(bits):
    run = subprocess.run(
        [sys.executable, "-c", REAL, str(bits)],
        cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    ratios = [float(line) for line in run.stdout.splitlines()]
    assert len(ratios) == len(FLOWS)
    assert all(1 / 1.15 <= ratio <= 1.15 for ratio in ratios), ratios


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_evaluation_takes_a_layer_and_the_logits_of_its_labels(tied):
    """Not every logit of the last rows, 40,000 words here, even if the head is the embedding."""
    shape = tiny_config("llama", vocab_size=40_000, tie_word_embeddings=tied)
    evaluation = step_memory(shape, options(), FLOAT32, EVALUATION, 50)
    local = step_memory(shape, options(), FLOAT32, Flow("local"), 50)
    logits = 40_000 * 4 / 50  # bytes a token, at one row for each prompt of 50 tokens
    slope = evaluation.of_large_batches.a_token
    assert slope < min(logits, local.of_large_batches.a_token)


@pytest.mark.slow
def test_what_fits_and_what_to_change():
    shape, config = tiny_config("llama"), options()
    whole = make_plan(shape, config, FLOAT32, FLOWS, longest=60, limit=10**9)
    assert all(whole.fits(flow) for flow in FLOWS)
    assert whole.most_demonstrations(Flow("full")) == 4  # 64 tokens of context, 12 an example
    full, local = Flow("full"), Flow("local")
    for step, flow in ((whole.steps[full], full), (whole.steps[local], local)):
        tokens = step.most_tokens(10**9 - whole.static.total)
        assert step.at(tokens) <= 10**9 - whole.static.total < step.at(tokens + 2), flow

    def advice(limit, **changes):
        return plan.what_to_change(shape, options(**changes), FLOAT32, 60, int(limit))

    at = {flow: whole.static.total + whole.steps[flow].at(60) for flow in FLOWS}
    assert advice(at[full] + 1) == "try --gradient full"
    cheapest = min(at, key=at.get)
    assert advice(min(at.values()) + 1) == f"try {cheapest.options}"
    assert "--quantized" in advice(at[cheapest] - 1)
    assert advice(1000).startswith("weights and optimizer alone take 0.0 GB with --quantized")


@pytest.mark.slow
def test_a_run_that_cannot_fit_is_refused_before_weights_are_read(monkeypatch):
    monkeypatch.setattr(train, "give_back_at_once", lambda: False)  # it is for the whole process
    config = options(train_samples=8)
    for limit, force in ((10**9, False), (10**5, True), (10**5, False)):
        monkeypatch.setattr(train, "available_memory", lambda device, all_gpus, it=limit: it)
        config.force = force
        found = train.TrainSession(config, Progress())
        prompts = found.encoder.encode(found.dataset.training_prompts(4, 8, 0)).prompts
        if limit > 10**5 or force:
            found.check_memory(prompts)
    with pytest.raises(UserError, match=r"does not fit in 0.0 GB: .*, or pass --force"):
        found.check_memory(prompts)
    assert not hasattr(found, "model")


@pytest.mark.slow
def test_memory_goes_back_at_once_only_where_it_is_short(monkeypatch):
    asked = []
    monkeypatch.setattr(train, "give_back_at_once", lambda: bool(asked.append(1)) or True)
    said = []
    progress = Progress()
    monkeypatch.setattr(progress, "say", said.append)
    session = train.TrainSession(options(train_samples=8, device="cpu"), progress)
    prompts = session.encode_training()
    flow = Flow("full")
    planned = make_plan(
        session.shape, session.config, session.arithmetic, [flow], max(map(len, prompts)), 10**9
    )
    step = planned.steps[flow].at(sum(map(len, prompts)))
    for room, is_short in ((2.8 * step, False), (2 * step, True)):
        asked.clear()
        said.clear()
        limit = int(planned.static.total + room)
        monkeypatch.setattr(train, "available_memory", lambda device, all_gpus, it=limit: it)
        session.check_memory(prompts)
        assert (bool(asked), any("memory is short" in line for line in said)) == (is_short,) * 2


def test_a_gpu_is_counted_with_its_own_autocast():
    """GPT-2's layer norms and powers are float32 there."""
    on_gpu, on_cpu = (
        step_memory(tiny_config("gpt2"), options(), Arithmetic(device, True), Flow("full"), 60)
        for device in ("cuda", "cpu")
    )
    assert on_gpu.of_large_batches.a_token > 1.1 * on_cpu.of_large_batches.a_token


@pytest.mark.slow
def test_a_loss_at_the_output_is_counted_with_its_logits():
    shape = tiny_config("llama", vocab_size=5000)
    logits = 4 * shape.vocab_size
    abft, e2e, picl = (
        step_memory(
            shape, options(method=method, trainable="lora"), FLOAT32, Flow("full"), 60
        ).of_large_batches
        for method in ("ABFT", "E2E", "PICL")
    )
    assert picl.a_token > e2e.a_token + logits  # of every token; of one in 60
    assert abft.a_token < e2e.a_token
    frozen = [
        static_memory(shape, options(method=method), FLOAT32).frozen for method in ("ABFT", "E2E")
    ]
    assert frozen[1] - frozen[0] == logits * shape.hidden_size  # the LM head is needed
    assert [f.options for f in plan.flows_of(options(method="E2E"))] == [
        "--gradient full", "--gradient full --checkpointing",
    ]  # fmt: skip


@pytest.mark.slow
def test_attention_prompt_by_prompt_is_counted_so():
    shape, long = tiny_config("llama"), 600
    flash, separate = (
        step_memory(shape, options(attention_backend=name), FLOAT32, Flow("full"), long)
        for name in ("auto", "separate")
    )
    assert separate.at(long) != flash.at(long)
    float32_on_gpu = step_memory(shape, options(), Arithmetic("cuda", False), Flow("full"), long)
    assert float32_on_gpu == separate


@pytest.mark.slow
def test_advice_is_advice_that_can_be_followed():
    shape = tiny_config("llama", hidden_size=512, intermediate_size=1024)
    config = options(trainable="full")
    quantized = static_memory(shape, options(quantized=True), FLOAT32).total
    advice = plan.what_to_change(shape, config, FLOAT32, 60, quantized + 10**7)
    assert advice.startswith("try --quantized --trainable lora --gradient ")


@pytest.mark.slow
def test_boxes_are_not_advised_another_k():
    shape = tiny_config("llama", max_position_embeddings=4096)
    few, many = options(quantized=True), options(quantized=True, dataset="boxes7")
    start, length = "try --gradient local", 1000
    room = step_memory(shape, few, FLOAT32, Flow("local"), length).at(700)
    limit = static_memory(shape, few, FLOAT32).total + int(room)
    assert plan.what_to_change(shape, few, FLOAT32, length, limit).startswith(f"{start} --k ")
    advice = plan.what_to_change(shape, many, FLOAT32, length, limit)
    assert advice == f"{start}, and a dataset of fewer boxes"


def test_a_cpu_packs_no_more_than_the_plan_has_room_for(tmp_path):
    config = options(train_samples=8, device="cpu")
    found = train.TrainSession(config, Progress())
    prompts = found.encoder.encode(found.dataset.training_prompts(4, 8, 0)).prompts
    run, longest = RunFolder(tmp_path), max(map(len, prompts))
    found.model = None  # nothing is computed

    def budget():
        return choose_token_budget(train.to_train(found, run, prompts))

    assert budget() == CPU_TOKENS  # nothing planned
    found.planned_tokens = CPU_TOKENS + 1
    assert budget() == CPU_TOKENS and run.token_budget is None
    found.planned_tokens = longest - 1
    assert budget() == longest == run.token_budget
    found.planned_tokens = CPU_TOKENS
    assert budget() == longest  # a resumed run goes on as it began


def test_what_nobody_can_count_is_said():
    gptj = GPTJConfig(vocab_size=97, n_embd=32, n_layer=2, n_head=4, rotary_dim=4)
    with pytest.raises(UnsupportedModel, match=r"gptj: .*not supported"):  # nor can it be trained
        make_plan(gptj, options(), FLOAT32, [Flow("full")], 60, 10**9)
    shape = tiny_config("llama")
    shape.quantization_config = {"quant_method": "gptq", "bits": 4}
    with pytest.raises(CannotCount, match="the memory of weights stored as gptq cannot be counted"):
        static_memory(shape, options(), FLOAT32)
    shape.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    assert static_memory(shape, options(), FLOAT32).quantized > 0


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"gpu_memory": "0"}, "--gpu-memory 0: input should be greater than 1"),
        ({"gpu_memory": "inf"}, "--gpu-memory inf"),
        ({"gpu_memory": "big"}, "--gpu-memory big"),
    ],
)
def test_a_malformed_gpu_is_refused(changes, error):
    with pytest.raises(UserError, match=error):
        resolve(PlanConfig, changes)


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0.000"), (1, "< 0.001"), (6e5, "0.001"), (16_098_600_000, "16.099")]
)
def test_little_memory_is_not_printed_as_none(size, text):
    assert _gigabytes(size) == text

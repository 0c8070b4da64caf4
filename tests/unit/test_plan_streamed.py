"""The plan of a streamed run against what the run reads and takes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from abft_fast.errors import UserError
from abft_fast.memory.streamed import PromptTokens, Speeds, Stored, plan_streamed
from abft_fast.memory.types import Arithmetic
from abft_fast.models.shapes import known_shape
from abft_fast.models.synthetic import skeleton
from abft_fast.options import TrainConfig
from abft_fast.options.resolve import resolve
from abft_fast.streaming.model import weights_to_read
from tests.tiny_models import tiny_config

pytestmark = [pytest.mark.unit, pytest.mark.slow]
ROOT = Path(__file__).parents[2]

CPU = Arithmetic("cpu", mixed=False)
PROMPTS = PromptTokens(longest=60, steps=5000, tests=3000, batch=900, turn=1000, turns=10)


def planned(shape, arithmetic=CPU, limit=10**9, pipeline_size=1, pipelines=1, **options):
    config = resolve(TrainConfig, {"stream": True, "gradient": "local", **options})
    bits = config.bits if config.quantized else None
    model = skeleton(shape, arithmetic.dtype, bits)
    wanted = weights_to_read(model, {1, 2, 3}, {3, 4})
    weights = [Stored(each, 2 * each.numbers, 2 * each.numbers) for each in wanted]
    return plan_streamed(
        shape, config, arithmetic, weights, PROMPTS, limit, pipeline_size, pipelines
    )


@pytest.mark.parametrize("is_tied", [False, True], ids=["own-head", "tied"])
def test_rows_of_the_embedding_and_the_head(is_tied):
    shape = tiny_config("llama", tie_word_embeddings=is_tied)
    read = list(weights_to_read(skeleton(shape, CPU.dtype, None), {1, 2, 3}, {3, 4}))
    rows = {each.name: each.rows for each in read if each.rows is not None}
    own = {"model.embed_tokens.weight": 3, "lm_head.weight": 2}
    assert rows == ({"model.embed_tokens.weight": 4} if is_tied else own)
    assert {each.layer for each in read} == {None, *range(shape.num_hidden_layers)}


def test_hidden_states_enter_and_leave():
    """A first block has none that enter, a last one none that leave."""
    for layers, copies in ((1, 0), (2, 1), (3, 2), (6, 2)):
        shape = tiny_config("llama", num_hidden_layers=layers)
        plan = planned(shape)
        assert plan.states == copies * 8000 * shape.hidden_size * 4
        assert plan.host_peak == plan.host_reading + plan.states
        on_disk = planned(shape, stream_states="disk")
        assert on_disk.states == plan.states and on_disk.host_peak == plan.host_reading


@pytest.mark.parametrize("size", [1, 2, 6])
def test_a_block_is_read_ahead_on_the_host_of_a_gpu(size):
    """In the model's dtype, also where it is quantized later; a single block has none ahead."""
    shape = tiny_config("llama", num_hidden_layers=6)
    gpu = Arithmetic("cuda", mixed=True)
    layer = skeleton(shape, CPU.dtype, None).model.layers[0]
    numbers = sum(p.numel() for p in layer.parameters())
    for quantized in (False, True):
        plan = planned(shape, gpu, gradient=size, quantized=quantized)
        assert plan.host_ahead == (0 if size == 6 else 2 * size * numbers)
        assert plan.host_peak == plan.host_reading + plan.host_ahead + plan.states
    assert planned(shape, gradient=size).host_ahead == 0


def test_a_larger_block_takes_more_and_reads_the_same():
    shape = tiny_config("llama", num_hidden_layers=6)
    one, three = planned(shape), planned(shape, gradient=3)
    name = "a block's frozen weights"
    assert three.device[name] == 3 * one.device[name]
    assert three.device["LoRA of all layers"] == one.device["LoRA of all layers"]
    assert (
        three.step.of_large_batches.a_token > one.step.of_large_batches.a_token
        and three.read == one.read
    )


def test_a_process_of_a_pipeline_holds_its_blocks():
    """Six blocks: of four processes two hold two."""
    shape = tiny_config("llama", num_hidden_layers=6)
    gpu = Arithmetic("cuda", mixed=True)
    one, four = (planned(shape, gpu, pipeline_size=count, limit=10**10) for count in (1, 4))
    weights = four.device["a process's 2 blocks' frozen weights"]
    assert weights == 2 * one.device["a block's frozen weights"]
    assert four.device["Adam's moments of 2 blocks"] == 2 * one.device["Adam's moments of a block"]
    turn = 1000 * shape.hidden_size * 2
    assert four.device["hidden states that enter and leave a block"] == 2 * turn
    assert four.host_peak == four.host_reading + 3 * turn
    weights = weights_to_read(skeleton(shape, CPU.dtype, None), {1, 2, 3}, {3, 4})
    outside = 2 * sum(each.numbers for each in weights if each.layer is None)
    assert four.read == one.read + 3 * outside  # which each process reads
    speeds = Speeds(1.0, 1.0, 1.0)
    copied = one.seconds(speeds)["copy"] + 3 * outside  # which each process copies
    assert four.seconds(speeds)["copy"] == pytest.approx(copied / 4)
    filled = one.seconds(speeds)["compute"] / 4 * 1.3  # three of ten turns to fill it
    assert four.seconds(speeds)["compute"] == pytest.approx(filled)
    with pytest.raises(UserError, match="7 processes for 6 blocks"):
        planned(shape, pipeline_size=7)
    twice = planned(shape, gpu, pipeline_size=4, pipelines=2, limit=10**10)
    assert (twice.processes, twice.device, twice.read) == (8, four.device, 2 * four.read)
    assert twice.seconds(speeds)["copy"] == four.seconds(speeds)["copy"]
    assert twice.seconds(speeds)["compute"] == four.seconds(speeds)["compute"] / 2


def test_operations_and_seconds():
    shape = tiny_config("llama", num_hidden_layers=4)
    model = skeleton(shape, CPU.dtype, None)
    matrices = sum(p.numel() for p in model.model.layers.parameters() if p.ndim > 1)
    plan = planned(shape)
    assert plan.operations == 2 * matrices * 8000  # a loss crosses no layer
    assert planned(shape, gradient=2).operations == 2 * matrices * (8000 + 5000 / 2)
    assert plan.copied == 0
    seconds = plan.seconds(Speeds(disk=plan.read / 3, bus=1.0, operations=None))
    assert seconds == {"read": pytest.approx(3)}
    gpu = planned(shape, Arithmetic("cuda", mixed=True))
    assert gpu.copied == gpu.read  # both are bfloat16
    assert gpu.seconds(Speeds(None, gpu.copied / 5, None)) == {"copy": pytest.approx(5)}


def test_a_batch_is_halved_until_it_fits_on_a_gpu():
    shape = tiny_config("llama", num_hidden_layers=4)
    gpu = Arithmetic("cuda", mixed=True)
    whole = planned(shape, gpu)
    assert whole.batch == 900 and whole.fits
    less = planned(shape, gpu, limit=int(whole.resident + whole.step.at(500)))
    assert less.batch == 450 and less.fits
    assert not planned(shape, gpu, limit=whole.resident).fits
    cpu = planned(shape)
    together = int(cpu.device_peak + cpu.host_peak)  # its device is its host
    assert planned(shape, limit=together + 1).fits and not planned(shape, limit=together - 1).fits


def test_llama_405b_has_the_parameters_of_its_name():
    shape = known_shape("llama3.1-405b")
    assert (shape.num_hidden_layers, shape.hidden_size, shape.intermediate_size) == (
        126, 16384, 53248,
    )  # fmt: skip
    assert (shape.num_attention_heads, shape.num_key_value_heads, shape.vocab_size) == (
        128, 8, 128256,
    )  # fmt: skip


REAL = """
import json, sys
from pathlib import Path
import torch
from abft_fast.commands.streamed.plan import plan_stream
from abft_fast.commands.streamed.run import StreamedTraining
from abft_fast.commands.train import prepare_data
from abft_fast.options import PlanConfig, TrainConfig
from abft_fast.options.resolve import resolve
from abft_fast.runtime.progress import Progress
from abft_fast.training.run_folder import RunFolder
from benchmarks.peak_memory import high_water_mark, reset_high_water_mark

torch.set_num_threads(1)
options, folder = json.loads(sys.argv[1]), Path(sys.argv[2])
plan, _, _ = plan_stream(resolve(PlanConfig, options), Progress())
config = resolve(TrainConfig, options)
session, prompts, tests = prepare_data(config, RunFolder(folder), Progress())
reset_high_water_mark("cpu")
before = high_water_mark("cpu")
run = StreamedTraining(session, RunFolder(folder), prompts, tests)
run.run()
rise = high_water_mark("cpu") - before
read = sum(run._streamed.weights.read_bytes.values())
print(json.dumps({"planned": plan.device_peak + plan.host_peak, "rise": rise,
                  "planned_read": plan.read, "read": read}))
"""


def measure(options, folder):
    """Plan a run and run it, in a process of its own."""
    run = subprocess.run(
        [sys.executable, "-c", REAL, json.dumps(options), str(folder)],
        cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout.splitlines()[-1])


NF4 = {
    "model": "synthetic:qwen2.5-1.5b:2", "quantized": True, "head_filter": False,
    "token_budget": 300, "k": 2,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the process's own high-water mark")
@pytest.mark.parametrize(
    "options",
    [{"train_samples": 64}, {**NF4, "mixed_precision": "bf16"}, NF4],
    ids=["float32", "NF4 in bfloat16", "NF4 in float32"],
)
def test_a_run_reads_and_takes_what_was_planned(options, tmp_path):
    """A large weight that is quantized is the peak of a small batch."""
    options = {
        "stream": True, "gradient": "local", "train_samples": 8, "epochs": 2, "no_save": True,
        "no_eval": True, "adaptation": "none", "device": "cpu", "no_report": True, **options,
    }  # fmt: skip
    found = measure(options, tmp_path / "run")
    if "model" not in options:  # a synthetic one has no files
        assert found["read"] == found["planned_read"]
    assert 1 / 1.25 <= found["planned"] / found["rise"] <= 1.25, found

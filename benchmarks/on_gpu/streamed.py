"""Layers of a 70B and of the 405B model, streamed under a cap: planned memory and speed."""

from __future__ import annotations

import tempfile
import time
from functools import partial
from pathlib import Path

from benchmarks.on_gpu.phase import Phase
from benchmarks.record import GPU, SEED
from benchmarks.steps import random_prompts

STEPS = 2


def run(phase: Phase) -> None:
    from benchmarks.capped import Capped

    cases = [
        Capped("llama3-70b", 64, 150, layers=8, bits=4, cap_gb=8),
        Capped("llama3.1-405b", 32, 150, layers=4, bits=4, cap_gb=24),
    ]
    for case in cases if GPU else [Capped("5x128", 4, 30, bits=4)]:
        phase.attempt(str(case), partial(measure, phase, case))


def measure(phase, case) -> None:
    """Walk through the layers once; weights are drawn when a layer comes."""
    from abft_fast.options import TrainConfig
    from abft_fast.options.resolve import resolve
    from benchmarks.capped import limit_memory

    options = {
        "stream": True, "gradient": "local", "quantized": True, "head_filter": False, "k": case.k,
        "adaptation": "none", "epochs": STEPS, "pseudo_batch_size": case.prompts, "no_save": True,
    }  # fmt: skip
    config = resolve(TrainConfig, options)
    prompts = list(random_prompts(case))
    plan = planned(case, config, prompts)
    limit_memory(case.cap_gb)
    try:
        seconds, in_steps, peak = walked(case, config, prompts)
    finally:
        limit_memory(0)
    layers = case.config.num_hidden_layers
    a_second = STEPS * case.prompts * case.length * layers / seconds
    phase.row({
        "shape": case.model, "layers": layers, "bits": case.bits, "cap_gb": case.cap_gb,
        "prompts": case.prompts, "n": case.length, "steps": STEPS, "tokens_at_once": plan.batch,
        "device_planned": int(plan.device_peak), "device_measured": peak,
        "seconds": round(seconds, 3), "seconds_of_steps": round(in_steps, 3),
        "layer_tokens_a_second": round(a_second),
    })  # fmt: skip
    words = f"{a_second:.0f} tokens through a layer a second, {in_steps / seconds:.0%} of the "
    words += f"time in steps, {peak / 1e9:.2f} GB"
    goal = f"at most the {plan.device_peak / 1e9:.2f} GB planned"
    phase.say(str(case), words, goal, peak <= plan.device_peak)


def planned(case, config, prompts):
    """The plan of `abft-fast plan --stream` for these prompts."""
    from abft_fast.memory.plan import GPU_RESERVE
    from abft_fast.memory.streamed import PromptTokens, Stored, plan_streamed
    from abft_fast.models.synthetic import skeleton
    from abft_fast.runtime.token_budget import tokens_at_once
    from abft_fast.streaming.model import weights_to_read
    from benchmarks.capped import ARITHMETIC

    used = {token for prompt in prompts for token in prompt.input_ids}
    model = skeleton(case.config, ARITHMETIC.dtype, case.bits)
    item = ARITHMETIC.dtype.itemsize
    wanted = weights_to_read(model, used, set())
    weights = [Stored(each, *[item * each.numbers] * 2) for each in wanted]
    tokens = case.prompts * case.length
    batch = min(tokens, tokens_at_once(config.token_budget, ARITHMETIC.device_type))
    data = PromptTokens(case.length, STEPS * tokens, tests=0, batch=batch, turn=tokens, turns=STEPS)
    limit = int(case.cap_gb * 1e9) - GPU_RESERVE if case.cap_gb else 10**12
    return plan_streamed(case.config, config, ARITHMETIC, weights, data, limit)


def walked(case, config, prompts) -> tuple[float, float, int]:
    """Seconds of the walk, seconds of them in steps, and most bytes."""
    import torch
    from accelerate import Accelerator

    from abft_fast.models.shapes import SYNTHETIC
    from abft_fast.runtime.environment import peak_memory
    from abft_fast.runtime.progress import Progress
    from abft_fast.streaming.model import StreamedModel
    from abft_fast.streaming.steps import TrainingSteps
    from abft_fast.streaming.walk import Walk
    from abft_fast.training.loop import Training
    from abft_fast.training.run_folder import RunFolder
    from benchmarks.capped import ARITHMETIC

    torch.manual_seed(SEED)
    device, dtype = torch.device("cuda" if GPU else "cpu"), ARITHMETIC.dtype
    streamed = StreamedModel(SYNTHETIC + case.model, case.config, device, dtype, case.bits)
    accelerator = Accelerator(cpu=not GPU, mixed_precision="bf16" if GPU else "no")
    with tempfile.TemporaryDirectory() as folder:
        run, progress = RunFolder(Path(folder)), Progress()
        training = Training(config, run, streamed.model, prompts, accelerator, progress)
        steps = TrainingSteps(streamed, training)
        walk = Walk(streamed, [steps], size=1)
        walk.read_outside([])
        streamed.set_trained("lora", config.lora_r)
        training.model = streamed.model
        if GPU:
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        walk.run(progress, "streamed")
        seconds = time.perf_counter() - started
    return seconds, sum(row["seconds"] for row in steps.metrics()), peak_memory(device)

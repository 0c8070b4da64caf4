"""Plan a streamed run, which holds one block of layers at a time."""

from __future__ import annotations

import math

from transformers import PreTrainedConfig

from abft_fast.commands.data_report import show_data
from abft_fast.commands.evaluate import evaluation_sets
from abft_fast.commands.plan import (
    machine_of,
    note_on_limit,
    notes_on_data,
    shape_of,
    training_data,
)
from abft_fast.errors import UserError
from abft_fast.memory.simulation import CannotCount
from abft_fast.memory.streamed import PromptTokens, Speeds, Stored, StreamedPlan, plan_streamed
from abft_fast.memory.types import Arithmetic
from abft_fast.models import loading
from abft_fast.models.synthetic import skeleton
from abft_fast.options import PlanConfig
from abft_fast.runtime.progress import Progress
from abft_fast.runtime.token_budget import tokens_at_once
from abft_fast.streaming.model import weights_to_read
from abft_fast.streaming.pipeline import size_of_pipelines
from abft_fast.streaming.weights import StoredWeights, check_stored_format
from abft_fast.training.loop import pseudo_batches

_STORED_BYTES = 2  # of a number of a known shape, which has no files: bfloat16


def plan_stream(config: PlanConfig, progress: Progress) -> tuple[StreamedPlan, Speeds, list[str]]:
    """Plan the run that `train --stream` would start with these options; read no weights.

    Returns:
        The plan, the machine's speeds by the options, and notes on the plan.

    Raises:
        UserError: an option, the data or the model does not allow the run, or its memory cannot be
            counted from its config.
    """
    pipeline_size = size_of_pipelines(config.pipeline_size, config.processes)
    pipelines = config.processes // pipeline_size
    shape, is_known, config = shape_of(config)
    prompts, dataset, encoder = training_data(config, shape, is_known)
    show_data(progress, dataset, encoder, [len(prompt) for prompt in prompts])
    tests = list(evaluation_sets(config, dataset, encoder)) if config.sides else []
    tested = [each.prompts for test in tests for each in test.encoded]
    everything = [*prompts, *(prompt for part in tested for prompt in part)]
    steps = [sum(len(prompts[i]) for i in batch) for batch in pseudo_batches(len(prompts), config)]
    sums = [sum(map(len, part)) for part in tested]
    arithmetic, limit = machine_of(config)
    if arithmetic.device_type == "cpu":
        limit //= config.processes  # they share the memory
    batch = min(tokens_at_once(config.token_budget, arithmetic.device_type), max(steps + sums))
    tested_tokens = len(config.sides) * sum(sums)
    data = PromptTokens(
        longest=max(map(len, everything)),
        steps=sum(steps),
        tests=tested_tokens,
        batch=batch,
        turn=max(math.ceil(max(steps) / pipelines), batch),
        turns=len(steps) + math.ceil(tested_tokens / (batch * pipelines)),
    )
    tokens = {token for prompt in everything for token in prompt.input_ids}
    label_ids = {token for test in tests for token in test.label_ids}
    try:
        weights = _weights(config, shape, arithmetic, is_known, tokens, label_ids)
        planned = plan_streamed(
            shape, config, arithmetic, weights, data, limit, pipeline_size, pipelines
        )
    except CannotCount as error:
        raise UserError(
            f"model {config.model}: {error}; `train --stream` counts nothing"
        ) from error
    speeds = Speeds(
        *(
            None if given is None else given * unit
            for given, unit in (
                (config.disk_bandwidth, 1e9),
                (config.bus_bandwidth, 1e9),
                (config.operations, 1e12),
            )
        )
    )
    fixes = ["a larger GPU", *(["more processes"] if config.pipeline else []), "a smaller --k"]
    verdict = "fits" if planned.fits else f"does not fit: use {' or '.join(fixes)}"
    how = "" if pipelines == 1 else f" in {pipelines} pipelines"
    pipeline = f" --pipeline, {config.processes} processes{how}" if config.pipeline else ""
    notes = [
        *notes_on_data(config, dataset, prompts, is_known),
        note_on_limit(arithmetic, limit),
        *(["stored weights are counted as bfloat16, as there are no files"] if is_known else []),
        f"--stream --gradient {config.gradient}{pipeline}: {verdict}",
        *([] if is_known else loading.left_out(config.model)),
        *config.without_effect,
    ]
    return planned, speeds, notes


def _weights(
    config: PlanConfig,
    shape: PreTrainedConfig,
    arithmetic: Arithmetic,
    is_known: bool,
    tokens: set[int],
    label_ids: set[int],
) -> list[Stored]:
    """Return what the walk reads."""
    if not is_known:
        check_stored_format(config.model, shape)
    model = skeleton(shape, arithmetic.dtype, config.bits if config.quantized else None)
    wanted = list(weights_to_read(model, tokens, label_ids))
    if is_known:
        return [Stored(each, *[_STORED_BYTES * each.numbers] * 2) for each in wanted]
    files = StoredWeights(config.model, shape, model)
    weights = []
    for each in wanted:
        in_file = files.stored_bytes(each.name, each.rows)
        weights.append(Stored(each, in_file, files.bytes_as_read(each.name, each.numbers, in_file)))
    return weights

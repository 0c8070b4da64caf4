"""Kernels compile for every GPU without one, and changing sizes compile nothing new."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
pytestmark = pytest.mark.unit
KERNELS_FOLDER = Path(__file__).parents[2] / "kernels"


def run_compiled(*arguments):
    """A process of its own: this one's kernels are interpreted."""
    environment = {n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (KERNELS_FOLDER, KERNELS_FOLDER.parent)))
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_representative_variants_compile_for_every_target_without_spills():
    run = run_compiled(KERNELS_FOLDER / "compile_report.py", "--quick")
    assert run.returncode == 0, run.stderr
    for target in ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "gfx90a", "gfx942"):
        assert target in run.stdout
    for kernel in ("scan_keys", "label_loss", "gradient", "sum_parts"):
        assert f"| {kernel} | bfloat16 | 128 |" in run.stdout
    assert "spills" not in run.stdout.split("| kernel |")[1]


COUNT_COMPILATIONS = """
import torch
from compile_report import PROCESSORS, recorded_launches
from abft_kernels.loss import _backward_op, _forward_op
from tests.last_row_cases import make_case

def launch(lengths, labels, **options):
    # The launchers' own results are never written here, so only what they launch matters.
    heads_first = options.pop("heads_first", False)
    case = make_case(lengths, labels, 7, 1, dtype=torch.bfloat16, head_dim=64, **options)
    if heads_first:
        for name in ("query", "key"):
            case[name] = case[name].transpose(0, 1).contiguous().transpose(0, 1)
    leaves = case["query"], case["key"], None
    indices = [case[n] for n in (
        "key_start", "key_end", "label_positions", "label_offsets", "label_is_correct")]
    factors = [torch.tensor(float(case[n])) for n in ("penalty", "reward")]
    tail = (0.125, None, case.get("window"))
    options = *tail, case.get("head_filter", True), "triton"
    loss, _, _, is_induction, peak, total, mean_weight, _ = _forward_op(
        *leaves, *indices, *factors, *options, True)
    for grad_loss in (loss, torch.ones(()).expand_as(loss)):
        _backward_op(grad_loss, *leaves[:2], *indices, is_induction, peak, total, mean_weight,
                     *factors, *options)

def count(*calls):
    def run():
        for lengths, labels, options in calls:
            launch(lengths, labels, **options)
    return len(recorded_launches(PROCESSORS["sm_90"].target, run))

first = ([300, 40], [4, 4], {})
others = [
    ([301, 40, 7], [5, 4, 1], {"penalty": 0.7}),
    ([1], [1], {"penalty": 0.0, "reward": 3.0}),
    ([16], [16], {"window": 16}),
    ([4000, 1, 1], [64, 0, 1], {"window": 1}),
    ([1] * 16, [0] * 16, {}),
    ([200] * 33, [3] * 33, {"head_filter": False}),
    ([301, 40], [5, 4], {"heads_first": True}),
]
print(count(first), count(first, *others))
"""


@pytest.mark.slow
def test_new_lengths_counts_penalties_filters_and_layouts_compile_nothing():
    run = run_compiled("-c", COUNT_COMPILATIONS)
    assert run.returncode == 0, run.stderr
    alone, together = map(int, run.stdout.split())
    assert alone == 4  # one of each kernel
    assert together == alone

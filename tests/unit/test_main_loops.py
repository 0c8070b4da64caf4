"""The machine code of the main loops: how keys are loaded, and how much work each tile takes.

Counts of compiled code, as no GPU is needed to compile. The goals (128-bit asynchronous copies, no
local memory, four programs a processor, 64 KiB in flight) are of kernels that wait for memory
alone. Where a kernel falls short, its test says what it has.
"""

import json

import pytest

from tests.unit.test_compilation import run_compiled

pytest.importorskip("triton")
pytestmark = [pytest.mark.unit, pytest.mark.slow]

TILE = 64 * 128 * 2  # bytes of 64 keys in bfloat16: 16 KiB
GRADIENT_TILE = TILE // 4
INSTRUCTIONS = 1800  # of all warps, for a tile
PROGRAMS = {"sm_80": 4, "sm_86": 2, "sm_89": 2, "sm_90": 4, "sm_100": 4}  # the goal is 4


@pytest.fixture(scope="module")
def loops():
    run = run_compiled("-m", "tests.main_loops", *PROGRAMS)
    assert run.returncode == 0, run.stderr
    found = [json.loads(line) for line in run.stdout.splitlines()]
    assert {loop["target"] for loop in found} == PROGRAMS.keys()
    return found


def of(loops, kernel):
    found = [loop for loop in loops if loop["kernel"] == kernel]
    assert {loop["target"] for loop in found} == PROGRAMS.keys()
    return found


def test_nothing_is_kept_in_local_memory(loops):
    for loop in loops:
        assert not loop["local"] and not loop["spilled"], loop


def test_the_scan_loads_keys_by_128_bit_asynchronous_copies_alone(loops):
    for loop in of(loops, "scan_keys"):
        assert not loop["loads"], loop
        assert loop["copies"] and all(".128" in name for name in loop["copies"]), loop
        assert len(loop["copies"]) * loop["warps"] * 32 * 16 == TILE, loop


def test_the_scan_keeps_64_kib_in_flight(loops):
    """While a tile is multiplied, those of the other stages are on their way."""
    for loop in of(loops, "scan_keys"):
        assert loop["programs"] >= PROGRAMS[loop["target"]], loop
        assert loop["programs"] * (loop["stages"] - 1) * TILE >= 64 * 1024, loop


def test_instructions_of_the_scan_a_tile(loops):
    """All warps' instructions for 16 KiB of keys."""
    for loop in of(loops, "scan_keys"):
        assert loop["loop"] * loop["warps"] <= INSTRUCTIONS, loop


def test_the_backward_loads_keys_by_128_bit_asynchronous_copies_alone(loops):
    """The keys' old gradients are loaded as they are added to, and the new ones stored."""
    for loop in of(loops, "gradient"):
        assert all(".128" in name for name in loop["copies"]), loop
        assert len(loop["copies"]) * loop["warps"] * 32 * 16 == GRADIENT_TILE, loop
        assert len(loop["loads"]) == len(loop["stores"]) == len(loop["copies"]), loop
        assert all(".128" in name for name in loop["loads"] + loop["stores"]), loop


def test_the_backward_keeps_60_kib_of_keys_in_flight(loops):
    for loop in of(loops, "gradient"):
        assert loop["programs"] >= 3, loop
        assert loop["programs"] * (loop["stages"] - 1) * GRADIENT_TILE >= 60 * 1024, loop


def test_instructions_of_the_backward_a_tile(loops):
    for loop in of(loops, "gradient"):
        assert loop["loop"] * loop["warps"] <= INSTRUCTIONS, loop

"""Settings of every benchmark: one seed, nothing from the network, how often contenders take turns.

    pytest benchmarks/train_step.py -k 4096 --rounds 3

`make bench` and `make bench-gpu` run the shorter cases, those not marked `long`.
"""

import gc
import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("PYTHONWARNINGS", "ignore")

from pathlib import Path

import pytest
import torch

from benchmarks import record


def pytest_addoption(parser):
    parser.addoption("--rounds", type=int, help="turns of every contender; else each file's own")
    parser.addoption("--results", type=Path, help="folder of the rows; else benchmarks/results")


def pytest_configure(config):
    record.RESULTS = config.getoption("--results") or record.RESULTS


@pytest.fixture
def rounds(request):
    """A function from a benchmark's own number of rounds to that of the command line, if any."""
    return lambda own: request.config.getoption("--rounds") or own


@pytest.fixture(autouse=True)
def same_start():
    """The same random numbers, nothing compiled for other shapes, and all of a GPU's memory."""
    for name in ("last_type", "last_value", "last_traceback", "last_exc"):
        vars(sys).pop(name, None)  # a failed benchmark's traceback would keep its model
    gc.collect()
    if record.GPU:
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(1.0)
    torch.manual_seed(record.SEED)
    torch.compiler.reset()

"""Settings of every benchmark: one seed, nothing from the network, how often contenders take turns.

    pytest benchmarks/train_step.py -k 4096 --rounds 3

`make bench` and `make bench-gpu` run them all but those marked `long`.
"""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("PYTHONWARNINGS", "ignore")

import pytest
import torch
from record import SEED


def pytest_addoption(parser):
    parser.addoption("--rounds", type=int, help="turns of every contender; else each file's own")


@pytest.fixture
def rounds(request):
    """A function from a benchmark's own number of rounds to that of the command line, if any."""
    return lambda own: request.config.getoption("--rounds") or own


@pytest.fixture(autouse=True)
def same_start():
    """The same random numbers, and nothing compiled for another benchmark's shapes."""
    torch.manual_seed(SEED)
    torch.compiler.reset()

"""Settings of every test: one seed, nothing from the network, kernels interpreted without a GPU."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic mode asks for

import pytest
import torch

if not torch.cuda.is_available():  # read when kernels are defined
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(config, items):
    """Mark `kernels` tests `gpu` where there is a GPU; without one, skip the `gpu` tests.

    `fuzz` tests run only where they are asked for.
    """
    for item in items:
        if item.get_closest_marker("fuzz") and "fuzz" not in config.getoption("markexpr"):
            item.add_marker(pytest.mark.skip(reason="takes minutes: `make fuzz`"))
        if not torch.cuda.is_available():
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no GPU"))
        elif item.get_closest_marker("kernels"):
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)

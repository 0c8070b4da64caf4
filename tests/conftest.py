"""Settings of every test: one seed, nothing from the network, kernels interpreted without a GPU."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic mode asks for

import pytest
import torch

if not torch.cuda.is_available():  # read when kernels are defined
    os.environ.setdefault("TRITON_INTERPRET", "1")


_RUN_ON_THE_GPU = (
    "test_triton_kernels",
    "test_fused",
    "test_kernel_launches",
    "test_last_row_loss",
    "test_prefix_attention",
    "test_torch_library",
)


def pytest_collection_modifyitems(items):
    """With a GPU, what runs on it is marked so; without one, what needs it is skipped."""
    for item in items:
        if not torch.cuda.is_available():
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no GPU"))
        elif item.module.__name__.rpartition(".")[2] in _RUN_ON_THE_GPU:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)

"""Variables of launchers, as shells and clusters leave them."""

import os

import pytest

from abft_fast.errors import UserError
from abft_fast.runtime import launch

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("value", ["", " "])
def test_an_empty_variable_is_not_set(value, monkeypatch):
    names = (
        "WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS",
        "OMPI_COMM_WORLD_SIZE", "ACCELERATE_USE_CPU", "TORCHINDUCTOR_MIN_NUM_SPLIT",
    )  # fmt: skip
    for name in (*names, "CUDA_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, value)
    launch.check_environment()
    assert not set(names) & set(os.environ)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == value  # this one means no GPU
    assert launch.process_count() == launch.local_process_count() == 1
    assert launch.is_main()


@pytest.mark.parametrize("name", ["WORLD_SIZE", "RANK", "MASTER_PORT", "PMI_RANK"])
def test_a_variable_that_is_no_number_is_named(name, monkeypatch):
    monkeypatch.setenv(name, "two")
    with pytest.raises(UserError, match=f"environment variable {name} is 'two', not a number"):
        launch.check_environment()
    assert launch.is_main()  # so that the line is printed


def test_numbers_stay(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    launch.check_environment()
    assert (launch.process_count(), launch.rank()) == (2, 1)

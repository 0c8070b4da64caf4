"""Variables of launchers, as shells and clusters leave them."""

import os
import signal

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


def test_a_handler_that_is_set_inside_stays():
    """A process that leaves a broken run must not die of the launcher's signal before its line."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}

    def of_a_broken_run(*_):
        pass

    try:
        with launch.signals_as_interrupt():
            signal.signal(signal.SIGTERM, of_a_broken_run)
            assert signal.getsignal(signal.SIGHUP) is not before[signal.SIGHUP]
        assert signal.getsignal(signal.SIGTERM) is of_a_broken_run
        assert signal.getsignal(signal.SIGHUP) is before[signal.SIGHUP]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

"""Launches that cannot work are refused before anything starts; one process needs nobody."""

import pytest
import torch

from abft_fast.errors import UserError
from abft_fast.runtime import launch, processes

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("environment", "cpu", "message"),
    [
        ({"LOCAL_WORLD_SIZE": "99"}, False, "99 processes run on this machine, which has . GPUs"),
        ({"ACCELERATE_USE_FSDP": "true"}, True, "accelerate is set to FSDP: launch with"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, True, "accelerate is set to DEEPSPEED"),
    ],
    ids=["too many", "fsdp", "deepspeed"],
)
def test_launches_that_cannot_work(environment, cpu, message, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message), processes.running(cpu):
        pass


def test_one_process_is_the_main_one_and_waits_for_nobody(monkeypatch):
    monkeypatch.setenv("RANK", "3")  # without a WORLD_SIZE it means nothing
    assert launch.is_main() and processes.count() == 1
    assert processes.own_share([5, 9, 2]) == [0, 1, 2]
    assert processes.gather("mine") == ["mine"]
    weight = torch.nn.Parameter(torch.ones(2))
    processes.sum_gradients([weight])
    assert weight.grad is None
    with pytest.raises(ZeroDivisionError), processes.fail_together():
        raise ZeroDivisionError

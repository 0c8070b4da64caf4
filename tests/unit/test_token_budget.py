"""Budgets under memory that really runs out: the process's own address space, limited."""

import gc
import itertools
import subprocess
import sys
import weakref

import pytest

from abft_fast.errors import RunError
from abft_fast.runtime.batching import micro_batches
from abft_fast.runtime.token_budget import TokenBudget, find_token_budget, in_halves

pytestmark = [pytest.mark.unit, pytest.mark.slow]


def out_of_memory_above(tokens, lengths):
    """Work that fails as torch does where a batch has more tokens."""

    def run(batch):
        if sum(lengths[i] for i in batch) > tokens:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")

    return run


@pytest.mark.parametrize("fits", [130, 500, 999, 5000])
def test_the_largest_budget_is_found(fits):
    lengths = [10 + i % 90 for i in range(200)]
    found = find_token_budget(lengths, out_of_memory_above(fits, lengths), most=3000)
    assert found <= 3000
    batches = list(micro_batches(lengths, found))
    assert all(sum(lengths[i] for i in batch) <= fits for batch in batches)
    assert found >= min(3000, fits) / 1.25  # a tenth, and what a batch leaves free


def test_the_largest_budget_of_tiny_prompts_is_found():
    lengths = [3] * 9
    assert find_token_budget(lengths, out_of_memory_above(4, lengths), most=9) in (3, 4, 5)


def test_a_failed_attempt_leaves_nothing_behind():
    """The next attempt needs the memory, also that of tensors in a reference cycle."""
    left = []

    class Graph:
        pass

    def run(tokens):
        if tokens > 50:
            graph = Graph()
            graph.itself = graph
            left.append(weakref.ref(graph))
            raise RuntimeError("CUDA out of memory")
        return left[0]()

    gc.disable()
    try:
        assert TokenBudget(100, lambda line: None).attempt([40, 40], run, lambda: None) is None
        left.clear()
        assert in_halves(lambda items: run(40 * len(items)), [1, 1]) == [None, None]
    finally:
        gc.enable()


@pytest.mark.parametrize("lengths", [[100, 20], [100, 20, 20], [100, 5, 5]], ids=str)
@pytest.mark.parametrize("tokens", [10, 1000])
def test_what_never_fits_is_said(lengths, tokens):
    run = out_of_memory_above(50, lengths)
    with pytest.raises(RunError, match="one prompt of 100 tokens at a time: try --gradient local"):
        find_token_budget(lengths, run, most=1000)
    budget = TokenBudget(tokens, lambda line: None)
    with pytest.raises(RunError, match="one prompt of 100 tokens at a time"):
        budget.attempt(
            lengths, lambda tokens: [run(b) for b in micro_batches(lengths, tokens)], lambda: None
        )


def test_the_budget_only_falls():
    lengths = [40, 30, 20, 10] * 4
    run = out_of_memory_above(45, lengths)
    said, undone = [], []
    budget = TokenBudget(10**6, said.append)
    budget.attempt(
        lengths,
        lambda tokens: [run(batch) for batch in micro_batches(lengths, tokens)],
        lambda: undone.append(budget.tokens),
    )
    assert 40 <= budget.tokens <= 50 and len(said) == len(undone) > 1
    tried = [*undone, budget.tokens]
    assert all(later <= earlier / 2 for earlier, later in itertools.pairwise(tried))


def test_other_errors_pass():
    def broken(_):
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        TokenBudget(10, print).attempt([5], broken, lambda: None)
    with pytest.raises(RuntimeError, match="shapes"):
        find_token_budget([5], broken, most=10)


REAL = """
import resource, sys
import torch
from accelerate import Accelerator
from abft_fast.options import TrainConfig
from abft_fast.options.resolve import resolve
from abft_fast.models.trainable import add_lora, trained_parameters
from abft_fast.runtime.token_budget import TokenBudget
from abft_fast.training.loop import backward
from tests.tiny_models import tiny_model
from tests.unit.test_training import make_prompts

torch.set_num_threads(1)
model = add_lora(tiny_model("llama", intermediate_size=4096), 4).eval()
prompts, config = make_prompts(64), resolve(TrainConfig, {})
accelerator = Accelerator(cpu=True)

def gradient():
    return torch.cat([p.grad.flatten() for p in trained_parameters(model).values()])

def run(tokens):
    return backward(model, prompts, config, 0.5, accelerator, tokens)

run(200)  # libraries take what they need once
model.zero_grad()
expected_loss = run(200)[0]
expected = gradient()
model.zero_grad()

status = open("/proc/self/status").read()
size = int(status.split("VmSize:")[1].split()[0]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (size + 60 * 2**20, resource.RLIM_INFINITY))
said = []
budget = TokenBudget(10**6, said.append)
loss, _ = budget.attempt([len(p) for p in prompts], run, model.zero_grad)
assert budget.tokens < sum(map(len, prompts)) and said, (budget.tokens, said)
assert abs(loss - expected_loss) <= 1e-5 * expected_loss
assert (gradient() - expected).norm() <= 1e-5 * expected.norm()
print(said[0])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits its own address space")
def test_memory_that_runs_out_halves_the_batch_and_changes_nothing():
    run = subprocess.run([sys.executable, "-c", REAL], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    assert "out of memory with" in run.stdout and "tokens a batch: going on with" in run.stdout

"""`--objective share` in a model, in training, and in options."""

import pytest
import torch

from abft_fast import EncodedPrompt, attention_behavior_loss, pack
from abft_fast.errors import UserError
from abft_fast.models import loading, trainable
from abft_fast.options import TrainConfig
from abft_fast.options.resolve import resolve
from abft_fast.training import checkpoint
from abft_fast.training.loop import optimize
from abft_fast.training.methods import method_loss
from abft_fast.training.penalty import PenaltyController
from tests.streamed_runs import (
    Streamed,
    adapter_bytes,
    config_of,
    resident,
    same_figures,
    saved,
    training_of,
)
from tests.tiny_models import tiny_model

pytestmark = pytest.mark.unit
LABELS, CORRECT = [3, 8, 12, 17], [True, False, False, True]


def prompts():
    """Return two prompts with labels of both kinds, and one with wrong labels alone."""
    ids = torch.randint(3, 97, (3, 21), generator=torch.Generator().manual_seed(2)).tolist()
    both = [EncodedPrompt(row, LABELS, CORRECT) for row in ids[:2]]
    return [*both, EncodedPrompt(ids[2], LABELS, [False] * 4)]


def by_matrices(model, hold):
    """Return the mean loss over prompts, from the attention matrices that the model shows."""
    total = 0.0
    for prompt in prompts()[:2]:  # the third has no loss
        ids = torch.tensor([prompt.input_ids])
        for matrix in model(ids, output_attentions=True).attentions:
            alpha = matrix[0, :, -1, LABELS]
            mass, correct = alpha.sum(-1), alpha[:, CORRECT].sum(-1)
            total = total + (1 - correct / mass + hold * mass.log()).sum()
    return total / 3


@pytest.mark.parametrize("hold", [0.0, 0.4, torch.tensor(-0.4)], ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_models_loss_is_that_of_its_attention_matrices(family, hold):
    model = tiny_model(family).double().eval()
    model.set_attn_implementation("eager")
    expected = by_matrices(model, hold)
    parameters = [p for p in model.parameters() if p.requires_grad]
    exact = torch.autograd.grad(expected, parameters, allow_unused=True)
    found = attention_behavior_loss(
        model, pack(prompts()), head_filter=False, objective="share", hold=hold
    ).loss
    grads = torch.autograd.grad(found, parameters, allow_unused=True)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)
    assert any(grad is not None and grad.any() for grad in grads)
    for one, other in zip(grads, exact, strict=True):
        if one is None or other is None:
            assert all(grad is None or grad.abs().max() < 1e-12 for grad in (one, other))
        else:
            # The matrices are rounded to float32.
            assert (one - other).norm() <= 1e-5 * other.norm() + 1e-9


def test_a_hold_without_share_is_refused():
    with pytest.raises(ValueError, match="hold works with objective='share' only"):
        attention_behavior_loss(tiny_model("llama"), pack(prompts()), hold=0.1)


def test_the_hold_follows_the_heads_since_step_1():
    controller = PenaltyController.from_options(
        resolve(TrainConfig, {"objective": "share", "hold": 0.2})
    )
    factors = [controller.penalty]
    for heads in (4.0, 8.0, 4.0, 1.0, 0.0):
        controller.update(heads)
        factors.append(controller.penalty)
    assert factors == pytest.approx([0, 0, 0.2, 0, -0.15, -0.2])
    never = PenaltyController("hold", 0.0, 0.2, 0, 0)
    for heads in (0.0, 3.0):  # a block without a head at step 1 has nothing to hold
        never.update(heads)
        assert never.penalty == 0


def test_the_methods_loss_has_the_hold():
    model = tiny_model("llama").eval()
    options = {"objective": "share", "head_filter": False, "penalty": 0.25}
    config = resolve(TrainConfig, options)
    packed = pack(prompts())
    found = method_loss(model, prompts(), packed, config, -0.3).loss
    expected = attention_behavior_loss(
        model, packed, head_filter=False, objective="share", hold=-0.3
    ).loss
    assert found.item() == expected.item()
    without = attention_behavior_loss(model, packed, head_filter=False, objective="share").loss
    assert abs(found.item() - without.item()) > 1e-3


@pytest.mark.slow
def test_streamed_in_one_block_is_an_ordinary_run(tmp_path):
    share = {"objective": "share", "hold": 3.0, "gradient": 4, "epochs": 4}
    config = config_of(saved("llama", tmp_path), **share)
    ordinary = resident(config, tmp_path / "ordinary")
    assert len({row["penalty"] for row in ordinary[0]}) > 2
    streamed = Streamed(config, tmp_path / "streamed").run()
    assert adapter_bytes(tmp_path / "streamed") == adapter_bytes(tmp_path / "ordinary")
    same_figures(streamed, ordinary)
    rows, *_ = resident(config_of(config.model, gradient=4, epochs=4), tmp_path / "mass")
    assert rows[0]["loss"] != ordinary[0][0]["loss"]


def test_a_run_goes_on_with_its_hold(tmp_path):
    """A run whose newest checkpoints are gone takes the same steps again, to the bit."""
    config = config_of(
        saved("llama", tmp_path), objective="share", hold=3.0, epochs=4, trainable="full"
    )
    folder = tmp_path / "run"

    def train():
        training = training_of(config, _trained(config.model), folder)
        optimize(training)
        drop = {"seconds", "tokens_per_second", "peak_memory_bytes"}
        return [{n: x for n, x in row.items() if n not in drop} for row in training.run.metrics()]

    whole = train()
    newest = checkpoint._complete(folder / "checkpoints")[-1]
    for file in newest.iterdir():
        file.unlink()
    newest.rmdir()
    assert len({row["penalty"] for row in whole}) > 2
    assert train() == whole


def _trained(path):
    model = loading.load(path, torch.device("cpu"), torch.float32, None)
    return trainable.set_trained(model, "full", 4)


def test_options_that_share_does_not_use():
    config = resolve(TrainConfig, {"objective": "share"})
    assert config.adaptation == "none" and not config.without_effect
    with pytest.raises(UserError, match="--objective share has none: leave --adaptation out"):
        resolve(TrainConfig, {"objective": "share", "adaptation": "pid"})
    for options, line in (
        ({"objective": "share", "reward": 2.0}, "--reward does nothing here: it works with --obj"),
        ({"hold": 0.5}, "--hold does nothing here: it works with --objective share"),
        ({"objective": "share", "method": "E2E"}, "--objective does nothing here: it works with"),
        ({"objective": "share", "pid_i": 0.1}, "--pid-i does nothing here"),
    ):
        (found,) = resolve(TrainConfig, options).without_effect
        assert found.startswith(line)
    with pytest.raises(UserError, match="objective"):
        resolve(TrainConfig, {"objective": "shares"})

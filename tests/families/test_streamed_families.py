"""Block by block, training and tests are those of the whole model, in every family that packs."""

import pytest
import torch
from accelerate import Accelerator

from abft_fast.core.shared_prefix import SharedPrefix
from abft_fast.models import loading
from abft_fast.runtime.batching import micro_batches
from abft_fast.runtime.float32_linear import fast_float32_linear
from abft_fast.runtime.progress import Progress
from abft_fast.streaming.labelling import Labelling
from abft_fast.streaming.model import StreamedModel
from abft_fast.streaming.walk import Walk
from tests.families.test_shared_prefix import LABELS, random_ids
from tests.streamed_runs import Streamed, adapter_bytes, config_of, resident, same_figures, saved
from tests.tiny_models import FAMILIES

pytestmark = pytest.mark.families


@pytest.mark.parametrize(("kind", "gradient"), [("lora", "local"), ("full", 2)])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_walk_is_an_ordinary_run(family, kind, gradient, tmp_path):
    model = saved(family, tmp_path)
    config = config_of(model, gradient=gradient, trainable=kind, adaptation="none")
    ordinary = resident(config, tmp_path / "ordinary")
    streamed = Streamed(config, tmp_path / "streamed").run()
    assert adapter_bytes(tmp_path / "streamed") == adapter_bytes(tmp_path / "ordinary")
    same_figures(streamed, ordinary)
    assert not torch.equal(ordinary[1], ordinary[2])


def logits_of_labelling(model, prompts, prefix, tokens):
    labelling = Labelling(
        model, Accelerator(cpu=True), prompts, prefix, LABELS, tokens, "auto", check=True
    )
    walk = Walk(model, [labelling], 1)
    if model.embedded:
        walk.read_embedding()
    else:
        walk.read_outside(LABELS)
    walk.run(Progress(), "labelling")
    return labelling.logits


@pytest.mark.parametrize(
    "family",
    [
        f if f in ("llama", "gemma3_text") else pytest.param(f, marks=pytest.mark.slow)
        for f in FAMILIES
    ],
)
def test_labels_after_a_prefix_are_those_of_the_whole_model(family, tmp_path):
    """Twice with one model, whose second prompts have other tokens than the first ones."""
    path = saved(family, tmp_path)
    whole = loading.load(path, torch.device("cpu"), torch.float32)
    shape = loading.read_config(path)
    streamed = StreamedModel(path, shape, torch.device("cpu"), torch.float32, None)
    for length, lengths in ((29, (11, 1, 17, 8, 30)), (0, (9, 4))):
        prefix = random_ids(length)[0]
        own = random_ids(*lengths)
        prompts = [prefix + ids for ids in own]
        shared, expected = SharedPrefix(whole, prefix), torch.empty(len(own), len(LABELS))
        with fast_float32_linear():
            for batch in micro_batches(lengths, 40):
                expected[batch] = shared.label_logits([prompts[i] for i in batch], LABELS)
        found = logits_of_labelling(streamed, prompts, prefix, 40)
        assert torch.equal(found, expected), (found - expected).abs().max()

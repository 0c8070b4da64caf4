"""Block by block, training and tests are those of the whole model, in every family that packs."""

import pytest
import torch

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

"""The plane's corners are the base and the two solutions; a barrier is measured from the line."""

import pytest
import torch

from abft_fast.analysis.last_row import run_prompt
from abft_fast.analysis.pair import moved
from abft_fast.analysis.plane import Score, barrier, combined, path_points, ray_points
from abft_fast.options import PlaneConfig
from abft_fast.options.resolve import resolve
from tests.tiny_models import tiny_model
from tests.unit.test_analysis_cmap import LABELS, prompts

pytestmark = pytest.mark.unit


def test_corners_are_the_models():
    base, e, a = (tiny_model("llama", seed=seed) for seed in range(3))
    weights = dict(base.named_parameters())
    changes = [
        {name: p.detach() - weights[name].detach() for name, p in model.named_parameters()}
        for model in (e, a)
    ]
    (prompt,) = prompts(12).prompts
    own = run_prompt(base, prompt, LABELS).logits
    for point, model in (((1, 0), e), ((0, 1), a)):
        with moved(base, combined(point, *changes)):
            logits = run_prompt(base, prompt, LABELS).logits
        torch.testing.assert_close(logits, run_prompt(model, prompt, LABELS).logits)
    assert combined((0, 0), *changes) == {}
    assert torch.equal(run_prompt(base, prompt, LABELS).logits, own)
    name = "model.layers.0.self_attn.q_proj.weight"
    half = combined((0.5, -2), *changes)[name]
    torch.testing.assert_close(half, 0.5 * changes[0][name] - 2 * changes[1][name])


def test_solutions_may_change_other_weights():
    one, two = {"q": torch.ones(2)}, {"k": torch.ones(2)}
    total = combined((2, 3), one, two)
    assert {name: change.tolist() for name, change in total.items()} == {"q": [2, 2], "k": [3, 3]}


def test_points():
    assert path_points(3) == [(1, 0), (0.5, 0.5), (0, 1)]
    assert ray_points(5) == [(0, 0), (0, 0.5), (0, 1), (0, 1.5), (0, 2)]
    config = resolve(PlaneConfig, {"a": ".", "e": "..", "grid": "-0.5:1.5:5"})
    assert config.coefficients == [-0.5, 0, 0.5, 1, 1.5]


def test_a_barrier():
    path = [Score(0.8, 0.4), Score(0.5, 0.9), Score(0.6, 0.2)]
    assert barrier(path) == pytest.approx((0.2, 0.6))  # the line is at 0.7 and 0.3
    assert barrier([Score(0.5, 1.0), Score(0.9, 0.1), Score(0.7, 0.5)]) == pytest.approx((0, 0))


def test_what_a_run_trained_is_found(tmp_path):
    for name in ("run/adapter", "whole/model", "adapter"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("run/adapter", "adapter"):
        (tmp_path / name / "adapter_config.json").write_text("{}")
    found = resolve(PlaneConfig, {"a": str(tmp_path / "run"), "e": str(tmp_path / "whole")})
    assert found.adapter_folders == [tmp_path / "run/adapter"]
    assert found.other_models == [str(tmp_path / "whole/model")]
    direct = resolve(PlaneConfig, {"a": str(tmp_path / "adapter"), "e": str(tmp_path / "run")})
    assert direct.adapter_folders == [tmp_path / "adapter", tmp_path / "run/adapter"]

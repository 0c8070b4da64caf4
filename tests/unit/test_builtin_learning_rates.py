"""The built-in model's learning rates are those its study found, by the rule of the decisions."""

import pytest

from abft_fast.builtin import BUILTIN_LEARNING_RATES
from tests.study_rows import rows_of

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("trainable", ["lora", "full"])
def test_they_are_the_highest_that_keep_the_heads(trainable):
    """No gradient, in no seed, loses a tenth of the heads that the lowest rate leaves."""
    heads, runs = {}, {}
    for row in rows_of("builtin_learning_rates"):
        if row["method"] == "ABFT" and row["trainable"] == trainable:
            heads.setdefault(float(row["lr"]), []).append(float(row["induction_heads"]))
            runs.setdefault(float(row["lr"]), set()).add((row["gradient"], row["seed"]))
    before = min(heads[min(heads)])
    keep = [rate for rate, found in heads.items() if min(found) > 0.9 * before]
    rate = BUILTIN_LEARNING_RATES[trainable]
    assert rate == max(keep) < max(heads)
    assert runs[rate] == {(g, s) for g in ("full", "local", "2") for s in ("0", "1")}

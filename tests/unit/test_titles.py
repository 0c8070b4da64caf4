"""Titles and texts of metrics: the terminal and the report show the same."""

import pytest

from abft_fast.evaluation.titles import rows_of

pytestmark = pytest.mark.unit


def test_shares_are_in_per_cent_and_have_their_intervals():
    found = rows_of(
        {
            "accuracy": 0.5, "accuracy_at_25_percent_wrong": 0.25, "accuracy_slope": -0.12345,
            "rotated": 0.4, "rotated_low": 0.3, "rotated_high": 0.51, "prior_rate": None,
            "prior_rate_low": None, "prior_rate_high": None, "induction_heads": 3.456,
            "correct_share_above_chance": 0.018, "label_mass": None,
        }
    )  # fmt: skip
    assert found == {
        "accuracy (%)": "50.0",
        "accuracy (%), 25 % wrong labels": "25.0",
        "accuracy slope": "-0.1235",
        "accuracy, label words rotated (%)": "40.0 (30.0 to 51.0)",
        "known queries answered by own labels though rotated (%)": "-",
        "induction heads a prompt": "3.46",
        "label mass on correct labels, above chance (%)": "+1.8",
        "label mass, mean of all heads (%)": "-",
    }

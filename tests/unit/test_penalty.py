import pytest

from abft_fast.training.penalty import PenaltyController

pytestmark = pytest.mark.unit

PAPER = (0.03, 0.005, 0.005)
HEADS = [10.0, 12.0, 11.0, 15.0, 9.0, 9.5]


def by_equation(heads, p, i, d):
    """Equation 3 of the paper (A.3), written as it stands; step t is heads[t - 1]."""
    penalty = 0.5
    for t in range(3, len(heads) + 1):
        n = {j: heads[j - 1] for j in range(1, t + 1)}
        penalty += p * (n[t] - n[t - 1])
        penalty += i * sum(n[j] - n[j - 1] for j in range(2, t + 1))
        penalty += d * (n[t] - 2 * n[t - 1] + n[t - 2])
    return penalty


@pytest.mark.parametrize(
    ("kind", "factors"), [("pid", (0.03, 0.005, 0.005)), ("p", (0.03, 0, 0)), ("none", (0, 0, 0))]
)
def test_follows_the_papers_equation(kind, factors):
    controller = PenaltyController(kind, 0.5, *PAPER)
    for heads in HEADS:
        controller.update(heads)
    assert controller.penalty == pytest.approx(by_equation(HEADS, *factors))


def test_first_two_steps_leave_it_alone():
    controller = PenaltyController("pid", 0.5, *PAPER)
    controller.update(1.0)
    controller.update(100.0)
    assert controller.penalty == 0.5


def test_never_below_zero():
    controller = PenaltyController("pid", 0.5, *PAPER)
    for heads in (100.0, 100.0, 10.0):
        controller.update(heads)
    assert controller.penalty == 0.0

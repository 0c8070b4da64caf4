import pytest

from abft_fast.runtime import progress
from abft_fast.runtime.progress import Progress

pytestmark = pytest.mark.unit


class Clock:
    def __init__(self):
        self.now = 100.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_a_plain_line_says_the_rate_and_the_time_left(clock, tmp_path):
    reporter = Progress()
    reporter.keep(tmp_path / "run.log")
    with reporter.bar("evaluating", 8, tokens=1000) as advance:
        for tokens in (400, 200, 200, 200):  # the first batch holds the longest prompts
            clock.now += tokens / 5
            advance(2, tokens)
    assert (tmp_path / "run.log").read_text().splitlines() == [
        "evaluating: 2/8, 5 tokens/s, 0:02:00 left",
        "evaluating: 4/8, 5 tokens/s, 0:01:20 left",
        "evaluating: 6/8, 5 tokens/s, 0:00:40 left",
        "evaluating: 8/8, 5 tokens/s, 0:00:00 left",
    ]


def test_a_resumed_block_counts_its_own_tokens_only(clock, tmp_path):
    reporter = Progress()
    reporter.keep(tmp_path / "run.log")
    with reporter.bar("training", 4, tokens=6000, done=2) as advance:
        clock.now += 2
        advance(1, 3000, "loss 1.000")
    assert (tmp_path / "run.log").read_text() == (
        "training: 3/4, loss 1.000, 1,500 tokens/s, 0:00:02 left\n"
    )

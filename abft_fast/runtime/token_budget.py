"""Tokens a packed batch may have: found by trying, halved where memory runs out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from accelerate.utils.memory import should_reduce_batch_size

from abft_fast.core.packing import micro_batches
from abft_fast.errors import RunError

CPU_TOKENS = 8192  # a CPU's system ends a process rather than refuse it memory
S = TypeVar("S")
T = TypeVar("T")


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a device or the system refused memory, in whoever's words."""
    words = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return should_reduce_batch_size(error) or any(word in str(error) for word in words)


class TokenBudget:
    """How many tokens are packed at once; no result depends on it.

    Attributes:
        tokens: the budget now.
    """

    def __init__(self, tokens: int, say: Callable[[str], None]):
        self.tokens = tokens
        self._say = say

    def attempt(
        self, lengths: Sequence[int], run: Callable[[int], T], undo: Callable[[], None]
    ) -> T:
        """`run(tokens)`, and after running out of memory `undo()` and again with half of them.

        Args:
            lengths: tokens of each prompt `run` packs.
            run: what is to be done within a budget.
            undo: drops what an attempt left when it failed.

        Raises:
            RunError: memory does not even hold one prompt at a time.
        """
        while True:
            try:
                return run(self.tokens)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
            # Outside the handler: its traceback would keep the failed attempt's tensors.
            undo()
            _release()
            batches = list(micro_batches(lengths, self.tokens))
            if max(map(len, batches)) == 1:
                raise _not_one_fits(lengths)
            packed = max(sum(lengths[i] for i in batch) for batch in batches)
            self.tokens = max(min(packed, self.tokens) // 2, 1)
            self._say(f"out of memory with {packed} tokens a batch: going on with {self.tokens}")

    def lower(self, tokens: int) -> None:
        """Take the budget of another process where that one's is smaller."""
        if tokens < self.tokens:
            self.tokens = tokens
            self._say(f"out of memory on another process: going on with {tokens} tokens a batch")


def in_halves(run: Callable[[Sequence[S]], T], items: Sequence[S]) -> list[T]:
    """`run` of all items at once, or, out of memory, of halves of them, in order."""
    try:
        return [run(items)]
    except RuntimeError as error:
        if not is_out_of_memory(error) or len(items) == 1:
            raise
    half = len(items) // 2
    return [found for part in (items[:half], items[half:]) for found in in_halves(run, part)]


def find_token_budget(lengths: Sequence[int], run: Callable[[list[int]], None], most: int) -> int:
    """The largest budget that fits in memory, by doubling and then bisecting to a tenth.

    Args:
        lengths: tokens of each prompt.
        run: does the work of one packed batch, given indices into `lengths`, and forgets it; it
            gets the fullest batch a budget makes.
        most: tokens beyond which a larger budget is of no use.

    Raises:
        RunError: not even the longest prompt fits.
    """

    def fits(tokens: int) -> bool:
        try:
            run(max(micro_batches(lengths, tokens), key=lambda b: sum(lengths[i] for i in b)))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        else:
            return True
        _release()
        return False

    good = max(lengths)
    if not fits(good):
        raise _not_one_fits(lengths)
    bad = None
    while bad is None and good < most:
        tokens = min(2 * good, most)
        if fits(tokens):
            good = tokens
        else:
            bad = tokens
    while bad is not None and bad - good > max(good // 10, 1):
        middle = (good + bad) // 2
        if fits(middle):
            good = middle
        else:
            bad = middle
    return good


def _not_one_fits(lengths: Sequence[int]) -> RunError:
    return RunError(
        f"out of memory with one prompt of {max(lengths)} tokens at a time: try --gradient local "
        "or a number of layers, --checkpointing, --quantized, or fewer demonstrations (--k)"
    )


def _release() -> None:
    """Give cached memory back, so that the next attempt is not cut into its pieces."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

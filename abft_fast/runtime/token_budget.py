"""Choose how many tokens a packed batch may have: try it, and halve it when memory runs out."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from accelerate.utils.memory import should_reduce_batch_size

from abft_fast.errors import RunError
from abft_fast.runtime.batching import micro_batches

CPU_TOKENS = 2048
"""More make no step on a CPU faster: activations leave its caches, and memory grows."""

GPU_TOKENS = 8192
"""A GPU's packed batch where nothing is tried: in evaluations, and in blocks that are streamed."""
S = TypeVar("S")
T = TypeVar("T")


def tokens_at_once(asked: str | int, device_type: str) -> int:
    """Return the most tokens of a packed batch: the value of `--token-budget`, or the device's."""
    if isinstance(asked, int):
        return asked
    return CPU_TOKENS if device_type == "cpu" else GPU_TOKENS


def is_out_of_memory(error: Exception) -> bool:
    """Return whether an error of torch, CUDA or cuBLAS means that memory ran out."""
    words = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return should_reduce_batch_size(error) or any(word in str(error) for word in words)


class TokenBudget:
    """Hold how many tokens are packed at once; no result depends on this number.

    Attributes:
        tokens: the current budget. It only falls.
    """

    def __init__(self, tokens: int, say: Callable[[str], None]):
        self.tokens = self._first = tokens
        self._say = say

    @property
    def has_fallen(self) -> bool:
        """Return whether memory ran out since the start."""
        return self.tokens < self._first

    def attempt(
        self, lengths: Sequence[int], run: Callable[[int], T], undo: Callable[[], None]
    ) -> T:
        """Call `run(tokens)`; after each out-of-memory error, halve the tokens and call it again.

        Args:
            lengths: tokens of each prompt that `run` packs.
            run: does the work in batches of at most the given number of tokens.
            undo: discards the partial result of a failed attempt.

        Raises:
            RunError: memory does not hold even one prompt at a time.
        """
        while True:
            try:
                return run(self.tokens)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
            # This is outside the handler: its traceback would keep the failed attempt's tensors.
            undo()
            _release()
            batches = list(micro_batches(lengths, self.tokens))
            if max(map(len, batches)) == 1:
                raise _not_one_fits(lengths)
            packed = max(sum(lengths[i] for i in batch) for batch in batches)
            self.tokens = max(min(packed, self.tokens) // 2, 1)
            self._say(f"out of memory with {packed} tokens a batch: going on with {self.tokens}")

    def lower(self, tokens: int) -> None:
        """Adopt another process's budget if it is smaller."""
        if tokens < self.tokens:
            self.tokens = tokens
            self._say(f"out of memory on another process: going on with {tokens} tokens a batch")


def in_halves(run: Callable[[Sequence[S]], T], items: Sequence[S]) -> list[T]:
    """Call `run` on all items at once; when memory runs out, call it on each half instead."""
    try:
        return [run(items)]
    except RuntimeError as error:
        if not is_out_of_memory(error) or len(items) == 1:
            raise
    _release()
    half = len(items) // 2
    return [*in_halves(run, items[:half]), *in_halves(run, items[half:])]


def find_token_budget(lengths: Sequence[int], run: Callable[[list[int]], None], most: int) -> int:
    """Find the largest budget that fits in memory: double it, then bisect to within a tenth.

    Args:
        lengths: tokens of each prompt.
        run: computes one packed batch, given indices into `lengths`, and discards the result. It
            gets the fullest batch that a budget makes.
        most: the largest useful budget, in tokens.

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
    """Return cached memory to the device, so that the next attempt can allocate whole blocks."""
    gc.collect()  # a graph that failed halfway can be in a reference cycle
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

"""Split prompts by their token counts: into packed batches, and among processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


def micro_batches(lengths: Sequence[int], token_budget: int) -> Iterator[list[int]]:
    """Split prompts, longest first, into batches of at most `token_budget` tokens.

    A prompt longer than the budget gets a batch of its own. For example, lengths `[3, 9, 4]` and a
    budget of 8 give `[1]` and `[2, 0]`.

    Yields:
        Indices into `lengths`.
    """
    batch: list[int] = []
    tokens = 0
    for i in _longest_first(lengths):
        if batch and tokens + lengths[i] > token_budget:
            yield batch
            batch, tokens = [], 0
        batch.append(i)
        tokens += lengths[i]
    if batch:
        yield batch


def balanced_shares(lengths: Sequence[int], count: int) -> list[list[int]]:
    """Split prompts into `count` shares of about the same number of tokens.

    No two shares differ by more tokens than the longest prompt has. With fewer prompts than shares,
    some shares are empty. A single share keeps the order.

    Returns:
        Indices into `lengths`, by share.
    """
    if count == 1:
        return [list(range(len(lengths)))]
    shares: list[list[int]] = [[] for _ in range(count)]
    tokens = [0] * count
    for i in _longest_first(lengths):
        smallest = tokens.index(min(tokens))
        shares[smallest].append(i)
        tokens[smallest] += lengths[i]
    return shares


def _longest_first(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda i: -lengths[i])

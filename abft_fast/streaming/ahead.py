"""Read the next block's weights in a thread while this block computes."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from threading import Event
from typing import Self

from torch import Tensor

from abft_fast.streaming.model import StreamedModel

THREAD = "abft-fast-reader"
"""How the reading thread's name begins."""


class ReadingAhead:
    """A thread that reads a block's weights into the host's memory, one block at a time.

    Leaving the context ends the thread after the tensor that it is reading.

    Args:
        streamed: the model.
    """

    def __init__(self, streamed: StreamedModel):
        self._streamed = streamed
        self._thread = ThreadPoolExecutor(1, THREAD)
        self._stop = Event()
        self._read: Future[dict[str, Tensor]] | None = None

    def __enter__(self) -> Self:
        """Return the reader; nothing is read yet."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the thread."""
        self._stop.set()
        self._thread.shutdown(cancel_futures=True)

    def begin(self, block: range) -> None:
        """Begin to read the weights of a block."""
        self._read = self._thread.submit(self._streamed.read_ahead, block, self._stop)

    def take(self) -> dict[str, Tensor]:
        """Return the weights of the block whose reading began, by name; none if none began.

        Raises:
            Exception: what went wrong in the thread, as itself.
        """
        read, self._read = self._read, None
        return {} if read is None else read.result()

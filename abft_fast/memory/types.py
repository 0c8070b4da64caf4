"""Name the parts of a plan of memory: arithmetic, gradient flow, what is always there, a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch


@dataclass(frozen=True)
class Arithmetic:
    """How numbers are kept.

    Attributes:
        device_type: `cuda` or `cpu`.
        mixed: whether the forward is in bfloat16 (autocast).
    """

    device_type: str
    mixed: bool

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of weights that are neither quantized nor trained."""
        return torch.bfloat16 if self.mixed else torch.float32


@dataclass(frozen=True)
class Flow:
    """How far gradients flow, and whether layers are recomputed in the backward.

    Attributes:
        gradient: the value of `--gradient`; `none` is a forward without gradients.
        checkpointing: the value of `--checkpointing`.
    """

    gradient: str | int
    checkpointing: bool = False

    @property
    def options(self) -> str:
        """Return the options that choose this flow; for `EVALUATION`, its name."""
        if self == EVALUATION:
            return "evaluation"
        option = f"--gradient {self.gradient}"
        return f"{option} --checkpointing" if self.checkpointing else option


FLOWS = (Flow("full"), Flow("full", True), Flow(4), Flow(2), Flow("local"))
"""The flows that a plan compares, in most models from most memory to least."""

EVALUATION = Flow("none")
"""A forward that predicts labels and observes heads."""


@dataclass(frozen=True)
class StaticMemory:
    """Bytes that a run holds all the time.

    Attributes:
        quantized: weights in 4 or 8 bits, with their statistics.
        frozen: all other weights that are not trained, without an LM head of which only the label
            words' rows are kept.
        trained: trained parameters, in float32.
        gradients: their gradients.
        optimizer: Adam's two moments of each.
        parameters: how many parameters are trained.
    """

    quantized: int
    frozen: int
    trained: int
    gradients: int
    optimizer: int
    parameters: int

    @property
    def total(self) -> int:
        """Return the sum of all parts."""
        return self.quantized + self.frozen + self.trained + self.gradients + self.optimizer


class Line(NamedTuple):
    """Bytes that grow with the tokens of a packed batch: `fixed + a_token * tokens`."""

    fixed: float
    a_token: float

    def at(self, tokens: int) -> float:
        """Return the bytes for this many tokens."""
        return self.fixed + self.a_token * tokens

    def most_tokens(self, room: float) -> int:
        """Return the most tokens that take at most `room` bytes, or 0."""
        return max(0, int((room - self.fixed) / self.a_token))


@dataclass(frozen=True)
class StepMemory:
    """Most bytes that a step adds to the static ones, by what takes them.

    The largest of the lines counts: a dequantized weight is the peak of a small batch, and
    activations are the peak of a large one.

    Attributes:
        lines: the tensors alone, and each operation that takes memory inside itself.
    """

    lines: tuple[Line, ...]

    @property
    def of_large_batches(self) -> Line:
        """Return the line that counts where a batch has many tokens."""
        return max(self.lines, key=lambda line: (line.a_token, line.fixed))

    def at(self, tokens: int) -> float:
        """Return the bytes for a packed batch of this many tokens."""
        return max(line.at(tokens) for line in self.lines)

    def most_tokens(self, room: float) -> int:
        """Return the tokens of the largest batch that takes at most `room` bytes, or 0."""
        return min(line.most_tokens(room) for line in self.lines)


@dataclass(frozen=True)
class Plan:
    """What memory a run takes, for each of some gradient flows.

    Attributes:
        static: bytes that are held all the time.
        steps: bytes of a step, by flow.
        longest: tokens of the longest prompt. A batch holds at least one prompt.
        k: demonstrations in that prompt.
        limit: available bytes.
        context: most tokens of a prompt; None if the model does not say.
    """

    static: StaticMemory
    steps: dict[Flow, StepMemory]
    longest: int
    k: int
    limit: int
    context: int | None

    def most_tokens(self, flow: Flow) -> int:
        """Return the tokens of the largest packed batch that fits; 0 if the weights do not fit."""
        return self.steps[flow].most_tokens(self.limit - self.static.total)

    def fits(self, flow: Flow) -> bool:
        """Return whether the longest prompt fits."""
        return self.most_tokens(flow) >= self.longest

    def most_demonstrations(self, flow: Flow) -> int:
        """Return how many demonstrations, as long as the longest prompt's, fit in one prompt."""
        tokens = self.most_tokens(flow)
        if self.context is not None:
            tokens = min(tokens, self.context)
        return max(0, int(tokens / (self.longest / (self.k + 1))) - 1)

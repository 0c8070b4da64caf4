"""Label texts with a model that is read layer by layer, as `predict` does with a whole one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from abft_fast.commands import adapter_origin
from abft_fast.commands.predict import Labeller
from abft_fast.commands.streamed.run import spare_memory, streamed_model
from abft_fast.core.packing import EncodedPrompt
from abft_fast.core.shared_prefix import common_prefix
from abft_fast.models.base_identity import base_of_adapter
from abft_fast.streaming.labelling import Labelling
from abft_fast.streaming.model import StreamedModel
from abft_fast.streaming.stages import AttentionCheck, BaseIdentity, Stage
from abft_fast.streaming.walk import Walk

_STATES = 2**30  # most bytes of hidden states in memory: those that enter a layer, and leave it


class StreamedLabeller(Labeller):
    """Label texts by a model of which one layer is in memory.

    A chunk of texts walks through the model together, so the model is read once a chunk. In memory,
    hidden states of a large chunk would take too much: its texts walk in several parts.

    Raises:
        UserError: the model cannot be streamed, or the adapter does not fit it.
    """

    def load(self) -> None:
        """Read no weights; each walk does."""
        for line in adapter_origin.differences(self.config):
            self.progress.say(line)
        if self.config.stream_states == "disk":
            spare_memory(self)
        self._streamed: StreamedModel | None = None
        self._walks, self._shared = 0, 0

    @property
    def cost(self) -> str:
        """Return how many tokens were computed once a walk, and the bytes read, to end a line."""
        if self._streamed is None:
            return ""
        times = "once" if self._walks == 1 else f"once in each of {self._walks} readings"
        tokens = f"; the first {self._shared:,} tokens of all prompts computed {times}"
        read = sum(self._streamed.weights.read_bytes.values())
        return f"{tokens if self._shared else ''}; weights read: {read / 1e6:,.0f} MB"

    def _logits(self, prompts: Sequence[list[int]]) -> Tensor:
        """Return the logits of the label words, (R, labels), in float32 on the CPU."""
        prefix = common_prefix(prompts)
        lengths = [len(ids) - len(prefix) for ids in prompts]
        return torch.cat(
            [self._walk(prompts[p.start : p.stop], prefix) for p in self._parts(lengths)]
        )

    def _parts(self, lengths: Sequence[int]) -> Iterator[range]:
        """Yield ranges of texts whose hidden states are in memory together; at least one each."""
        if self.config.stream_states == "disk":
            yield range(len(lengths))
            return
        width = self.shape.get_text_config(decoder=True).hidden_size
        most = _STATES // (2 * width * self.arithmetic.dtype.itemsize)
        start, tokens = 0, 0
        for index, length in enumerate(lengths):
            if index > start and tokens + length > most:
                yield range(start, index)
                start, tokens = index, 0
            tokens += length
        yield range(start, len(lengths))

    def _walk(self, prompts: Sequence[list[int]], prefix: list[int]) -> Tensor:
        """Read the model once, and return the logits of these prompts."""
        is_first = self._streamed is None
        if self._streamed is None:
            self._streamed = streamed_model(self)
        config, place = self.config, (self._streamed, self.accelerator)
        labelling = Labelling(
            *place,
            prompts,
            prefix,
            self.encoder.label_ids,
            self.token_budget,
            config.attention_backend,
            check=is_first,
        )
        stages: list[Stage] = [labelling]
        if is_first:
            adapter = config.adapter
            base = None if adapter is None else base_of_adapter(adapter)
            encoded = [EncodedPrompt(ids, [], []) for ids in prompts]
            stages = [
                BaseIdentity(*place, self.progress, base, f"adapter {adapter}"),
                AttentionCheck(*place, encoded, config.attention_backend, self.progress),
                labelling,
            ]
        on_disk, output = config.stream_states == "disk", config.output
        folder = output.parent if on_disk and output is not None else None
        walk = Walk(self._streamed, stages, 1, folder)
        if is_first:
            walk.read_outside(self.encoder.label_ids)
            if config.adapter is not None:
                self._streamed.load_adapter(config.adapter, self.progress.say)
        else:
            walk.read_embedding()
        walk.run(self.progress, "labelling")
        walk.remove_files()
        self._walks += 1
        self._shared = min(self._shared, len(prefix)) if self._walks > 1 else len(prefix)
        return labelling.logits

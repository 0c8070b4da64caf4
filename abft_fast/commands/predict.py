"""Predict the labels of a file's texts: compute demonstrations once, and pack the queries."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from abft_fast.commands import adapter_origin
from abft_fast.commands.data_report import labels_alike, special_token_line
from abft_fast.commands.prediction_files import PredictionWriter, notes, read_queries
from abft_fast.commands.session import ModelOnDevice
from abft_fast.core.label_logits import keep_label_rows
from abft_fast.core.packing import EncodedPrompt
from abft_fast.core.shared_prefix import SharedPrefix, common_prefix
from abft_fast.data import Dataset, Example, Prompt
from abft_fast.data.rows import Row
from abft_fast.errors import RunError, UserError
from abft_fast.models import loading
from abft_fast.models.preflight import check_attention, shared_prefix_is_exact
from abft_fast.options import PredictConfig
from abft_fast.prompts import PromptEncoder
from abft_fast.runtime.batching import micro_batches
from abft_fast.runtime.float32_linear import fast_float32_linear
from abft_fast.runtime.progress import Progress
from abft_fast.runtime.token_budget import in_halves

_CHUNK = 1024  # most rows that are read, sorted by length and written at a time
_CHUNK_TOKENS = 2**20  # about how many tokens their whole prompts have


def predict(
    config: PredictConfig, dataset: Dataset, writer: PredictionWriter, progress: Progress
) -> None:
    """Write every row of the input, in order, with the probabilities of its labels.

    Args:
        config: the command's options.
        dataset: the demonstrations, by `prediction_files.read_demonstrations`.
        writer: where rows go, by `prediction_files.open_output`.
        progress: prints messages.

    Raises:
        UserError: a row cannot be used, the model cannot be loaded or cannot tell the labels apart,
            or a prompt is too long and `--on-long-prompt` is refuse.
        RunError: a label's logit is not finite.
    """
    for line in (*notes(config), *labels_alike(dataset.label_words)):
        progress.say(line)
    labeller = _labeller(config, dataset, progress)
    done = dropped = 0
    special: list[tuple[str, str]] = []  # places and tokens
    said = labeller.chunk
    queries = read_queries(config, dataset.label_words)
    while rows := list(itertools.islice(queries, labeller.chunk)):
        for row, probabilities in labeller.label(rows):
            writer.write(row, probabilities)
            dropped += probabilities is None
        done += len(rows)
        tokens_of_rows = ((row, labeller.encoder.special_token_in(text)) for row, text in rows)
        special += [(row.place(), token) for row, token in tokens_of_rows if token]
        if done >= 2 * said:
            progress.say(f"{done:,} rows")
            said = done
    if special:
        progress.say(special_token_line(len(special), *special[0]))
    left = f", {dropped:,} longer than the model's context, without a prediction" if dropped else ""
    progress.say(f"{done:,} rows labelled{left}{labeller.cost}")


def _labeller(config: PredictConfig, dataset: Dataset, progress: Progress) -> Labeller:
    if config.stream:
        from abft_fast.commands.streamed.predict import StreamedLabeller  # it uses this module

        return StreamedLabeller(config, dataset, progress)
    return Labeller(config, dataset, progress)


class Labeller(ModelOnDevice):
    """Label texts by a model and demonstrations.

    Texts come in chunks. The common beginning of all prompts is computed once. It is shortened when
    the prompts of a later chunk part earlier, as a token may reach from a demonstration into a
    query.

    Attributes:
        dataset: the demonstrations.
        context: the model's context length; None if the model does not say.
        encoder: the dataset's encoder for the model.
        chunk: rows to label at a time, so that memory does not grow with the demonstrations.
    """

    config: PredictConfig

    def __init__(self, config: PredictConfig, dataset: Dataset, progress: Progress):
        super().__init__(config, progress)
        self.dataset = dataset
        self.context = loading.context_length(self.shape)
        tokenizer = loading.read_tokenizer(config.model)
        # Too long prompts are refused or dropped below, where a row's place is known.
        vocabulary = loading.vocabulary_size(self.shape)
        self.encoder = PromptEncoder.from_options(config, tokenizer, dataset, None, vocabulary)
        (bare,) = self._encode([""])
        if self._is_too_long(bare):
            raise UserError(
                f"{config.demonstrations}: with its {len(dataset.demonstrations)} demonstrations a "
                f"prompt without a query has {len(bare)} tokens, but the model's context has "
                f"{self.context}: use fewer demonstrations"
            )
        self.chunk = min(max(_CHUNK_TOKENS // len(bare), 1), _CHUNK)
        self.load()
        self._prefix: SharedPrefix | None = None

    @property
    def cost(self) -> str:
        """Return how many tokens all prompts share and were computed once, to end a line."""
        tokens = len(self._prefix.ids) if self._prefix else 0
        return f"; the first {tokens:,} tokens of all prompts computed once" if tokens else ""

    def label(self, rows: Sequence[tuple[Row, str]]) -> Iterator[tuple[Row, list[float] | None]]:
        """Yield each row with the probabilities of the label words, None for a too long prompt."""
        prompts = self._encode([text for _, text in rows], [row.place() for row, _ in rows])
        fitting = []
        for index, (row, _) in enumerate(rows):
            if not self._is_too_long(prompts[index]):
                fitting.append(index)
            elif self.config.on_long_prompt == "refuse":
                raise UserError(
                    f"{row.place()}: the prompt of {len(prompts[index])} tokens is longer than the "
                    f"model's context of {self.context} tokens: shorten the text, use fewer "
                    "demonstrations, or pass --on-long-prompt drop"
                )
        by_index: dict[int, list[float]] = {}
        if fitting:
            logits = self._logits([prompts[index] for index in fitting])
            for index, one in zip(fitting, logits, strict=True):
                if not one.isfinite().all():
                    place = rows[index][0].place()
                    raise RunError(f"{place}: the model's logits of the labels are not finite")
            probabilities = logits.double().softmax(dim=1).tolist()
            by_index = dict(zip(fitting, probabilities, strict=True))
        for index, (row, _) in enumerate(rows):
            yield row, by_index.get(index)

    def load(self) -> None:
        """Read the model and its adapter; keep the label words' rows of the LM head only."""
        super().load()
        for line in adapter_origin.differences(self.config):
            self.progress.say(line)
        if self.config.adapter is not None:
            self.load_adapter(self.config.adapter)
        keep_label_rows(self.model, self.encoder.label_ids)
        self.model.eval()

    def _encode(self, texts: Sequence[str], places: Sequence[str] | None = None) -> list[list[int]]:
        """Tokenize whole prompts, because the tokens of a word depend on the text around it."""
        demonstrations = self.dataset.demonstrations
        prompts = [Prompt(demonstrations, Example(text, label=0)) for text in texts]
        encoded = self.encoder.encode(prompts, places=places).prompts
        return [prompt.input_ids for prompt in encoded]

    def _is_too_long(self, ids: list[int]) -> bool:
        return self.context is not None and len(ids) > self.context

    def _logits(self, prompts: Sequence[list[int]]) -> Tensor:
        """Return the logits of the label words, (R, labels), in float32 on the CPU."""
        prefix = self._prefix_of(prompts)
        lengths = [len(ids) - len(prefix.ids) for ids in prompts]
        logits = torch.empty(len(prompts), len(self.encoder.label_ids))

        def run(part: Sequence[int]) -> Tensor:
            with fast_float32_linear(), self.accelerator.autocast():
                ids = [prompts[i] for i in part]
                return prefix.label_logits(ids, self.encoder.label_ids).float().cpu()

        for batch in micro_batches(lengths, self.token_budget):
            logits[batch] = torch.cat(in_halves(run, batch))
        return logits

    def _prefix_of(self, prompts: Sequence[list[int]]) -> SharedPrefix:
        """Return the common beginning of all prompts so far; compute and check it at first."""
        shared = common_prefix(prompts)
        if self._prefix is None:
            self._prefix = self._checked(
                SharedPrefix(self.model, shared, self.config.attention_backend), prompts
            )
        else:
            pairs = zip(self._prefix.ids, shared, strict=False)
            same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
            if same < len(self._prefix.ids):
                self._prefix.shorten(same)
        return self._prefix

    def _checked(self, prefix: SharedPrefix, prompts: Sequence[list[int]]) -> SharedPrefix:
        """Return the prefix, or an empty one if the model does not allow a shared prefix."""
        autocast, backend = self.accelerator.autocast, self.config.attention_backend
        encoded = [EncodedPrompt(ids, [], []) for ids in prompts]
        attentions = check_attention(self.model, encoded, autocast, backend)
        self.progress.say(f"attention: {', '.join(sorted({name for name, _ in attentions}))}")
        if prefix.can_share(1) and shared_prefix_is_exact(prefix, prompts, autocast):
            return prefix
        self.progress.say("demonstrations are computed for each query: the model needs it")
        return SharedPrefix(self.model, [], backend)

"""Draw the label words of training prompts (`--training-labels`)."""

from __future__ import annotations

import random
from collections.abc import Sequence

from abft_fast.data import Dataset, Prompt
from abft_fast.errors import UserError
from abft_fast.options import TrainConfig
from abft_fast.prompts import EncodedPrompts, PromptEncoder
from abft_fast.prompts.symbols import draw_symbols, with_labels


def encode_with_drawn_labels(
    config: TrainConfig, dataset: Dataset, encoder: PromptEncoder, prompts: Sequence[Prompt]
) -> EncodedPrompts:
    """Encode training prompts with the label words that `--training-labels` asks for.

    The draw depends on the dataset and `--seed` alone.

    Raises:
        UserError: the dataset has one label, or the tokenizer has too few words.
    """
    if config.training_labels == "own":
        return encoder.encode(prompts)
    labels = len(dataset.label_words)
    if labels < 2:
        raise UserError(
            f"--training-labels {config.training_labels}: {dataset.name} has one label, so its "
            "words cannot change places: use --training-labels own"
        )
    seed = f"{dataset.name}-{config.seed}-{config.training_labels}"
    if config.training_labels == "symbols":
        words = encoder.symbols.training
        drawn = draw_symbols(prompts, labels, words, seed)
        changed = [with_labels(*pair) for pair in zip(prompts, drawn, strict=True)]
        return encoder.with_label_words(words).encode(changed)
    generator = random.Random(seed)
    own_share = config.own_labels_share if config.training_labels == "mixed" else 0.0
    permuted = []
    for prompt in prompts:
        order = generator.sample(range(labels), labels)
        keep = generator.random() < own_share
        permuted.append(prompt if keep else with_labels(prompt, order))
    return encoder.encode(permuted)

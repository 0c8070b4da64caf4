"""What each method of `--method` trains on: prompts, for all but ABFT with targets."""

from __future__ import annotations

from abft_fast.core.language_model_loss import every_token, label_target
from abft_fast.data import Dataset
from abft_fast.options import TrainConfig, datasets
from abft_fast.prompts import EncodedPrompts, PromptEncoder
from abft_fast.training.picl import intrinsic_tasks, paragraphs


def training_prompts(
    config: TrainConfig, dataset: Dataset, encoder: PromptEncoder
) -> EncodedPrompts:
    """The prompts of a run whose tested dataset this is.

    Raises:
        UserError: the data do not allow it.
    """
    match config.method:
        case "ABFT":
            return _encoded(config, dataset, encoder, config.train_samples)
        case "E2E":
            return _with_labels(config, dataset, encoder, config.train_samples)
        case "MetaICL":
            return _meta_prompts(config, encoder)
        case "PICL":
            return _plain_text(config, encoder)
    raise ValueError(f"method {config.method!r} is unknown")


def _encoded(
    config: TrainConfig, dataset: Dataset, encoder: PromptEncoder, count: int
) -> EncodedPrompts:
    return encoder.encode(dataset.training_prompts(config.k, count, config.seed))


def _with_labels(
    config: TrainConfig, dataset: Dataset, encoder: PromptEncoder, count: int
) -> EncodedPrompts:
    found = _encoded(config, dataset, encoder, count)
    found.prompts = [
        label_target(prompt, encoder.label_ids[label])
        for prompt, label in zip(found.prompts, found.labels, strict=True)
    ]
    return found


def _meta_prompts(config: TrainConfig, encoder: PromptEncoder) -> EncodedPrompts:
    """As many prompts of each dataset, those that are tested left out (Min et al. 2022, 3.1).

    The loss is on the last label alone, given the whole concatenation, as theirs is.
    """
    names = config.meta_dataset_names
    together = EncodedPrompts()
    for i, name in enumerate(names):
        count = config.train_samples // len(names) + (i < config.train_samples % len(names))
        if not count:
            continue
        dataset = datasets.meta_dataset(config, name)
        its = PromptEncoder.by_options(config, encoder.tokenizer, dataset, encoder.max_length)
        found = _with_labels(config, dataset, its, count)
        together.prompts += found.prompts
        together.labels += found.labels
        together.dropped += found.dropped
        together.shortened += found.shortened
    return together


def _plain_text(config: TrainConfig, encoder: PromptEncoder) -> EncodedPrompts:
    """Retrieved paragraphs, one a line; of too many tokens the last (Gu et al. 2023, 3.3)."""
    texts = paragraphs(config.plain_text)
    limit = encoder.max_length or 0
    found = EncodedPrompts()
    for task in intrinsic_tasks(texts, config.k, config.train_samples, config.seed):
        ids = encoder.tokenizer("\n".join(task), verbose=False)["input_ids"]
        found.shortened += 0 < limit < len(ids)
        if len(ids) > 1:  # else there is nothing to predict
            found.prompts.append(every_token(ids[-limit:]))
        else:
            found.dropped += 1
    return found

"""Make the training prompts of each method; all but ABFT's have targets."""

from __future__ import annotations

from abft_fast.core.language_model_loss import every_token, label_target
from abft_fast.data import Dataset
from abft_fast.options import TrainConfig, datasets
from abft_fast.prompts import EncodedPrompts, PromptEncoder
from abft_fast.training.picl import intrinsic_tasks, paragraphs


def attention_behavior(
    config: TrainConfig, dataset: Dataset, encoder: PromptEncoder
) -> EncodedPrompts:
    """Return prompts of the dataset, with their label positions and no target."""
    return _encode(config, dataset, encoder, config.train_samples)


def end_to_end(config: TrainConfig, dataset: Dataset, encoder: PromptEncoder) -> EncodedPrompts:
    """Return prompts of the dataset whose target is the query's label."""
    return _encode_with_labels(config, dataset, encoder, config.train_samples)


def meta_learning(config: TrainConfig, _: Dataset, encoder: PromptEncoder) -> EncodedPrompts:
    """Return as many prompts of each other dataset (MetaICL: Min et al. 2022, section 3.1).

    The only target is the label of the query, given the whole concatenation, as in the paper.
    """
    names = config.meta_dataset_names
    together = EncodedPrompts()
    for i, name in enumerate(names):
        count = config.train_samples // len(names) + (i < config.train_samples % len(names))
        if not count:
            continue
        dataset = datasets.meta_dataset(config, name)
        its = PromptEncoder.by_options(
            config, encoder.tokenizer, dataset, encoder.max_length, encoder.vocabulary
        )
        part = _encode_with_labels(config, dataset, its, count)
        together.prompts += part.prompts
        together.labels += part.labels
        together.dropped += part.dropped
        together.shortened += part.shortened
    return together


def plain_text(config: TrainConfig, _: Dataset, encoder: PromptEncoder) -> EncodedPrompts:
    """Return retrieved paragraphs, one a line, whose targets are all their tokens (PICL).

    Of too many tokens the last ones are kept (Gu et al. 2023, section 3.3).
    """
    texts = paragraphs(config.plain_text)
    limit = encoder.max_length or 0
    encoded = EncodedPrompts()
    for task in intrinsic_tasks(texts, config.k, config.train_samples, config.seed):
        text = "\n".join(task)
        ids = encoder.tokenizer(text, split_special_tokens=True, verbose=False)["input_ids"]
        encoder.check_vocabulary(ids, f"--plain-text, in {text[:60]!r}")
        encoded.shortened += 0 < limit < len(ids)
        if len(ids) > 1:  # a single token leaves nothing to predict
            encoded.prompts.append(every_token(ids[-limit:]))
        else:
            encoded.dropped += 1
    return encoded


def _encode(
    config: TrainConfig, dataset: Dataset, encoder: PromptEncoder, count: int
) -> EncodedPrompts:
    return encoder.encode(dataset.training_prompts(config.k, count, config.seed))


def _encode_with_labels(
    config: TrainConfig, dataset: Dataset, encoder: PromptEncoder, count: int
) -> EncodedPrompts:
    encoded = _encode(config, dataset, encoder, count)
    encoded.prompts = [
        label_target(prompt, encoder.label_ids[label])
        for prompt, label in zip(encoded.prompts, encoded.labels, strict=True)
    ]
    return encoded

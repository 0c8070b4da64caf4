"""Make the training prompts of each method; all but ABFT's have targets."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from abft_fast import data
from abft_fast.core.language_model_loss import every_token, label_target
from abft_fast.data import Dataset, text_key
from abft_fast.errors import UserError
from abft_fast.options import TrainConfig, datasets
from abft_fast.prompts import EncodedPrompts, PromptEncoder
from abft_fast.training.label_words import encode_with_drawn_labels
from abft_fast.training.picl import intrinsic_tasks, paragraphs


def without_targets(
    config: TrainConfig, dataset: Dataset, encoder: PromptEncoder
) -> EncodedPrompts:
    """Return prompts of the training datasets, with their label positions and no target."""
    return _of_all_datasets(config, dataset, encoder, _encode)


def with_label_targets(
    config: TrainConfig, dataset: Dataset, encoder: PromptEncoder
) -> EncodedPrompts:
    """Return prompts of the training datasets whose target is the query's label.

    MetaICL's only target is the label of the query, given the whole concatenation, as in its paper
    (Min et al. 2022, section 3.1).
    """
    return _of_all_datasets(config, dataset, encoder, _encode_with_targets)


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


def _of_all_datasets(
    config: TrainConfig,
    dataset: Dataset,
    encoder: PromptEncoder,
    encode: Callable[[TrainConfig, Dataset, PromptEncoder, int], EncodedPrompts],
) -> EncodedPrompts:
    """Join the prompts of all training datasets; `dataset` and `encoder` are the tested one's.

    Some texts are in several datasets. No other dataset trains on a text of the test.
    """
    tested = _tested_texts(config, dataset)
    loaded = [
        dataset if name == config.dataset else datasets.to_train_on(config, name).without(tested)
        for name in config.training_dataset_names
    ]
    for each in loaded:
        if each is not dataset and not each.training:
            raise UserError(
                f"{each.name}: all of its texts to train on are also tested: name another dataset"
            )
    sizes = [len(each.training) for each in loaded]
    weights = sizes if config.mixture == "proportional" else [1] * len(sizes)
    joined = EncodedPrompts()
    for each, count in zip(loaded, shares(config.train_samples, weights), strict=True):
        if not count:
            continue
        its = encoder
        if each is not dataset:
            its = PromptEncoder.from_options(
                config, encoder.tokenizer, each, encoder.max_length, encoder.vocabulary
            )
        part = encode(config, each, its, count)
        joined.prompts += part.prompts
        joined.labels += part.labels
        joined.dropped += part.dropped
        joined.shortened += part.shortened
    return joined


def _tested_texts(config: TrainConfig, dataset: Dataset) -> set[str]:
    """Return the `text_key` of every text that the run tests on."""
    others = data.PAPER_DATASETS if config.generalization_test else ()
    tested = [dataset, *(data.load(name) for name in others)]
    return {text_key(example.text) for each in tested for example in each.test} - {""}


def shares(total: int, weights: Sequence[int]) -> list[int]:
    """Divide a number by weights, as evenly as whole numbers allow.

    Example: `shares(10, [1, 1, 1])` is [4, 3, 3].
    """
    whole = [total * weight // sum(weights) for weight in weights]
    remainders = [total * weight % sum(weights) for weight in weights]
    largest = sorted(range(len(weights)), key=lambda i: -remainders[i])
    for i in largest[: total - sum(whole)]:
        whole[i] += 1
    return whole


def _encode(
    config: TrainConfig, dataset: Dataset, encoder: PromptEncoder, count: int
) -> EncodedPrompts:
    prompts = dataset.training_prompts(config.k, count, config.seed, config.seen_labels_only)
    return encode_with_drawn_labels(config, dataset, encoder, prompts)


def _encode_with_targets(
    config: TrainConfig, dataset: Dataset, encoder: PromptEncoder, count: int
) -> EncodedPrompts:
    encoded = _encode(config, dataset, encoder, count)
    encoded.prompts = [
        label_target(prompt, encoded.label_ids[label])
        for prompt, label in zip(encoded.prompts, encoded.labels, strict=True)
    ]
    return encoded

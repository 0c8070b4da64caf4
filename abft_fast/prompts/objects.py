"""Choose the objects of boxes for one tokenizer."""

from __future__ import annotations

from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from abft_fast.data import Boxes, Dataset
from abft_fast.prompts.label_tokens import LabelTokens
from abft_fast.prompts.template import Template
from abft_fast.prompts.text_tokens import TextTokens


def for_tokenizer(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, vocabulary: int | None = None
) -> Dataset:
    """Return boxes with the objects that are one token; return any other dataset as it is.

    Args:
        dataset: the dataset.
        tokenizer: the model's fast tokenizer.
        vocabulary: tokens that the model has; None for any number.

    Raises:
        UserError: there are fewer objects than boxes in a prompt.
    """
    if not isinstance(dataset, Boxes):
        return dataset
    text = TextTokens(tokenizer, dataset.label_words)
    template = Template.of(dataset, "ours")
    words = LabelTokens(text, dataset.name, dataset.example, template, "single").of_one_token()
    if vocabulary is not None:
        words = [word for word in words if max(text.ids(f" {word}")) < vocabulary]
    fitting = replace(dataset, label_words=tuple(words), staicc_label_words=tuple(words))
    fitting.check_test(fitting.boxes)
    return fitting

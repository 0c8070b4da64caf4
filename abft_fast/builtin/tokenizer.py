"""The built-in model's tokenizer: lower-case byte-level BPE, label words single tokens.

Both ends of a text are stripped and every text starts with a space. So `"sentiment: "` ends in the
same token as `"sentiment:"`, and `"positive"` alone is the token it is inside a prompt: StaICC's
own string form and ours come out equal.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VOCABULARY = 4096
_FORCED_COUNT = 20_000  # more than any pair that competes for a merge


def train_tokenizer(
    texts: Iterable[str], single_tokens: Iterable[str], max_length: int
) -> PreTrainedTokenizerFast:
    """Train on `texts`; each of `single_tokens`, and the same after a newline, is one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.Strip(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )

    def corpus() -> Iterator[str]:
        yield from texts
        for word in single_tokens:
            for _ in range(_FORCED_COUNT):
                yield f"{word}:\n{word}:"

    tokenizer.train_from_iterator(corpus(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
        model_max_length=max_length,
    )

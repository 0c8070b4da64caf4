"""Texts that MAUVE compares: how much of a prefix a model continues."""

import pytest

from abft_fast.commands.mauve import generate
from abft_fast.errors import UserError
from tests.tiny_models import tiny_model

pytestmark = pytest.mark.unit


class Numbers:
    """A tokenizer whose texts are numbers between spaces."""

    eos_token_id = 1

    def __call__(self, texts, **options):
        return {"input_ids": [[int(word) for word in text.split()] for text in texts]}

    def batch_decode(self, rows, **options):
        return [" ".join(map(str, row)) for row in rows]


@pytest.mark.parametrize(("context", "kept"), [(66, "8 9"), (65, "9")])
def test_the_end_of_a_prefix_is_continued_as_far_as_there_is_room(context, kept):
    model = tiny_model("llama", max_position_embeddings=context)
    (text,) = generate(model, Numbers(), ["7 8 9"], seed=0)
    assert text.startswith(f"{kept} ") and len(text.split()) <= context


@pytest.mark.parametrize("context", [32, 64])
def test_a_context_without_room_for_a_continuation_is_refused(context):
    model = tiny_model("llama", max_position_embeddings=context)
    with pytest.raises(UserError, match=f"by 64 tokens, but the model's context has {context}: "):
        generate(model, Numbers(), ["7 8 9"], seed=0)

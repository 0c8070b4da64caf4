"""Prompts: texts become token ids, label positions, and which labels are the query's own."""

from abft_fast.prompts.encoder import EncodedPrompts, PromptEncoder
from abft_fast.prompts.objects import for_tokenizer
from abft_fast.prompts.template import Template

__all__ = ["EncodedPrompts", "PromptEncoder", "Template", "for_tokenizer"]

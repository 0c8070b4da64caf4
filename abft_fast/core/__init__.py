"""The method: packed prompts, attention, and the attention-behavior loss of a whole model."""

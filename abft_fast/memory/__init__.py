"""Count the memory of a training run before it runs."""

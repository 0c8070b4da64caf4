"""The memory of a training run, counted before it runs."""

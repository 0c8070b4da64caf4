"""Train a model by any of the methods, and keep the run on disk."""

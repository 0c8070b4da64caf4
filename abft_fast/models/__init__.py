"""Models of transformers: read, checked, and set to train."""

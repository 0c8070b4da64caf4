"""The training loop, the methods it can train, and what a run leaves on disk."""

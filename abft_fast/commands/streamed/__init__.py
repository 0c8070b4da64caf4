"""The verbs with `--stream`, which read a model block by block, and the speeds of their plan."""

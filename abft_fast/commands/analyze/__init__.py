"""The verbs of `abft-fast analyze`: what training did to a model, in tables and pictures."""

"""Predictions of label words, StaICC's tests, and what attention heads do meanwhile."""

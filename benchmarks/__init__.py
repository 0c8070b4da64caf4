"""Measurements of speed and memory: rows in results/, and the report made of them."""

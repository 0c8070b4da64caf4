"""The phases of `first_gpu.py`, the most telling first."""

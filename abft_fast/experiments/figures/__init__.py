"""Figures of the paper, from the folders that runs left: rows of a tidy CSV, and a picture."""

"""Sweeps over grids of options, and the tables made of their runs; torch is not imported here."""

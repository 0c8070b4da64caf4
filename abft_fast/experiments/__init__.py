"""Run sweeps over grids of options, and make tables of their runs. Nothing here imports torch.

A sweep file (`sweep_file`) expands (`grid`) into cells (`cell`). Each cell has a folder
(`cell_folder`) and runs in a process of its own (`sweep`, `local_engine`, `ray_engine`). What the
runs leave is read back (`records`) and written as a CSV (`results`) or as the paper's tables
(`tables`).
"""

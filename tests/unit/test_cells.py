"""How a sweep starts a cell, and goes on with it."""

import pytest

from abft_fast.experiments.cell import Cell
from abft_fast.experiments.cell_folder import CellFolder
from abft_fast.options import TrainConfig
from abft_fast.options.resolve import resolve
from abft_fast.training.run_folder import RunFolder

pytestmark = pytest.mark.unit


def test_a_cell_goes_on_where_the_sweep_now_says(tmp_path):
    place = CellFolder(tmp_path)
    for device in ("cuda", "cpu"):
        config = resolve(TrainConfig, {"device": device})
        place.prepare(Cell("train", "ABFT", config, {}, "title"))
        if device == "cuda":
            assert "--resume" not in place.command()
            RunFolder(place.run).create(config, 0, {}, {})
    command = place.command()
    assert command[command.index("--resume") + 1] == str(place.run)
    assert command[command.index("--device") + 1] == "cpu"

"""How a sweep starts a cell, and goes on with it."""

import pytest

from abft_fast.errors import UserError
from abft_fast.experiments.cell import Cell
from abft_fast.experiments.cell_folder import FAILED, FINISHED, CellFolder
from abft_fast.experiments.local_engine import run_here
from abft_fast.experiments.records import read_cell
from abft_fast.options import EvalConfig, SweepConfig, TrainConfig
from abft_fast.options.datasets import file_hashes
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


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "reviews.csv"
    path.write_text("text,label\n" + "good film,yes\nbad film,no\n" * 10)
    return path


def cell_on(data, command="train"):
    config = resolve(TrainConfig if command == "train" else EvalConfig, {"dataset": str(data)})
    return Cell(command, "ABFT", config, {}, "title", tuple(file_hashes(config).items()))


def test_data_that_changed_since_the_sweep_was_planned(data, tmp_path):
    place = CellFolder(tmp_path / "cell")
    place.prepare(cell_on(data))
    data.write_text(data.read_text().replace("good", "fine"))
    ended = []
    config = resolve(SweepConfig, {"file": tmp_path / "sweep.yaml"})
    run_here(config, [place.folder], lambda *cell: ended.append(cell))
    ((name, outcome, _),) = ended
    assert name == "cell" and outcome.status == place.outcome.status == FAILED
    assert outcome.error.startswith(f"{data} has changed since the sweep began: ")
    assert not (place.folder / "output.log").exists()  # nothing was started


@pytest.mark.parametrize("command", ["train", "eval"])
def test_a_cell_that_read_other_data_than_planned(command, data, tmp_path):
    """They change behind the check, while the process starts; a run keeps what it read."""
    for is_changed in (False, True):
        cell = cell_on(data, command)
        place = CellFolder(tmp_path / f"cell-{is_changed}")
        place.prepare(cell)
        planned = data.read_text()
        if is_changed:
            data.write_text(planned.replace("good", "fine"))
        read = file_hashes(cell.config)
        RunFolder(place.run).create(resolve(TrainConfig, {}), 0, read, {})
        place.metrics.write_text("{}")
        if command == "train":
            data.write_text(planned)
        assert place.finish(0, 1.0).status == (FAILED if is_changed else FINISHED)
        assert place.run.exists() != is_changed and place.metrics.exists() != is_changed
        if command == "train" and not is_changed:
            assert read_cell(place.folder).data == read


def test_a_cell_goes_on_where_its_data_have_moved(data, tmp_path):
    place, cell = CellFolder(tmp_path / "cell"), cell_on(data)
    place.prepare(cell)
    RunFolder(place.run).create(cell.config, 0, dict(cell.data), {})
    moved = tmp_path / "elsewhere" / data.name
    moved.parent.mkdir()
    data.rename(moved)
    again = cell_on(moved)
    assert again.name == cell.name
    place.prepare(again)
    command = place.command()
    assert command[command.index("--dataset") + 1] == str(moved)
    other = resolve(TrainConfig, {"dataset": str(moved), "lr": 0.5})
    with pytest.raises(UserError, match=r"was run with lr .*choose another --output-dir"):
        place.prepare(Cell("train", "ABFT", other, {}, "title"))

import json

import pytest
import torch

from abft_fast.errors import RunError, UserError
from abft_fast.models.trainable import trained_parameters, unfreeze_query_key
from abft_fast.options import TrainConfig
from abft_fast.options.resolve import resolve
from abft_fast.runtime.files import atomic_folder, write_json
from abft_fast.training import checkpoint
from abft_fast.training.penalty import PenaltyController
from abft_fast.training.run_folder import RunFolder
from tests.tiny_models import tiny_model

pytestmark = pytest.mark.unit


def test_two_runs_of_one_second_get_two_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = resolve(TrainConfig, {})
    first = RunFolder.reserve(config)
    first.create(config, 0, {}, {})
    second = RunFolder.reserve(config)
    second.create(config, 0, {}, {})
    assert first.folder != second.folder


def test_a_folder_taken_meanwhile_is_left_alone(tmp_path):
    config = resolve(TrainConfig, {"output_dir": str(tmp_path / "run")})
    slow, quick = RunFolder.reserve(config), RunFolder.reserve(config)
    quick.hold(print)
    quick.create(config, 0, {}, {})
    quick.append_metrics({"step": 1})
    with pytest.raises(UserError, match="another run is using"):
        slow.hold(print)
    quick.release()
    slow.hold(print)
    with pytest.raises(UserError, match="taken by another run"):
        slow.create(config, 0, {}, {})
    assert quick.metrics() == [{"step": 1}]


def test_what_a_kill_left_half_written_is_overwritten(tmp_path):
    RunFolder(tmp_path).create(resolve(TrainConfig, {}), 0, {}, {})
    (tmp_path / ".adapter.0a1b2c3d.tmp").mkdir()
    (tmp_path / ".evaluation.json.0a1b2c3d.tmp").write_text("{")
    config = resolve(TrainConfig, {"output_dir": str(tmp_path), "overwrite": True})
    run = RunFolder.reserve(config)
    (tmp_path / ".notes.tmp").write_text("mine")
    with pytest.raises(UserError, match=r"holds .notes.tmp, which no run writes"):
        RunFolder.reserve(config)
    (tmp_path / ".notes.tmp").unlink()
    run.create(config, 0, {}, {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.yaml", "environment.json"]


def test_a_half_written_state_of_a_process_is_removed(tmp_path):
    run = RunFolder(tmp_path)
    state = tmp_path / "checkpoints" / "step-000008" / ".state-1.0a1b2c3d.tmp"
    state.mkdir(parents=True)
    (state.parent / "state-0").mkdir()
    run.hold(print)
    run.release()
    assert [path.name for path in state.parent.iterdir()] == ["state-0"]


@pytest.mark.parametrize("force", [False, True], ids=["as it is", "--overwrite"])
def test_nothing_starts_or_continues_in_the_folder_of_a_run_that_goes_on(force, tmp_path):
    config = resolve(TrainConfig, {"output_dir": str(tmp_path), "overwrite": force})
    run = RunFolder.reserve(config)
    run.hold(print)
    run.create(config, 0, {}, {})
    for refused in (lambda: RunFolder.reserve(config), lambda: RunFolder.open(tmp_path)):
        with pytest.raises(UserError, match=f"another run is using {tmp_path}: wait until it ends"):
            refused()
    run.release()
    assert RunFolder.open(tmp_path)[0].is_begun


def test_a_resumed_run_removes_what_a_kill_left_half_written(tmp_path):
    run = RunFolder(tmp_path)
    half = tmp_path / "checkpoints" / ".step-000002.0a1b2c3d.tmp"
    half.mkdir(parents=True)
    mine = tmp_path / ".notes.tmp"
    mine.touch()
    run.hold(print)
    assert not half.exists()
    assert mine.exists()
    run.release()


def test_a_config_cut_short_is_not_resumed_as_something_else(tmp_path):
    config = resolve(TrainConfig, {"output_dir": str(tmp_path), "dataset": "trec", "lr": "0.5"})
    RunFolder(tmp_path).create(config, 0, {}, {})
    assert RunFolder.open(tmp_path)[1].model_dump() == config.model_dump()
    (tmp_path / "config.yaml").write_text("model: builtin\n")
    with pytest.raises(UserError, match="lacks"):
        RunFolder.open(tmp_path)


def test_a_run_older_than_an_option_is_resumed_with_its_default(tmp_path):
    config = resolve(TrainConfig, {"output_dir": str(tmp_path), "dataset": "trec", "k": "2"})
    RunFolder(tmp_path).create(config, 0, {}, {})
    path = tmp_path / "config.yaml"
    newest = ("training_datasets", "mixture", "training_labels", "layers", "p_factor", "no_report")
    lines = path.read_text().splitlines(keepends=True)
    kept = [line for line in lines if line.partition(":")[0] not in newest]
    assert len(kept) == len(lines) - len(newest)
    path.write_text("".join(kept))
    run, resumed = RunFolder.open(tmp_path)
    assert resumed.model_dump() == config.model_dump()
    assert run.resume_command(resumed) == f"abft-fast train --resume {tmp_path}"
    for option in ("lr", "tracker", "seed"):  # every program wrote them
        path.write_text("".join(line for line in kept if not line.startswith(f"{option}:")))
        with pytest.raises(UserError, match=f"lacks the option {option}"):
            RunFolder.open(tmp_path)


def test_a_metrics_row_cut_short_is_dropped(tmp_path):
    run = RunFolder(tmp_path)
    for step in (1, 2, 3):
        run.append_metrics({"step": step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    run.forget_metrics_after(2)
    assert run.metrics() == [{"step": 1}, {"step": 2}]


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "a") as temporary:
        (temporary / "half").write_text("x")
        raise RuntimeError
    assert not (tmp_path / "a").exists()
    with atomic_folder(tmp_path / "a") as temporary:
        (temporary / "whole").write_text("x")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    write_json(tmp_path / "b.json", {"x": 1})
    assert json.loads((tmp_path / "b.json").read_text()) == {"x": 1}


def trainable(hidden=32):
    trained = trained_parameters(unfreeze_query_key(tiny_model("llama", hidden_size=hidden)))
    optimizer = torch.optim.Adam(trained.values(), lr=0.1)
    return trained, optimizer, PenaltyController("pid", 0.5, 0.03, 0.005, 0.005)


def test_a_checkpoint_restores_everything(tmp_path):
    trained, optimizer, controller = trainable()
    for parameter in trained.values():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    for heads in (3.0, 5.0, 4.0):
        controller.update(heads)
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, trained, optimizer, controller)
    expected_noise = torch.rand(3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000002", "step-000003"]

    fresh, fresh_optimizer, fresh_controller = trainable()
    assert checkpoint.restore(tmp_path, fresh, fresh_optimizer, fresh_controller) == 3
    assert torch.equal(torch.rand(3), expected_noise)
    assert fresh_controller == controller
    for name, parameter in trained.items():
        assert torch.equal(fresh[name], parameter)
        theirs, ours = optimizer.state[parameter], fresh_optimizer.state[fresh[name]]
        assert theirs.keys() == ours.keys() and all(torch.equal(theirs[k], ours[k]) for k in ours)


def test_a_damaged_or_foreign_checkpoint_is_refused(tmp_path):
    trained, optimizer, controller = trainable()
    assert checkpoint.restore(tmp_path, trained, optimizer, controller) == 0
    checkpoint.save(tmp_path, 1, trained, optimizer, controller)
    with pytest.raises(RunError, match="other weights"):
        checkpoint.restore(tmp_path, *trainable(hidden=64))
    (tmp_path / "step-000001" / "state.safetensors").write_bytes(b"short")
    with pytest.raises(RunError, match="cannot be read"):
        checkpoint.restore(tmp_path, trained, optimizer, controller)


@pytest.mark.parametrize("name", ["write_yaml", "write_json"])
def test_a_run_that_ends_while_it_is_made_leaves_nothing(name, tmp_path, monkeypatch):
    def end(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"abft_fast.training.run_folder.{name}", end)
    with pytest.raises(KeyboardInterrupt):
        RunFolder(tmp_path / "run").create(resolve(TrainConfig, {}), 0, {}, {})
    assert not (tmp_path / "run").exists()


def test_a_folder_whose_run_was_killed_while_it_was_made(tmp_path):
    """Without config.yaml nothing can be continued, so --resume is no advice."""
    (tmp_path / "environment.json").write_text("{}")
    config = resolve(TrainConfig, {"output_dir": tmp_path})
    with pytest.raises(UserError, match="not empty: choose another --output-dir, or pass --over"):
        RunFolder.reserve(config)
    RunFolder(tmp_path).create(resolve(TrainConfig, {"overwrite": True}), 0, {}, {})
    with pytest.raises(UserError, match="or continue it with --resume"):
        RunFolder.reserve(config)

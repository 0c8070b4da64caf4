import json
from pathlib import Path
from typing import get_args

import pytest

from abft_fast.builtin import BUILTIN_LEARNING_RATES
from abft_fast.errors import UserError
from abft_fast.options import EvalConfig, MergeConfig, SweepConfig, TrainConfig
from abft_fast.options.base import shell_command
from abft_fast.options.methods import METHODS, MethodName
from abft_fast.options.resolve import resolve, write_yaml

pytestmark = pytest.mark.unit


def test_defaults_are_the_papers():
    config = resolve(TrainConfig, {"model": "some/model"})
    assert (config.k, config.train_samples, config.epochs, config.pseudo_batch_size) == (
        4, 512, 2, 32,
    )  # fmt: skip
    assert (config.penalty, config.reward, config.lora_r) == (0.5, 1.0, 16)
    assert (config.adaptation, config.pid_p, config.pid_i, config.pid_d) == (
        "pid", 0.03, 0.005, 0.005,
    )  # fmt: skip
    assert config.gradient == "full" and config.head_filter


def test_what_is_trained_where_nothing_is_said(tmp_path):
    """Section 4.1: W_Q and W_K themselves, or LoRA where the base is quantized."""
    config = {"quantization_config": {"quant_method": "bitsandbytes"}}
    for folder, content in (("float", {}), ("quantized", config)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text(json.dumps(content))
    for given, expected in (
        ({"model": "some/model"}, ("full", 2e-5)),
        ({"model": str(tmp_path / "float"), "method": "E2E"}, ("full", 2e-5)),
        ({"model": str(tmp_path / "quantized")}, ("lora", 1e-4)),
        ({"model": "some/model", "quantized": True}, ("lora", 1e-4)),
        ({"model": "some/model", "lora_r": 4}, ("lora", 1e-4)),
        ({"model": "some/model", "trainable": "lora"}, ("lora", 1e-4)),
        ({"model": "some/model", "method": "PICL"}, ("model", 1e-5)),
        ({}, ("lora", BUILTIN_LEARNING_RATES["lora"])),
    ):
        config = resolve(TrainConfig, given)
        assert (config.trainable, config.lr) == expected, given


def test_the_builtin_model_has_its_own_learning_rate():
    for trainable, rate in BUILTIN_LEARNING_RATES.items():
        assert resolve(TrainConfig, {"trainable": trainable}).lr == rate
    assert resolve(TrainConfig, {"lr": "3e-4"}).lr == 3e-4


def test_flags_override_the_file_which_overrides_defaults(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("k: 8\ntrain-samples: 64\ndataset: '1'\n")
    config = resolve(TrainConfig, {"config": str(path), "k": "2"})
    assert (config.k, config.train_samples, config.dataset) == (2, 64, "mr")


def test_a_written_config_replays(tmp_path):
    config = resolve(TrainConfig, {"gradient": "2", "lr": "0.01", "output_dir": "x"})
    write_yaml(config, tmp_path / "config.yaml")
    again = resolve(TrainConfig, {"config": str(tmp_path / "config.yaml")})
    assert again.model_dump() == config.model_dump()
    assert "output_dir" not in (tmp_path / "config.yaml").read_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"k": "0"}, "--k 0"),
        ({"k": "many"}, "--k many"),
        ({"lr": "-1"}, "--lr -1"),
        ({"lr": "nan"}, "--lr nan"),
        ({"reward": "inf"}, "--reward inf"),
        ({"adaptation": "p", "p_factor": "nan"}, "--p-factor nan"),
        ({"plain_text": "a.txt"}, "--plain-text works with --method PICL"),
        ({"method": "PICL", "meta_datasets": "mr"}, "--meta-datasets works with --method MetaICL"),
        ({"mauve_model": "m"}, "--mauve-model works with --mauve-test"),
        ({"method": "MetaICL", "meta_datasets": "1, mr"}, "--meta-datasets.*mr is named twice"),
        ({"method": "MetaICL", "meta_datasets": ""}, "dataset '' is unknown"),
        ({"gradient": "half"}, "--gradient half"),
        ({"gradient": "0"}, "--gradient 0"),
        ({"trainable": "all"}, "--trainable all"),
        ({"dataset": "imdb"}, "dataset 'imdb' is unknown"),
        ({"epochs": "0", "seed": "-1"}, "--epochs 0.*--seed -1"),
        ({"config": "/nowhere.yaml"}, "/nowhere.yaml does not exist"),
    ],
)
def test_mistakes_are_one_line_naming_the_option(flags, message):
    with pytest.raises(UserError, match=message) as caught:
        resolve(TrainConfig, flags)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "factor"),
    [
        ({}, 0.03),
        ({"pid_p": 0.1}, 0.1),
        ({"adaptation": "P", "pid_p": 0.1}, 0.1),
        ({"adaptation": "p", "p_factor": 0}, 0.0),
        ({"adaptation": "p", "p_factor": 0.2, "pid_p": 0.1}, 0.2),
        ({"adaptation": "PID", "p_factor": 0.2}, 0.03),
    ],
)
def test_p_alone_may_have_a_factor_of_its_own(flags, factor):
    assert resolve(TrainConfig, flags).proportional_factor == factor


def test_files_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for given, name, expected in (
        ({"method": "PICL", "plain_text": "a,b.txt"}, "plain_text", f"{tmp_path}/a,b.txt"),
        ({"mauve_test": True, "mauve_prefix": "a"}, "mauve_prefix", f"{tmp_path}/a"),
        (
            {"method": "MetaICL", "meta_datasets": "mr,a.csv"},
            "meta_datasets",
            f"mr,{tmp_path}/a.csv",
        ),
    ):
        assert resolve(TrainConfig, given).model_dump(mode="json")[name] == expected


@pytest.mark.parametrize(
    ("flags", "idle"),
    [
        ({}, []),
        ({"penalty": 0.1, "p_factor": 1, "adaptation": "p", "pid_i": 0.1}, ["--pid-i"]),
        ({"method": "E2E", "penalty": 0.1, "head_filter": False}, ["--penalty", "--head-filter"]),
        ({"adaptation": "p", "p_factor": 1, "pid_p": 0.1}, ["--pid-p"]),
        ({"adaptation": "p", "pid_p": 0.1}, []),
        ({"trainable": "full", "lora_r": 4, "calibration_samples": 2}, ["--cali", "--lora-r"]),
        ({"mixture": "proportional"}, ["--mixture"]),
        ({"mixture": "proportional", "training_datasets": "mr"}, ["--mixture"]),
        ({"mixture": "proportional", "training_datasets": "mr,subj"}, []),
        ({"mixture": "proportional", "training_datasets": "others"}, []),
        ({"mixture": "proportional", "method": "MetaICL", "meta_datasets": "mr,sst2"}, []),
        ({"mixture": "proportional", "method": "MetaICL"}, []),
        ({"mixture": "proportional", "method": "PICL"}, ["--mixture"]),
        ({"mixture": "proportional", "method": "PICL", "plain_text": __file__}, ["--mixture"]),
        ({"no_eval": True, "no_save": True, "test_type": "GLER", "save_steps": 1},
         ["--test-type", "--save-steps"]),
        ({"no_eval": True, "generalization_test": True}, ["--generalization-test"]),
        ({"no_eval": True, "generalization_test": True, "method": "MetaICL"}, []),
    ],
)  # fmt: skip
def test_options_that_do_nothing_are_named(flags, idle):
    lines = resolve(TrainConfig, flags).without_effect
    assert len(lines) == len(idle)
    assert all(line.startswith(name) for line, name in zip(lines, idle, strict=True))


@pytest.mark.parametrize("ablation", [{"head_filter": False}, {"penalty": "0"}, {"penalty": 0.0}])
def test_the_control_of_the_penalty_is_off_in_the_papers_ablations(ablation, tmp_path):
    config = resolve(TrainConfig, ablation)
    assert config.adaptation == "none" and not config.without_effect
    (line,) = resolve(TrainConfig, {**ablation, "pid_p": 0.1}).without_effect
    assert line.startswith("--pid-p does nothing here")
    for adaptation in ("pid", "P"):
        asked = resolve(TrainConfig, {**ablation, "adaptation": adaptation})
        assert asked.adaptation == adaptation.lower()
        (line,) = asked.without_effect
        assert line.startswith(f"--adaptation {adaptation.lower()} ") and "none" in line
    write_yaml(asked, tmp_path / "config.yaml")  # a recorded run keeps what it ran with
    assert resolve(TrainConfig, {"config": str(tmp_path / "config.yaml")}).adaptation == "p"
    other = resolve(TrainConfig, {**ablation, "method": "e2e"})
    assert not any("adaptation" in line for line in other.without_effect)


def test_a_tilde_is_the_home_folder_in_every_path(tmp_path, monkeypatch):
    """A shell expands none in YAML and in `--option=~/file`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("a.csv", "b.csv"):
        (tmp_path / name).write_text("text,label\n")
    path = tmp_path / "c.yaml"
    path.write_text("{dataset: ~/a.csv, model: ~/m, test_file: ~/b.csv, output_dir: ~/run}")
    config = resolve(TrainConfig, {"config": "~/c.yaml"})
    assert (config.dataset, config.model) == (f"{tmp_path}/a.csv", f"{tmp_path}/m")
    assert (config.test_file, config.output_dir) == (tmp_path / "b.csv", tmp_path / "run")
    meta = resolve(TrainConfig, {"method": "MetaICL", "meta_datasets": "~/a.csv,mr, ~/b.csv"})
    assert meta.meta_datasets == f"{tmp_path}/a.csv,mr,{tmp_path}/b.csv"
    merge = resolve(MergeConfig, {"adapter": "~/a=0.5,~/b", "output_dir": "~"})
    assert merge.adapters == [(tmp_path / "a", 0.5), (tmp_path / "b", 1.0)]
    assert merge.output_dir == tmp_path
    assert resolve(EvalConfig, {"dataset": "~/a.csv", "text_column": "~"}).text_column == "~"


@pytest.mark.parametrize("text", ["- 1\n", "k: [\n", "kk: 3\n"])
def test_bad_config_files(tmp_path: Path, text):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(UserError):
        resolve(TrainConfig, {"config": str(path)})


def test_evaluation_names_what_does_nothing_too():
    (line,) = resolve(EvalConfig, {"calibration_samples": 2}).without_effect
    assert line.startswith("--calibration-samples does nothing here")
    used = {"calibration": "domain", "calibration_samples": 2}
    assert not resolve(EvalConfig, used).without_effect


@pytest.mark.parametrize("other", ["b.csv", "folder/test"])
def test_metaicl_does_not_train_on_what_is_tested(other, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder" / "test").mkdir(parents=True)
    given = {"method": "MetaICL", "dataset": "folder", "meta_datasets": f"{other},mr"}
    with pytest.raises(UserError, match=f"--meta-datasets holds {other}, which is tested"):
        resolve(TrainConfig, {**given, "test_file": "b.csv"})


def test_evaluation_takes_zero_shot():
    assert resolve(EvalConfig, {"k": "0"}).k == 0


@pytest.mark.parametrize("method", get_args(MethodName))
@pytest.mark.parametrize("model", ["builtin", "some/model"])
def test_defaults_of_a_method_are_saved_and_replayed(method, model, tmp_path):
    config = resolve(TrainConfig, {"method": method.lower(), "model": model})
    write_yaml(config, tmp_path / "config.yaml")
    again = resolve(TrainConfig, {"config": str(tmp_path / "config.yaml")})
    assert again == config.model_copy(update={"config": tmp_path / "config.yaml"})
    other = config.model_copy(update={"model": "other", "method": "E2E"})
    assert (other.trainable, other.lr) == (config.trainable, config.lr)


@pytest.mark.parametrize("name", ["method", "trainable", "lr"])
def test_a_list_in_place_of_a_value_is_one_mistake(name, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(f"{name}: [1]\n")
    with pytest.raises(UserError, match=rf"c\.yaml: --{name} \[1\]: "):
        resolve(TrainConfig, {"config": str(path)})


def test_the_table_of_methods_is_whole():
    assert tuple(METHODS) == get_args(MethodName)
    assert {name for name, m in METHODS.items() if m.gradient_can_be_local} == {"ABFT"}
    own = {m.data_option for m in METHODS.values()} - {None}
    assert own == {"meta_datasets", "plain_text"} and own < TrainConfig.model_fields.keys()
    for method in METHODS.values():
        assert (method.data_option is None) == method.trains_on_tested_dataset


def test_a_command_to_continue_repeats_what_was_given():
    given = {
        "file": "my sweep.yaml", "set": ["seed=[0, 1]", "k=2"], "engine": "ray", "jobs": "2",
        "cell_gpus": "0.5", "output_dir": "run[final]", "dry_run": True,
    }  # fmt: skip
    config = resolve(SweepConfig, given)
    assert shell_command("sweep", *config.as_arguments()) == (
        "abft-fast sweep 'my sweep.yaml' --set 'seed=[0, 1]' --set k=2 --output-dir 'run[final]' "
        "--jobs 2 --engine ray --cell-gpus 0.5 --dry-run"
    )
    switched_off = resolve(TrainConfig, {"head_filter": False})
    assert switched_off.as_arguments(["head_filter"]) == ["--no-head-filter"]

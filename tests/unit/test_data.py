"""Real data: StaICC's files, splits and prompts are what StaICC itself makes of them."""

import subprocess
import sys
import warnings

import pytest
from StaICC import normal
from StaICC.util import experimentor, hgf_dataset_loader

from abft_fast import data
from abft_fast.data import staicc_files
from abft_fast.data.staicc_files import SOURCES
from abft_fast.errors import UserError
from abft_fast.prompts import Template

pytestmark = pytest.mark.unit


def staicc_experimentor(name, k=4):
    source = SOURCES[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return experimentor.single_experimentor(
            original_dataset=getattr(hgf_dataset_loader, source.loader)(),
            k=k,
            dividing=list(source.split),
        )


@pytest.mark.slow
@pytest.mark.parametrize("name", data.DATASETS)
def test_staicc_form_is_staiccs_own_prompts(name):
    dataset = data.load(name)
    theirs = staicc_experimentor(name)
    template = Template.of(dataset, "staicc")
    prompts = dataset.test_prompts(4)
    assert [template.render(p)[0] for p in prompts] == theirs.prompt_set()
    truth = [
        theirs.triplet_dataset.get_default_ground_truth_label_index(i % len(dataset.test))
        for i in range(len(prompts))
    ]
    assert [p.query.label for p in prompts] == truth
    assert len(prompts) == 1024


@pytest.mark.slow
@pytest.mark.parametrize("name", data.DATASETS)
def test_split_sizes(name):
    dataset = data.load(name)
    pool = {"fp": 512, "tee": 3192}.get(name, 4096)
    assert (len(dataset.training), len(dataset.demonstrations), len(dataset.test)) == (
        1024, pool, 512,
    )  # fmt: skip
    assert len(dataset.label_words) == len(dataset.staicc_label_words)


def test_training_prompts_are_seeded_distinct_and_from_the_training_part():
    dataset = data.load("subj")
    prompts = dataset.training_prompts(4, 50, seed=1)
    assert prompts == dataset.training_prompts(4, 50, seed=1)
    assert prompts != dataset.training_prompts(4, 50, seed=2)
    allowed = {id(example) for example in dataset.training}
    for prompt in prompts:
        examples = [*prompt.demonstrations, prompt.query]
        assert len({id(e) for e in examples}) == 5
        assert all(id(e) in allowed for e in examples)


def test_names_and_the_originals_indices():
    loaders = [loader.__name__ for loader in normal.ORIGINAL_DATA_LOADER_NORMAL]
    named = [data.resolve_name(str(i)) for i in range(len(loaders))]
    assert [SOURCES[name].loader for name in named] == loaders
    assert sorted(named) == sorted(data.DATASETS)
    assert data.resolve_name("SST2") == "sst2"
    for bad in ("10", "-1", "²", "glue", ""):
        with pytest.raises(UserError, match="unknown"):
            data.resolve_name(bad)


def test_a_changed_file_is_not_unpickled(tmp_path, monkeypatch):
    path = tmp_path / "trec.dataset"
    path.write_bytes(b"not the pickle")
    monkeypatch.setattr(staicc_files, "_data_file", lambda source: path)
    data.load.cache_clear()
    with pytest.raises(UserError, match="SHA-256"):
        data.load("trec")
    data.load.cache_clear()


def test_too_many_demonstrations_are_refused():
    dataset = data.load("fp")
    with pytest.raises(UserError, match="at most 1023"):
        dataset.training_prompts(1024, 1, seed=0)
    with pytest.raises(UserError, match="512"):
        dataset.test_prompts(513)


def test_data_and_options_are_read_without_what_is_heavy():
    code = (
        "import sys, abft_fast.data, abft_fast.data.own, abft_fast.options.datasets\n"
        "print(sorted({'StaICC', 'torch', 'transformers', 'datasets'} & sys.modules.keys()))\n"
        "print(any(name.startswith('abft_fast.evaluation') for name in sys.modules))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.split("\n")[:2] == ["[]", "False"]


def test_test_prompts_need_neither_torch_nor_the_tests():
    code = (
        "import sys; from abft_fast import data; data.load('fp').test_prompts(2)\n"
        "print([n for n in sys.modules if n in ('torch', 'abft_fast.evaluation')])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"

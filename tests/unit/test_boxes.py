"""Entity tracking: generated prompts about objects in boxes, trained on, tested and analyzed."""

import csv
import dataclasses
import re

import pytest
import torch

from abft_fast import data
from abft_fast.analysis.path import permuted
from abft_fast.commands.analyze import cmap, dcm, path, show
from abft_fast.commands.analyze.models import draw_queries
from abft_fast.commands.evaluate import evaluate
from abft_fast.commands.train import train
from abft_fast.core.label_logits import label_logits
from abft_fast.data import boxes
from abft_fast.errors import Interrupted, UserError
from abft_fast.evaluation.behavior import BehaviorMean
from abft_fast.evaluation.evaluation_set import EvaluationSet
from abft_fast.models import loading
from abft_fast.options import CmapConfig, DcmConfig, EvalConfig, PathConfig, ShowConfig, TrainConfig
from abft_fast.options.resolve import resolve
from abft_fast.prompts import PromptEncoder, for_tokenizer
from abft_fast.runtime.progress import Progress
from abft_fast.training.methods import training_prompts
from abft_fast.training.run_folder import RunFolder

pytestmark = pytest.mark.unit

TOKENIZER = loading.read_tokenizer("builtin")
TRAINING = {
    "dataset": "boxes3", "device": "cpu", "train_samples": 16, "pseudo_batch_size": 8, "epochs": 1,
    "save_steps": 1, "no_report": True, "test_samples": 24,
}  # fmt: skip


def fitted(name):
    dataset = for_tokenizer(data.load(name), TOKENIZER)
    return dataset, PromptEncoder(TOKENIZER, dataset)


def words_at(encoded, positions):
    return [TOKENIZER.decode([encoded.input_ids[i]]).strip() for i in positions]


@pytest.mark.parametrize("name", data.BOXES)
def test_a_prompt_says_what_is_in_each_box_and_asks_for_one(name):
    dataset, encoder = fitted(name)
    prompts = dataset.test_prompts(dataset.boxes)[:64]
    encoded = encoder.encode(prompts)
    for prompt, one, label in zip(prompts, encoded.prompts, encoded.labels, strict=True):
        text, _ = encoder.template.render(prompt)
        facts = re.findall(r"[Tt]he (\w+) is in Box ([A-Z])(?:, |\. )", text)
        (asked,) = re.findall(r"Box ([A-Z]) contains the$", text)
        objects, letters = zip(*facts, strict=True)
        assert len(facts) == dataset.boxes == len(set(objects)) == len(set(letters))
        assert text == (
            "T" + ", ".join(f"the {o} is in Box {b}" for o, b in facts)[1:]
            + f". Box {asked} contains the"
        )  # fmt: skip
        # Each label position is the one token of its object, before "is in Box".
        assert words_at(one, one.label_positions) == list(objects)
        assert words_at(one, [i + 1 for i in one.label_positions]) == ["is"] * dataset.boxes
        assert one.label_is_correct == [letter == asked for letter in letters]
        right = dict(zip(letters, objects, strict=True))[asked]
        assert encoder.template.label_words[label] == right
        # What is predicted after the prompt is the token that stands in it.
        at = one.label_positions[one.label_is_correct.index(True)]
        assert one.input_ids[at] == encoder.label_ids[label]
        asked_at = encoder.tokens_at(prompt, encoder.template.letters(prompt))
        assert asked_at[0] == at + 4 and asked_at[1] > asked_at[0] + 1
        assert words_at(one, asked_at) == [asked.lower()] * 2
        answered = TOKENIZER(f"{text} {right}")["input_ids"]
        assert answered == [*one.input_ids, encoder.label_ids[label]]


def test_training_prompts_are_drawn_by_the_seed_and_are_never_tested(monkeypatch):
    dataset, _ = fitted("boxes3")
    tested = dataset.test_prompts(3)
    drawn = dataset.training_prompts(3, 200, 0)
    assert len(set(tested)) == len(tested) == 512 and len(drawn) == 200
    assert drawn == dataset.training_prompts(3, 200, 0) != dataset.training_prompts(3, 200, 1)
    assert dataset.training_prompts(3, 20, 0) == drawn[:20]
    places = [prompt.demonstrations.index(prompt.query) for prompt in tested]
    assert all(130 < places.count(place) < 210 for place in range(3))
    few = dataclasses.replace(dataset, label_words=("key", "pen", "hat"))
    monkeypatch.setattr(boxes.string, "ascii_uppercase", "ABCD")  # 432 prompts, most are tested
    tested = set(few.test_prompts(3))
    assert len(tested) > 200 and not tested & set(few.training_prompts(3, 200, 0))


def test_some_of_the_test_prompts():
    dataset, _ = fitted("boxes3")
    few = dataset.with_queries(20)
    assert few.test_prompts(3) == dataset.test_prompts(3)[:20]
    assert dataset.with_queries(600) == dataset


def test_objects_are_single_tokens_of_the_model():
    dataset, encoder = fitted("boxes7")
    kept = set(dataset.label_words)
    assert 7 < len(kept) < len(boxes.OBJECTS)
    for word in boxes.OBJECTS:
        assert (len(TOKENIZER(f"x {word}")["input_ids"]) == 2) == (word in kept)
    middle = sorted(encoder.label_ids)[20]
    small = for_tokenizer(data.load("boxes7"), TOKENIZER, vocabulary=middle)
    assert max(PromptEncoder(TOKENIZER, small, vocabulary=middle).label_ids) < middle
    assert len(small.label_words) == 20
    with pytest.raises(UserError, match="boxes7: 2 of the 113 objects are single tokens"):
        for_tokenizer(data.load("boxes7"), TOKENIZER, vocabulary=sorted(encoder.label_ids)[2])
    assert for_tokenizer(data.load("trec"), TOKENIZER) is data.load("trec")
    with pytest.raises(UserError, match="choose objects of one token by"):
        PromptEncoder(TOKENIZER, data.load("boxes7"))


def test_a_context_that_is_too_short_has_another_remedy():
    dataset, _ = fitted("boxes7")
    encoder = PromptEncoder(TOKENIZER, dataset, max_length=50, name_flags=True)
    with pytest.raises(UserError) as error:
        encoder.encode(dataset.test_prompts(7)[:3])
    assert str(error.value).endswith("use a dataset of fewer boxes, or pass --on-long-prompt drop")


def answering(label_of):
    """Predict with certainty the label word that `label_of` says, by kept prompt's index."""

    def predict(encoded, behavior):
        logits = torch.full((len(encoded.prompts), len(encoded.label_ids)), -5.0)
        for i in range(len(logits)):
            logits[i, label_of(encoded, i)] = 5.0
        return encoded.of_answers(logits), BehaviorMean()

    return predict


def test_only_the_objects_of_a_prompt_answer_it():
    dataset, encoder = fitted("boxes5")
    test = EvaluationSet(resolve(EvalConfig, {"dataset": "boxes5"}), dataset, encoder, "Normal")
    (encoded,) = test.encoded
    for i, prompt in enumerate(encoded.prompts):
        shown = [prompt.input_ids[at] for at in prompt.label_positions]
        assert encoded.answer_ids(i) == shown and len(set(shown)) == 5
        assert prompt.label_is_correct.index(True) == encoded.labels[i]

    right = test.run(answering(lambda encoded, i: encoded.answers[i][encoded.labels[i]]))
    assert right.metrics["accuracy"] == 1 and len(right.probabilities[0]) == 5
    # What is in no box has the largest logit, but is no answer: all five are equal then.
    absent = test.run(answering(lambda encoded, i: min(set(range(43)) - set(encoded.answers[i]))))
    assert absent.probabilities == [[pytest.approx(0.2)] * 5] * 512
    wrong = test.run(answering(lambda encoded, i: encoded.answers[i][encoded.labels[i] - 1]))
    assert wrong.metrics["accuracy"] == 0
    assert test.label_words == ["box 1", "box 2", "box 3", "box 4", "box 5"]
    assert len(set(right.queries)) == 512  # every prompt is a question of its own


def test_end_to_end_training_predicts_the_object():
    dataset, encoder = fitted("boxes3")
    config = resolve(TrainConfig, {"dataset": "boxes3", "method": "E2E", "train_samples": 20})
    for prompt in training_prompts(config, dataset, encoder).prompts:
        at = prompt.label_positions[prompt.label_is_correct.index(True)]
        assert prompt.targets == [prompt.input_ids[at]]


def test_path_patching_permutes_objects_among_boxes():
    dataset, encoder = fitted("boxes3")
    (prompt,) = encoder.encode(dataset.test_prompts(3)[:1]).prompts
    corrupted = permuted(prompt)
    first, second, third = (prompt.input_ids[i] for i in prompt.label_positions)
    assert [corrupted.input_ids[i] for i in prompt.label_positions] == [second, third, first]
    others = set(range(len(prompt))) - set(prompt.label_positions)
    assert all(corrupted.input_ids[i] == prompt.input_ids[i] for i in others)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (EvalConfig, {"k": 4}, "--k 4: boxes7 has 7 boxes in each prompt: leave --k out"),
        (EvalConfig, {"test_type": "GLER"}, "--test-type GLER: boxes7 has no test but Normal"),
        (EvalConfig, {"test_type": "Normal,LabelFollowing"}, "has no test but Normal"),
        (ShowConfig, {"test_type": "UnseenLabel"}, "has no test but Normal"),
        (EvalConfig, {"calibration": "batch"}, "--calibration batch: boxes7 has other answers"),
        (EvalConfig, {"prompt_form": "staicc"}, "--prompt-form staicc: boxes7 has one form"),
        (EvalConfig, {"label_token": "first"}, "--label-token first: boxes7 takes only objects"),
        (EvalConfig, {"on_long_prompt": "fewer-demonstrations"}, "boxes7 needs every box"),
        (EvalConfig, {"text_column": "x"}, "for your own data, and boxes7 is generated"),
        (TrainConfig, {"training_labels": "permuted"}, "--training-labels permuted: boxes7 draws"),
        (TrainConfig, {"training_datasets": "trec,boxes3"}, "--training-datasets boxes3: its"),
        (TrainConfig, {"method": "MetaICL", "meta_datasets": "boxes3"}, "--meta-datasets boxes3"),
    ],
)
def test_what_boxes_do_not_have_is_refused_in_one_line(kind, options, message):
    with pytest.raises(UserError) as error:
        resolve(kind, {"dataset": "boxes7", **options})
    assert message in str(error.value) and "\n" not in str(error.value)
    resolve(kind, {"dataset": "boxes7"})


def test_names():
    assert data.resolve_name("boxes") == data.resolve_name("Boxes7") == "boxes7"
    for name, count in data.BOXES.items():
        config = resolve(TrainConfig, {"dataset": name})
        assert (config.dataset, config.k, config.data_are_own) == (name, count, False)
        assert resolve(TrainConfig, config.model_dump(mode="json")).k == count
    assert resolve(TrainConfig, {"dataset": "boxes", "k": 7}).dataset_name == "boxes7"
    metaicl = resolve(TrainConfig, {"method": "MetaICL", "dataset": "boxes7"})
    assert metaicl.training_dataset_names == list(data.DATASETS)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("boxes") / "run"
    config = resolve(TrainConfig, {**TRAINING, "output_dir": folder})
    return train(config, RunFolder.reserve(config), Progress())


def test_eval_finds_what_the_run_found(run):
    rows = run.metrics()
    assert [row["step"] for row in rows] == [1, 2] and all(row["loss"] > 0 for row in rows)
    options = {"dataset": "boxes3", "device": "cpu", "test_samples": 24}
    config = resolve(EvalConfig, {**options, "adapter": str(run.folder / "adapter")})
    metrics, attention = evaluate(config, Progress())
    assert metrics == run.evaluation["after"] and attention == run.attention["after"]
    details = run.details("after")
    assert details["label_words"] == ["box 1", "box 2", "box 3"]
    assert {len(row) for row in details["probabilities"]} == {3} and len(details["labels"]) == 24


@pytest.mark.slow
def test_an_interrupted_run_goes_on_with_the_same_prompts(run, tmp_path):
    config = resolve(TrainConfig, {**TRAINING, "no_eval": True, "output_dir": tmp_path / "run"})
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(RunFolder, "append_metrics", interrupted_at_step_2)
        train(config, RunFolder.reserve(config), Progress())
    again, config = RunFolder.open(tmp_path / "run", {"resume": tmp_path / "run"})
    assert (config.dataset, config.k, len(again.metrics())) == ("boxes3", 3, 1)
    train(config, again, Progress())
    name = "adapter/adapter_model.safetensors"
    assert (again.folder / name).read_bytes() == (run.folder / name).read_bytes()


def interrupted_at_step_2(run, row, append=RunFolder.append_metrics):
    if row["step"] == 2:
        raise KeyboardInterrupt
    append(run, row)


@pytest.mark.slow
def test_a_streamed_run_finds_the_same(run, tmp_path):
    options = {"gradient": "local", "stream": True, "output_dir": tmp_path / "run"}
    config = resolve(TrainConfig, TRAINING | options)
    streamed = train(config, RunFolder.reserve(config), Progress()).details("before")
    expected = run.details("before")
    assert streamed["labels"] == expected["labels"]
    for row, other in zip(streamed["probabilities"], expected["probabilities"], strict=True):
        assert row == pytest.approx(other, abs=1e-4) and len(row) == 3


def table(results):
    (file,) = (each for each in results.written if each.suffix == ".csv")
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


@pytest.mark.slow
def test_analyses_score_the_objects_of_each_prompt(run, tmp_path):
    few = {"dataset": "boxes3", "device": "cpu", "adapter": run.folder / "adapter"}
    config = {**few, "prompts": 6, "groups": "layer", "output_dir": tmp_path}
    rows = table(cmap.cmap(resolve(CmapConfig, config), Progress()))

    dataset, encoder = fitted("boxes3")
    prompts = [dataset.test_prompts(3)[i] for i in draw_queries(range(512), 6)]
    model = loading.load("builtin", torch.device("cpu"), torch.float32)
    encoded = encoder.encode(prompts)
    with torch.no_grad():
        logits, _, _ = label_logits(model, encoded.prompts, encoder.label_ids)
    odds = []
    for prompt, row in zip(prompts, logits.double(), strict=True):
        others = [row[box.label] for box in prompt.demonstrations if box != prompt.query]
        odds.append(row[prompt.query.label] - torch.stack(others).logsumexp(0))
    for way in ("receiver", "none"):
        (found,) = (float(row["log_odds"]) for row in rows if row["group"] == way)
        assert found == pytest.approx(float(torch.stack(odds).mean()), abs=1e-4)

    effects = table(
        path.path(resolve(PathConfig, {**few, "prompts": 1, "output_dir": tmp_path}), Progress())
    )
    assert len(effects) == 2 * 3 * 4 * 6
    shown = table(show.show(resolve(ShowConfig, {**few, "output_dir": tmp_path}), Progress()))
    marks = {(int(row["position"]), row["label"]) for row in shown if row["label"]}
    assert sorted(mark for _, mark in marks) == ["asked", "asked", "right", "wrong", "wrong"]

    options = {**few, "prompts": 6, "steps": 2, "batch_size": 2, "output_dir": tmp_path}
    masks = table(dcm.dcm(resolve(DcmConfig, options), Progress()))
    assert len(masks) == 2 * 3 * (24 + 3)
    assert {row["prompts"] for row in masks if row["group"] == "all"} == {"3"}  # all can be used

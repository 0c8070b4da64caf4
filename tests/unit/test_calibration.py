"""Calibrations trained by a packed run are those StaICC trains one prompt at a time."""

import random

import pytest
import torch
from StaICC.prefabricate_inference import standard_calibration
from StaICC.prefabricate_inference.model_kernel import standard_ICL_inference_with_torch_Causal_LM
from StaICC.util import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from abft_fast import builtin_model_path, data
from abft_fast.errors import UserError
from abft_fast.evaluation.calibration import Calibration
from abft_fast.evaluation.evaluation_set import EvaluationSet
from abft_fast.evaluation.inference import predict_labels
from abft_fast.evaluation.staicc_adapter import Triplet, quiet
from abft_fast.options import EvalConfig
from abft_fast.options.resolve import resolve
from abft_fast.prompts import PromptEncoder
from tests.staicc_reference import staicc_experimentor
from tests.unit.test_staicc_tests import cut

pytestmark = pytest.mark.unit

THEIRS = {
    "contextual": standard_calibration.contextual_calibration,
    "domain": standard_calibration.domain_calibration,
}


@pytest.fixture(scope="module")
def builtin():
    path = builtin_model_path()
    return AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)


def one_by_one(model, tokenizer, calibration_function=None):
    def inference(prompt, label_space):
        return standard_ICL_inference_with_torch_Causal_LM(
            prompt,
            model,
            tokenizer,
            label_space,
            cache_empty=None,
            calibration_function=calibration_function,
        )

    return inference


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["none", "contextual", "domain", "batch"])
def test_a_whole_evaluation_is_staiccs_own(builtin, kind):
    """Ours packed, theirs on a model of its own, one prompt at a time; labels differ in GLER."""
    model, tokenizer = builtin
    options = resolve(
        EvalConfig,
        {
            "dataset": "tee",
            "k": 4,
            "test_type": "GLER" if kind == "none" else "Normal",
            "prompt_form": "staicc",
            "calibration": kind,
            "calibration_samples": 6,
        },
    )
    dataset = cut("tee", 8)
    encoder = PromptEncoder.from_options(options, tokenizer, dataset, None)
    test = EvaluationSet(options, dataset, encoder, options.test_type)
    outcome = test.run(lambda encoded, heads: predict_labels(model, encoded, 2000, behavior=heads))
    ours = outcome.metrics
    assert outcome.behavior.result().induction_heads > 0

    reference = AutoModelForCausalLM.from_pretrained(builtin_model_path())
    theirs = staicc_experimentor(options.test_type, "tee", 4, 8)
    trained = None
    if kind in THEIRS:
        trained = THEIRS[kind](theirs.get_label_space())
        with quiet():
            trained.train(
                theirs.get_prompt_writter_from_dataline(),
                one_by_one(reference, tokenizer),
                theirs.triplet_dataset.calibration,
                calibration_number=6,
                k=4,
            )
    single = one_by_one(reference, tokenizer, trained)

    def batch(prompt, label_space):
        return standard_calibration.batch_calibration([single(p, label_space) for p in prompt])

    with quiet():
        if kind == "batch":
            results, _ = theirs(batch, batched_inference=True)
        else:
            results, _ = theirs(single)
    if kind == "none":
        for i, rate in enumerate((0, 25, 50, 75, 100)):
            assert ours[f"accuracy_at_{rate}_percent_wrong"] == results[str(i)]["accuracy"]
        likelihood = results["sensitivity"]["averaged_truelabel_likelihood"]
        slope, intercept = (
            ours["true_label_likelihood_slope"],
            ours["true_label_likelihood_intercept"],
        )
        assert (slope, intercept) == pytest.approx(likelihood, abs=1e-5)
    else:
        assert ours["accuracy"] == results["accuracy"]
        assert ours["macro_f1"] == results["macro_F1"]
        assert ours["true_label_likelihood"] == pytest.approx(
            results["averaged_truelabel_likelihood"], abs=1e-5
        )


@pytest.mark.parametrize("kind", ["contextual", "domain"])
def test_the_prompts_learnt_from_are_staiccs_own(kind):
    found = Calibration(kind, Triplet(data.load("subj"), "staicc"), 4, 20).call
    theirs, prompts = staicc_experimentor("Normal", "subj", 4, 1), []

    def note(prompt, label_space):
        prompts.append(prompt)
        return [0.5, 0.5]

    with quiet():
        THEIRS[kind](["false", "true"]).train(
            theirs.get_prompt_writter_from_dataline(),
            note,
            theirs.triplet_dataset.calibration,
            calibration_number=20,
            k=4,
        )
    assert [found.template.render(prompt)[0] for prompt in found.prompts] == prompts
    assert not found.measures_behavior


def test_prompts_left_out_stay_out():
    generator = random.Random(0)
    rows = [functional.softmax([generator.gauss(0, 1) for _ in range(2)]) for _ in range(9)]
    calibration = Calibration("batch", Triplet(cut("subj", 5), "ours"), 4, 1)
    [found] = calibration.calibrate([[*rows[:4], [], *rows[4:]]], None)
    assert found == [*(expected := standard_calibration.batch_calibration(rows))[:4], [],
                     *expected[4:]]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"test_type": "TempSensitivity"}, "TempSensitivity compares all predictions of a query"),
        ({"calibration": "domain"}, "--calibration domain learns from every prompt"),
    ],
)
def test_prompts_that_staicc_needs_are_not_left_out(builtin, options, message):
    options = resolve(EvalConfig, {"on_long_prompt": "drop", "calibration_samples": 9} | options)
    dataset = cut("subj", 9)
    encoder = PromptEncoder.from_options(options, builtin[1], dataset, 230)
    with pytest.raises(UserError, match=message):
        EvaluationSet(options, dataset, encoder, options.test_type)


def test_prompts_left_out_of_an_evaluation(builtin):
    """The metrics are those of the others."""
    model, tokenizer = builtin
    options = resolve(EvalConfig, {"on_long_prompt": "drop", "dataset": "subj"})
    dataset = cut("subj", 9)
    encoder = PromptEncoder.from_options(options, tokenizer, dataset, 180)
    found = EvaluationSet(options, dataset, encoder, options.test_type)
    [encoded] = found.encoded
    assert 0 < encoded.dropped < 18
    outcome = found.run(lambda encoded, heads: predict_labels(model, encoded, 2000, behavior=heads))
    logits, _ = predict_labels(model, encoded, 2000)
    right = logits.argmax(-1) == torch.tensor(encoded.labels)
    assert outcome.metrics["accuracy"] == pytest.approx(right.double().mean().item())

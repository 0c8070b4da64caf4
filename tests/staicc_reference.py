"""StaICC's own experimentors, from its own loaders, to be compared with."""

import copy
import functools

import pytest
import torch
from StaICC.prefabricate_inference.model_kernel import standard_ICL_inference_with_torch_Causal_LM
from StaICC.util import dataset_interface, experimentor, functional, hgf_dataset_loader

from abft_fast.data.staicc_files import SOURCES
from abft_fast.evaluation.staicc_adapter import quiet

KINDS = {
    "Normal": experimentor.single_experimentor,
    "UnseenLabel": experimentor.single_experimentor,
    "TempSensitivity": experimentor.template_sensitivity_experimentor,
    "DemoSensitivity": experimentor.demonstration_sensitivity_experimentor,
    "GLER": experimentor.GLER_experimentor,
    "contextual": experimentor.prior_bias_experimentor,
    "domain": experimentor.prior_bias_experimentor,
    "post": experimentor.post_bias_experimentor,
}


@functools.cache
def _loaded(name):
    return getattr(hgf_dataset_loader, SOURCES[name].loader)()


@functools.cache
def _split(name, test):
    calibration, demonstration, _ = SOURCES[name].split
    with quiet():
        return dataset_interface.triplet_dataset(_loaded(name), calibration, demonstration, test)


_sampler = dataset_interface.demonstration_sampler
_drawn = functools.cache(_sampler)


def staicc_experimentor(kind, name, k, queries=None):
    """A fresh one; `queries` cuts its test set, which its own sampler is then drawn for.

    Splits and draws are StaICC's own, made once, as each takes a second. Its tests of templates
    split again, for fewer test examples, which are the first of the others: done for one dataset.
    """
    separate = kind == "TempSensitivity" and name == "fp"  # its split, of 100 test examples
    triplet = copy.deepcopy(_split(name, 100 if separate else 512))
    if kind == "TempSensitivity":
        triplet.test.cut_by_index(min(queries or 100, 100))
    elif queries is not None:
        triplet.test.cut_by_index(queries)
    options = {}
    if kind in ("contextual", "domain"):
        options["bias_type"] = kind
    if kind == "TempSensitivity" and queries is not None:
        options["metrics"] = {
            "consistency": functools.partial(functional.consistency, loop_length=queries)
        }
    if kind == "DemoSensitivity" and queries is not None:
        options["metrics"] = {
            "consistency": functools.partial(functional.consistency, loop_length=queries // 4)
        }
    with quiet(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            dataset_interface, "demonstration_sampler", lambda *a: copy.deepcopy(_drawn(*a))
        )
        made = KINDS[kind](triplet_dataset=triplet, k=k, **options)
        if kind == "UnseenLabel":
            made.set_out_of_domain_mode()
    return made


def staicc_probabilities(model, tokenizer, dataset, template, prompts):
    """What StaICC's harness says of each prompt by its own string, (prompts, labels)."""
    words = list(dataset.staicc_label_words)
    return torch.tensor([
        standard_ICL_inference_with_torch_Causal_LM(
            template.render(prompt)[0], model, tokenizer, words, cache_empty=None
        )
        for prompt in prompts
    ])  # fmt: skip


def parts(test_type):
    """The experimentors of one of our test types."""
    return ("contextual", "domain", "post") if test_type == "TripletBias" else (test_type,)

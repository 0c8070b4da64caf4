"""A dataset as StaICC's experimentors see it, and a writer that writes `Prompt`s, not strings."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import warnings
from collections.abc import Iterator, Sequence

from StaICC.util import dataset_interface, hgf_dataset_loader
from StaICC.util.experimentor import single_experimentor

from abft_fast.data import Dataset, Example, Prompt
from abft_fast.data.sampling import Sampler
from abft_fast.prompts import Template


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence StaICC's progress on stdout and its warnings about settings."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class Part(hgf_dataset_loader.basic_datasets_loader):
    """One of a dataset's three parts: calibration, demonstration or test."""

    def __init__(self, dataset: Dataset, template: Template, name: str, examples: Sequence):
        super().__init__()
        self.dataset_name = f"{dataset.name}-{name}"
        self.table = [([example.text], example.label) for example in examples]
        self._instruction, self._query_prefix = template.instruction, template.query_prefix
        self._input_text_prefixes = [template.input_prefix]
        self._input_text_affixes = [template.input_affix]
        self._label_prefix, self._label_affix = template.label_prefix, template.label_affix
        self._label_space = list(template.label_words)
        self._label_mapping = {label: label for label in range(len(template.label_words))}


class Triplet(dataset_interface.triplet_dataset):
    """A dataset that is already split; `install` gives it its test part."""

    def __init__(self, dataset: Dataset, form: str):  # StaICC's own would split
        self.template = Template.of(dataset, form)
        self.dataset = dataset
        self.dataset_name = dataset.name
        self.alternate_template = dataset.alternate_template
        self.calibration = self.part("calibration", dataset.training)
        self.demonstration = self.part("demonstration", dataset.demonstrations)
        self.test = self.part("test", ())

    def part(self, name: str, examples: Sequence[Example]) -> Part:
        """Return a part with some of the dataset's examples."""
        return Part(self.dataset, self.template, name, examples)


class PromptWriter(dataset_interface.prompt_writter):
    """StaICC's writer, except its last step: it returns a `Prompt`, which `template` renders."""

    def __init__(self, triplet: Triplet, pseudo_queries: Iterator[list[str]] | None = None):
        super().__init__(triplet, pseudo_query_generater=pseudo_queries)

    @property
    def template(self) -> Template:
        """Return how prompts are written now; some experimentors change it."""
        return Template(
            self._input_text_prefixes[0],
            self._label_prefix,
            tuple(self._label_space),
            self._triplet_dataset.template.form,
            instruction=self._instruction,
            input_affix=self._input_text_affixes[0],
            label_affix=self._label_affix,
            query_prefix=self._query_prefix,
        )

    def write_prompt(self, demos_indexes: list[int], query_index: int | None = None) -> Prompt:
        """Return demonstrations and a test query with its label; a pseudo query has none."""
        prompt = super().write_prompt(demos_indexes, query_index)
        if self.pseudo_prompt:
            return prompt
        label = self._triplet_dataset.get_default_ground_truth_label_index(query_index)
        return dataclasses.replace(prompt, query=Example(prompt.query.text, label))

    def write_prompt_from_dataline(
        self,
        demos_lines: Sequence[tuple[Sequence[str], str]],
        query_line: Sequence[str],
        cut_by_length: int = 0,
    ) -> Prompt:
        """Return a prompt whose query's label is not known."""
        words = self._triplet_dataset.demonstration
        return Prompt(
            tuple(
                Example(text, words.find_index_from_label(label)) for [text], label in demos_lines
            ),
            Example(query_line[0], Example.NO_LABEL),
        )


def install(
    experimentor: single_experimentor, test: Sequence[Example], draws: int
) -> single_experimentor:
    """Give an experimentor its test examples, `draws` demonstration draws, and our writer."""
    triplet = experimentor.triplet_dataset
    triplet.test = triplet.part("test", test)
    experimentor.prompt_former = PromptWriter(triplet, experimentor.prompt_former.pseudo_prompt)
    sampler = Sampler(experimentor.get_k(), len(triplet.demonstration), draws)
    experimentor.demonstration_sampler = experimentor._default_demonstration_sampler = sampler
    return experimentor

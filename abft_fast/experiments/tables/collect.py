"""Sort runs into methods: which runs differ only in dataset and seed, and what they scored."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from abft_fast.experiments.cell import CALIBRATIONS, SAID_BY_METHOD, VANILLA, WITHOUT_RESULT
from abft_fast.experiments.own_data import check_data_unchanged, fixed_data_options
from abft_fast.experiments.records import Record, ambiguous
from abft_fast.experiments.tables.statistics import changed_options
from abft_fast.experiments.tables.types import MethodRuns
from abft_fast.options import EvalConfig, TrainConfig
from abft_fast.options.methods import METHODS

_NOT_COMPARED = WITHOUT_RESULT | {
    "model", "dataset", "seed", "adapter", "method", "generalization_test",
}  # fmt: skip
"""Options that do not split the runs of a method: columns, seeds, and what changes no result."""

_TITLES = {VANILLA: "Vanilla", "contextual": "Calibrate (contextual)"}


def collect(records: Iterable[Record], metric: str) -> list[MethodRuns]:
    """Sort the scores of a metric into methods, in the order of a table's lines.

    The evaluations before training are the runs of `vanilla`. They are the same whatever is
    trained afterwards, so all evaluations of a model and dataset count as one.

    Raises:
        UserError: a data file changed between runs, or two datasets have one name.
    """
    records = list(records)
    check_data_unchanged(records)
    collector = _Collector(records, metric)
    for record in records:
        collector.add_before_training(record)
        collector.add_result(record)
    return _named(_in_order(collector.tested_methods()))


class _Collector:
    """Adds records one at a time to the runs of their methods."""

    def __init__(self, records: list[Record], metric: str) -> None:
        self._metric = metric
        self._not_compared = {*_NOT_COMPARED, *fixed_data_options(records)}
        self._ambiguous_models = ambiguous(
            (_model_name(r), str(r.options["model"])) for r in records
        )
        self._methods: dict[tuple, MethodRuns] = {}
        self._test_types: set[str] = set()  # of the runs that have the metric

    def add_before_training(self, record: Record) -> None:
        """Add the scores of the evaluation before training."""
        untrained = record.untrained
        for dataset, score in self._scores(untrained):
            runs = self._evaluation_runs(untrained)
            runs.scores.setdefault((dataset, dataset), {}).setdefault(None, []).append(score)

    def add_result(self, record: Record) -> None:
        """Add what the record's method reached, unless the run was not to be evaluated."""
        if record.options.get("no_eval") or record.options.get("no_eval_after"):
            return
        if record.method in CALIBRATIONS:
            runs, seed = self._evaluation_runs(record), None
        else:
            runs, seed = self._training_runs(record), record.options["seed"]
        runs.datasets.add(record.dataset)
        for dataset, score in self._scores(record):
            trained_on = record.dataset if runs.trains else dataset
            runs.scores.setdefault((trained_on, dataset), {}).setdefault(seed, []).append(score)
        if record.seconds is not None and "after" in record.evaluation:
            by_seed = runs.seconds.setdefault(record.dataset, {})
            by_seed.setdefault(seed, []).append(record.seconds)
        if record.trained_parameters is not None:
            runs.trained_parameters.append(record.trained_parameters)

    def tested_methods(self) -> list[MethodRuns]:
        """Return the methods whose type of test yields the metric, even without scores yet."""
        return [
            runs for runs in self._methods.values() if runs.options["test_type"] in self._test_types
        ]

    def _scores(self, record: Record) -> Iterator[tuple[str, float]]:
        for dataset, metrics in record.evaluation.get("after", {}).items():
            if metrics.get(self._metric) is not None:
                self._test_types.add(record.options.get("test_type", "Normal"))
                yield dataset, metrics[self._metric]

    def _training_runs(self, record: Record) -> MethodRuns:
        setting = record.labels.get("setting", "")
        if setting == record.method:  # says no more than the method of a run without a sweep
            setting = ""
        return self._runs(record, TrainConfig, self._not_compared, setting)

    def _evaluation_runs(self, record: Record) -> MethodRuns:
        return self._runs(record, EvalConfig, self._not_compared | SAID_BY_METHOD)

    def _runs(
        self,
        record: Record,
        kind: type[TrainConfig | EvalConfig],
        not_compared: set[str],
        setting: str = "",
    ) -> MethodRuns:
        """Return the runs that a record belongs to; the first record of a kind starts them."""
        model = _model_name(record)
        if model in self._ambiguous_models:
            model += f" ({record.options['model']})"
        options = {
            # The default stands in for an option that did not exist yet when the run was made.
            name: record.options.get(name, field.default)
            for name, field in kind.model_fields.items()
            if not field.exclude and name not in not_compared
        }
        values = tuple(sorted((name, str(value)) for name, value in options.items()))
        key = (model, record.method, setting, values)  # settings may differ in their time alone
        return self._methods.setdefault(key, MethodRuns(model, record.method, setting, options))


def _model_name(record: Record) -> str:
    """Return the model's name in the sweep file, else its path."""
    return record.labels.get("model", str(record.options["model"]))


def _in_order(methods: list[MethodRuns]) -> list[MethodRuns]:
    """Sort by model; within a model: evaluated methods, trained ones, ABFT last, plain first."""
    models = list(dict.fromkeys(runs.model for runs in methods))
    order = [*CALIBRATIONS, *(method for method in METHODS if method != "ABFT"), "ABFT"]

    def place(runs: MethodRuns) -> tuple[int, int, int]:
        return models.index(runs.model), order.index(runs.method), changed_options(runs)

    return sorted(methods, key=place)


def titled(method: str, methods: Iterable[MethodRuns]) -> str:
    """Return what a table calls a method of training; say where its corpus is not its paper's."""
    if not _has_corpus(method):
        return method
    prompts = sorted({runs.options["train_samples"] for runs in methods})
    return f"{method} (on {' or '.join(map(str, prompts))} prompts, not its paper's corpus)"


def _has_corpus(method: str) -> bool:
    """Return whether the method's paper trains on a corpus; here it trains on a few prompts."""
    return method in METHODS and not METHODS[method].trains_on_tested_dataset


def _named(methods: list[MethodRuns]) -> list[MethodRuns]:
    """Give each method a name of its own within its model: its setting, then what differs."""
    for runs in methods:
        title = _TITLES.get(runs.method, f"Calibrate ({runs.method})")
        runs.name = titled(runs.method, [runs]) if runs.trains else title
        same_method = [r for r in methods if (r.model, r.method) == (runs.model, runs.method)]
        if len(same_method) == 1:
            continue
        if runs.setting:
            runs.name += f", {runs.setting}"
        same_name = [r for r in same_method if r.setting == runs.setting]
        differing = [
            f"{option}={value}"
            for option, value in runs.options.items()
            if len({str(r.options.get(option)) for r in same_name}) > 1
            and not (option == "train_samples" and _has_corpus(runs.method))  # is in the title
        ]
        if differing:
            runs.name += f" ({', '.join(differing)})"
    return methods

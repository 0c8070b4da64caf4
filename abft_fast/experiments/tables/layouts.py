"""The layouts of the paper's tables 1 to 4, and of the tests of label following."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence

from abft_fast.data import DATASETS
from abft_fast.errors import UserError
from abft_fast.experiments.cell import SAID_BY_METHOD, VANILLA
from abft_fast.experiments.records import Record
from abft_fast.experiments.tables.collect import collect, titled
from abft_fast.experiments.tables.statistics import (
    average,
    mark_best,
    out_of_domain,
    over_seeds,
    parameter_count,
    relative_time,
)
from abft_fast.experiments.tables.types import Entry, MethodRuns, Table
from abft_fast.options import EvalConfig, TableConfig

_LESS_IS_BETTER = ("expected_calibration_error",)
_LABEL_METRICS = {
    "own": "Own",
    "rotated": "Rotated",
    "symbols": "New words",
    "override_rate": "Follows rotation",
    "prior_rate": "Keeps own label",
}
_CONSISTENCY_TESTS = {"Template": "TempSensitivity", "Demonstration": "DemoSensitivity"}


def make_table(config: TableConfig, records: Iterable[Record]) -> Table:
    """Make a table of the runs, in the layout that the options ask for.

    Raises:
        UserError: no run has the scores that this layout shows, or runs contradict one another.
    """
    if config.layout == "labels":
        return label_following(config, list(records))
    metric = "consistency" if config.layout == "3" else config.metric
    methods = collect(records, metric)
    if not any(runs.scores for runs in methods):
        raise UserError(
            f"layout {config.layout}: no run below {config.folder} was evaluated for {metric}"
        )
    match config.layout:
        case "1":
            return by_dataset(methods, best=min if metric in _LESS_IS_BETTER else max)
        case "2":
            return cost(methods)
        case "3":
            return consistency(methods)
        case _:
            return settings(methods)


def by_dataset(methods: list[MethodRuns], best: Callable[[list[float]], float] = max) -> Table:
    """Lay out table 1: a line a method, a column a dataset.

    The best entry of a column is that of one model under one test.

    Args:
        methods: runs by method, those of a model in sequence.
        best: `max`, or `min` where less is better.
    """
    datasets = _datasets(methods)
    columns = [[over_seeds(runs.in_domain(name)) for runs in methods] for name in datasets]
    columns.append([_in_domain_average(runs, datasets) for runs in methods])
    by_test: dict[tuple[str, ...], list[int]] = {}
    for index, runs in enumerate(methods):
        options = _evaluation_options(runs, without=("calibration_samples",))
        test = (runs.model, runs.options["test_type"], *options)
        by_test.setdefault(test, []).append(index)
    for column, places in itertools.product(columns, by_test.values()):
        marked = mark_best([column[index] for index in places], best)
        for index, entry in zip(places, marked, strict=True):
            column[index] = entry
    lines: list[list[str | Entry]] = [
        [runs.model, runs.name, runs.seeds, *(column[index] for column in columns)]
        for index, runs in enumerate(methods)
    ]
    titles = [name.upper() if name in DATASETS else name for name in datasets]
    return Table(["Model", "Method", "Seeds", *titles, "Average"], lines)


def cost(methods: list[MethodRuns]) -> Table:
    """Lay out table 2: trained parameters, training time, scores in and out of domain."""
    all_datasets = _datasets(methods)
    trained_on = _trained_on([runs for runs in methods if runs.trains] or methods)
    lines: list[list[str | Entry]] = [
        [
            runs.model,
            runs.name,
            runs.seeds,
            parameter_count(runs),
            relative_time(runs, methods),
            _in_domain_average(runs, trained_on),
            average([out_of_domain(runs, name, all_datasets) for name in trained_on]),
        ]
        for runs in methods
    ]
    titles = ["Model", "Method", "Seeds", "Param.", "Time", "In domain", "Out of domain"]
    return Table(titles, lines)


def consistency(methods: list[MethodRuns]) -> Table:
    """Lay out table 3: consistency under other templates and demonstrations, by method.

    Raises:
        UserError: a method was run with several settings, which one column cannot show.
    """
    trained = list(dict.fromkeys(runs.method for runs in methods if runs.method != VANILLA))
    names = [titled(name, [runs for runs in methods if runs.method == name]) for name in trained]
    columns = ["w/o", *(f"w/ {name}" for name in names)]
    titles = [f"{test}, {column}" for test in _CONSISTENCY_TESTS for column in columns]
    datasets = _datasets(methods)
    by_evaluation: dict[tuple[str, ...], list[MethodRuns]] = {}
    for runs in methods:
        by_evaluation.setdefault((runs.model, *_evaluation_options(runs)), []).append(runs)
    lines: list[list[str | Entry]] = []
    for (model, *options), group in by_evaluation.items():
        others = [
            other for name, *other in by_evaluation if name == model and set(other) != set(options)
        ]
        distinct = [option for option in options if any(option not in other for other in others)]
        name = f"{model} ({', '.join(distinct)})" if distinct else model
        seeds = sorted({runs.seeds for runs in group if runs.trains})
        entries = []
        for test_type in _CONSISTENCY_TESTS.values():
            tested = [runs for runs in group if runs.options["test_type"] == test_type]
            for method in (VANILLA, *trained):
                only = _only_setting(tested, method)
                entries.append(_in_domain_average(only, datasets) if only else Entry())
        lines.append([name, ", ".join(seeds) or "0", *entries])
    return Table(["Model", "Seeds", *titles], lines)


def settings(methods: list[MethodRuns]) -> Table:
    """Lay out table 4: training time relative to plain ABFT's, and the average over datasets."""
    datasets = _datasets(methods)
    lines: list[list[str | Entry]] = [
        [
            runs.model,
            runs.name,
            runs.seeds,
            relative_time(runs, methods),
            _in_domain_average(runs, datasets),
        ]
        for runs in methods
    ]
    return Table(["Model", "Method", "Seeds", "Time", "Average"], lines)


def label_following(config: TableConfig, records: Sequence[Record]) -> Table:
    """Lay out the tests of label following: a line a method, means over datasets.

    Raises:
        UserError: no run was tested so.
    """
    lines: dict[tuple[str, str], list[str | Entry]] = {}
    for column, metric in enumerate(_LABEL_METRICS):
        methods = collect(records, metric)
        datasets = _datasets(methods)
        for runs in methods:
            blank = [Entry()] * len(_LABEL_METRICS)
            start: list[str | Entry] = [runs.model, runs.name, runs.seeds, *blank]
            line = lines.setdefault((runs.model, runs.name), start)
            line[3 + column] = _in_domain_average(runs, datasets)
    if not lines:
        raise UserError(
            f"layout labels: no run below {config.folder} was evaluated by --test-type "
            "LabelFollowing"
        )
    return Table(["Model", "Method", "Seeds", *_LABEL_METRICS.values()], list(lines.values()))


def _in_domain_average(runs: MethodRuns, datasets: list[str]) -> Entry:
    return average([runs.in_domain(name) for name in datasets])


def _evaluation_options(runs: MethodRuns, without: Iterable[str] = ()) -> list[str]:
    """Return the options of evaluation, as `k=4`, less those that the columns of table 3 show.

    How a model is read is none of them.
    """
    left_out = {"test_type", *SAID_BY_METHOD, *without}
    return [
        f"{name}={value}"
        for name, value in runs.options.items()
        if name in EvalConfig.model_fields and name not in left_out
    ]


def _only_setting(methods: list[MethodRuns], method: str) -> MethodRuns | None:
    """Return the one entry of a method, or None if there is none."""
    settings = [runs for runs in methods if runs.method == method]
    if len(settings) > 1:
        raise UserError(
            f"layout 3: {settings[0].model} has {len(settings)} settings of {method}: "
            "use a folder with one setting"
        )
    return settings[0] if settings else None


def _trained_on(methods: list[MethodRuns]) -> list[str]:
    """Return the datasets that runs are of, in the paper's order."""
    return _in_order({name for runs in methods for name in runs.datasets})


def _datasets(methods: list[MethodRuns]) -> list[str]:
    """Return the datasets that runs are of or were evaluated on, in the paper's order."""
    evaluated = {name for runs in methods for _, name in runs.scores}
    return _in_order(evaluated.union(*(runs.datasets for runs in methods)))


def _in_order(names: set[str]) -> list[str]:
    order = {name: index for index, name in enumerate(DATASETS)}
    return sorted(names, key=lambda name: (order.get(name, len(order)), name))

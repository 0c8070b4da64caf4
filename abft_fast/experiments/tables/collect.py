"""The paper's tables 1 to 4 from what runs left: seeds to mean and deviation, nothing filled in."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from abft_fast.data.catalog import DATASETS
from abft_fast.errors import UserError
from abft_fast.experiments.grid import EVALUATED, WHERE
from abft_fast.experiments.records import Record
from abft_fast.options import EvalConfig, TableConfig, TrainConfig

VANILLA = "vanilla"

_NOT_THE_EXPERIMENT = WHERE | {
    "model", "dataset", "seed", "adapter", "method", "generalization_test", "token_budget",
    "attention_backend", "checkpointing", "save_steps", "tracker", "no_eval", "no_eval_before",
    "no_eval_after", "no_save",
}  # fmt: skip
"""Options by which rows are not told apart: columns, seeds, and what no result depends on."""

_OF_DATA = ("text_column", "label_column", "template", "test_file", "test_share", "split_seed")
"""Options that belong to a dataset of the user's own, where each dataset has its own of them."""

_LESS_IS_BETTER = ("expected_calibration_error",)
_CONSISTENCY = {"Template": "TempSensitivity", "Demonstration": "DemoSensitivity"}


@dataclass(frozen=True)
class Entry:
    """What a table shows in one place.

    Attributes:
        mean: None where nothing was found.
        deviation: of the sample, over seeds; None with fewer than two.
        unit: `%` for shares, which are shown times 100, `x` for ratios, `` for counts.
        note: what a reader must know, such as `7 of 8 datasets`.
        best: the best of its model.
        applies: whether there could be a value at all.
    """

    mean: float | None = None
    deviation: float | None = None
    unit: str = "%"
    note: str = ""
    best: bool = False
    applies: bool = True


@dataclass(frozen=True)
class Table:
    """Titles of columns, and lines of texts and entries; `model` starts a new group."""

    titles: list[str]
    lines: list[list[str | Entry]]


@dataclass
class Row:
    """All runs that differ in dataset and seed alone.

    Attributes:
        options: what tells it from other rows of its model and method.
        datasets: its runs are of; some may have no score yet.
        scores: by dataset trained on, dataset evaluated on, seed; each found once or more often.
        seconds: of training, by dataset and seed.
        parameters: trained, as runs said.
    """

    model: str
    method: str
    setting: str
    options: dict[str, Any]
    datasets: set[str] = field(default_factory=set)
    scores: dict[tuple[str, str], dict[int | None, list[float]]] = field(default_factory=dict)
    seconds: dict[str, dict[int | None, list[float]]] = field(default_factory=dict)
    parameters: list[int] = field(default_factory=list)
    name: str = ""

    @property
    def seeds(self) -> str:
        """How many seeds its entries are means of."""
        counts = sorted({len(by_seed) for by_seed in self.scores.values()})
        return "-".join(str(n) for n in sorted({counts[0], counts[-1]})) if counts else "0"


def make_table(config: TableConfig, records: Iterable[Record]) -> Table:
    """A table of the runs, in the layout asked for.

    Raises:
        UserError: no run has what this layout shows.
    """
    metric = "consistency" if config.layout == "3" else config.metric
    rows = collect(records, metric)
    if not any(row.scores for row in rows):
        raise UserError(
            f"layout {config.layout}: no run below {config.folder} was evaluated for {metric}"
        )
    layouts = {"1": by_dataset, "2": cost, "3": consistency, "4": settings}
    return layouts[config.layout](rows, metric)


def collect(records: Iterable[Record], metric: str) -> list[Row]:
    """Rows of a metric, by model; the evaluations before training are its vanilla row.

    An evaluation without training is the same whatever is trained afterwards, so all that were
    made of it count as one.
    """
    records = list(records)
    _check_contents(records)
    paths: dict[str, set[str]] = {}  # of models, by what they are called
    for record in records:
        paths.setdefault(_called(record), set()).add(str(record.options["model"]))
    left_out = {*_NOT_THE_EXPERIMENT, *_of_data(records)}
    rows: dict[tuple, Row] = {}
    tests = set()  # that yield this metric

    def row(record: Record, method: str, kind: type) -> Row:
        options = {
            name: record.options.get(name, field.default)  # a run of before there was the option
            for name, field in kind.model_fields.items()
            if not field.exclude
            and name not in left_out
            and (name != "calibration" or kind is TrainConfig)  # else it is the method
        }
        model = _called(record)
        if len(paths[model]) > 1:
            model += f" ({record.options['model']})"
        setting = record.labels.get("setting", "") if kind is TrainConfig else ""
        key = (model, method, tuple(sorted((n, str(v)) for n, v in options.items())))
        return rows.setdefault(key, Row(model, method, setting, options))

    def found(record: Record, side: str) -> Iterator[tuple[str, float]]:
        for name, scores in record.evaluation.get(side, {}).items():
            if scores.get(metric) is not None:
                tests.add(record.options.get("test_type", "Normal"))
                yield name, scores[metric]

    for record in records:
        options, dataset = record.options, record.dataset
        untrained = next(m for m, c in EVALUATED.items() if c == options.get("calibration", "none"))
        for name, score in found(record, "before"):
            place = row(record, untrained, EvalConfig).scores.setdefault((name, name), {})
            place.setdefault(None, []).append(score)
        if options.get("no_eval") or options.get("no_eval_after"):
            continue
        evaluated_only = record.method in EVALUATED
        seed = None if evaluated_only else options["seed"]
        mine = row(record, record.method, EvalConfig if evaluated_only else TrainConfig)
        mine.datasets.add(dataset)
        for name, score in found(record, "after"):
            place = mine.scores.setdefault((name if evaluated_only else dataset, name), {})
            place.setdefault(seed, []).append(score)
        if record.seconds is not None and "after" in record.evaluation:
            mine.seconds.setdefault(dataset, {}).setdefault(seed, []).append(record.seconds)
        if record.trained_parameters is not None:
            mine.parameters.append(record.trained_parameters)
    return _named([row for row in rows.values() if row.options["test_type"] in tests])


def _called(record: Record) -> str:
    """A model's name in the sweep file, or its own."""
    return record.labels.get("model", str(record.options["model"]))


def _check_contents(records: list[Record]) -> None:
    """Raises UserError where a file of the user's changed between runs."""
    known: dict[str, tuple[str, Record]] = {}
    for record in records:
        for path, digest in record.data.items():
            first, other = known.setdefault(path, (digest, record))
            if first != digest:
                raise UserError(
                    f"{path} changed between {other.folder} and {record.folder}: move away the "
                    "runs on what it was"
                )


def _of_data(records: list[Record]) -> list[str]:
    """Options of the user's own data that no dataset has two values of.

    Raises:
        UserError: two datasets have one name, so that their scores could not be told apart.
    """
    values: dict[tuple[str, str], set[str]] = {}
    for record in records:
        for name in ("dataset", *_OF_DATA):
            values.setdefault((record.dataset, name), set()).add(str(record.options.get(name)))
    for (dataset, name), found in values.items():
        if name == "dataset" and len(found) > 1:
            first, second, *_ = sorted(found)
            raise UserError(f"two datasets are called {dataset}: {first} and {second}: rename one")
    datasets = {record.dataset for record in records}
    return [name for name in _OF_DATA if all(len(values[d, name]) == 1 for d in datasets)]


def _named(rows: list[Row]) -> list[Row]:
    """The rows in order, each with a name of its own within its model."""
    models = list(dict.fromkeys(row.model for row in rows))
    order = [VANILLA, *(method for method in EVALUATED if method != VANILLA)]
    rows = sorted(
        rows,
        key=lambda row: (
            models.index(row.model),
            order.index(row.method) if row.method in order else len(order) + (row.method == "ABFT"),
            _changes(row),
        ),
    )
    for row in rows:
        words = {VANILLA: "Vanilla", "contextual": "Calibrate (contextual)"}
        word = words.get(row.method, f"Calibrate ({row.method})")
        row.name = word if row.method in EVALUATED else row.method
        alike = [r for r in rows if (r.model, r.method) == (row.model, row.method)]
        if len(alike) == 1:
            continue
        if row.setting not in ("", row.method):
            row.name += f", {row.setting}"
        alike = [r for r in alike if r.setting == row.setting]
        differ = [n for n in row.options if len({str(r.options.get(n)) for r in alike}) > 1]
        if differ:
            row.name += f" ({', '.join(f'{n}={row.options[n]}' for n in differ)})"
    return rows


def _changes(row: Row) -> int:
    """How many options are not the default."""
    defaults = {name: field.default for name, field in TrainConfig.model_fields.items()}
    return sum(value != defaults.get(name) for name, value in row.options.items())


def by_dataset(rows: list[Row], metric: str) -> Table:
    """Table 1: a row a method, a column a dataset."""
    datasets = _datasets(rows)
    body = []
    for row in rows:
        places = [row.scores.get((name, name), {}) for name in datasets]
        body.append([*map(_entry, places), _average(places)])
    better = min if metric in _LESS_IS_BETTER else max
    for model in {row.model for row in rows}:
        mine = [line for row, line in zip(rows, body, strict=True) if row.model == model]
        for column in range(len(datasets) + 1):
            _mark_best([line[column] for line in mine], better, mine, column)
    lines = [[row.model, row.name, row.seeds, *line] for row, line in zip(rows, body, strict=True)]
    titles = [
        "Model",
        "Method",
        "Seeds",
        *(n.upper() if n in DATASETS else n for n in datasets),
        "Average",
    ]
    return Table(titles, lines)


def cost(rows: list[Row], metric: str) -> Table:
    """Table 2: trained parameters, time, in and out of the domain trained on."""
    training = [row for row in rows if row.method not in EVALUATED]
    datasets = _datasets(training or rows, evaluated=False)
    every = _datasets(rows)
    lines = []
    for row in rows:
        trains = row.method not in EVALUATED
        inside = [row.scores.get((name, name), {}) for name in datasets]
        outside = [_outside(row, name, every) for name in datasets]
        lines.append(
            [
                row.model,
                row.name,
                row.seeds,
                _parameters(row) if trains else Entry(applies=False),
                _time(row, rows) if trains else Entry(applies=False),
                _average(inside),
                _average(outside),
            ]
        )
    return Table(
        ["Model", "Method", "Seeds", "Param.", "Time", "In domain", "Out of domain"], lines
    )


def consistency(rows: list[Row], metric: str) -> Table:
    """Table 3: consistency under other templates and other demonstrations, without and with."""
    methods = list(dict.fromkeys(row.method for row in rows if row.method != VANILLA))
    titles, lines = ["Model", "Seeds"], []
    for what in _CONSISTENCY:
        titles += [f"{what}, {m}" for m in ("w/o", *(f"w/ {method}" for method in methods))]
    datasets = _datasets(rows)
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        shared = {n: v for n, v in row.options.items() if n in EvalConfig.model_fields}
        shared = {n: v for n, v in shared.items() if n not in ("test_type", "calibration")}
        groups.setdefault((row.model, *(f"{n}={v}" for n, v in shared.items())), []).append(row)
    for (model, *shared), mine in groups.items():
        others = [set(key[1:]) for key in groups if key[0] == model and list(key[1:]) != shared]
        differ = [option for option in shared if any(option not in other for other in others)]
        entries = []
        for test_type in _CONSISTENCY.values():
            for method in (VANILLA, *methods):
                found = [
                    row
                    for row in mine
                    if row.method == method and row.options["test_type"] == test_type
                ]
                if len(found) > 1:
                    raise UserError(
                        f"layout 3: {model} has {len(found)} settings of {method}: "
                        "use a folder with one of them"
                    )
                places = [found[0].scores.get((n, n), {}) if found else {} for n in datasets]
                entries.append(_average(places))
        seeds = sorted({row.seeds for row in mine if row.method not in EVALUATED})
        name = f"{model} ({', '.join(differ)})" if differ else model
        lines.append([name, ", ".join(seeds) or "0", *entries])
    return Table(titles, lines)


def settings(rows: list[Row], metric: str) -> Table:
    """Table 4: each setting's time, relative to plain ABFT's, and average over datasets."""
    datasets = _datasets(rows)
    lines = []
    for row in rows:
        time = Entry(applies=False) if row.method in EVALUATED else _time(row, rows)
        average = _average([row.scores.get((name, name), {}) for name in datasets])
        lines.append([row.model, row.name, row.seeds, time, average])
    return Table(["Model", "Method", "Seeds", "Time", "Average"], lines)


BySeed = dict[int | None, list[float]]


def _entry(by_seed: BySeed) -> Entry:
    """Mean and sample deviation over seeds, each with the mean of what was found for it."""
    values = [statistics.fmean(found) for found in by_seed.values()]
    if not values:
        return Entry()
    return Entry(statistics.fmean(values), _deviation(values))


def _average(places: list[BySeed]) -> Entry:
    """The mean over datasets of their means; its deviation is that of the seeds' own averages.

    Where a dataset lacks, the entry says over how many it is.
    """
    known = [by_seed for by_seed in places if by_seed]
    if not known:
        return Entry()
    mean = statistics.fmean(_entry(by_seed).mean for by_seed in known)
    common = set.intersection(*(set(by_seed) for by_seed in known))
    whole = all(set(by_seed) == common for by_seed in known)
    averages = [
        statistics.fmean(statistics.fmean(by_seed[seed]) for by_seed in known)
        for seed in sorted(common, key=str)
    ]
    note = "" if len(known) == len(places) else f"{len(known)} of {len(places)} datasets"
    return Entry(mean, _deviation(averages) if whole else None, note=note)


def _outside(row: Row, trained: str, every: list[str]) -> BySeed:
    """The mean over the datasets a seed's run was not trained on; without training, of the same.

    Seeds that lack one of them do not count.
    """
    trains = row.method not in EVALUATED
    others = [name for name in every if name != trained]
    source = {n: row.scores.get((trained if trains else n, n), {}) for n in others}
    if not source:
        return {}
    seeds = set.intersection(*(set(by_seed) for by_seed in source.values()))
    return {
        seed: [statistics.fmean(statistics.fmean(found[seed]) for found in source.values())]
        for seed in seeds
    }


def _time(row: Row, rows: list[Row]) -> Entry:
    """Seconds of training relative to plain ABFT's of the same model, on datasets both have."""
    references = [other for other in rows if (other.model, other.method) == (row.model, "ABFT")]
    if not references:
        return Entry(unit="x")
    reference = min(references, key=_changes)
    common = sorted(set(row.seconds) & set(reference.seconds))
    if not common:
        return Entry(unit="x")
    ours, theirs = (
        sum(_entry(seconds[name]).mean for name in common)
        for seconds in (row.seconds, reference.seconds)
    )
    every = set(row.seconds) | set(reference.seconds)
    note = "" if len(common) == len(every) else f"{len(common)} of {len(every)} datasets"
    return Entry(ours / theirs, unit="x", note=note)


def _parameters(row: Row) -> Entry:
    return Entry(statistics.fmean(row.parameters), unit="") if row.parameters else Entry(unit="")


def _deviation(values: list[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def _datasets(rows: Iterable[Row], *, evaluated: bool = True) -> list[str]:
    """What rows are of, with or without what else was evaluated; in the paper's order."""
    names = {name for row in rows for name in row.datasets}
    if evaluated:
        names |= {name for row in rows for _, name in row.scores}
    order = {name: index for index, name in enumerate(DATASETS)}
    return sorted(names, key=lambda name: (order.get(name, len(order)), name))


def _mark_best(
    entries: list[Entry], better: Callable, lines: list[list[Entry]], column: int
) -> None:
    """Mark the best of several whole entries, as they are shown."""
    shown = [round(entry.mean, 4) for entry in entries if entry.mean is not None and not entry.note]
    for line, entry in zip(lines, entries, strict=True):
        whole = entry.mean is not None and not entry.note
        if whole and len(shown) > 1 and round(entry.mean, 4) == better(shown):
            line[column] = Entry(entry.mean, entry.deviation, entry.unit, entry.note, best=True)

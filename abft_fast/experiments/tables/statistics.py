"""Means and standard deviations over seeds and datasets, as a table's entries; gaps stay."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from statistics import fmean, stdev

from abft_fast.experiments.tables.types import BySeed, Entry, MethodRuns
from abft_fast.options import TrainConfig


def over_seeds(by_seed: BySeed) -> Entry:
    """Return the mean and the sample standard deviation over seeds.

    A seed that was measured several times counts once, with the mean of its values.
    """
    if not by_seed:
        return Entry()
    return Entry(_mean(by_seed), _deviation([fmean(values) for values in by_seed.values()]))


def average(datasets: Sequence[BySeed]) -> Entry:
    """Return the mean over datasets of their means over seeds.

    The deviation is that of the seeds' own averages, and is left out unless every dataset has the
    same seeds. If datasets lack scores, the entry's note says how many it covers.
    """
    known = [by_seed for by_seed in datasets if by_seed]
    if not known:
        return Entry()
    common = set.intersection(*(set(by_seed) for by_seed in known))
    same_seeds = all(set(by_seed) == common for by_seed in known)
    averages = [
        fmean(fmean(by_seed[seed]) for by_seed in known) for seed in sorted(common, key=str)
    ]
    return Entry(
        fmean(map(_mean, known)),
        _deviation(averages) if same_seeds else None,
        note=_coverage(len(known), len(datasets)),
    )


def out_of_domain(runs: MethodRuns, trained_on: str, datasets: Iterable[str]) -> BySeed:
    """Return each seed's mean score over the datasets it was not trained on.

    A method that does not train is scored on the same datasets. A seed that lacks one of them is
    left out.
    """
    others = [
        runs.scores.get((trained_on if runs.trains else name, name), {})
        for name in datasets
        if name != trained_on
    ]
    if not others:
        return {}
    seeds = set.intersection(*(set(by_seed) for by_seed in others))
    return {seed: [fmean(fmean(by_seed[seed]) for by_seed in others)] for seed in seeds}


def relative_time(runs: MethodRuns, all_runs: Iterable[MethodRuns]) -> Entry:
    """Return the training time as a multiple of plain ABFT's, on the datasets that both have.

    Plain ABFT is the model's ABFT with the fewest options changed from their defaults.
    """
    if not runs.trains:
        return Entry(applies=False)
    abft = [other for other in all_runs if (other.model, other.method) == (runs.model, "ABFT")]
    if not abft:
        return Entry(unit="x")
    reference = min(abft, key=changed_options)
    common = sorted(set(runs.seconds) & set(reference.seconds))
    if not common:
        return Entry(unit="x")
    seconds = sum(_mean(runs.seconds[name]) for name in common)
    reference_seconds = sum(_mean(reference.seconds[name]) for name in common)
    either = set(runs.seconds) | set(reference.seconds)
    return Entry(seconds / reference_seconds, unit="x", note=_coverage(len(common), len(either)))


def parameter_count(runs: MethodRuns) -> Entry:
    """Return how many parameters a run of the method trains."""
    if not runs.trains:
        return Entry(applies=False)
    counts = runs.trained_parameters
    return Entry(fmean(counts) if counts else None, unit="")


def mark_best(entries: Sequence[Entry], better: Callable[[list[float]], float]) -> list[Entry]:
    """Mark the best entries of a column, ties included, as far as the shown decimals tell.

    Entries with a note do not cover all datasets, so they do not compete. A single entry is not
    marked.
    """
    shown = [None if e.mean is None or e.note else round(e.mean, 4) for e in entries]
    competing = [value for value in shown if value is not None]
    if len(competing) < 2:
        return list(entries)
    best = better(competing)
    return [
        replace(entry, best=True) if value == best else entry
        for entry, value in zip(entries, shown, strict=True)
    ]


def changed_options(runs: MethodRuns) -> int:
    """Return how many options differ from their defaults."""
    defaults = {name: field.default for name, field in TrainConfig.model_fields.items()}
    return sum(value != defaults.get(name) for name, value in runs.options.items())


def _mean(by_seed: BySeed) -> float:
    return fmean(fmean(values) for values in by_seed.values())


def _deviation(values: list[float]) -> float | None:
    return stdev(values) if len(values) > 1 else None


def _coverage(covered: int, total: int) -> str:
    return "" if covered == total else f"{covered} of {total} datasets"

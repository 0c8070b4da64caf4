"""README's performance section, docs/performance/measurements.md and docs/performance/plots/, from the rows of results/.

    python benchmarks/report.py        # or `make report`

Nothing here is a figure: without its row it is "not measured yet". CI checks that what is committed
is what this writes.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

from plots import PLOTS, draw
from rows import KINDS, QUESTIONS, Row, read
from tables import SUMMARIES, every_column, listed, origin, paragraph

from abft_fast.errors import UserError

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- performance -->", "<!-- /performance -->"
COMMANDS = {"GPU": "make bench-gpu", "CPU": "make bench"}
PLOTS_IN_README = ("train_step", "scaling")
NOT_IN_README = {("large_models", "CPU"), ("shared_prefix", "CPU"), ("shared_prefix", "GPU")}

Found = dict[tuple[str, str], list[Row]]


def report(results: Path, readme: str) -> dict[str, bytes]:
    """Contents by path, of README, docs/performance/measurements.md and every plot there are rows for.

    Raises:
        UserError: a row is malformed, or README lacks its marks.
    """
    found = read(results)
    plots = {
        f"docs/performance/plots/{name}-{kind.lower()}.svg": draw(plot, found[name, kind])
        for name, (plot, _) in PLOTS.items()
        for kind in KINDS
        if _summary(found, name, kind)
    }
    section = performance(found)
    return {
        "README.md": insert(readme, section).encode(),
        "docs/performance/measurements.md": measurements(found).encode(),
        **plots,
    }


def insert(readme: str, section: str) -> str:
    """README with another performance section.

    Raises:
        UserError: it does not have each mark once, in order.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end) or readme.count(BEGIN) + readme.count(END) > 2:
        raise UserError(f"README.md needs the lines {BEGIN} and {END}, each once, in this order")
    return f"{before}{BEGIN}\n{section}\n{END}{after}"


def performance(found: Found) -> str:
    """README's section."""
    blocks = [
        paragraph(
            "`make bench` measures on a CPU, `make bench-gpu` on a GPU: contenders take turns once "
            "their results agree. Figures are medians (20th to 80th percentile of rounds), a GPU's "
            "where there are any; [docs/performance/measurements.md](docs/performance/measurements.md) has all, and "
            "`make report` writes both from `benchmarks/results/`."
        )
    ]
    for name in SUMMARIES:
        kind = next((kind for kind in KINDS if _summary(found, name, kind)), None)
        if kind is None or (name, kind) in NOT_IN_README:
            continue
        blocks.append(_summary(found, name, kind))
        if name in PLOTS_IN_README:
            blocks.append(_image(name, kind, "docs/performance/plots"))
    blocks += missing(found)
    return "\n\n".join(blocks)


def missing(found: Found) -> Iterable[str]:
    """A paragraph a kind of device that lacks rows."""
    for kind in KINDS:
        titles = [q.title for q in QUESTIONS if kind in q.kinds and not _told(found, q.name, kind)]
        if titles:
            yield paragraph(
                f"**Not measured yet** on a {kind} (`{COMMANDS[kind]}`): {listed(titles)}."
            )


def measurements(found: Found) -> str:
    """docs/performance/measurements.md: every latest row, a section a question."""
    blocks = [
        "# Measurements",
        paragraph(
            "Written by `make report` from `benchmarks/results/`, which has every row with its "
            "date, commit, device, versions and seed. Of each case and contender the last row is "
            "here, CPUs and GPUs apart; in brackets the 20th and 80th percentile of rounds. "
            "`to floor` is time over that of the contender in `floor`, round by round; `speedup` "
            "is the baseline's time over a contender's."
        ),
    ]
    for question in QUESTIONS:
        blocks.append(f"## {question.title[0].upper()}{question.title[1:]}, {question.name}.csv")
        for kind in KINDS:
            rows = found[question.name, kind]
            if not _told(found, question.name, kind):
                if kind in question.kinds:
                    blocks.append(f"{kind}: not measured yet (`{COMMANDS[kind]}`).")
                continue
            whence = origin(rows, "threads", "commit", "torch", "triton", "transformers")
            blocks.append(paragraph(f"{kind}: {whence}"))
            blocks.append(_summary(found, question.name, kind))
            if question.name in PLOTS and _summary(found, question.name, kind):
                blocks.append(_image(question.name, kind, "plots"))
            blocks.append(every_column(rows))
    return "\n\n".join(filter(None, blocks)) + "\n"


def _summary(found: Found, name: str, kind: str) -> str:
    rows = found[name, kind]
    return SUMMARIES[name](rows) if rows and name in SUMMARIES else ""


def _told(found: Found, name: str, kind: str) -> bool:
    """Whether there is all that README says of a question."""
    return bool(_summary(found, name, kind) if name in SUMMARIES else found[name, kind])


def _image(name: str, kind: str, folder: str) -> str:
    _, text = PLOTS[name]
    return f"![{text}, on a {kind}]({folder}/{name}-{kind.lower()}.svg)"


def write(root: Path, contents: dict[str, bytes]) -> None:
    """Write files; plots whose rows are gone go too."""
    for path, content in contents.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)
    for plot in (root / "docs" / "performance" / "plots").glob("*.svg"):
        if f"docs/performance/plots/{plot.name}" not in contents:
            plot.unlink()


def main() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    try:
        write(ROOT, report(ROOT / "benchmarks" / "results", readme))
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()

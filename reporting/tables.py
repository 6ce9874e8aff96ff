"""The tables of the report: what results.json holds, and how it is shown."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from reporting.results import Experiment, Result, grouped, row_key

FITS = ("train", "correct labels", "wrong labels")
COST = (
    "Cost of reaching the final test accuracy of SGD with the same seed: mean over the seeds that "
    "reach it; compare only methods that do so with equally many seeds."
)


def known(values: Sequence[float | None] | None) -> bool:
    """Whether there is a value of every seed; earlier versions had fewer columns."""
    return bool(values) and None not in values


def mean_std(values: Sequence[float | None] | None, digits: int) -> str:
    """Mean ± standard deviation; a single value as it is, nothing where a value is missing."""
    if not known(values):
        return ""
    text = f"{statistics.mean(values):.{digits}f}"
    return text + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


def cost(result: Result, accuracy: float) -> tuple[int, float] | None:
    """Total epochs and seconds until the test accuracy is first reached."""
    for done, row in enumerate(result.rows, 1):
        if row["test_acc"] >= accuracy:
            return len(result.sampled) + min(done, result.epochs), result.seconds(done)
    return None


def tabulate(results: Sequence[Result]) -> list[dict]:
    """What results.json holds of each row of the table: lists of numbers, one a seed."""
    table = []
    for (experiment, title, _, epochs, total), seeds in grouped(results, row_key).items():
        k = sorted({result.k for result in seeds})
        row = experiment._asdict() | {"method": title}
        row["k"] = k[0] if len(k) == 1 else f"{k[0]}–{k[-1]}"
        row |= {"epochs": epochs, "total epochs": total}
        row["seeds"] = [result.seed for result in seeds]
        row["final"] = [result.final for result in seeds]
        row["top-5"] = [result.rows[-1].get("test_top5") for result in seeds]
        row["best"] = [max(row["test_acc"] for row in result.rows) for result in seeds]
        fits = zip(*(result.fits for result in seeds), strict=True)
        row |= zip(FITS, map(list, fits), strict=True)
        row["variance"] = [result.variance for result in seeds]
        row["seconds"] = [result.seconds(len(result.rows)) for result in seeds]
        row["cost"] = [cost(result, result.trajectory.final) for result in seeds]
        table.append(row)
    return table


def sections(table: Iterable[dict]) -> dict[Experiment, dict]:
    """Title and tables of each experiment from rows of results.json, the least noise first."""
    found = grouped(table, lambda row: Experiment(*(row[name] for name in Experiment._fields)))
    for experiment, rows in found.items():
        seeds = sorted({seed for row in rows for seed in row["seeds"]})
        title = f"{experiment}; seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"
        tables = {"results": results_table(rows), "cost": cost_table(rows)}
        found[experiment] = {"title": title, **tables}
    return dict(sorted(found.items()))


def results_table(rows: Sequence[dict]) -> list[dict]:
    """The table of an experiment: what stands in each column of a row."""
    fits = FITS if rows[0]["noise"] else FITS[:1]  # without noise all labels are correct
    shown = [
        name
        for name in ("variance", "final", "top-5", "best", *fits)
        if any(known(row.get(name)) for row in rows)
    ]
    most, table = max(len(row["seeds"]) for row in rows), []
    for row in rows:
        seeds = len(row["seeds"])
        cells = {"method": row["method"] + (f", {seeds} of {most} seeds" if seeds < most else "")}
        cells |= {name: row[name] for name in ("k", "epochs", "total epochs")}
        cells |= {name: mean_std(row.get(name), 2) for name in shown}
        table.append(cells | {"seconds": mean_std(row["seconds"], 0)})
    return table


def cost_table(rows: Iterable[dict]) -> list[dict]:
    """The table of costs, without the rows of SGD at an earlier epoch."""
    table = []
    for row in [row for row in rows if " at epoch " not in row["method"]]:
        there = [cost for cost in row["cost"] if cost]
        epochs, seconds = zip(*there, strict=True) if there else ((), ())
        cells = {"method": row["method"], "k": row["k"]}
        cells["reached by"] = f"{len(there)} of {len(row['seeds'])}"
        cells["total epochs"], cells["seconds"] = mean_std(epochs, 1), mean_std(seconds, 1)
        table.append(cells)
    return table


def markdown(table: Sequence[dict]) -> str:
    """A Markdown table that can be read as it is."""
    cells = [[str(cell) for cell in row] for row in (table[0], *(row.values() for row in table))]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    lines = ([cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in cells)
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def section_text(section: Mapping[str, Any]) -> str:
    """Title and tables of an experiment as Markdown."""
    text = f"## {section['title']}\n\n{markdown(section['results'])}\n"
    return f"{text}{COST}\n\n{markdown(section['cost'])}"


def machine(results: Sequence[Result]) -> dict[str, list]:
    """Where the runs were made, and with what: each value that occurs."""
    sessions = [session for result in results for session in result.sessions]
    facts = {name: [s[name] for s in sessions] for name in ("device", "threads", "commit")}
    versions = [s["versions"].items() for s in sessions]
    facts["versions"] = [", ".join(map(" ".join, items)) for items in versions]
    return {name: list(dict.fromkeys(values)) for name, values in facts.items()}


def machine_text(facts: Mapping[str, Sequence]) -> str:
    """What `machine` returns, in a line; of commits, which not all runs know, seven characters."""
    shown = facts | {"commit": [commit[:7] for commit in facts["commit"] if commit]}
    return "; ".join(f"{name}: {', '.join(map(str, shown[name]))}" for name in shown if shown[name])

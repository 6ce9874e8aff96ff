"""The tables of the report: what results.json holds, and how it is shown."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from reporting.results import Experiment, Result, grouped, row_key
from training.options import ABSENT

TRAIN = ("train", "correct labels", "wrong labels")
COST = (
    "Cost of reaching the final test accuracy of SGD with the same seed: mean over the seeds that "
    "reach it; compare only methods that do so with equally many seeds."
)
# Options in the table of settings, and what they are called there.
OPTIONS = {
    "lr": "learning rate",
    "batch_size": "batch size",
    "accumulate": "batches per step",
    "momentum": "momentum",
    "weight_decay": "weight decay",
    "milestones": "milestones",
    "alpha": "α",
}
RECORDED = (*OPTIONS, "schedule", "gamma")


def is_complete(values: Sequence[float | None] | None) -> bool:
    """Whether there is a value of every seed."""
    return bool(values) and None not in values


def mean_std(values: Sequence[float | None] | None, digits: int) -> str:
    """Mean ± standard deviation; a single value as it is, nothing where a value is missing."""
    if not is_complete(values):
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
    """What results.json holds of each row of the table: lists of numbers, one a seed.

    `title` is what the table shows; `kind`, `method`, `variant` and `run` are what it is made of.
    """
    table = []
    for (experiment, title, _, epochs, total), seeds in grouped(results, row_key).items():
        first, k = seeds[0], sorted({result.k for result in seeds})
        row = experiment._asdict() | {"title": title, "kind": first.kind, "method": first.method}
        row |= {"variant": first.variant, "run": first.run, "finished": first.finished}
        row["k"] = k[0] if len(k) == 1 else f"{k[0]}–{k[-1]}"
        row |= {"epochs": epochs, "total epochs": total}
        row["seeds"] = [result.seed for result in seeds]
        row["final"] = [result.final for result in seeds]
        row["top-5"] = [result.rows[-1].get("test_top5") for result in seeds]
        row["best"] = [max(row["test_acc"] for row in result.rows) for result in seeds]
        parts = zip(*(result.train for result in seeds), strict=True)
        row |= zip(TRAIN, map(list, parts), strict=True)
        row["variance"] = [result.variance for result in seeds]
        row["walk"] = [result.walk for result in seeds]
        row["seconds"] = [result.seconds(len(result.rows)) for result in seeds]
        row["cost"] = [cost(result, result.trajectory.final) for result in seeds]
        row["settings"] = {name: first.arguments[name] for name in RECORDED} if epochs else {}
        row["messages"] = [result.messages for result in seeds]
        table.append(row)
    return table


def sections(table: Iterable[dict]) -> dict[Experiment, dict]:
    """Title and tables of each experiment from rows of results.json, the least noise first."""
    parts = grouped(table, lambda row: Experiment(*(row[name] for name in Experiment._fields)))
    for experiment, rows in parts.items():
        seeds = sorted({seed for row in rows for seed in row["seeds"]}, key=seed_order)
        title = f"{experiment}; seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"
        parts[experiment] = {
            "title": title,
            "results": results_table(rows),
            "cost": cost_table(rows),
            "settings": settings_table(rows),
            "messages": messages(rows),
        }
    return dict(sorted(parts.items()))


def seed_order(seed: int | str) -> list[int]:
    """By what seeds are sorted: 2, 10 and 10/3."""
    return [int(part) for part in str(seed).split("/")]


def results_table(rows: Sequence[dict]) -> list[dict]:
    """The table of an experiment: what stands in each column of a row."""
    noisy = any(is_complete(row.get("wrong labels")) for row in rows)
    train = TRAIN if noisy else TRAIN[:1]  # without noise all labels are correct
    shown = [
        name
        for name in ("variance", "walk", "final", "top-5", "best", *train)
        if any(is_complete(row.get(name)) for row in rows)
    ]
    most, table = max(len(row["seeds"]) for row in rows), []
    for row in rows:
        seeds = len(row["seeds"])
        cells = {"method": row["title"] + (f", {seeds} of {most} seeds" if seeds < most else "")}
        cells |= {name: row[name] for name in ("k", "epochs", "total epochs")}
        cells |= {name: mean_std(row.get(name), 2) for name in shown}
        table.append(cells | {"seconds": mean_std(row["seconds"], 0)})
    return table


def cost_table(rows: Iterable[dict]) -> list[dict]:
    """The table of costs, without the rows of SGD at an earlier epoch."""
    table = []
    for row in [row for row in rows if row["kind"] != "partial"]:
        reached = [cost for cost in row["cost"] if cost]
        epochs, seconds = zip(*reached, strict=True) if reached else ((), ())
        cells = {"method": row["title"], "k": row["k"]}
        cells["reached by"] = f"{len(reached)} of {len(row['seeds'])}"
        cells["total epochs"], cells["seconds"] = mean_std(epochs, 1), mean_std(seconds, 1)
        table.append(cells)
    return table


def settings_table(rows: Iterable[dict]) -> list[dict]:
    """The table of options of what was trained, less the options that none of it uses."""
    trained = [row for row in rows if row.get("settings") and row["kind"] != "partial"]
    shown = [
        name
        for name in OPTIONS
        if any(row["settings"][name] != ABSENT.get(name) for row in trained)
    ]
    return [
        {"method": row["title"]} | {OPTIONS[name]: setting(row, name) for name in shown}
        for row in trained
    ]


def messages(rows: Iterable[dict]) -> list[str]:
    """What the runs recorded, in a line each."""
    lines = []
    for row in [row for row in rows if "messages" in row and row["kind"] != "partial"]:
        for seed, recorded in zip(row["seeds"], row["messages"], strict=True):
            lines += [f"{row['title']}, seed {seed}: {message}" for message in recorded]
    return lines


def setting(row: Mapping[str, Any], name: str) -> str:
    """An option of a row as the table shows it; a schedule takes the place of milestones."""
    value = row["settings"][name]
    if name == "milestones":
        return row["settings"]["schedule"] or " ".join(map(str, value or ()))
    return "" if value is None else str(value)


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
    """What `machine` returns, in a line; of commits the first seven characters."""
    shown = facts | {"commit": [commit[:7] for commit in facts["commit"] if commit]}
    parts = [f"{name}: {', '.join(map(str, values))}" for name, values in shown.items() if values]
    return "; ".join(parts)

"""Fill the tables of README.md and experiments/*.md with what was measured: experiments/*.json.

    PYTHONPATH=. python experiments/tables.py

NAME.json is the results.json of the report of experiment NAME. A table stands between
<!-- table NAME --> and <!-- end -->; NAME is that of an experiment, or one of OTHERS.
"""

import json
import re
from collections import defaultdict
from functools import partial
from pathlib import Path

import torch

import dldr
from reporting import tables as report_tables

HERE = Path(__file__).parent
PAGES = (HERE.parent / "README.md", *sorted(HERE.glob("*.md")))
# Rows of the first page: kind, method and basis of the runs.
ROWS = {
    "SGD": ("full", "SGD", None),
    "weight average of the later half": ("average", "weight average", None),
    "P-SGD, k dimensions": ("subspace", "P-SGD", None),
    "P-SGD, k random dimensions": ("subspace", "P-SGD", "random"),
}
# What the first page calls the data, and the levels of noise there.
SHOWN = {"cifar": ("CIFAR-10", (0.0, 0.4)), "digits-full": ("digits", (0.4,))}
TIMED = ("digits-full",)  # the others shared the machine


def measured(experiment: str) -> dict:
    """What the JSON file of an experiment holds."""
    return json.loads((HERE / f"{experiment}.json").read_text())


def is_of_later_half(row: dict) -> bool:
    """Whether a row is the average of the later half of its snapshots."""
    first, last = row["variant"].get("snapshots", (0, 0))
    return row["kind"] == "average" and first == last // 2 + 1


def rows_of(experiment: str, noise: float) -> dict[str, dict]:
    """The row of each of ROWS that an experiment has, from the start and without a name."""
    rows = [row for row in measured(experiment)["results"] if row["noise"] == noise]
    chosen: dict[str, dict] = {}
    for name, kind in ROWS.items():
        alike = [
            row
            for row in rows
            if (row["kind"], row["method"], row["variant"].get("basis")) == kind
            and not row["run"]
            and "start" not in row["variant"]
        ]
        if kind[0] == "average":  # others are of fewer snapshots
            halves = [row for row in rows if is_of_later_half(row)]
            alike = [max(halves, key=lambda row: row["total epochs"])]
        if len(alike) > 1:
            raise ValueError(f"{experiment}.json: several rows of {name}")
        if alike:
            chosen[name] = alike[0]
    return chosen


def main_table() -> str:
    """Final test accuracy of each method in the experiments of SHOWN."""
    shown = [(data, name, c) for name, (data, noises) in SHOWN.items() for c in noises]
    columns = {f"{data}, c = {c:g}": rows_of(name, c) for data, name, c in shown}
    table = []
    for name in ROWS:
        cells = {"": name}
        for column, rows in columns.items():
            cells[column] = report_tables.mean_std(rows.get(name, {}).get("final"), 2)
        table.append(cells)
    return report_tables.markdown(table)


def walk_of_equal_steps(steps: int) -> torch.Tensor:
    """Percent of its variance that a random walk has in its first 1, 2, … components, (steps,)."""
    return 100 * dldr.random_walk_spectrum(torch.ones(steps)).cumsum(0)


def walk_table() -> str:
    """CIFAR-10: the variance in the first k components, a random walk's beside it, and P-SGD."""
    walk = walk_of_equal_steps(80)
    table = []
    for k in (2, 5, 10, 20, 40):
        cells = {"k": k, "random walk": f"{walk[k - 1]:.1f}"}
        for row in measured("cifar")["results"]:
            if row["run"] == f"psgd_k{k}":
                cells[f"trajectory, c = {row['noise']:g}"] = f"{row['variance'][0]:.1f}"
                cells[f"P-SGD, c = {row['noise']:g}"] = f"{row['final'][0]:.2f}"
        table.append(cells)
    return report_tables.markdown(table)


def levels_table(column: str) -> str:
    """Digits: a column of the rows that are there at all levels of noise."""
    levels = (0.0, 0.2, 0.4, 0.6, 0.8) if column == "final" else (0.2, 0.4, 0.6, 0.8)
    by_title = defaultdict(dict)
    for row in sorted(measured("digits-full")["results"], key=lambda row: row["noise"]):
        if row["noise"] in levels and not row["run"]:
            title = row["title"].removesuffix(", BN update")
            by_title[title][f"c = {row['noise']:g}"] = report_tables.mean_std(row[column], 2)
    complete = {title: cells for title, cells in by_title.items() if len(cells) == len(levels)}
    return report_tables.markdown([{"": title} | cells for title, cells in complete.items()])


def finetune_table() -> str:
    """Public ResNets: final test accuracy of each method, by network, learning rate and noise."""
    table = defaultdict(dict)
    for row in sorted(measured("finetune")["results"], key=lambda row: row["noise"]):
        rate = row["data"].split()[-1]
        column = f"{row['arch'].replace('resnet', 'ResNet-')}, {rate}"
        if row["noise"]:
            column += f", c = {row['noise']:g}"
        table[row["title"]][column] = report_tables.mean_std(row["final"], 2)
    columns = {column: "" for cells in table.values() for column in cells}
    return report_tables.markdown([{"": title} | columns | cells for title, cells in table.items()])


def beside_walk(row: dict) -> dict:
    """The row, with a walk's explained variance where its own step lengths were not kept.

    The steps of that walk are of equal length, as many as there are epochs of SGD.
    """
    if row.get("walk") or not report_tables.is_complete(row.get("variance")):
        return row
    walk = walk_of_equal_steps(row["total epochs"] - row["epochs"])
    return row | {"walk": [walk[row["k"] - 1].item()]}


def experiment_tables(name: str) -> str:
    """The tables of an experiment, without times and costs unless it is TIMED; the machine."""
    content = measured(name)
    text = ""
    for section in report_tables.sections(map(beside_walk, content["results"])).values():
        if name in TIMED:
            text += f"\n#{report_tables.section_text(section)}"
        else:
            table = [{k: v for k, v in row.items() if k != "seconds"} for row in section["results"]]
            text += f"\n### {section['title']}\n\n{report_tables.markdown(table)}"
    return f"{text}\n{report_tables.machine_text(content['machine'])}\n\n"


OTHERS = {  # tables that are not an experiment's
    "main": main_table,
    "walk": walk_table,
    "finetune-final": finetune_table,
    "levels": partial(levels_table, "final"),
    "wrong": partial(levels_table, "wrong labels"),
}


def filled(page: str) -> str:
    """The page with its tables as they should be."""

    def fill(found: re.Match) -> str:
        before, name, after = found.groups()
        table = OTHERS[name]() if name in OTHERS else experiment_tables(name)
        return before + table + after

    marks = r"(<!-- table ([\w-]+) -->\n).*?(<!-- end -->)"
    return re.sub(marks, fill, page, flags=re.DOTALL)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(filled(page.read_text()))

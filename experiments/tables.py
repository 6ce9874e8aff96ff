"""Fill the tables of README.md and experiments/*.md with what was measured: experiments/*.json.

    PYTHONPATH=. python experiments/tables.py

NAME.json is the results.json of the report of experiment NAME. A table stands between
<!-- table NAME --> and <!-- end -->; NAME is that of an experiment, or one
of OTHERS.
"""

import json
import re
from functools import partial
from pathlib import Path

import torch

import dldr
from reporting import tables as report_tables

HERE = Path(__file__).parent
PAGES = (HERE.parent / "README.md", *sorted(HERE.glob("*.md")))
METHODS = {  # rows of the first page, and what results.py calls them
    "SGD": r"SGD",
    "SGD at epoch T": r"SGD at epoch \d+",
    "SGD, from sample T": r"SGD, from sample \d+",
    "weight average": r"weight average \(samples (\d+)–(\d+)\)",
    "P-BFGS": r"P-BFGS(, BN update)?",
    "P-SGD": r"P-SGD(, BN update)?",
    "P-SGD, random basis": r"P-SGD, random basis(, BN update)?",
}
# What the first page calls the data, and the levels of noise there.
SHOWN = {"cifar": ("CIFAR-10", (0.0, 0.4)), "digits-full": ("digits", (0.0, 0.4, 0.8))}
TIMED = ("digits-full",)  # the others shared the machine


def measured(experiment: str) -> dict:
    """What the JSON file of an experiment holds."""
    return json.loads((HERE / f"{experiment}.json").read_text())


def is_of_later_half(method: str) -> bool:
    """Whether a method is the average of the later half of its samples."""
    found = re.fullmatch(METHODS["weight average"], method)
    return bool(found) and int(found[1]) == int(found[2]) // 2 + 1


def of_methods(experiment: str, noise: float) -> dict[str, dict]:
    """The row of each of METHODS that an experiment has, without variations."""
    found: dict[str, dict] = {}
    rows = [row for row in measured(experiment)["results"] if row["noise"] == noise]
    averages = [row for row in rows if is_of_later_half(row["method"])]
    average = max(averages, key=lambda row: row["total epochs"])  # the others have fewer samples
    for name, method in METHODS.items():
        own = [row for row in rows if re.fullmatch(method, row["method"])]
        if name == "SGD at epoch T":  # of the samples of that average, not of other runs'
            own = [row for row in own if row["total epochs"] == average["total epochs"]]
        elif name == "weight average":
            own = [average]
        if len(own) > 1:
            raise ValueError(f"{experiment}.json: several rows of {name}")
        if own:
            found[name] = own[0]
    return found


def main_table() -> str:
    """Final test accuracy of each method in the experiments of SHOWN."""
    shown = [(data, name, c) for name, (data, noises) in SHOWN.items() for c in noises]
    found = {f"{data}, c = {c:g}": of_methods(name, c) for data, name, c in shown}
    table = []
    for method in METHODS:
        own = [rows[method] for rows in found.values() if method in rows]
        titles = {row["method"].removesuffix(", BN update") for row in own}
        cells = {"": titles.pop() if len(titles) == 1 else method}
        for name in ("k", "total epochs"):
            cells[name] = " / ".join(dict.fromkeys(str(row[name]) for row in own))
        finals = {name: rows.get(method, {}).get("final") for name, rows in found.items()}
        table.append(
            cells | {name: report_tables.mean_std(final, 2) for name, final in finals.items()}
        )
    return report_tables.markdown(table)


def walk_table() -> str:
    """CIFAR-10: the variance in the first k components, a random walk's beside it, and P-SGD."""
    walk = 100 * dldr.random_walk_spectrum(torch.ones(80)).cumsum(0)
    table = []
    for k in (2, 5, 10, 20, 40):
        cells = {"k": k, "random walk": f"{walk[k - 1]:.1f}"}
        for row in measured("cifar")["results"]:
            if row["method"] == f"P-SGD (psgd_k{k})":
                cells[f"trajectory, c = {row['noise']:g}"] = f"{row['variance'][0]:.1f}"
                cells[f"P-SGD, c = {row['noise']:g}"] = f"{row['final'][0]:.2f}"
        table.append(cells)
    return report_tables.markdown(table)


def levels_table(column: str) -> str:
    """Digits: a column of each method's row at all levels of noise."""
    found = {f"c = {c:g}": of_methods("digits-full", c) for c in (0.0, 0.2, 0.4, 0.6, 0.8)}
    if column == "wrong labels":
        del found["c = 0"]
    table = []
    for method in METHODS:
        cells = {
            c: report_tables.mean_std(rows[method][column], 2)
            for c, rows in found.items()
            if method in rows
        }
        if cells:
            table.append({"": method.replace("epoch T", "epoch 30")} | cells)
    return report_tables.markdown(table)


def experiment_tables(name: str) -> str:
    """The tables of an experiment, without times and costs unless it is TIMED; the machine."""
    content = measured(name)
    text = ""
    for section in report_tables.sections(content["results"]).values():
        if name in TIMED:
            text += f"\n#{report_tables.section_text(section)}"
        else:
            table = [{k: v for k, v in row.items() if k != "seconds"} for row in section["results"]]
            text += f"\n### {section['title']}\n\n{report_tables.markdown(table)}"
    return f"{text}\n{report_tables.machine_text(content['machine'])}\n\n"


OTHERS = {  # tables that are not an experiment's
    "main": main_table,
    "walk": walk_table,
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

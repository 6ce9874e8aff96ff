"""Fill the tables of the two README.md files with what was measured: experiments/*.json.

    PYTHONPATH=. python experiments/tables.py

NAME.json is the results.json of the report of experiment NAME. A table stands between
<!-- table NAME --> and <!-- end -->; NAME is that of an experiment, or main.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import results

HERE = Path(__file__).parent
PAGES = (HERE.parent / "README.md", HERE / "README.md")
METHODS = (  # rows of the first page, and what results.py calls them
    ("SGD", r"SGD"),
    ("SGD at epoch T", r"SGD at epoch \d+"),
    ("weight average", r"weight average \(samples \d+–\d+\)"),
    ("P-BFGS", r"P-BFGS(, BN update)?"),
    ("P-SGD", r"P-SGD(, BN update)?"),
    ("P-SGD, random basis", r"P-SGD, random basis(, BN update)?"),
)
SHOWN = {"digits-full": ("digits", (0.0, 0.4, 0.8))}  # what the first page calls the data, c
TIMED = ("digits-full",)  # the others shared the machine


def measured(experiment: str) -> dict:
    """What the JSON file of an experiment holds."""
    return json.loads((HERE / f"{experiment}.json").read_text())


def of_methods(experiment: str, noise: float) -> dict[str, dict]:
    """The row of each of METHODS that an experiment has, without variations."""
    rows = [row for row in measured(experiment)["results"] if row["noise"] == noise]
    found = {
        name: [row for row in rows if re.fullmatch(method, row["method"])]
        for name, method in METHODS
    }
    (average,) = found["weight average"]
    # Of the samples of that average, not of other runs'.
    found["SGD at epoch T"] = [
        row for row in found["SGD at epoch T"] if row["total epochs"] == average["total epochs"]
    ]
    if any(len(own) > 1 for own in found.values()):
        raise ValueError(f"{experiment}.json: several rows of a method")
    return {name: own[0] for name, own in found.items() if own}


def main_table() -> str:
    """Final test accuracy of each method in the experiments of SHOWN."""
    shown = [(data, name, c) for name, (data, noises) in SHOWN.items() for c in noises]
    columns = ["", "k", "total epochs", *(f"{data}, c = {noise:g}" for data, _, noise in shown)]
    found, rows = [of_methods(experiment, noise) for _, experiment, noise in shown], []
    for method, _ in METHODS:
        own = [row for row in (rows.get(method) for rows in found) if row]
        titles = {row["method"].removesuffix(", BN update") for row in own}
        cells = [titles.pop() if len(titles) == 1 else method]
        cells += [" / ".join(dict.fromkeys(str(row[name]) for row in own)) for name in columns[1:3]]
        rows.append(
            cells + [results.mean_std(row.get(method, {}).get("final"), 2) for row in found]
        )
    return results.markdown(columns, rows)


def without_seconds(experiment: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; seconds that were measured beside other work are left out."""
    kept = [i for i, name in enumerate(columns) if experiment in TIMED or "seconds" not in name]
    columns, *rows = ([row[i] for i in kept] for row in (columns, *rows))
    return results.markdown(columns, rows)


def experiment_tables(name: str) -> str:
    """All tables of an experiment, and on what they were measured."""
    content = measured(name)
    text = f"\n{results.machine_text(content['machine'])}\n"
    for experiment, rows in results.by_experiment(content["results"]).items():
        text += f"\n### {experiment}; {results.seeds_text(rows)}\n\n"
        text += without_seconds(name, *results.results_table(rows))
        text += f"\n{results.COST}\n\n{without_seconds(name, *results.cost_table(rows))}"
    return text + "\n"


def filled(page: str) -> str:
    """The page with its tables as they should be."""

    def fill(found: re.Match) -> str:
        table = main_table() if found[2] == "main" else experiment_tables(found[2])
        return found[1] + table + found[3]

    marks = r"(<!-- table ([\w-]+) -->\n).*?(<!-- end -->)"
    return re.sub(marks, fill, page, flags=re.DOTALL)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(filled(page.read_text()))

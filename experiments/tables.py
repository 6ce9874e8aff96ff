"""Fill the tables into the README.md files, from what was measured: experiments/*.json.

    PYTHONPATH=. python experiments/tables.py

A JSON file is the results.json that report.py left of the experiment that the file is named
after; networks.json is what networks.py left. A table stands between <!-- table NAME --> and
<!-- end -->; NAME is main, networks, or an experiment.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import results

HERE = Path(__file__).parent
PAGES = (HERE.parent / "README.md", HERE / "README.md", HERE.parent / "models" / "README.md")
METHODS = (  # on the first page, and the methods that results.py names so
    ("SGD", r"SGD"),
    ("SGD at epoch T", r"SGD at epoch \d+"),
    ("weight average", r"weight average \(samples \d+–\d+\)"),
    ("P-BFGS", r"P-BFGS(, BN update)?"),
    ("P-SGD", r"P-SGD(, BN update)?"),
    ("P-SGD, random basis", r"P-SGD, random basis(, BN update)?"),
)
SHOWN = {"digits-full": ("digits", (0.0, 0.4, 0.8))}

TIMED = ("digits-full",)  # the others shared the machine


def measured(target: str) -> dict:
    """What a target's JSON file holds."""
    return json.loads((HERE / f"{target}.json").read_text())


def of_methods(target: str, noise: float) -> dict[str, dict]:
    """The row of each of METHODS that an experiment has, without variations."""
    rows = [row for row in measured(target)["results"] if row["noise"] == noise]
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
        raise ValueError(f"{target}.json: several rows of a method")
    return {row["method"].removesuffix(", BN update"): row for own in found.values() for row in own}


def main_table() -> str:
    """Final test accuracy of each method in the experiments of SHOWN."""
    columns, rows = ["", "k", "total epochs"], {}
    for target, (name, noises) in SHOWN.items():
        for noise in noises:
            columns.append(f"{name}, c = {noise:g}")
            for method, row in of_methods(target, noise).items():
                cells = rows.setdefault(method, [method, str(row["k"]), str(row["total epochs"])])
                cells.append(results.mean_std(row["final"], 2))
    return results.markdown(columns, rows.values())


def shown(target: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table, without seconds that were measured beside other work."""
    kept = [i for i, name in enumerate(columns) if target in TIMED or "seconds" not in name]
    columns, *rows = ([row[i] for i in kept] for row in (columns, *rows))
    return results.markdown(columns, rows)


def target_tables(target: str) -> str:
    """All tables of a target, and on what they were measured."""
    content = measured(target)
    text = f"\n{results.machine_text(content['machine'])}\n"
    for experiment, rows in results.by_experiment(content["results"]).items():
        text += f"\n### {experiment}; {results.seeds_text(rows)}\n\n"
        text += shown(target, *results.results_table(rows))
        text += f"\n{results.COST}\n\n{shown(target, *results.cost_table(rows))}"
    return text + "\n"


def networks_table() -> str:
    """Size of each network, and seconds of an epoch of 256 images by each method."""
    lines = json.loads((HERE / "networks.json").read_text())
    rows = [
        [line["arch"], f"{line['n']:,}", *(f"{value:.1f}" for value in line["seconds"].values())]
        for line in lines
    ]
    facts = {
        name: list(dict.fromkeys(value for line in lines for value in line["machine"][name]))
        for name in lines[0]["machine"]
    }
    columns = ["--arch", "n at 10 classes", *(f"{method}, s" for method in lines[0]["seconds"])]
    return f"\n{results.machine_text(facts)}\n\n{results.markdown(columns, rows)}\n"


def filled(page: str) -> str:
    """The page with its tables as they should be."""

    def fill(found: re.Match) -> str:
        own = {"main": main_table, "networks": networks_table}
        table = own[found[2]]() if found[2] in own else target_tables(found[2])
        return found[1] + table + found[3]

    marks = r"(<!-- table ([\w-]+) -->\n).*?(<!-- end -->)"
    return re.sub(marks, fill, page, flags=re.DOTALL)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(filled(page.read_text()))

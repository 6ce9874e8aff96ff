"""Fill the tables into the README.md files, from what was measured: results/*.json.

    PYTHONPATH=. python results/tables.py

A JSON file is the results.json that report.py left of the run.sh target that the file is named
after; networks.json is what networks.py left. A table stands between <!-- table NAME --> and
<!-- end -->; NAME is main, networks, or a target.
"""

import json
import re
from pathlib import Path

import report

HERE = Path(__file__).parent
PAGES = (HERE.parent / "README.md", HERE / "README.md", HERE.parent / "models" / "README.md")
METHODS = {
    "SGD": "SGD, to its end",
    "SGD to the last sample": "SGD, at the last sample",
    "mean of the samples 16 to 30": "mean of the samples 16 to 30",
    "P-BFGS, BatchNorm re-estimated": "P-BFGS in the plane of the samples",
    "P-SGD, BatchNorm re-estimated": "P-SGD in the plane of the samples",
    "P-SGD, random basis, BatchNorm re-estimated": "P-SGD in a random plane",
}
SHOWN = {"digits-full": ("digits", (0.0, 0.4, 0.8)), "cifar-small": ("CIFAR-10", (0.0, 0.4))}


def measured(target: str) -> dict:
    """What a target's JSON file holds."""
    return json.loads((HERE / f"{target}.json").read_text())


def main_table() -> str:
    """Final test accuracy of each method in the experiments of SHOWN."""
    columns, rows = ["", "k", "epochs in all"], {method: ["", ""] for method in METHODS}
    for target, (name, noises) in SHOWN.items():
        lines = measured(target)["lines"]
        for noise in noises:
            columns.append(f"{name}, c = {noise:g}")
            for method, row in rows.items():
                # "to the last sample" is that of the 31 samples, not of other runs'.
                (line,) = (
                    line
                    for line in lines
                    if (line["method"], line["noise"]) == (method, noise)
                    and (method != "SGD to the last sample" or line["in all"] == 30)
                )
                row[:2] = str(line["k"]), str(line["in all"])
                row.append(report.spread(line["final"], 2))
    return report.markdown(columns, [[METHODS[method], *row] for method, row in rows.items()])


def target_tables(target: str) -> str:
    """All tables of a target, and on what they were measured."""
    content = measured(target)
    text = f"\n{report.machine_text(content['machine'])}\n"
    for experiment, lines in report.by_experiment(content["lines"]).items():
        text += f"\n### {experiment}; seeds {', '.join(map(str, lines[0]['seeds']))}\n\n"
        text += report.markdown(*report.results_table(lines))
        text += f"\n{report.COST}\n\n{report.markdown(*report.cost_table(lines))}"
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
    return f"\n{report.machine_text(facts)}\n\n{report.markdown(columns, rows)}\n"


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

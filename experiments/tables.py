"""Fill the tables into the README.md files, from what was measured: experiments/*.json.

    PYTHONPATH=. python experiments/tables.py

A JSON file is the results.json that report.py left of the experiment that the file is named
after; networks.json is what networks.py left. A table stands between <!-- table NAME --> and
<!-- end -->; NAME is main, published, networks, or an experiment.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import report

HERE = Path(__file__).parent
PAGES = (HERE.parent / "README.md", HERE / "README.md", HERE.parent / "models" / "README.md")
METHODS = {  # as the first page names them, and how report.py's names begin
    "SGD, to its end": "SGD",
    "SGD, at the last sample": "SGD to the last sample",
    "mean of the later samples": "mean of the samples",
    "P-BFGS in the plane of the samples": "P-BFGS",
    "P-SGD in the plane of the samples": "P-SGD",
    "P-SGD in a random plane": "P-SGD, random basis",
}
SHOWN = {"digits-full": ("digits", (0.0, 0.4, 0.8)), "cifar-small": ("CIFAR-10", (0.0, 0.4))}

TIMED = ("digits-full",)  # the others shared the machine


def measured(target: str) -> dict:
    """What a target's JSON file holds."""
    return json.loads((HERE / f"{target}.json").read_text())


def of_methods(target: str, noise: float) -> dict[str, dict]:
    """The line of each of METHODS that an experiment has, without variations."""
    lines = [line for line in measured(target)["lines"] if line["noise"] == noise]
    found = {}
    for name, method in METHODS.items():
        plain = rf"{method}( \d+ to \d+)?(, BatchNorm re-estimated)?"
        found[name] = [line for line in lines if re.fullmatch(plain, line["method"])]
    (mean,) = found["mean of the later samples"]
    # Of the samples of that mean, not of other runs'.
    found["SGD, at the last sample"] = [
        line for line in found["SGD, at the last sample"] if line["in all"] == mean["in all"]
    ]
    if any(len(own) > 1 for own in found.values()):
        raise ValueError(f"{target}.json: several lines of a method")
    return {name: line for name, own in found.items() for line in own}


def main_table() -> str:
    """Final test accuracy of each method in the experiments of SHOWN."""
    columns, rows = ["", "k", "epochs in all"], {}
    for target, (name, noises) in SHOWN.items():
        for noise in noises:
            columns.append(f"{name}, c = {noise:g}")
            for method, line in of_methods(target, noise).items():
                row = rows.setdefault(method, [method, str(line["k"]), str(line["in all"])])
                row.append(report.spread(line["final"], 2))
    return report.markdown(columns, rows.values())


def published_table() -> str:
    """The experiment of the published commands, with test accuracy at the end and at its best."""
    rows = [
        [method, str(line["k"]), str(line["in all"])]
        + [report.spread(line[name], 2) for name in ("final", "best", "train")]
        for method, line in of_methods("cifar", 0.0).items()
    ]
    return report.markdown(["", "k", "epochs in all", "final", "best", "train"], rows)


def told(target: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table, without seconds that were measured beside other work."""
    kept = [i for i, name in enumerate(columns) if target in TIMED or "seconds" not in name]
    columns, *rows = ([line[i] for i in kept] for line in (columns, *rows))
    return report.markdown(columns, rows)


def target_tables(target: str) -> str:
    """All tables of a target, and on what they were measured."""
    content = measured(target)
    text = f"\n{report.machine_text(content['machine'])}\n"
    for experiment, lines in report.by_experiment(content["lines"]).items():
        text += f"\n### {experiment}; {report.seeds_text(lines)}\n\n"
        text += told(target, *report.results_table(lines))
        text += f"\n{report.COST}\n\n{told(target, *report.cost_table(lines))}"
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
        own = {"main": main_table, "published": published_table, "networks": networks_table}
        table = own[found[2]]() if found[2] in own else target_tables(found[2])
        return found[1] + table + found[3]

    marks = r"(<!-- table ([\w-]+) -->\n).*?(<!-- end -->)"
    return re.sub(marks, fill, page, flags=re.DOTALL)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(filled(page.read_text()))

"""3. What came of it: a table of the runs in one or more save dirs, over seeds as mean ± std.

    python report.py save_labelnoise0_resnet20 save_labelnoise0_resnet20_seed2

Directories of the same network, data, label noise and epochs are taken as seeds of one experiment.
"""

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import utils

COLUMNS = ("experiment", "method", "k", "epochs", "in all", "final", "best", "seconds")


def read_run(directory: Path) -> tuple[dict, list[dict]]:
    """The arguments of a run and its metrics rows."""
    arguments = json.loads((directory / "config.json").read_text())["arguments"]
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    if not all(math.isfinite(row[key]) for row in rows for key in ("epoch", "test_acc", "seconds")):
        raise ValueError(f"{directory / 'metrics.jsonl'} holds what is not finite")
    return arguments, rows


def method_of(arguments: dict) -> str:
    """What a subspace run did, in words."""
    name = "P-SGD" if "lr" in arguments else "P+-BFGS" if arguments["alpha"] else "P-BFGS"
    if arguments["basis"] != "pca":
        name += f", {Path(arguments['basis']).name} basis"
    if arguments["start"] is not None:
        name += f", from {arguments['start']}"
    return name + (", BatchNorm re-estimated" if arguments["bn_update"] else "")


def results(save_dir: Path) -> list[tuple]:
    """(experiment, method, k, epochs, epochs in all, final, best, seconds) of each run."""
    arguments, sgd = read_run(save_dir)
    experiment = f"{arguments['datasets']}, {arguments['arch']}, c = {arguments['corrupt']:g}"
    if arguments["smalldatasets"]:
        experiment += f", {100 * arguments['smalldatasets']:g} % of the training images"

    def row(method: str, k: int | str, rows: list[dict], sampled: list[dict]) -> tuple:
        seconds = sum(row["seconds"] for row in sampled + rows)
        best = max(row["test_acc"] for row in rows)
        epochs = sum(row["epoch"] > 0 for row in rows)  # the mean of samples trains none
        key = (experiment, method, k, epochs, len(sampled) + epochs)
        return key, rows[-1]["test_acc"], best, seconds

    table = [row("SGD", "n", sgd, [])]
    for directory in sorted(file.parent for file in save_dir.glob("*/metrics.jsonl")):
        own, rows = read_run(directory)
        if any(own[option] != arguments[option] for option in utils.EXPERIMENT):
            raise ValueError(f"{directory} is not of the experiment in {save_dir}")
        if own.get("average"):
            first, end = own["average"]
            sampled = [row for row in sgd if row["epoch"] < end]
            table.append(row(f"mean of the samples {first} to {end - 1}", 0, rows, sampled))
            continue
        last = range(own["params_start"], own["params_end"], own["params_stride"])[-1]
        sampled = [row for row in sgd if row["epoch"] <= last]
        k = len(np.load(directory / "basis.npz")["explained_variance_ratio"])
        table.append(row("SGD to the last sample", "n", sampled, []))
        table.append(row(method_of(own), k, rows, sampled))
    return list(dict.fromkeys(table))


def spread(values: Sequence[float], digits: int) -> str:
    """Mean ± standard deviation; a single value as it is."""
    text = f"{statistics.mean(values):.{digits}f}"
    return text + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


def main(argv: Sequence[str] | None = None) -> list[list[str]]:
    """Print the table as Markdown; returns its rows."""
    parser = utils.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("save_dirs", nargs="+", type=Path, metavar="SAVE_DIR")
    groups = defaultdict(list)
    for save_dir in parser.parse_args(argv).save_dirs:
        with utils.refusing(f"{save_dir}: no finished run", Exception):
            for key, *numbers in results(save_dir):
                groups[key].append(numbers)
    rows = []
    for (experiment, method, k, epochs, in_all), runs in groups.items():
        final, best, seconds = zip(*runs, strict=True)
        seeds = f" ({len(runs)} seeds)" if len(runs) > 1 else " (1 seed)"
        numbers = [spread(final, 2), spread(best, 2), spread(seconds, 0)]
        rows.append([experiment + seeds, method, str(k), str(epochs), str(in_all), *numbers])
    for row in (COLUMNS, ["---"] * len(COLUMNS), *rows):
        print(f"| {' | '.join(row)} |")
    return rows


if __name__ == "__main__":
    utils.program(main)

"""Reads the runs of save dirs and computes the tables of the report; no networks, no pictures.

A save dir holds a run of train_sgd.py, the trajectory, and in its folders the runs on its samples.
What cannot be used is left out, with a line in a list of problems.
"""

import contextlib
import functools
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from checkpoint import EXPERIMENT, PREPROCESSING, fingerprint

# What seeds of one experiment have to share, beside what the table shows.
SETTINGS = ("lr", "momentum", "milestones", "weight_decay", "batch_size", "optimizer", "half")
SETTINGS += ("params_start", "params_end", "params_stride", "alpha", "gamma", "accumulate")
SETTINGS += ("image_size", *PREPROCESSING)
FITS = ("train", "correct labels", "wrong labels")
COST = (
    "Cost of reaching the final test accuracy of SGD with the same seed: mean over the seeds that "
    "reach it; compare only methods that do so with equally many seeds."
)

# ------------------------------------------------------------------------------ reading runs


class Experiment(NamedTuple):
    """What seeds have in common."""

    data: str
    arch: str
    n: int
    noise: float

    def __str__(self) -> str:
        return f"{self.data}, {self.arch} (n = {self.n:,}), c = {self.noise:g}"


@dataclass(eq=False)
class Result:
    """A trained network: one seed of a row of the table.

    `kind` is "full" for a trajectory, "partial" for one up to its last sample in use, "continued"
    for one that goes on from a sample of another, "average" or "subspace", and "pretrained" for the
    network that a trajectory started from.
    """

    kind: str
    directory: Path
    config: dict
    rows: list[dict]  # metrics.jsonl; what did not train has one row, of epoch 0
    trajectory: "Result | None" = None  # None: this is one
    sampled: list[dict] = field(default_factory=list)  # rows of the trajectory that it builds on
    method: str = ""
    weights: Path | None = None
    fits: Sequence[float | None] = (None, None, None)  # see analysis.Probe.training_accuracy
    start: float | None = None  # test accuracy of the network that training started from

    def __post_init__(self) -> None:
        self.arguments = self.config["arguments"]
        self.trajectory = self.trajectory or self
        self.experiment = experiment_of(self.trajectory.config)
        self.seed = self.trajectory.config["arguments"]["randomseed"]
        self.method = self.method or method_of(self.config)
        self.k = 0 if self.kind == "average" else self.config.get("k", "n")
        self.variance = self.config.get("explained_variance")  # of its samples, in percent
        self.epochs = sum(row["epoch"] > 0 for row in self.rows)
        self.final = self.rows[-1]["test_acc"]
        self.name = (self.arguments.get("run") or "") if self.kind == "subspace" else ""
        done = self.rows[-1]["epoch"]
        self.sessions = self.config.get("sessions", [self.config])  # one for each start
        last = self.sessions[-1]["arguments"]["epochs"]
        self.finished = self.kind == "partial" or not 0 < done < last
        self.title = self.method + (f" ({self.name})" if self.name else "")
        self.title += "" if self.finished else f", {done} of {last} epochs so far"

    @property
    def is_of_later_half(self) -> bool:
        """Whether it is the average of the later half of the samples 1 … T."""
        numbers = self.config.get("samples", [0])
        return self.kind == "average" and numbers[0] == numbers[-1] // 2 + 1

    def seconds(self, rows: int) -> float:
        """Of training, sampling included, until the metrics have so many rows.

        An epoch counts as the median epoch: the first one after a start may include compilation.
        """
        parts = ((self.sampled, len(self.sampled)), (self.rows, rows))
        return sum(n * statistics.median(row["seconds"] for row in part) for part, n in parts if n)

    def settings(self) -> dict[str, Any]:
        """What seeds of it have to share."""
        runs = {"": self, " of the trajectory": self.trajectory}
        return {f"{s}{of}": run.arguments.get(s) for of, run in runs.items() for s in SETTINGS}


@contextlib.contextmanager
def noting(problems: list[str], where: Any) -> Iterator[None]:
    """Add what fails inside to `problems`, as one line, instead of raising it."""
    try:
        yield
    except Exception as error:  # files that were cut or edited have many ways to be wrong
        text = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        problems.append(f"{where}: {' '.join(text.split()) or type(error).__name__}")


def experiment_of(config: Mapping[str, Any]) -> Experiment:
    """The experiment of a trajectory."""
    arguments = config["arguments"]
    data = arguments["datasets"]
    if arguments["smalldatasets"]:
        data += f", {100 * arguments['smalldatasets']:g} % of the training images"
    if arguments["pretrained"]:
        data += ", from pretrained weights"
    return Experiment(data, arguments["arch"], config["n"], float(arguments["corrupt"]))


def method_of(config: Mapping[str, Any]) -> str:
    """What a run did, as the table names it."""
    arguments = config["arguments"]
    if arguments.get("average"):
        first, last = config["samples"][0], config["samples"][-1]
        which = f"samples {first}–{last}" if first < last else f"sample {first}"
        return f"weight average ({which})"
    if "basis" not in arguments:
        return {"adam": "Adam", "adamw": "AdamW"}.get(arguments["optimizer"], "SGD")
    name = "P-SGD" if "lr" in arguments else "P+-BFGS" if arguments["alpha"] else "P-BFGS"
    start = arguments["start"]
    if arguments["basis"] != "pca":
        name += f", {Path(arguments['basis']).name} basis"
    if start is not None:
        name += f", from {start if isinstance(start, str) else f'sample {start}'}"
    return name + (", BN update" if arguments["bn_update"] else "")


def read_run(directory: Path, trajectory: Result | None = None) -> Result:
    """The run in a directory; one on the samples of a trajectory where that is given.

    Like all that reads here, it raises an exception of any kind where there is none.
    """
    if not (directory / "config.json").is_file():
        raise ValueError("there is no config.json; a report is of directories that a run has made")
    config = json.loads((directory / "config.json").read_text())
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    arguments = config["arguments"]
    kind = "average" if arguments.get("average") else "subspace" if "basis" in arguments else "full"
    if trajectory is None and kind != "full":
        raise ValueError(f"a run on the samples of a save dir; give that one: {directory.parent}")
    if trajectory is not None and kind == "full":
        raise ValueError("a run of train_sgd.py inside of another one; report it by its own name")
    if not rows:
        raise ValueError("no epoch is finished yet")
    if not all(math.isfinite(row[key]) for row in rows for key in ("epoch", "test_acc", "seconds")):
        raise ValueError("metrics.jsonl holds values that are not finite")
    return Result(kind, directory, config, rows, trajectory, weights=directory / "model.th")


def epoch_of(trajectory: Result, sample: int) -> float:
    """The epoch after which a sample was taken; infinite if there never was such a sample."""
    epochs = trajectory.config.get("sample_epochs")  # where samples are not those of the epochs
    return sample if not epochs else epochs[sample] if sample < len(epochs) else math.inf


def read_on_samples(directory: Path, trajectory: Result, digest: Callable) -> Iterator[Result]:
    """The run in a directory, and its trajectory at the last sample of a subspace run."""
    run = read_run(directory, trajectory)
    for name in EXPERIMENT:
        if run.arguments[name] != trajectory.arguments[name]:
            raise ValueError(f"not of the experiment in {trajectory.directory}, see {name}")
    samples, start = run.config["samples"], run.arguments.get("start")
    last = epoch_of(trajectory, samples[-1])
    files = tuple(trajectory.directory / f"{number}.pt" for number in samples)
    if all(file.exists() for file in files):
        replaced = digest(files) != run.config["fingerprint"]
    else:  # some have been removed to save disk space
        replaced = last > trajectory.rows[-1]["epoch"]
    if replaced:
        raise ValueError("its samples have been replaced since; run it again")
    used = max(last, epoch_of(trajectory, start) if isinstance(start, int) else 0)
    yield replace(run, sampled=[row for row in trajectory.rows if row["epoch"] <= math.ceil(used)])
    rows = [row for row in trajectory.rows if row["epoch"] <= math.ceil(last)]
    if run.kind == "subspace" and 0 < len(rows) < len(trajectory.rows):
        weights = files[-1] if last == int(last) else None
        method = f"{trajectory.method} at epoch {rows[-1]['epoch']}"
        yield replace(trajectory, kind="partial", rows=rows, weights=weights, method=method)


def continued(run: Result) -> Result | None:
    """The run as one that goes on from sample N of another; None where it is not.

    It has --pretrained DIR/N.pt and --start-epoch N.
    """
    number, file = run.arguments.get("start_epoch"), Path(str(run.arguments["pretrained"]))
    if file.name != f"{number}.pt" or not (file.parent / "config.json").is_file():
        return None
    before = read_run(file.parent)
    if any(run.arguments[name] != before.arguments[name] for name in EXPERIMENT):
        return None
    method = f"{run.method}, from sample {number}"
    rows = [row for row in before.rows if row["epoch"] <= epoch_of(before, number)]
    return replace(run, kind="continued", trajectory=before, sampled=rows, method=method)


def read_save_dir(save_dir: Path, problems: list[str]) -> list[Result]:
    """The results of a save dir: the trajectory's first, then those on its samples."""
    trajectory = read_run(save_dir)
    if not any(save_dir.glob("*/metrics.jsonl")) and (later := continued(trajectory)):
        return [later]
    digest = functools.cache(fingerprint)  # many runs build on the same samples
    found: dict[tuple, Result] = {}
    for file in sorted(save_dir.glob("*/metrics.jsonl")):
        with noting(problems, file.parent):
            for result in read_on_samples(file.parent, trajectory, digest):
                found.setdefault((result.directory, result.title), result)

    def place(result: Result) -> tuple:
        begun = len(result.sampled or result.rows)
        return begun, result.k != "n", bool(result.name), result.method, result.k

    return [trajectory, *sorted(found.values(), key=place)]


def read(save_dirs: Iterable[Path], problems: list[str]) -> list[Result]:
    """The results of several save dirs, less copies and what cannot be averaged with the others."""
    table: dict[tuple, list[Result]] = defaultdict(list)
    for save_dir in {path.resolve(): path for path in save_dirs}.values():
        results: list[Result] = []
        with noting(problems, save_dir):
            results = read_save_dir(save_dir, problems)
        for result in results:
            seeds = table[row_key(result)]
            why = next(filter(None, (mismatch(result, other) for other in seeds)), None)
            if why is None:
                seeds.append(result)
            elif result.kind != "partial":  # what builds on it says the same
                problems.append(f"{result.directory}: {why}")
                if result.kind == "full":
                    break
    return [result for seeds in table.values() for result in seeds]


def row_key(result: Result) -> tuple:
    """What the seeds of a row of the table share. A k that is chosen by variance may differ."""
    asked = result.arguments.get("n_components")
    k = asked if isinstance(asked, float) and result.arguments["basis"] == "pca" else result.k
    total = len(result.sampled) + result.epochs
    return result.experiment, result.title, k, result.epochs, total


def mismatch(result: Result, other: Result) -> str | None:
    """Why two results are not seeds of one experiment; None if they are."""
    expected = other.settings()
    for name, value in result.settings().items():
        if value != expected[name]:
            return f"not averaged: {name} is {value}, but {expected[name]} in {other.directory}"
    same = f"seed {result.seed} of the experiment is in {other.directory} already; a copy?"
    return same if result.seed == other.seed else None


def plain(results: Iterable[Result]) -> list[Result]:
    """One run per method and trajectory: the one without a name, else the first."""
    ordered = sorted(results, key=lambda result: result.name)
    runs = grouped(ordered, lambda result: (result.trajectory.directory, result.method))
    return [own[0] for own in runs.values() if own[0].kind != "partial"]


def grouped(items: Iterable[Any], key: Callable[[Any], Any]) -> dict[Any, list]:
    """The items that share a key, in the order in which they come."""
    groups: dict = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


# ---------------------------------------------------------------------------------- tables


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
    """What `machine` returns, in a line."""
    return "; ".join(f"{name}: {', '.join(map(str, values))}" for name, values in facts.items())

"""Reads the runs of save dirs; no networks, no pictures.

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

from training.files import EXPERIMENT, PREPROCESSING, fingerprint

# What seeds of one experiment have to share, beside what the table shows.
SETTINGS = ("lr", "momentum", "milestones", "weight_decay", "batch_size", "optimizer", "half")
SETTINGS += ("params_start", "params_end", "params_stride", "alpha", "gamma", "accumulate")
SETTINGS += ("image_size", *PREPROCESSING)
KINDS = {"sgd": "full", "average": "average"}  # all other methods train in a subspace
METHODS = {"sgd": "SGD", "adam": "Adam", "adamw": "AdamW", "psgd": "P-SGD", "pbfgs": "P-BFGS"}


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
    arguments, method = config["arguments"], config["method"]
    if method == "average":
        first, last = config["samples"][0], config["samples"][-1]
        which = f"samples {first}–{last}" if first < last else f"sample {first}"
        return f"weight average ({which})"
    if method == "sgd":
        return METHODS[arguments["optimizer"]]
    name = "P+-BFGS" if arguments["alpha"] else METHODS.get(method, method)
    start = arguments["start"]
    if arguments["basis"] != "pca":
        name += f", {Path(arguments['basis']).name} basis"
    if start == "mean":
        name += ", from mean"
    elif start is not None:
        name += f", from sample {start}"
    return name + (", BN update" if arguments["bn_update"] else "")


def read_run(directory: Path, trajectory: Result | None = None) -> Result:
    """The run in a directory; one on the samples of a trajectory where that is given.

    Like all that reads here, it raises an exception of any kind where there is none.
    """
    if not (directory / "config.json").is_file():
        raise ValueError("there is no config.json; a report is of directories that a run has made")
    config = json.loads((directory / "config.json").read_text())
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    kind = KINDS.get(config["method"], "subspace")
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
    epochs = trajectory.config.get("sample_epochs")
    if not epochs:  # samples are those of the epochs
        return sample
    return epochs[sample] if sample < len(epochs) else math.inf


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
            problem = mismatch(result, seeds)
            if problem is None:
                seeds.append(result)
            elif result.kind != "partial":  # what builds on it says the same
                problems.append(f"{result.directory}: {problem}")
                if result.kind == "full":
                    break
    return [result for seeds in table.values() for result in seeds]


def row_key(result: Result) -> tuple:
    """What the seeds of a row of the table share. A k that is chosen by variance may differ."""
    asked = result.arguments.get("n_components")
    k = asked if isinstance(asked, float) and result.arguments["basis"] == "pca" else result.k
    total = len(result.sampled) + result.epochs
    return result.experiment, result.title, k, result.epochs, total


def mismatch(result: Result, seeds: Iterable[Result]) -> str | None:
    """Why a result is not one more seed of the same experiment; None if it is."""
    for other in seeds:
        expected = other.settings()
        for name, value in result.settings().items():
            if value != expected[name]:
                return f"not averaged: {name} is {value}, but {expected[name]} in {other.directory}"
        if result.seed == other.seed:
            return f"seed {result.seed} of the experiment is in {other.directory} already; a copy?"
    return None


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

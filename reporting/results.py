"""Reads the runs of save dirs; no networks, no figures.

A save dir holds a run of train_sgd.py, the trajectory, and in its folders the runs that build on
its snapshots. What cannot be used is left out, with a line in a list of problems.
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

from dldr.trajectory import abbreviate
from training.files import fingerprint
from training.records import EXPERIMENT, PREPROCESSING

# What seeds of one experiment have to share, beside what the table shows.
SETTINGS = ("lr", "momentum", "milestones", "schedule", "weight_decay", "batch_size", "half")
SETTINGS += ("params_start", "params_end", "params_stride", "alpha", "gamma", "accumulate")
SETTINGS += ("optimizer", "basis_dtype", "image_size", *PREPROCESSING)
CHANGES = (*SETTINGS, "epochs", "device")  # of these a resumed run's report says that they changed
# Methods go by the name that their script recorded, except these.
NAMES = {"average": "weight average", "pbfgs": "P-BFGS"}


class Experiment(NamedTuple):
    """What seeds have in common."""

    data: str
    arch: str
    n: int
    noise: float

    def __str__(self) -> str:
        c = "" if "labels of " in self.data else f", c = {self.noise:g}"
        return f"{self.data}, {self.arch} (n = {self.n:,}){c}"


@dataclass(eq=False)
class Result:
    """A trained network: one seed of a row of the table.

    `kind` is "full" for a trajectory, "partial" for one up to its last snapshot in use, "continued"
    for one that goes on from a snapshot of another, "average" or "subspace", and "pretrained" for
    the network that a trajectory started from. `variant` holds what distinguishes it from other
    runs of its method; see `variant_of`.
    """

    kind: str
    directory: Path
    config: dict
    rows: list[dict]  # metrics.jsonl; what did not train has one row, of epoch 0
    trajectory: "Result | None" = None  # None: this is one
    sampled: list[dict] = field(default_factory=list)  # rows of the trajectory that it builds on
    method: str = ""
    variant: dict[str, Any] | None = None
    weights: Path | None = None
    train: Sequence[float | None] = (None, None, None)  # see analysis.Probe.training_accuracy
    start: float | None = None  # test accuracy of the network that training started from
    walk: float | None = None  # percent of its variance that a random walk would explain

    def __post_init__(self) -> None:
        self.arguments = self.config["arguments"]
        self.trajectory = self.trajectory or self
        self.experiment = experiment_of(self.trajectory.config)
        self.seed = seed_of(self.trajectory.arguments, self.arguments)
        self.method = self.method or method_of(self.config)
        self.variant = variant_of(self.config) if self.variant is None else self.variant
        self.k = 0 if self.kind == "average" else self.config.get("k", "n")
        self.variance = self.config.get("explained_variance")  # of its snapshots, in percent
        self.epochs = sum(row["epoch"] > 0 for row in self.rows)
        self.final = self.rows[-1]["test_acc"]
        self.run = self.arguments["run"] if self.kind == "subspace" else None
        self.done = self.rows[-1]["epoch"]
        self.sessions = self.config.get("sessions", [self.config])  # one for each start
        self.last = self.sessions[-1]["arguments"]["epochs"]
        self.finished = self.kind == "partial" or not 0 < self.done < self.last

    @property
    def name(self) -> str:
        """The method and its variant."""
        return name_of(self.method, self.variant)

    @property
    def title(self) -> str:
        """What the table calls it."""
        run = f" ({self.run})" if self.run else ""
        state = "" if self.finished else f", {self.done} of {self.last} epochs so far"
        return self.name + run + state

    @property
    def is_of_later_half(self) -> bool:
        """Whether it is the average of the later half of the snapshots 1 … T."""
        first, last = self.variant.get("snapshots", (0, 0))
        return self.kind == "average" and first == last // 2 + 1

    @property
    def messages(self) -> list[str]:
        """What the run recorded that its table does not show: other settings from some epoch on."""
        lines = []
        for session in self.sessions:
            changed = session.get("changed", {}).items()
            parts = [f"{name} {old} → {new}" for name, (old, new) in changed if name in CHANGES]
            if parts:
                lines.append(f"from epoch {session['from_epoch']} on: {', '.join(parts)}")
        lagging = [row["epoch"] for row in self.rows if row.get("statistics_lag")]
        if lagging:
            epochs = f"epoch{'s' if len(lagging) > 1 else ''} {abbreviate(lagging)}"
            lines.append(f"BatchNorm's statistics lag at {epochs}; --bn-update recomputes them")
        return lines

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


# ------------------------------------------------------------------- what a run is, by its records


def experiment_of(config: Mapping[str, Any]) -> Experiment:
    """The experiment of a trajectory."""
    arguments = config["arguments"]
    data = arguments["datasets"]
    if arguments["smalldatasets"]:
        data += f", {100 * arguments['smalldatasets']:g} % of the training images"
    noise = Path(arguments.get("noise", "symmetric")).name  # earlier versions had no other
    if noise != "symmetric":
        data += f", labels of {noise}" if "." in noise else f", {noise} labels"
    if arguments["pretrained"]:
        data += f", from pretrained weights at a learning rate of {arguments['lr']:g}"
    return Experiment(data, arguments["arch"], config["n"], float(arguments["corrupt"]))


def seed_of(trajectory: Mapping[str, Any], arguments: Mapping[str, Any]) -> int | str:
    """The seed of a run on a trajectory; "1/2" where it has --train-seed 2.

    "1/2/3" where the trajectory has --train-seed 2, and the run 3.
    """
    seed = trajectory["randomseed"]
    trained = seed if trajectory["train_seed"] is None else trajectory["train_seed"]
    own = trained if arguments["train_seed"] is None else arguments["train_seed"]
    if trained == seed:
        return seed if own == seed else f"{seed}/{own}"
    return f"{seed}/{trained}/{own}"


def method_of(config: Mapping[str, Any]) -> str:
    """The method of a run: its script's, and its optimizer's name where that decides."""
    method = config["method"]
    if method == "sgd":
        return config["optimizer"]
    if method == "psgd":
        return f"P-{config['optimizer']}"
    if method == "pbfgs" and config["arguments"]["alpha"]:
        return "P+-BFGS"
    return NAMES.get(method, method)


def variant_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """What distinguishes a run from others of its method.

    `basis`, unless by PCA; `start`, "mean" or the number of a snapshot; `bn_update`; of averages
    the first and last of their `snapshots`.
    """
    arguments = config["arguments"]
    if config["method"] == "average":
        return {"snapshots": [config["samples"][0], config["samples"][-1]]}
    variant = {}
    if arguments["basis"] not in (None, "pca"):
        variant["basis"] = Path(arguments["basis"]).name
    if arguments["start"] is not None:
        variant["start"] = arguments["start"]
    if arguments["bn_update"]:
        variant["bn_update"] = True
    return variant


def name_of(method: str, variant: Mapping[str, Any]) -> str:
    """What a method and its variant are called: "P-SGD, random basis, from mean, BN update"."""
    parts = [method]
    if "basis" in variant:
        parts.append(f"{variant['basis']} basis")
    if "start" in variant:
        mean = variant["start"] == "mean"
        parts.append("from mean" if mean else f"from snapshot {variant['start']}")
    if "bn_update" in variant:
        parts.append("BN update")
    name = ", ".join(parts)
    if "epoch" in variant:
        name += f" at epoch {variant['epoch']}"
    if "snapshots" in variant:
        first, last = variant["snapshots"]
        name += f" (snapshots {first}–{last})" if first < last else f" (snapshot {last})"
    return name


# ----------------------------------------------------------------------------------------- reading


@contextlib.contextmanager
def skipping(problems: list[str], where: Any) -> Iterator[None]:
    """Add what fails inside to `problems`, as one line, instead of raising it."""
    try:
        yield
    except Exception as error:  # files that were cut or edited have many ways to be wrong
        text = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        problems.append(f"{where}: {' '.join(text.split()) or type(error).__name__}")


def read_run(directory: Path, trajectory: Result | None = None) -> Result:
    """The run in a directory; one on the snapshots of a trajectory where that is given.

    Like all that reads here, it raises an exception of any kind where there is none.
    """
    if not (directory / "config.json").is_file():
        raise ValueError(
            "there is no config.json; allowed: a --save-dir with the trajectory of train_sgd.py "
            "(runs on --samples have none)"
        )
    config = json.loads((directory / "config.json").read_text())
    metrics = directory / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    rows = [json.loads(line) for line in lines]
    kind = config["kind"]
    if trajectory is None and kind != "full":
        raise ValueError(f"a run on the snapshots of a save dir; give that one: {directory.parent}")
    if trajectory is not None and kind == "full":
        raise ValueError("a run of train_sgd.py inside of another one; report it by its own name")
    if not rows:
        raise ValueError("no epoch is finished yet")
    if not all(math.isfinite(row[key]) for row in rows for key in ("epoch", "test_acc", "seconds")):
        raise ValueError("metrics.jsonl holds values that are not finite")
    return Result(kind, directory, config, rows, trajectory, weights=directory / "model.th")


def epoch_of(trajectory: Result, snapshot: int) -> float:
    """The epoch after which a snapshot was taken; infinite if there never was such a one."""
    epochs = trajectory.config.get("sample_epochs")
    if not epochs:  # snapshots are those of the epochs
        return snapshot
    return epochs[snapshot] if snapshot < len(epochs) else math.inf


def read_on_snapshots(directory: Path, trajectory: Result, digest: Callable) -> Iterator[Result]:
    """The run in a directory, and its trajectory at the last snapshot of a subspace run."""
    run = read_run(directory, trajectory)
    if run.arguments.get("samples"):
        raise ValueError("a run on --samples, which are not of this trajectory")
    for name in EXPERIMENT:
        if run.arguments.get(name) != trajectory.arguments.get(name):
            raise ValueError(f"not of the experiment in {trajectory.directory}, see {name}")
    snapshots, start = run.config["samples"], run.arguments["start"]
    last = epoch_of(trajectory, snapshots[-1])
    files = tuple(trajectory.directory / f"{number}.pt" for number in snapshots)
    if all(file.exists() for file in files):
        replaced = digest(files) != run.config["fingerprint"]
    else:  # some have been removed to save disk space
        replaced = last > trajectory.done
    if replaced:
        raise ValueError("its snapshots have been replaced since; run it again")
    used = max(last, epoch_of(trajectory, start) if isinstance(start, int) else 0)
    yield replace(run, sampled=[row for row in trajectory.rows if row["epoch"] <= math.ceil(used)])
    rows = [row for row in trajectory.rows if row["epoch"] <= math.ceil(last)]
    if run.kind == "subspace" and 0 < len(rows) < len(trajectory.rows):
        weights = files[-1] if last == int(last) else None
        variant = {"epoch": rows[-1]["epoch"]}
        yield replace(trajectory, kind="partial", rows=rows, weights=weights, variant=variant)


def continued(run: Result) -> Result | None:
    """The run as one that goes on from a snapshot of another; None where it is not.

    It has --pretrained DIR/N.pt, and --start-epoch is the epoch of that snapshot, rounded.
    """
    file = Path(str(run.arguments["pretrained"]))
    if not (file.stem.isdecimal() and (file.parent / "config.json").is_file()):
        return None
    before, number = read_run(file.parent), int(file.stem)
    epoch = epoch_of(before, number)
    if abs(epoch - run.arguments["start_epoch"]) > 0.5:
        return None
    if any(run.arguments.get(name) != before.arguments.get(name) for name in EXPERIMENT):
        return None
    rows = [row for row in before.rows if row["epoch"] <= run.arguments["start_epoch"]]
    variant = {"start": number}
    return replace(run, kind="continued", trajectory=before, sampled=rows, variant=variant)


def read_save_dir(save_dir: Path, problems: list[str]) -> list[Result]:
    """The results of a save dir: the trajectory's first, then those on its snapshots."""
    trajectory = read_run(save_dir)
    if not any(save_dir.glob("*/metrics.jsonl")) and (later := continued(trajectory)):
        return [later]
    digest = functools.cache(fingerprint)  # many runs build on the same snapshots
    others: dict[tuple, Result] = {}
    for file in sorted(save_dir.glob("*/metrics.jsonl")):
        with skipping(problems, file.parent):
            for result in read_on_snapshots(file.parent, trajectory, digest):
                others.setdefault((result.directory, result.title), result)

    def place(result: Result) -> tuple:
        begun = len(result.sampled or result.rows)
        return begun, result.k != "n", bool(result.run), result.name, result.k

    return [trajectory, *sorted(others.values(), key=place)]


def read(save_dirs: Iterable[Path], problems: list[str]) -> list[Result]:
    """The results of several save dirs, less copies and what cannot be averaged with the others."""
    table: dict[tuple, list[Result]] = defaultdict(list)
    for save_dir in {path.resolve(): path for path in save_dirs}.values():
        results: list[Result] = []
        with skipping(problems, save_dir):
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
    kept = [result for seeds in table.values() for result in seeds]
    whole = {result.directory.resolve(): result for result in kept if result.kind == "full"}
    for result in kept:
        if result.kind == "continued":  # it has read its trajectory by itself
            result.trajectory = whole.get(result.trajectory.directory.resolve(), result.trajectory)
    return kept


# ---------------------------------------------------------------------------------------- grouping


def row_key(result: Result) -> tuple:
    """What the seeds of a row of the table share. A k that is chosen by variance may differ."""
    total = len(result.sampled) + result.epochs
    return result.experiment, result.title, asked_k(result), result.epochs, total


def asked_k(result: Result) -> Any:
    """k, or the fraction of the variance that it was chosen by."""
    asked = result.arguments["n_components"]
    chosen = isinstance(asked, float) and result.arguments["basis"] == "pca"
    return asked if chosen else result.k


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


def one_per_name(results: Iterable[Result]) -> list[Result]:
    """A run of each method, variant and seed: in the method's directory, else the first.

    All seeds have the same k. A trajectory up to a snapshot is part of the whole one, and left out.
    """
    ordered = sorted(results, key=lambda r: (r.run or "", len(r.directory.name)))
    runs = grouped(ordered, lambda r: (r.trajectory.directory, r.seed, r.name))
    ones = [alike[0] for alike in runs.values() if alike[0].kind != "partial"]
    k = {run.name: asked_k(run) for run in reversed(ones)}
    return [run for run in ones if asked_k(run) == k[run.name]]


def grouped(items: Iterable[Any], key: Callable[[Any], Any]) -> dict[Any, list]:
    """The items that share a key, in the order in which they come."""
    groups: dict = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups

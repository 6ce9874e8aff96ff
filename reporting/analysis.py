"""What the report measures: principal components, accuracies, the loss landscape."""

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import models
import utils
from dldr import Subspace, average, landscape, pca, trainable
from dldr.pca import centered, gram_matrix, with_names
from dldr.trajectory import load_samples, load_state_dict, snapshot_numbers
from reporting.results import Experiment, Result, grouped, one_per_name, skipping
from reporting.trajectories import Trajectory
from training.losses import cross_entropy, evaluate
from training.network import copy_into, load_weights, renamed
from training.records import sample_range
from training.subspaces import load_basis

TRAINING_IMAGES = 5000  # at most this many are used for the training accuracy
GRID = 21  # points a side of the loss landscape
# The landscape's images: at most so many, and fewer where all together have more pixels than this,
# but at least so many, for BatchNorm. A point costs a forward pass of them.
LANDSCAPE_IMAGES, LANDSCAPE_PIXELS, LANDSCAPE_LEAST = 500, 2**17, 16
Samples = Sequence[Mapping[str, Tensor]]


@dataclass
class Measured:
    """What the figures need beside the results.

    `grid` is the number of points a side of the landscape; 0 for none.
    """

    grid: int = 0
    grams: dict[Path, "Gram"] = field(default_factory=dict)  # by the trajectory's directory
    probes: dict[Experiment, "Probe"] = field(default_factory=dict)


# ---------------------------------------------------------------------------- principal components


class Gram:
    """The Gram matrix of a trajectory's snapshots, read once: any of them are in it."""

    def __init__(self, directory: Path, numbers: Sequence[int]) -> None:
        """Raises ValueError for snapshots that have no common parameters, or are not finite."""
        snapshots = [load_samples(directory, number, number + 1)[0] for number in numbers]
        snapshots, names = with_names(snapshots, None)
        self.row = {number: row for row, number in enumerate(numbers)}
        self.n = sum(snapshots[0][name].numel() for name in names)
        self.matrix = gram_matrix(snapshots, names)

    def has(self, numbers: Sequence[int]) -> bool:
        """Whether these are three snapshots or more, and all have been read."""
        return len(numbers) > 2 and self.row.keys() >= set(numbers)

    def trajectory(self, numbers: Sequence[int]) -> Trajectory:
        """These snapshots; ValueError where they are all the same."""
        rows = [self.row[number] for number in numbers]
        return Trajectory(centered(self.matrix[rows][:, rows]), self.n)


def read_snapshots(results: Sequence[Result], problems: list[str]) -> dict[Path, Gram]:
    """The Gram matrices of the trajectories; the results' `walk` is set from them."""
    grams = {}
    for directory, runs in grouped(results, lambda r: r.trajectory.directory).items():
        with skipping(problems, f"{directory}: principal components"):
            explained = [run for run in runs if run.variance is not None]
            used = {number for run in explained for number in run.config["samples"]}
            used.update(shown_snapshots(runs))
            gram = Gram(directory, sorted(used.intersection(snapshot_numbers(directory))))
            for run in explained:
                if gram.has(run.config["samples"]):
                    run.walk = 100 * gram.trajectory(run.config["samples"]).walk.explained(run.k)
            grams[directory] = gram
    return grams


def shown_snapshots(runs: Sequence[Result]) -> list[int]:
    """The snapshots in the figures: of the first subspace run on a trajectory, else all of it."""
    subspaces = [run for run in one_per_name(runs) if run.kind == "subspace"]
    if subspaces:
        return list(subspaces[0].config["samples"])
    return snapshot_numbers(runs[0].trajectory.directory)


# --------------------------------------------------------------------------------------- accuracies


class Probe:
    """The network and the images of a trajectory, to measure on."""

    def __init__(self, trajectory: Result, options: argparse.Namespace) -> None:
        """Raises ValueError for a network from a module that --arch does not allow by name."""
        args = argparse.Namespace(**trajectory.arguments | {"device": options.device})
        args.data_dir = options.data_dir or Path(args.data_dir)
        if ":" in args.arch and args.arch != options.arch:
            # Code is not imported because a file names it.
            raise ValueError(f"its network is {args.arch}; allow it: --arch {args.arch}")
        train, test = utils.read_splits(args)
        classes = len(train.classes)
        labels = utils.noisy_labels(args, train)
        random = utils.rng(args.randomseed, "report")
        which = random.permutation(len(labels))[:TRAINING_IMAGES]
        self.correct = labels[which] == train.labels[which]
        split = train._replace(images=train.images[which], labels=labels[which])
        self.train = utils.make_loader(split, args, LANDSCAPE_IMAGES)
        self.landscape_images = landscape_images(args.image_size, len(which))
        self.test = utils.make_loader(test, args)
        self.model = models.build(args.arch, classes, args.image_size).to(args.device).eval()
        self.args, self.trajectory = args, trajectory
        self.starts: dict[range, float] = {}

    @torch.no_grad()
    def training_accuracy(self, weights: Path) -> list[float | None]:
        """Accuracy in percent on all images, those with a correct and those with a wrong label."""
        load_weights(self.model, weights, self.args.arch)
        hits = [self.model(images).argmax(1) == labels for images, labels in self.train.epoch()]
        right = 100 * torch.cat(hits).float().cpu()
        parts = (right, right[self.correct], right[~self.correct])
        return [float(part.mean()) if len(part) else None for part in parts]

    def start_accuracy(self, result: Result) -> float | None:
        """Test accuracy in percent of the network that training started from, if it is there."""
        numbers = started_from(result)
        if numbers not in self.starts and (samples := load(result, numbers)):
            copy_into(self.model, renamed(average(samples), self.model))
            self.starts[numbers] = evaluate(self.model, self.test.epoch(), False)["test_acc"]
        return self.starts.get(numbers)


def measure(
    results: list[Result], options: argparse.Namespace, problems: list[str]
) -> dict[Experiment, Probe]:
    """Measure on the networks of the results, to which those of pretrained networks are added.

    Returns a Probe of a trajectory of each experiment.
    """
    probes: dict[Experiment, Probe] = {}
    for directory, runs in grouped(results, lambda r: r.trajectory.directory).items():
        with skipping(problems, f"{directory}: training accuracy and landscape"):
            trajectory = runs[0].trajectory
            probe = Probe(trajectory, options)
            probes.setdefault(runs[0].experiment, probe)
            trajectory.start = probe.start_accuracy(trajectory)
            if trajectory.arguments["pretrained"] and trajectory.start is not None:
                before = pretrained(trajectory)
                runs.append(before)
                if trajectory in results:  # else only one that goes on from it is reported
                    results.insert(results.index(trajectory), before)
            for result in tqdm(runs, "training accuracy", disable=None, leave=False):
                with skipping(problems, f"{result.directory}: training accuracy"):
                    if result.kind in ("subspace", "continued"):
                        result.start = probe.start_accuracy(result)
                    if result.weights and result.weights.exists():
                        result.train = probe.training_accuracy(result.weights)
    return probes


def pretrained(trajectory: Result) -> Result:
    """The network that a trajectory started from, once its test accuracy has been measured."""
    row = {"epoch": 0, "seconds": 0.0, "test_acc": trajectory.start}
    weights = trajectory.directory / f"{first_snapshot(trajectory)}.pt"
    return replace(
        trajectory,
        kind="pretrained",
        method="pretrained",
        variant={},
        rows=[row],
        start=None,
        weights=weights,
    )


def load(result: Result, numbers: range) -> Samples:
    """Snapshots of a result's trajectory, [] if some have been removed to save disk space."""
    directory = result.trajectory.directory
    try:
        return load_samples(directory, numbers.start, numbers.stop, numbers.step)
    except FileNotFoundError:
        return []


def started_from(result: Result) -> range:
    """The snapshots (usually one) whose mean training started from; none for another file."""
    arguments, start = result.arguments, result.variant.get("start")
    if start == "mean":
        return sample_range(arguments)
    if start is None:
        if result.kind == "subspace" and arguments["pretrained"]:
            return range(0)
        subspace = result.kind == "subspace"
        start = arguments["params_start"] if subspace else first_snapshot(result)
    return range(start, start + 1)


def first_snapshot(result: Result) -> int:
    """The number of the snapshot that a run of train_sgd.py started from: that of --start-epoch."""
    begun, epochs = result.arguments["start_epoch"], result.config.get("sample_epochs")
    if not epochs:  # snapshots are those of the epochs
        return begun
    return next(number for number, epoch in enumerate(epochs) if epoch >= begun)


# --------------------------------------------------------------------------------------- landscape


@torch.no_grad()
def loss_landscape(
    probe: Probe, numbers: Sequence[int], results: Sequence[Result], grid: int
) -> dict[str, Any]:
    """The loss on the plane of the snapshots' first two components: what plots.landscape draws.

    `results` are of the probe's trajectory. Raises ValueError where the snapshots span no plane.
    """
    directory = probe.trajectory.directory
    samples = [load_samples(directory, number, number + 1)[0] for number in numbers]
    names = list(trainable(probe.model))
    basis, ratios = pca(samples, 2, names=names, device=probe.args.device)
    copy_into(probe.model, average(samples))
    plane = Subspace(probe.model, basis)

    def project(state: Mapping[str, Tensor]) -> np.ndarray:
        vector = torch.cat([state[name].reshape(-1) for name in names]).to(basis.device)
        return (basis @ (vector - plane.origin)).cpu().numpy()

    paths = {run.title: path_of(run, basis, project) for run in one_per_name(results)}
    paths = {title: np.array(path) for title, path in paths.items() if path}
    points = np.concatenate(list(paths.values()))
    low, high = points.min(0), points.max(0)
    room = 0.15 * (high - low).max()
    x, y = np.linspace(low - room, high + room, grid).T
    points = np.stack(np.meshgrid(x, y), -1).reshape(-1, 2)
    images, labels = next(probe.train.epoch())
    batch = images[: probe.landscape_images], labels[: probe.landscape_images]
    loss = loss_on(plane, batch, points).reshape(grid, grid)
    return {"paths": paths, "x": x, "y": y, "loss": loss, "ratios": ratios.tolist()}


def path_of(result: Result, basis: Tensor, project: Callable) -> list[np.ndarray]:
    """Where a run went on the plane of a basis (2, n), a point an epoch; [] without records."""
    if result.kind != "subspace":
        directory, files = result.directory, [result.weights]
        if result.kind in ("full", "continued"):
            files = [directory / f"{number}.pt" for number in snapshot_numbers(directory)]
        return [project(load_state_dict(file)) for file in files if file.exists()]
    start = load(result, started_from(result))
    trained = load_basis(result.directory / "basis.npz", basis.shape[1])
    if not start or trained is None or any("coordinates" not in row for row in result.rows):
        return []
    coordinates = np.array([row["coordinates"] for row in result.rows])
    turn = trained.vectors.to(basis) @ basis.T  # (k, 2)
    moved = coordinates @ turn.cpu().numpy()
    start = project(average(start))
    return [start, *(start + moved)]


def loss_on(plane: Subspace, batch: tuple[Tensor, Tensor], points: np.ndarray) -> np.ndarray:
    """The loss at each point (P, 2), on one batch, with BatchNorm's statistics of the batch.

    Running statistics belong to the network at which they were gathered, and mislead elsewhere.
    """
    images, labels = batch
    plane.eval()
    for layer in plane.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.train()
    what = f"loss landscape of {len(images)} images"
    loss = announced(lambda: cross_entropy(plane, images, labels, False)[0], what, len(points))
    return landscape(loss, plane, points).cpu().numpy()  # the only host sync


def landscape_images(size: int, most: int) -> int:
    """On how many images of so many pixels a side the landscape is computed, of `most`."""
    count = min(LANDSCAPE_IMAGES, max(LANDSCAPE_LEAST, LANDSCAPE_PIXELS // size**2))
    return min(count, most)


def announced(function: Callable[[], Any], what: str, total: int) -> Callable[[], Any]:
    """The function, which says every half minute how often it was called.

    It is silent on a terminal, which has a progress bar.
    """
    done, last = 0, -30.0

    def call() -> Any:
        nonlocal done, last
        if not sys.stderr.isatty() and time.monotonic() - last >= 30:
            print(f"{what}: {done} of {total} points", flush=True)
            last = time.monotonic()
        done += 1
        return function()

    return call

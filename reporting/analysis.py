"""What the report measures with networks: accuracies, principal components, the loss landscape."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import models
import utils
from dldr import Subspace, average, landscape, pca, trainable
from dldr.trajectory import load_samples, load_state_dict, snapshot_numbers
from reporting.results import Experiment, Result, grouped, noting, plain
from training.files import sample_range
from training.losses import cross_entropy, evaluate
from training.network import copy_into, load_weights
from training.subspaces import load_basis

TRAINING_IMAGES = 5000  # at most this many are used for the training accuracy
GRID, GRID_IMAGES = 21, 500  # points a side of the loss landscape, and images for its loss
Samples = Sequence[Mapping[str, Tensor]]


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
        labels = utils.corrupt_labels(train.labels, args.corrupt, classes, args.randomseed)
        random = utils.rng(args.randomseed, "report")
        which = random.permutation(len(labels))[:TRAINING_IMAGES]
        self.correct = labels[which] == train.labels[which]
        split = train._replace(images=train.images[which], labels=labels[which])
        self.train = utils.make_loader(split, args, GRID_IMAGES)
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
            copy_into(self.model, average(samples))
            self.starts[numbers] = evaluate(self.model, self.test.epoch(), False)["test_acc"]
        return self.starts.get(numbers)


def measure(
    results: list[Result], options: argparse.Namespace, problems: list[str]
) -> dict[Experiment, Probe]:
    """Measure on the networks of the results, to which those of pretrained networks are added.

    Returns a Probe of a trajectory of each experiment.
    """
    probes: dict[Experiment, Probe] = {}
    for directory, own in grouped(results, lambda r: r.trajectory.directory).items():
        with noting(problems, f"{directory}: training accuracy and landscape"):
            probe, trajectory = Probe(own[0].trajectory, options), own[0].trajectory
            probes.setdefault(own[0].experiment, probe)
            trajectory.start = probe.start_accuracy(trajectory)
            if trajectory.arguments["pretrained"] and trajectory.start is not None:
                row = {"epoch": 0, "seconds": 0.0, "test_acc": trajectory.start}
                before = replace(
                    trajectory, kind="pretrained", method="pretrained", rows=[row], start=None,
                    weights=directory / "0.pt",
                )  # fmt: skip
                own.append(before)
                results.insert(results.index(trajectory), before)
            for result in tqdm(own, "training accuracy", disable=None, leave=False):
                with noting(problems, f"{result.directory}: training accuracy"):
                    if result.kind in ("subspace", "continued"):
                        result.start = probe.start_accuracy(result)
                    if result.weights and result.weights.exists():
                        result.fits = probe.training_accuracy(result.weights)
    return probes


def load(result: Result, numbers: range) -> Samples:
    """Samples of a result's trajectory, [] if some have been removed to save disk space."""
    directory = result.trajectory.directory
    try:
        return load_samples(directory, numbers.start, numbers.stop, numbers.step)
    except FileNotFoundError:
        return []


def started_from(result: Result) -> range:
    """The samples (usually one) whose mean training started from; none for another file."""
    arguments, start = result.arguments, result.arguments.get("start")
    if start == "mean":
        return sample_range(arguments)
    if result.kind == "subspace" and start is None and arguments["pretrained"]:
        return range(0)
    if start is None:
        start = arguments["params_start" if result.kind == "subspace" else "start_epoch"]
    return range(start, start + 1)


def samples_of(results: Sequence[Result]) -> Samples:
    """The samples of the first subspace run on a trajectory, else all; [] where some are gone."""
    numbers = snapshot_numbers(results[0].trajectory.directory)
    used = range(numbers[0], numbers[-1] + 1) if numbers else range(0)
    subspaces = [result for result in plain(results) if result.kind == "subspace"]
    return load(results[0], sample_range(subspaces[0].arguments) if subspaces else used)


@torch.no_grad()
def loss_landscape(probe: Probe, samples: Samples, results: Sequence[Result]) -> dict[str, Any]:
    """The loss on the plane of the samples' first two principal components: what plots draws.

    `results` are of the probe's trajectory. Raises ValueError where the samples span no plane.
    """
    names = list(trainable(probe.model))
    basis, ratios = pca(samples, 2, names=names, device=probe.args.device)
    copy_into(probe.model, average(samples))
    plane = Subspace(probe.model, basis)

    def project(state: Mapping[str, Tensor]) -> np.ndarray:
        vector = torch.cat([state[name].reshape(-1) for name in names]).to(basis.device)
        return (basis @ (vector - plane.origin)).cpu().numpy()

    found = {result.title: path_of(result, basis, project) for result in plain(results)}
    paths = {title: np.array(path) for title, path in found.items() if path}
    points = np.concatenate(list(paths.values()))
    low, high = points.min(0), points.max(0)
    room = 0.15 * (high - low).max()
    x, y = np.linspace(low - room, high + room, GRID).T
    loss = loss_on(plane, probe.train, np.stack(np.meshgrid(x, y), -1).reshape(-1, 2))
    loss = loss.reshape(GRID, GRID)
    return {"paths": paths, "x": x, "y": y, "loss": loss, "ratios": ratios.tolist()}


def path_of(result: Result, basis: Tensor, project: Callable) -> list[np.ndarray]:
    """Where a run went on the plane of a basis (2, n), a point an epoch; [] where not known."""
    if result.kind != "subspace":
        directory, files = result.directory, [result.weights]
        if result.kind in ("full", "continued"):
            files = [directory / f"{number}.pt" for number in snapshot_numbers(directory)]
        return [project(load_state_dict(file)) for file in files if file.exists()]
    start = load(result, started_from(result))
    own = load_basis(result.directory / "basis.npz", basis.shape[1])
    if not start or own is None or any("coordinates" not in row for row in result.rows):
        return []
    coordinates = np.array([row["coordinates"] for row in result.rows])
    turn = own.vectors.to(basis) @ basis.T  # (k, 2)
    moved = coordinates @ turn.cpu().numpy()
    start = project(average(start))
    return [start, *(start + moved)]


def loss_on(plane: Subspace, images: Any, points: np.ndarray) -> np.ndarray:
    """The loss at each point (P, 2), on one batch, with BatchNorm's statistics of the batch.

    Running statistics belong to the network at which they were gathered, and mislead elsewhere.
    """
    batch, labels = next(images.epoch())
    plane.eval()
    for layer in plane.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.train()
    losses = landscape(lambda: cross_entropy(plane, batch, labels, False)[0], plane, points)
    return losses.cpu().numpy()  # the only host sync

"""3. What came of it: tables and pictures of the runs in one or more save dirs, and a page of both.

    python report.py save_labelnoise0_resnet20 save_labelnoise0.4_resnet20 --out report

Directories of the same network, data, label noise and epochs are taken as seeds of one experiment.
"""

import argparse
import base64
import functools
import html
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import models
import pictures
import utils

LEGEND = """Accuracy in percent; mean ± standard deviation over the seeds. *k*: numbers trained, n
is all of the network's. *in all*: epochs, those of the sampled SGD included. *final*, *best*: on
the test set, after the last epoch and after the best one, which no user can pick. *train*: on
training images as they are, with their labels as given; *true labels*, *false labels*: on those
with a right and on those with a wrong label. How far the last is above chance (a tenth at ten
classes for a network that knows nothing, the less the more it knows) says how many wrong labels
were learned. *seconds*: of training, sampling included, PCA and tests not."""
COST = "Cost of reaching the test accuracy at which SGD of the same seed ends, "
COST += "mean over the seeds that reach it (compare where as many do):"
TRAINING_IMAGES = 5000  # at most as many are looked at for the training accuracy
# What the runs that are taken for seeds of each other have to share, beside what the table shows.
SETTINGS = ("lr", "momentum", "milestones", "weight_decay", "batch_size", "optimizer", "half")
SETTINGS += ("params_start", "params_end", "params_stride", "alpha", "gamma", "accumulate")
SETTINGS += ("image_size",)
GRID, GRID_IMAGES = 21, 500  # points a side of the loss around the trajectory, and images for it

# ------------------------------------------------------------------------------ what runs left


class Experiment(NamedTuple):
    """What seeds have in common."""

    data: str
    arch: str
    n: int
    noise: float

    def __str__(self) -> str:
        return f"{self.data}, {self.arch} (n = {self.n:,}), c = {self.noise:g}"


class Line(NamedTuple):
    """A line of the table, of one seed."""

    experiment: Experiment
    method: str
    title: str  # the method, the run's name if it has one, and how far it is if not at its end
    finished: bool
    k: int | str
    rows: list[dict]  # metrics of its own epochs
    sampled: list[dict]  # and of the epochs of SGD that it builds on
    save_dir: Path
    weights: Path  # the network at the end
    arguments: dict
    facts: dict  # about the machine

    def epochs(self) -> int:
        """The epochs it trained itself."""
        return sum(row["epoch"] > 0 for row in self.rows)

    def seconds(self) -> float:
        """Of training, sampling included."""
        return sum(row["seconds"] for row in self.sampled + self.rows)

    def final(self) -> float:
        """Test accuracy after the last epoch, in percent."""
        return self.rows[-1]["test_acc"]

    def is_named(self) -> bool:
        """Whether --run gave it a name: it is a variation, then."""
        return self.arguments.get("run") is not None


def read_run(directory: Path) -> tuple[dict, list[dict]]:
    """config.json of a run and its metrics rows."""
    config = json.loads((directory / "config.json").read_text())
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    if not all(math.isfinite(row[key]) for row in rows for key in ("epoch", "test_acc", "seconds")):
        raise ValueError(f"{directory / 'metrics.jsonl'} holds what is not finite")
    return config, rows


def method_of(arguments: dict) -> str:
    """What a subspace run did, in words."""
    name = "P-SGD" if "lr" in arguments else "P+-BFGS" if arguments["alpha"] else "P-BFGS"
    if arguments["basis"] != "pca":
        name += f", {Path(arguments['basis']).name} basis"
    if arguments["start"] is not None:
        name += f", from {arguments['start']}"
    return name + (", BatchNorm re-estimated" if arguments["bn_update"] else "")


def lines_of(save_dir: Path) -> list[Line]:
    """The lines that a save dir has to tell: of SGD, and of each run in its folders."""
    config, sgd = read_run(save_dir)
    arguments = config["arguments"]
    data = arguments["datasets"]
    if arguments["smalldatasets"]:
        data += f", {100 * arguments['smalldatasets']:g} % of the training images"
    if arguments["pretrained"]:
        data += ", from trained weights"
    experiment = Experiment(data, arguments["arch"], config["n"], float(arguments["corrupt"]))

    def line(method: str, k: int | str, rows: list, sampled: list, of: Path, config: dict) -> Line:
        arguments = config["arguments"]
        title = f"{method} ({arguments['run']})" if arguments.get("run") else method
        finished = of.name != "model.th" or not 0 < rows[-1]["epoch"] < arguments["epochs"]
        if not finished:
            title += f", {rows[-1]['epoch']} of {arguments['epochs']} epochs so far"
        facts = {name: config[name] for name in ("device", "threads", "commit")}
        versions = ", ".join(f"{name} {text}" for name, text in config["versions"].items())
        return Line(experiment, method, title, finished, k, rows, sampled, save_dir, of, arguments,
                    facts | {"versions": versions})  # fmt: skip

    def sampled_by(number: int) -> list[dict]:
        """The epochs that it took to the sample of this number."""
        epochs = config.get("sample_epochs")  # where samples are not those of the epochs
        last = math.ceil(epochs[number]) if epochs else number
        return [row for row in sgd if row["epoch"] <= last]

    @functools.cache  # many runs take the same samples
    def digest(numbers: range) -> str | None:
        """Of samples that are all there: they take room, and may have been removed."""
        files = [save_dir / f"{number}.pt" for number in numbers]
        return utils.fingerprint(files) if all(file.exists() for file in files) else None

    lines = []
    for directory in (file.parent for file in save_dir.glob("*/metrics.jsonl")):
        own_config, rows = read_run(directory)
        own, weights = own_config["arguments"], directory / "model.th"
        if any(own[option] != arguments[option] for option in utils.EXPERIMENT):
            raise ValueError(f"{directory} is not of the experiment in {save_dir}")
        numbers = utils.sample_range(own)
        told = own_config.get("fingerprint")
        if told and digest(numbers) not in (told, None):
            raise ValueError(f"{directory} is of samples that have been replaced since")
        sampled = sampled_by(numbers[-1])
        if own.get("average"):
            method = f"mean of the samples {numbers[0]} to {numbers[-1]}"
            lines.append(line(method, 0, rows, sampled, weights, own_config))
            continue
        weights_at_last = save_dir / f"{numbers[-1]}.pt"
        at_last = line("SGD to the last sample", "n", sampled, [], weights_at_last, config)
        if sampled and at_last not in lines:
            lines.append(at_last)
        if isinstance(own["start"], int):  # it may lie beyond the samples
            sampled = sampled_by(max(numbers[-1], own["start"]))
        k = len(np.load(directory / "basis.npz")["explained_variance_ratio"])
        lines.append(line(method_of(own), k, rows, sampled, weights, own_config))

    def place(line: Line) -> tuple:
        sampled = line.sampled or line.rows
        return len(sampled), line.k != "n", line.is_named(), line.method, line.k

    return [line("SGD", "n", sgd, [], save_dir / "model.th", config), *sorted(lines, key=place)]


def plain(lines: Iterable[Line]) -> list[Line]:
    """Of several runs of a method on one trajectory the one without a name, else the first."""
    found: dict = {}
    for line in sorted(lines, key=Line.is_named):
        found.setdefault((line.save_dir, line.method), line)
    return [line for line in found.values() if line.method != "SGD to the last sample"]


def grouped(items: Iterable[Any], key: Callable[[Any], Any]) -> dict[Any, list]:
    """The items that share a key, in the order in which they come."""
    groups = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    return groups


# ------------------------------------------------------------------- what the networks do


class Laboratory:
    """A network and training images of one save dir, to measure on."""

    def __init__(self, line: Line, data_dir: Path | None, arch: str | None) -> None:
        self.line = line
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.args = argparse.Namespace(**line.arguments | {"device": device})
        self.args.data_dir = data_dir or Path(line.arguments["data_dir"])
        train, self.test = utils.read_splits(self.args)
        noise, seed, classes = self.args.corrupt, self.args.randomseed, len(train.classes)
        labels = utils.corrupt_labels(train.labels, noise, classes, seed)
        random = utils.random_stream(seed, "report")
        which = random.permutation(len(labels))[:TRAINING_IMAGES]
        split = train._replace(images=train.images[which], labels=labels[which])
        self.true = labels[which] == train.labels[which]
        self.images = utils.in_batches(split, self.args, GRID_IMAGES)
        if ":" in self.args.arch and self.args.arch != arch:
            # What a file names is not to be imported because it stands there.
            raise ValueError(f"its network is {self.args.arch}; allow it: --arch {self.args.arch}")
        self.model = models.build(self.args.arch, classes, self.args.image_size).to(device).eval()

    @torch.no_grad()
    def training_accuracy(self, weights: Path) -> list[float | None]:
        """Accuracy in percent on all images, those with true and those with false labels."""
        utils.load_file(self.args, self.model, weights)
        hits = [self.model(images).argmax(1) == labels for images, labels in self.images.epoch()]
        right = 100 * torch.cat(hits).float().cpu()
        parts = (right, right[self.true], right[~self.true])
        return [float(part.mean()) if len(part) else None for part in parts]

    def test_accuracy(self, weights: Path) -> float:
        """Accuracy in percent on the test images."""
        utils.load_file(self.args, self.model, weights)
        return utils.evaluate(self.model, utils.in_batches(self.test, self.args), False)["test_acc"]


def start_line(line: Line, laboratory: Laboratory) -> Line:
    """The network that training started from, which is of interest when it was trained before."""
    weights = line.save_dir / f"{utils.sample_numbers(line.save_dir)[0]}.pt"
    row = {"epoch": 0, "seconds": 0.0, "test_acc": laboratory.test_accuracy(weights)}
    return line._replace(method="before", title="before", rows=[row], weights=weights)


def measured(
    lines: Sequence[Line], data_dir: Path | None, arch: str | None
) -> tuple[list[Line], dict, dict]:
    """The lines, with those of the networks that were trained further; the training accuracies by
    weights file; and a Laboratory for the first save dir of each experiment.
    """
    everything, accuracies, laboratories = [], {}, {}
    bar = tqdm(total=len(lines), desc="training accuracy", disable=None, leave=False)
    for save_dir, own in grouped(lines, lambda line: line.save_dir).items():
        with utils.refusing(str(save_dir), Exception):
            laboratory = Laboratory(own[0], data_dir, arch)
            laboratories.setdefault(own[0].experiment, laboratory)
            if own[0].arguments["pretrained"] and utils.sample_numbers(save_dir):
                own.insert(0, start_line(own[0], laboratory))
            for line in own:
                if line.weights.exists():
                    accuracies[line.weights] = laboratory.training_accuracy(line.weights)
                bar.update()
        everything += own
    bar.close()
    return everything, accuracies, laboratories


# ---------------------------------------------------------------------------------- tables


def spread(values: Sequence[float | None], digits: int) -> str:
    """Mean ± standard deviation; a single value as it is, nothing where a value is missing."""
    if not values or None in values:
        return ""
    text = f"{statistics.mean(values):.{digits}f}"
    return text + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


def same_line(line: Line) -> tuple:
    """What the seeds of a line of the table share."""
    epochs = line.epochs()
    return line.experiment, line.title, line.k, epochs, len(line.sampled) + epochs


def settings(line: Line) -> tuple[str, ...]:
    """What seeds of it have to share."""
    return tuple(str(line.arguments.get(name)) for name in SETTINGS)


def check_alike(seeds: Sequence[Line]) -> None:
    """Refuse runs whose mean would be one of different things."""
    for line in seeds[1:]:
        for name, one, other in zip(SETTINGS, settings(seeds[0]), settings(line), strict=True):
            if one != other:
                where = f"{seeds[0].weights.parent} and {line.weights.parent}"
                utils.refuse(f"{where}: {name} is {one} and {other}; no seeds of one experiment")


def reaching(line: Line, accuracy: float) -> tuple[int, float] | None:
    """Epochs and seconds, sampling included, after which the test accuracy was first reached."""
    for done, row in enumerate(line.rows, 1):
        if row["test_acc"] >= accuracy:
            upto = line._replace(rows=line.rows[:done])
            return len(line.sampled) + upto.epochs(), upto.seconds()
    return None


def results(lines: Sequence[Line], accuracies: Mapping[Path, list]) -> list[dict]:
    """What results.json holds of each line of the table: lists of numbers, one a seed."""
    targets = {line.save_dir: line.final() for line in lines if line.method == "SGD"}
    found = []
    for (experiment, title, k, epochs, in_all), seeds in grouped(lines, same_line).items():
        check_alike(seeds)
        row = experiment._asdict() | {"method": title, "k": k, "epochs": epochs, "in all": in_all}
        row["seeds"] = [line.arguments["randomseed"] for line in seeds]
        row["final"] = [line.final() for line in seeds]
        row["best"] = [max(row["test_acc"] for row in line.rows) for line in seeds]
        parts = zip(*(accuracies.get(line.weights, [None] * 3) for line in seeds), strict=True)
        row |= zip(("train", "true labels", "false labels"), map(list, parts), strict=True)
        row["seconds"] = [line.seconds() for line in seeds]
        row["to SGD's final"] = [reaching(line, targets[line.save_dir]) for line in seeds]
        found.append(row)
    return found


def by_experiment(rows: Iterable[dict]) -> dict[Experiment, list[dict]]:
    """The lines of results.json, an experiment each, the least noise first."""
    of = grouped(rows, lambda row: Experiment(*(row[name] for name in Experiment._fields)))
    return dict(sorted(of.items()))


def seeds_text(rows: Sequence[dict]) -> str:
    """The seeds of an experiment, in words."""
    seeds = ", ".join(map(str, rows[0]["seeds"]))
    return f"seed{'s' if ',' in seeds else ''} {seeds}"


def results_table(rows: Sequence[dict]) -> tuple[Sequence[str], list[list[str]]]:
    """The columns and lines of the table of an experiment."""
    accuracies = ("final", "best", "train", "true labels", "false labels")
    accuracies = accuracies if rows[0]["noise"] else accuracies[:3]
    columns = ("method", "k", "epochs", "in all", *accuracies, "seconds")
    lines = [
        [str(row[name]) for name in columns[:4]]
        + [spread(row[name], 2) for name in accuracies]
        + [spread(row["seconds"], 0)]
        for row in rows
    ]
    return columns, lines


def cost_table(rows: Sequence[dict]) -> tuple[Sequence[str], list[list[str]]]:
    """The columns and lines of the table of costs."""
    lines = []
    for row in rows:
        if row["method"] == "SGD to the last sample":  # the beginning of SGD's line
            continue
        there = [cost for cost in row["to SGD's final"] if cost]
        epochs, seconds = zip(*there, strict=True) if there else ((), ())
        reached = f"{len(there)} of {len(row['seeds'])}"
        lines.append([row["method"], str(row["k"]), reached, spread(epochs, 1), spread(seconds, 1)])
    return ("method", "k", "reached by", "epochs in all", "seconds in all"), lines


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table that can be read as it is."""
    cells = [columns, ["-"] * len(columns), *rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells[1] = ["-" * width for width in widths]
    lines = (
        " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in cells
    )
    return "".join(f"| {line} |\n" for line in lines)


# -------------------------------------------------------------------------------- pictures


def curves(lines: Sequence[Line]) -> bytes:
    """The way of each method, over its seeds."""
    ways = []

    def drawn_as_one(line: Line) -> tuple:
        name = line.method if line.finished else line.title
        return name, len(line.sampled), len(line.rows)

    for (method, before, _), seeds in grouped(plain(lines), drawn_as_one).items():
        rows = [line.rows for line in seeds]
        times = [
            np.cumsum([row["seconds"] for row in line.sampled + line.rows])[before:]
            for line in seeds
        ]
        epochs = before + np.array([row["epoch"] for row in rows[0]])
        accuracy, loss = (
            np.array([[row[key] for row in own] for own in rows]) if key in rows[0][0] else None
            for key in ("test_acc", "train_loss")
        )
        ways.append(pictures.Curve(method, epochs, np.mean(times, axis=0), accuracy, loss))
    return pictures.curves(ways)


def variance(samples: Sequence[Mapping[str, Tensor]], runs: Sequence[Line]) -> bytes:
    """How the variance of the samples is shared out among their principal components."""
    variances, _ = utils.principal_axes(samples, utils.parameter_names(samples[0]))
    ratios = (variances / variances.sum())[:-1].clamp(min=1e-12).numpy()
    used = {run.k for run in plain(runs) if run.arguments["basis"] == "pca"}
    return pictures.variance(ratios, sorted(used))


def trajectory(line: Line, runs: Sequence[Line]) -> list[Mapping[str, Tensor]]:
    """The samples that span the subspace of the save dir's runs, else all; [] where not there."""
    numbers = utils.sample_numbers(line.save_dir)
    if not numbers:
        return []
    taken = range(numbers[0], numbers[-1] + 1)
    for run in plain(runs)[:1]:
        taken = utils.sample_range(run.arguments)
    try:
        return utils.load_samples(line.save_dir, taken.start, taken.stop, taken.step)
    except FileNotFoundError:
        return []


@torch.no_grad()
def landscape(
    laboratory: Laboratory, samples: Sequence[Mapping[str, Tensor]], runs: Sequence[Line]
) -> bytes:
    """The loss over the plane of the first two principal components, and the paths in it."""
    line, model = laboratory.line, laboratory.model
    names = [name for name, _ in model.named_parameters()]
    basis, ratio = utils.pca(samples, 2, names=names, device=laboratory.args.device)
    utils.load_into(model, utils.mean_of(samples))
    plane = models.Subspace(model, basis)

    def place(state: Mapping[str, Tensor]) -> np.ndarray:
        vector = torch.cat([state[name].reshape(-1) for name in names])
        return (basis @ (vector.to(basis.device) - plane.origin)).cpu().numpy()

    def sample(number: int) -> np.ndarray:
        return place(utils.state_dict_in(line.save_dir / f"{number}.pt"))

    numbers = utils.sample_numbers(line.save_dir)
    paths = {"SGD": np.array([sample(number) for number in numbers])}
    for run in plain(runs):
        arguments = run.arguments
        start = arguments["params_start"] if arguments["start"] is None else arguments["start"]
        own_samples = trajectory(line, [run])
        own = utils.load_basis(run.weights.parent / "basis.npz", basis.shape[1], basis.device)
        known = all("coordinates" in row for row in run.rows) and not arguments["pretrained"]
        # Samples may have been removed, and a basis in parts is not kept.
        if own is None or not known or not own_samples or start not in ("mean", *numbers):
            continue
        begin = place(utils.mean_of(own_samples)) if start == "mean" else sample(start)
        turn = (own.basis.to(basis.dtype) @ basis.T).cpu().numpy()  # (k, 2)
        z = np.array([row["coordinates"] for row in run.rows])
        paths[run.method] = np.array([begin, *(begin + z @ turn)])
    points = np.concatenate(list(paths.values()))
    low, high = points.min(0), points.max(0)
    room = 0.15 * (high - low).max()
    x, y = (np.linspace(low[i] - room, high[i] + room, GRID) for i in range(2))
    loss = loss_on(plane, laboratory.images, [(a, b) for b in y for a in x]).reshape(GRID, GRID)
    return pictures.landscape(paths, x, y, loss, ratio.tolist())


def loss_on(plane: models.Subspace, images: Any, points: Sequence[tuple]) -> np.ndarray:
    """The loss at each point of the plane, on one batch, with BatchNorm's statistics of the batch.

    Running statistics belong to the network at which they were gathered, and mislead elsewhere.
    """
    batch, labels = next(images.epoch())
    plane.eval()
    for layer in plane.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.train()
    losses = []
    for point in tqdm(points, "loss around the trajectory", disable=None, leave=False):
        plane.coordinates.copy_(torch.tensor(point))
        losses.append(float(utils.cross_entropy(plane, batch, labels, False)[0]))
    return np.array(losses)


def finals(lines: Iterable[Line], name: Callable, at: Callable) -> dict[str, dict]:
    """Final test accuracies of the seeds that have ended, by a name and a number of their lines."""
    found: dict = {}
    for line in [line for line in lines if line.finished]:
        found.setdefault(name(line), defaultdict(list))[at(line)].append(line.final())
    return found


def drawings(
    lines: Sequence[Line], laboratories: Mapping[Experiment, Laboratory]
) -> Iterator[tuple[Experiment | None, str, str, bytes]]:
    """(experiment, name, caption, PNG) of each picture; those over experiments come first."""
    for same in grouped(lines, lambda line: line.experiment._replace(noise=0.0)).values():
        percent = finals(plain(same), lambda r: r.method, lambda r: 100 * r.experiment.noise)
        if max(map(len, percent.values()), default=0) > 1:
            caption = "Final test accuracy against label noise; mean ± standard deviation."
            axis = "training labels drawn anew (%)"
            yield None, "noise", caption, pictures.against(axis, percent)
        taken = grouped(
            [line for line in same if "n_components" in line.arguments],
            lambda line: (line.method, len(line.sampled), settings(line)),
        )
        for (method, sampled, _), runs in taken.items():
            series = finals(runs, lambda line: f"c = {line.experiment.noise:g}", lambda r: r.k)
            if max(map(len, series.values()), default=0) > 2:
                caption = f"{method} in planes of k dimensions, of samples of {sampled} epochs."
                yield None, "dimensions", caption, pictures.against("k", series, log=True)
    for experiment, same in grouped(lines, lambda line: line.experiment).items():
        several = len({line.save_dir for line in same}) > 1
        seeds = "; lines are means over the seeds, bands go from the least to the most"
        caption = f"Test accuracy and training loss{seeds if several else ''}."
        yield experiment, "curves", caption, curves(same)
        runs = [line for line in same if line.save_dir == same[0].save_dir]
        runs = [line for line in runs if "basis" in line.arguments]
        seed = f" (seed {same[0].arguments['randomseed']})" if several else ""
        samples = trajectory(same[0], runs)
        if len(samples) > 2:
            caption = f"Principal components of the samples{seed}."
            yield experiment, "variance", caption, variance(samples, runs)
            if experiment in laboratories:
                caption = (
                    f"The training loss of {GRID_IMAGES} images around the trajectory{seed}, and "
                    "the paths of SGD and of the runs in its plane, projected."
                )
                drawn = landscape(laboratories[experiment], samples, runs)
                yield experiment, "landscape", caption, drawn
        bfgs = [line for line in plain(same) if "trials" in line.rows[-1]]
        if bfgs:
            yield (
                experiment,
                "steps",
                "The steps of P-BFGS; a line a seed.",
                pictures.steps([line.rows for line in bfgs]),
            )


# ------------------------------------------------------------------------------------ page

PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>Training in tiny subspaces: report</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; }}
body {{ max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }}
table {{ border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; }}
div {{ overflow-x: auto; }}
th, td {{ padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #ccc; }}
th:first-child, td:first-child {{ text-align: left; }}
img {{ max-width: 100%; }} figure {{ margin: 1.5rem 0; }} figcaption {{ color: #444; }}
</style></head><body>
<h1>Training in tiny subspaces</h1>
{body}</body></html>
"""


class Page:
    """The report, as Markdown and as HTML, side by side."""

    def __init__(self) -> None:
        self.markdown, self.html, self.files = "", "", {}

    def heading(self, text: str) -> None:
        """A section begins."""
        self.markdown += f"## {text}\n\n"
        self.html += f"<h2>{html.escape(text)}</h2>\n"

    def paragraph(self, text: str) -> None:
        """Text, in which *stars* say what to stress."""
        self.markdown += f"{text}\n\n"
        parts = html.escape(text).split("*")
        marked = "".join(f"<em>{p}</em>" if i % 2 else p for i, p in enumerate(parts))
        self.html += f"<p>{marked}</p>\n"

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table, its first column to the left."""
        self.markdown += markdown(columns, rows) + "\n"

        def line(cells: Sequence[str], tag: str) -> str:
            return f"<tr>{''.join(f'<{tag}>{html.escape(c)}</{tag}>' for c in cells)}</tr>\n"

        lines = line(columns, "th") + "".join(line(row, "td") for row in rows)
        self.html += f"<div><table>\n{lines}</table></div>\n"

    def picture(self, file: str, caption: str, png: bytes) -> None:
        """A picture with its caption."""
        self.files[file] = png
        self.markdown += f"![{caption}]({file})\n\n{caption}\n\n"
        source, text = base64.b64encode(png).decode(), html.escape(caption)
        image = f'<img alt="{text}" src="data:image/png;base64,{source}">'
        self.html += f"<figure>{image}<figcaption>{text}</figcaption></figure>\n"


def machine(lines: Sequence[Line]) -> dict[str, list]:
    """Where the runs were made, and by what: each value that occurs."""
    return {
        name: list(dict.fromkeys(line.facts[name] for line in lines)) for name in lines[0].facts
    }


def machine_text(facts: Mapping[str, Sequence]) -> str:
    """The same in a line."""
    return "; ".join(f"{name}: {', '.join(map(str, values))}" for name, values in facts.items())


def options() -> utils.Parser:
    """The command line."""
    parser = utils.Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("save_dirs", nargs="+", type=utils.place, metavar="SAVE_DIR")
    # fmt: off
    parser.add("--out", type=utils.place, metavar="DIR", default=Path("report"),
        help="directory of index.html, report.md, results.json and the pictures")
    parser.add("--data-dir", type=utils.place, metavar="DIR",
        help="where the dataset is, if no longer where the runs had it")
    parser.add("--arch", metavar="NAME",
        help="package.module:callable, where the network of the runs is one")
    parser.add("--no-data", action="store_true",
        help="leave out what needs the images: training accuracy and the loss around trajectories")
    # fmt: on
    return parser


def main(argv: Sequence[str] | None = None) -> list[dict]:
    """Write the report and print its tables; returns what results.json holds of the lines."""
    args = options().parse_args(argv)
    lines: list[Line] = []
    for save_dir in {place.resolve(): place for place in args.save_dirs}.values():
        with utils.refusing(f"{save_dir}: no finished run", Exception):
            lines += lines_of(save_dir)
    accuracies, laboratories = {}, {}
    if not args.no_data:
        lines, accuracies, laboratories = measured(lines, args.data_dir, args.arch)
    rows, facts, page = results(lines, accuracies), machine(lines), Page()
    with utils.refusing():
        drawn = grouped(drawings(lines, laboratories), lambda drawing: drawing[0])

    page.paragraph(LEGEND.replace("\n", " "))
    for number, (_, name, caption, png) in enumerate(drawn.pop(None, []), 1):
        page.picture(f"{name}_{number}.png", caption, png)
    of = by_experiment(rows)
    for number, (experiment, own) in enumerate(of.items(), 1):
        page.heading(f"{experiment}; {seeds_text(own)}")
        page.table(*results_table(own))
        page.paragraph(COST)
        page.table(*cost_table(own))
        for _, name, caption, png in drawn[experiment]:
            page.picture(f"experiment_{number}_{name}.png", caption, png)
    page.paragraph(machine_text(facts))

    content = json.dumps({"machine": facts, "lines": rows})
    rounded = json.loads(content, parse_float=lambda text: round(float(text), 4))
    page.files["results.json"] = (json.dumps(rounded) + "\n").encode()
    page.files["report.md"] = page.markdown.encode()
    page.files["index.html"] = PAGE.format(body=page.html).encode()
    with utils.refusing("--out"):
        args.out.mkdir(parents=True, exist_ok=True)
    for name, content in page.files.items():
        with utils.replacing(args.out / name) as stream:
            stream.write(content)
    for experiment, own in of.items():
        print(f"\n{experiment}")
        print(markdown(*results_table(own)), end="")
    print(f"\n{args.out / 'index.html'}: this table and pictures")
    return rows


if __name__ == "__main__":
    utils.program(main)

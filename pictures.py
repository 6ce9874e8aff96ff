"""The pictures of report.py, from numbers to PNG; it knows nothing of runs and files."""

import io
import itertools
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator


class Look(NamedTuple):
    """How a method is drawn: in colour, and without."""

    color: str
    linestyle: str
    marker: str


# Colours of Okabe and Ito, which the colour-blind can tell apart.
LOOKS = {
    "SGD": Look("#000000", "-", "o"),
    "P-BFGS": Look("#D55E00", "-", "s"),
    "P-SGD": Look("#0072B2", "--", "^"),
    "mean": Look("#009E73", "-", "D"),
    "random": Look("#CC79A7", ":", "v"),
    "other": Look("#E69F00", "-.", "x"),
}
TICKS = (1, 2, 5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 95, 98, 99, 99.5, 99.9)
FINE_TICKS = (*range(1, 99), *np.arange(99, 100, 0.1))


def look(method: str) -> Look:
    """The look of a method, given in the words of the table."""
    if "random basis" in method or method.startswith("mean of"):
        return LOOKS["random" if "random basis" in method else "mean"]
    varied = " from " in method or "basis" in method
    return LOOKS["other"] if varied else LOOKS.get(method.partition(",")[0], LOOKS["other"])


def png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=100)
    return stream.getvalue()


def share(percent: np.ndarray) -> np.ndarray:
    """Percent as what a logit scale can show: 0 and 100 are moved inside."""
    return np.clip(np.asarray(percent) / 100, 1e-3, 1 - 1e-3)


def accuracy_axis(axes: matplotlib.axes.Axes, shown: Sequence[np.ndarray], what: str) -> None:
    """A logit scale, on which 1 and 2 % are as far apart as 98 and 99 %, for the shares shown."""
    values = np.concatenate([np.ravel(part) for part in shown])
    logits = np.log(values / (1 - values))
    room = 0.1 * np.ptp(logits) + 0.1
    ends = np.array([logits.min() - room, logits.max() + room])
    ticks = np.array(TICKS if np.ptp(logits) > 2 else FINE_TICKS)
    axes.set_yscale("logit")
    axes.set_yticks(ticks / 100, [f"{tick:g}" for tick in ticks])
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylim(*(1 / (1 + np.exp(-ends))))
    axes.set_ylabel(f"{what} (%, logit scale)")


def log_axis(axis: matplotlib.axis.Axis, low: float, high: float) -> None:
    """A logarithmic axis with labels as 0.02, not as powers of ten."""
    subs = (1, 2, 5) if high > 10 * low else (1, 1.5, 2, 3, 4, 5, 7)
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


class Curve(NamedTuple):
    """A method's way: E epochs, S seeds; accuracy in percent."""

    method: str
    epochs: np.ndarray  # (E,)
    seconds: np.ndarray  # (E,)
    accuracy: np.ndarray  # (S, E)
    loss: np.ndarray | None  # (S, E)


def curves(ways: Sequence[Curve]) -> bytes:
    """Test accuracy and training loss against epochs and seconds; the mean, least and most."""
    figure = Figure(figsize=(10, 7), layout="constrained")
    grid = figure.subplots(2, 2, sharey="row")
    accuracies = [share(way.accuracy) for way in ways]
    losses = [way.loss for way in ways]
    for row, values_of_all in zip(grid, (accuracies, losses), strict=True):
        for axes, name in zip(row, ("epochs", "seconds"), strict=True):
            axes.grid(alpha=0.3)
            for way, values in zip(ways, values_of_all, strict=True):
                if values is None:
                    continue
                color, line, marker = look(way.method)
                marker = marker if len(way.epochs) == 1 else None
                x = getattr(way, name)
                axes.plot(x, values.mean(0), line, color=color, marker=marker, label=way.method)
                band = {"color": color, "alpha": 0.15, "linewidth": 0}
                axes.fill_between(x, values.min(0), values.max(0), **band)
    accuracy_axis(grid[0, 0], accuracies, "test accuracy")
    there = np.concatenate([np.ravel(loss) for loss in losses if loss is not None])
    log_axis(grid[1, 0].yaxis, there.min(), there.max())
    grid[1, 0].set_ylabel("training loss of the epoch")
    grid[1, 0].set_xlabel("epochs, sampled ones included")
    grid[1, 1].set_xlabel("seconds of training, sampling included")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return png(figure)


def variance(ratios: np.ndarray, used: Sequence[int]) -> bytes:
    """Explained variance ratios (T − 1,) of T samples one by one and added up; k is marked."""
    figure = Figure(figsize=(10, 3.5), layout="constrained")
    count = np.arange(1, len(ratios) + 1)
    series = {"variance explained (%)": ratios, "cumulative (%)": ratios.cumsum()}
    for axes, (text, values) in zip(figure.subplots(1, 2), series.items(), strict=True):
        axes.plot(count, 100 * values, "o-", color=LOOKS["P-SGD"].color, markersize=4)
        axes.set(xlabel=f"principal component of the {len(count) + 1} samples", ylabel=text)
        axes.grid(alpha=0.3)
        for k in used:
            style = {"color": LOOKS["P-BFGS"].color, "linestyle": "--"}
            axes.axvline(k + 0.5, **style, label=f"the first k = {k} span the plane")
        if used:
            axes.legend()
    log_axis(figure.axes[0].yaxis, ratios.min(), ratios.max())
    return png(figure)


def landscape(
    paths: Mapping[str, np.ndarray], x: np.ndarray, y: np.ndarray, loss: np.ndarray,
    ratios: Sequence[float]
) -> bytes:  # fmt: skip
    """Contours of the loss (Y, X), and on them the paths (E, 2) in the plane of two components."""
    loss = np.nan_to_num(loss, nan=1e6, posinf=1e6).clip(1e-6, 1e6)
    height = 1.8 + 6 * np.clip(np.ptp(y) / np.ptp(x), 0.4, 1.5)
    figure = Figure(figsize=(8, height), layout="constrained")
    axes = figure.subplots()
    greys = LinearSegmentedColormap.from_list("light", ["#FFFFFF", "#808080"])
    levels = np.geomspace(loss.min(), loss.max() * (1 + 1e-6), 13)
    filled = axes.contourf(x, y, loss, levels, cmap=greys, norm=LogNorm())
    axes.contour(x, y, loss, levels, colors="#606060", linewidths=0.4)
    figure.colorbar(filled, label="training loss", format="%.2g")
    for method, path in paths.items():
        color, line, marker = look(method)
        style = {"color": color, "marker": marker}
        axes.plot(*path.T, color="white", linewidth=3.5)
        axes.plot(*path.T, linestyle=line, linewidth=1.5, markersize=3.5, label=method, **style)
        axes.plot(*path[-1], markersize=10, markeredgecolor="white", **style)
    axes.set_aspect("equal")
    axes.set_xlabel(f"along the first principal component ({ratios[0]:.1%} of the variance)")
    axes.set_ylabel(f"along the second ({ratios[1]:.1%})")
    axes.set_title(f"this plane explains {sum(ratios):.1%} of the samples' variance", fontsize=10)
    figure.legend(loc="outside upper center", ncols=2, title="paths (large mark: the end)")
    return png(figure)


def steps(runs: Sequence[Sequence[Mapping]]) -> bytes:
    """P-BFGS: rejected trials a step and length of the steps, from the rows of each run."""
    figure = Figure(figsize=(10, 3.5), layout="constrained")
    texts = {
        "trials": "rejected trials a step (epoch's mean)",
        "step_length": "length of a step ‖s‖ (epoch's mean)",
    }
    for axes, (key, text) in zip(figure.subplots(1, 2), texts.items(), strict=True):
        for rows in runs:
            epochs, values = zip(*((row["epoch"], row[key]) for row in rows), strict=True)
            axes.plot(epochs, values, color=LOOKS["P-BFGS"].color, alpha=0.6)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set(xlabel="epochs in the plane", ylabel=text)
        axes.grid(alpha=0.3)
    log_axis(figure.axes[1].yaxis, *figure.axes[1].get_ylim())
    return png(figure)


def against(setting: str, series: Mapping[str, Mapping], log: bool = False) -> bytes:
    """Final test accuracies {name: {value of the setting: one a seed}}: mean ± deviation."""
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.subplots()
    shown = []
    looks = itertools.cycle(LOOKS.values())
    for name, values in series.items():
        color, line, marker = next(looks) if name.startswith("c = ") else look(name)
        x = sorted(values)
        mean = np.array([statistics.mean(values[at]) for at in x])
        deviation = [statistics.stdev(values[at]) if len(values[at]) > 1 else 0 for at in x]
        low, middle, high = share(mean - deviation), share(mean), share(mean + deviation)
        style = {"color": color, "linestyle": line, "marker": marker, "capsize": 3}
        axes.errorbar(x, middle, [middle - low, high - middle], label=name, **style)
        shown += [low, high]
    accuracy_axis(axes, shown, "final test accuracy")
    if log:
        axes.set_xscale("log")
        axes.xaxis.set_minor_locator(NullLocator())
    ticks = sorted({at for values in series.values() for at in values})
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xlabel(setting)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside upper center", ncols=2)
    return png(figure)

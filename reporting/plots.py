"""Draws the figures of the report. It takes numbers, and knows nothing of runs and files."""

import io
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import LogLocator, MaxNLocator
from matplotlib.transforms import offset_copy

# Color and marker of a method; the color-blind distinguish Okabe and Ito's colors.
METHODS = {
    "SGD": ("#000000", "o"),
    "P-SGD": ("#0072B2", "^"),
    "P-BFGS": ("#D55E00", "s"),
    "P+-BFGS": ("#E69F00", "P"),
    "weight average": ("#009E73", "D"),
}
OTHERS = [("#CC79A7", "v"), ("#56B4E9", "X"), ("#8C564B", "p"), ("#7F7F7F", "*"), ("#332288", "<")]
# Line and marker of the variants of a method, as P-SGD with and without BN update.
LINES = ("-", "--", ":", "-.", (0, (8, 2, 1, 2, 1, 2)), (0, (2, 4)))
FILLS = ("full", "none", "bottom", "left", "top")
# Label and scale of the axis of each metric.
METRICS = {
    "test_acc": ("test accuracy (%, logit scale)", "logit"),
    "train_loss": ("training loss", "log"),
    "trials": ("rejected trials per step", "linear"),
    "step_length": ("length of a step ‖s‖", "log"),
}
PERCENT = (0.1, 0.5, 1, 2, 5, 10, 20, 50, 80, 90, 95, 98, 99, 99.5, 99.9)  # ticks of a logit scale
Styles = Mapping[str, Mapping[str, Any]]
NARROW = 4.5  # inches, of a figure for narrow pages


def styles(methods: Mapping[str, str]) -> Styles:
    """How each run is drawn, no two alike, given its method: keywords of `Axes.plot`."""
    marks, variants, drawn = dict(METHODS), Counter(), {}
    for name, method in methods.items():
        color, marker = marks.setdefault(method, OTHERS[len(marks) % len(OTHERS)])
        drawn[name] = {"color": color, "marker": marker, "markerfacecoloralt": "white"}
        drawn[name]["linestyle"] = LINES[variants[method] % len(LINES)]
        drawn[name]["fillstyle"] = FILLS[variants[method] % len(FILLS)]
        variants[method] += 1
    return drawn


def image(figure: Figure, kind: str) -> bytes:
    """The figure as a file, "png", "svg" or "pdf"."""
    stream = io.BytesIO()
    # Without dates and random names, so that the same report is the same files.
    dates = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
    with matplotlib.rc_context({"svg.hashsalt": "report", "pdf.fonttype": 42}):
        figure.savefig(stream, format=kind, dpi=150, bbox_inches="tight", metadata=dates.get(kind))
    return stream.getvalue()


def logit(percent: np.ndarray) -> np.ndarray:
    """Percent on a scale where 1 and 2 % are as far apart as 98 and 99 %; 0 and 100 are moved."""
    share = np.clip(percent, PERCENT[0], PERCENT[-1]) / 100
    return np.log(share / (1 - share))


class LogitLocator(MaxNLocator):
    """Ticks of a logit scale of percent; it is almost linear where it shows few of PERCENT."""

    def nonsingular(self, v0: float, v1: float) -> tuple[float, float]:
        return super().nonsingular(*np.clip((v0, v1), PERCENT[0], PERCENT[-1]))

    def tick_values(self, vmin: float, vmax: float) -> Sequence[float]:
        seen = [value for value in PERCENT if vmin <= value <= vmax]
        return seen[:: 1 + len(seen) // 11] if len(seen) > 2 else super().tick_values(vmin, vmax)


def set_scale(axis: Axis, scale: str) -> None:
    """Draw on a scale, "linear", "log" or "logit" of percent, with decimal numbers as labels."""
    if scale == "logit":
        axis.axes.set_yscale("function", functions=(logit, lambda y: 100 / (1 + np.exp(-y))))
        axis.set_major_locator(LogitLocator(6))
    elif scale == "log":
        axis.axes.set(**{f"{axis.axis_name}scale": "log"})
        axis.set_minor_locator(LogLocator(subs=(2, 4, 6), numticks=2))
        axis.set_minor_formatter("{x:g}")
        axis.set_tick_params(which="minor", length=3.5)
    axis.set_major_formatter("{x:g}")


def add_legend(figure: Figure, handles: Sequence, names: Sequence[str], **settings: str) -> None:
    """A legend above the axes, in as many columns, up to three, as fit beside each other.

    A narrow figure becomes higher by it.
    """
    names = [textwrap.fill(name, round(11 * figure.get_figwidth())) for name in names]
    for columns in (3, 2, 1):
        settings |= {"loc": "outside upper center", "ncols": columns}
        legend = figure.legend(handles, names, **settings)
        extent = legend.get_window_extent()
        if columns == 1 or extent.width < figure.bbox.width:
            break
        legend.remove()
    if figure.get_figwidth() == NARROW:
        figure.set_figheight(figure.get_figheight() + extent.height / figure.dpi)


def panels(
    rows: int, columns: int, size: tuple[float, float], narrow: bool, **shared: str
) -> tuple[Figure, np.ndarray]:
    """A figure of a size in inches and its axes (rows, columns), all below each other if narrow."""
    if not narrow:
        figure = Figure(figsize=size, layout="constrained")
        return figure, figure.subplots(rows, columns, squeeze=False, **shared)
    width, height = size[0] / columns, size[1] / rows
    count = rows * columns
    figure = Figure(figsize=(NARROW, count * height * NARROW / width), layout="constrained")
    return figure, figure.subplots(count, 1, squeeze=False).reshape(rows, columns)


class Curve(NamedTuple):
    """The metrics of a method: E epochs, S seeds."""

    name: str
    epochs: np.ndarray  # (E,)
    seconds: np.ndarray  # (E,)
    metrics: Mapping[str, np.ndarray]  # (S, E), NaN where there is none


def curves(
    shown: Sequence[Curve], metrics: Sequence[str], styles: Styles, narrow: bool = False
) -> Figure:
    """Two of METRICS over epochs and seconds: the mean, and the range of seeds."""
    figure, grid = panels(2, 2, (9, 7), narrow, sharex="col", sharey="row")
    for row, metric in zip(grid, metrics, strict=True):
        label, scale = METRICS[metric]
        for axes in row:
            set_scale(axes.yaxis, scale)
            axes.set_ylabel(label)
            axes.grid(which="both", alpha=0.3)
        for curve in shown:
            y, style = curve.metrics[metric], styles[curve.name]
            for axes, x in zip(row, (curve.epochs, curve.seconds), strict=True):
                axes.plot(x, y.mean(0), label=curve.name, markevery=[-1], **style)
                axes.fill_between(x, y.min(0), y.max(0), color=style["color"], alpha=0.15, lw=0)
        row[0].set_xlabel("total epochs, sampling included")
        row[1].set_xlabel("seconds of training, sampling included")
        row[0].xaxis.set_major_locator(MaxNLocator(integer=True))
    if not narrow:
        for axes in grid.flat:
            axes.label_outer()
    add_legend(figure, *grid[0, 0].get_legend_handles_labels())
    return figure


def variance(
    ratios: np.ndarray, walk: np.ndarray, used: Sequence[int], narrow: bool = False
) -> Figure:
    """Explained variance ratios (T − 1,) of T snapshots one by one and added up; k is marked.

    Beside them are those of a random walk with the same step lengths.
    """
    figure, grid = panels(1, 2, (9, 3.8), narrow)
    count = np.arange(1, len(ratios) + 1)
    set_scale(grid[0, 0].yaxis, "log")
    for axes, label, summed in zip(
        grid[0], ("explained", "cumulative"), (False, True), strict=True
    ):
        for name, values, style in (
            ("trajectory", ratios, {"color": "#0072B2", "marker": "o", "markersize": 4}),
            ("random walk with the same step lengths", walk, {"color": "#7F7F7F", "ls": "--"}),
        ):
            axes.plot(count, 100 * (values.cumsum() if summed else values), label=name, **style)
        axes.set_xlabel(f"principal component of {len(count) + 1} snapshots")
        axes.set_ylabel(f"{label} variance (%)")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(which="both", alpha=0.3)
        beside = {"transform": axes.get_xaxis_transform(), "rotation": 90, "ha": "right"}
        for k in used:
            axes.axvline(k + 0.5, color="#D55E00", linestyle="--")
            axes.text(k + 0.5, 0.5, f"k = {k}", color="#D55E00", **beside)
    add_legend(figure, *grid[0, 0].get_legend_handles_labels())
    return figure


def landscape(
    paths: Mapping[str, np.ndarray],
    x: np.ndarray,
    y: np.ndarray,
    loss: np.ndarray,
    ratios: Sequence[float],
    styles: Styles,
    narrow: bool = False,
) -> Figure:
    """Contours of the loss (Y, X), and on them the paths (E, 2) in the plane of two components."""
    height = 2.5 + 6 * np.clip(np.ptp(y) / np.ptp(x), 0.4, 1.5)
    figure, grid = panels(1, 1, (8, height), narrow)
    axes = grid[0, 0]
    draw_contours(axes, x, y, loss)
    draw_paths(axes, paths, styles)
    axes.set_aspect("equal", anchor="N")
    axes.set_xlabel(f"along the first principal component ({ratios[0]:.1%})")
    axes.set_ylabel(f"along the second ({ratios[1]:.1%})")
    add_legend(figure, *axes.get_legend_handles_labels(), title="paths (large marker: the end)")
    return figure


def draw_contours(axes: Axes, x: np.ndarray, y: np.ndarray, loss: np.ndarray) -> None:
    """Shades of gray for the loss (Y, X), and a color bar as tall as the axes."""
    loss = np.nan_to_num(loss, nan=1e6, posinf=1e6).clip(1e-6, 1e6)
    grays = LinearSegmentedColormap.from_list("light", ["#FFFFFF", "#808080"])
    levels = np.geomspace(loss.min(), loss.max() * (1 + 1e-6), 13)
    filled = axes.contourf(x, y, loss, levels, cmap=grays, norm=LogNorm())
    axes.contour(x, y, loss, levels, colors="#606060", linewidths=0.4)
    bar = axes.inset_axes([1.03, 0, 0.04, 1])
    axes.figure.colorbar(filled, cax=bar, label="training loss", format="%.2g")


def draw_paths(axes: Axes, paths: Mapping[str, np.ndarray], styles: Styles) -> None:
    """Paths (E, 2), those that are the same once, and their ends above all of them."""
    edge = [withStroke(linewidth=3.5, foreground="white")]
    for number, (name, path) in enumerate(paths.items()):
        # BN update, for one, does not change a path.
        same = [other for other in paths if np.array_equal(paths[other], path)]
        if name != same[0]:
            continue
        axes.plot(*path.T, label=" = ".join(same), markersize=4, path_effects=edge, **styles[name])
        # Later ends are smaller: where several meet, all can be seen.
        end = {"markersize": 12 - 5 * number / len(paths), "zorder": 3 + number}
        axes.plot(*path[-1:].T, path_effects=edge, **styles[name], **end)


def against(
    setting: str,
    series: Mapping[str, Mapping[float, Sequence[float]]],
    styles: Styles,
    levels: Mapping[str, Sequence[float]] | None = None,
    scale: str = "linear",
    narrow: bool = False,
) -> Figure:
    """Final test accuracies {name: {value of the setting: one a seed}}: mean ± deviation.

    `levels`, one a seed of what has no such setting, are lines at their mean.
    """
    figure, grid = panels(1, 1, (8, 5.5), narrow)
    axes = grid[0, 0]
    set_scale(axes.xaxis, scale)
    set_scale(axes.yaxis, "logit")
    for name, values in (levels or {}).items():
        style = styles[name] | {"marker": "", "alpha": 0.7}
        axes.axhline(np.mean(values), label=name, **style)
    for number, (name, values) in enumerate(series.items()):
        x = sorted(values)
        mean = [np.mean(values[at]) for at in x]
        std = [np.std(values[at], ddof=min(1, len(values[at]) - 1)) for at in x]
        bars = axes.errorbar(x, mean, std, label=name, capsize=3, **styles[name])
        shift = 3 * (number - len(series) // 2)
        beside = offset_copy(axes.transData, figure, shift, units="points")
        for artist in bars.get_children():
            artist.set_transform(beside)
    axes.set(xlabel=setting, ylabel="final test accuracy (%, logit scale)")
    axes.grid(which="both", alpha=0.3)
    add_legend(figure, *axes.get_legend_handles_labels())
    return figure

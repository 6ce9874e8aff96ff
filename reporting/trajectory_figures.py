"""Which figures there are of a trajectory, and how they are drawn."""

from collections.abc import Iterator
from functools import partial

import matplotlib.figure
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from reporting import plots
from reporting.page import Figure
from reporting.trajectories import Trajectory, random_angle

TRAJECTORY = {"color": "#0072B2", "label": "trajectory"}
WALK = {"color": "#7F7F7F", "linestyle": "--", "label": "random walk with the same step lengths"}
SHOWN = 4  # coordinates over time


def figures_of(trajectory: Trajectory) -> Iterator[Figure]:
    """The figures of a trajectory, each beside its random walk."""
    walk = trajectory.walk
    shares, expected = trajectory.shares.numpy(), walk.shares.numpy()
    yield Figure(
        "spectrum",
        "The variance along the principal components, one by one and added up. A trajectory whose "
        "sum is not above the walk's is no more concentrated than chance.",
        partial(plots.variance, shares, expected, []),
        {"trajectory": shares, "walk": expected},
    )
    path, walked = trajectory.coordinates[:, :SHOWN].numpy(), walk.coordinates[:, :SHOWN].numpy()
    path = path * np.where((path * walked).sum(0) < 0, -1, 1)  # signs of components are arbitrary
    yield Figure(
        "path",
        "The path in the plane of the first two principal components, light at the start. That of "
        "a random walk with equal steps is a parabola.",
        partial(draw_path, path[:, :2], walked[:, :2]),
        {"trajectory": path[:, :2], "walk": walked[:, :2]},
    )
    yield Figure(
        "coordinates",
        "The coordinates along the first principal components. Those of a random walk with equal "
        "steps are cosines, so cosines are no sign that training oscillates.",
        partial(draw_coordinates, path, walked),
        {"trajectory": path, "walk": walked},
    )
    steps, cosines = trajectory.steps.numpy(), trajectory.cosines.numpy()
    yield Figure(
        "steps",
        "The lengths of the steps from snapshot to snapshot, and the cosines of the angles between "
        "them. The steps of a random walk are orthogonal to each other: all its cosines are 0.",
        partial(draw_steps, steps, cosines),
        {"lengths": steps, "cosines": cosines},
    )


def angles_figure(angles: Tensor, n: int) -> Figure:
    """The principal angles between the spans of two trajectories of n parameters that move."""
    random = random_angle(len(angles), n)
    return Figure(
        "angles",
        f"The principal angles between the spans of the first {len(angles)} principal components "
        f"of both trajectories. Between random subspaces all are above about {random:.1f}°.",
        partial(draw_angles, angles.numpy(), random),
        {"angles": angles.numpy(), "random": random},
    )


def draw_path(path: np.ndarray, walk: np.ndarray, narrow: bool = False) -> matplotlib.figure.Figure:
    """Two paths (T, 2) beside each other."""
    figure, grid = plots.panels(1, 2, (9, 4.2), narrow)
    for axes, points, style in zip(grid[0], (path, walk), (TRAJECTORY, WALK), strict=True):
        axes.plot(*points.T, color=style["color"], linewidth=0.8)
        axes.scatter(*points.T, c=np.arange(len(points)), cmap="viridis_r", s=16, zorder=3)
        above = {"xytext": (0, 7), "textcoords": "offset points", "ha": "center"}
        axes.annotate("start", points[0], **above)
        axes.annotate("end", points[-1], **above)
        axes.set(title=style["label"], xlabel="first principal component", ylabel="second")
        axes.set_aspect("equal", "datalim")
        axes.grid(alpha=0.3)
    return figure


def draw_coordinates(
    path: np.ndarray, walk: np.ndarray, narrow: bool = False
) -> matplotlib.figure.Figure:
    """Coordinates (T, up to SHOWN) over time, a panel each."""
    figure, grid = plots.panels(2, 2, (9, 6), narrow)
    for number, axes in enumerate(grid.flat):
        if number >= path.shape[1]:
            axes.set_visible(False)
            continue
        axes.plot(path[:, number], **TRAJECTORY)
        axes.plot(walk[:, number], **WALK)
        over_time(axes, "snapshot", f"principal component {number + 1}")
    plots.add_legend(figure, *grid[0, 0].get_legend_handles_labels())
    return figure


def draw_steps(
    lengths: np.ndarray, cosines: np.ndarray, narrow: bool = False
) -> matplotlib.figure.Figure:
    """The lengths of steps (T − 1,), and the cosines between them (T − 1, T − 1)."""
    figure, grid = plots.panels(1, 2, (9, 4), narrow)
    lines, image = grid[0]
    lines.plot(np.arange(1, len(lengths) + 1), lengths, color=TRAJECTORY["color"])
    lines.set_ylim(bottom=0)
    over_time(lines, "step", "length")
    others = np.where(np.eye(len(cosines)), np.nan, cosines)  # of a step and itself it is 1
    most = np.nanmax(np.abs(others), initial=1e-3)
    ends = (0.5, len(lengths) + 0.5)
    drawn = image.imshow(others, "RdBu_r", vmin=-most, vmax=most, extent=(*ends, *ends[::-1]))
    image.set(xlabel="step", ylabel="step")
    figure.colorbar(drawn, ax=image, label="cosine of the angle between steps", shrink=0.8)
    return figure


def draw_angles(
    angles: np.ndarray, random: float, narrow: bool = False
) -> matplotlib.figure.Figure:
    """Angles (k,) in degrees, and the smallest that random subspaces have."""
    figure, grid = plots.panels(1, 1, (7, 4), narrow)
    axes = grid[0, 0]
    axes.plot(np.arange(1, len(angles) + 1), angles, "o-", color=TRAJECTORY["color"])
    axes.axhline(random, **WALK | {"label": "random subspaces: above this"})
    axes.set(xlabel="principal angle", ylabel="degrees", ylim=(0, 92))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def over_time(axes: Axes, time: str, label: str) -> None:
    """Label axes of a quantity over snapshots or steps."""
    axes.set(xlabel=time, ylabel=label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)

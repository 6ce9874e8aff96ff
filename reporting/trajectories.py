"""What can be said of any trajectory, from the Gram matrix of its snapshots; no networks, no runs.

Everything is set beside a random walk with the same step lengths, in as many dimensions as there
are steps: what a walk does, too, is no property of training.
"""

import math
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from dldr.pca import (
    centered,
    gram_matrices,
    principal_axes,
    random_walk_gram,
    step_lengths,
    with_names,
)

SHARES = (0.9, 0.95, 0.99)  # of the variance, for which components are counted
LEADING = (1, 2, 5, 10, 20, 40)  # numbers of components whose shares are told
DECISIVE = (
    "What decides is training in the span, beside training in a random subspace and in the span of "
    "a random walk. The hypothesis holds for this network where the first reaches the accuracy of "
    "ordinary training, and the others with as many dimensions do not:"
)
# Drawn random walks differ from the expected one: the standard deviations are 3 % (effective
# dimension) and 2 % (distance) in 1,000 dimensions, 1 % in 10,000 (measured on 30 equal steps).
MARGIN = 0.05
LAYER_COLUMNS = ("parameters", "% of the variance", "path length", "distance")
LAYER_COLUMNS += ("effective dimension", "of the walk")
WORDS = {
    "random walk": "what a walk of steps as long as the trajectory's, each in a direction of its "
    "own, would have; where all are of one length, its first component explains about 61 % of the "
    "variance, however many they are",
    "path length": "the sum of the distances between consecutive snapshots",
    "distance from start to end": "from the first snapshot to the last; of a walk √Σ|step|²",
    "effective dimension": "(Σλ)² / Σλ² of the variances λ along the principal components: d if d "
    "of them are equal and the others 0",
}


@dataclass(frozen=True)
class Trajectory:
    """T positions of n parameters, as their Gram matrix about their mean (T, T), float64.

    Raises ValueError for fewer than three positions, and where they are all the same.
    """

    gram: Tensor
    n: int

    def __post_init__(self) -> None:
        if len(self.gram) < 3:
            raise ValueError(f"{len(self.gram)} snapshots; allowed: from 3")
        if not self.steps.any():
            raise ValueError("the snapshots are all the same")

    @cached_property
    def steps(self) -> Tensor:
        """The lengths of the steps, (T − 1,)."""
        return step_lengths(self.gram)

    @property
    def length(self) -> float:
        """The length of the path."""
        return float(self.steps.sum())

    @property
    def distance(self) -> float:
        """The distance from the first position to the last."""
        return float(step_lengths(self.gram[[0, -1]][:, [0, -1]]))

    @cached_property
    def axes(self) -> tuple[Tensor, Tensor]:
        """Variances (T,) times T along the principal components, and eigenvectors (T, T)."""
        variances, vectors = principal_axes(self.gram)
        return variances.clamp(min=0), vectors

    @property
    def shares(self) -> Tensor:
        """The share of the variance in each principal component, (T − 1,)."""
        variances, _ = self.axes
        return (variances / variances.sum())[:-1]

    @property
    def coordinates(self) -> Tensor:
        """The positions along the principal components, (T, T − 1)."""
        variances, vectors = self.axes
        return (vectors * variances.sqrt())[:, :-1]

    @property
    def cosines(self) -> Tensor:
        """The cosines between steps, (T − 1, T − 1); NaN where one has no length."""
        products = self.gram.diff(dim=0).diff(dim=1)
        return products / torch.outer(self.steps, self.steps)

    @property
    def dimension(self) -> float:
        """The effective dimension."""
        return 1 / float(self.shares.square().sum())

    def components(self, fraction: float) -> int:
        """How many principal components explain a fraction of the variance."""
        explained = self.shares.cumsum(0)
        return int((explained < fraction * explained[-1] - 1e-12).sum()) + 1

    def explained(self, k: int) -> float:
        """The share of the variance in the first k principal components."""
        return float(self.shares[:k].sum())

    @cached_property
    def walk(self) -> "Trajectory":
        """A random walk with the same step lengths, as expected in many dimensions."""
        return Trajectory(random_walk_gram(self.steps), self.n)


def measure(
    snapshots: Sequence[Mapping[str, Tensor]], names: Sequence[str], by_layer: bool
) -> dict[str, Tensor]:
    """The Gram matrix of each layer, or of all parameters under "", in one read."""
    snapshots, names = with_names(snapshots, names)
    return gram_matrices(snapshots, names, layer_of if by_layer else lambda name: "")


def layer_of(name: str) -> str:
    """The layer that a parameter is of."""
    return name.rpartition(".")[0] or name


def angles(gram: Tensor, first: int, k: int) -> Tensor:
    """The principal angles (k,), in degrees, between the spans of two sets of vectors.

    `gram` is their joint Gram matrix, the `first` ones before the others. The span of a set is that
    of its first k principal components, about its own mean.
    """
    cosines = gram[:first, first:]  # the eigenvectors take care of the means
    for own in (gram[:first, :first], gram[first:, first:]):
        variances, vectors = principal_axes(centered(own))
        cosines = ((vectors[:, :k] / variances[:k].sqrt()).T @ cosines).T
    return torch.linalg.svdvals(cosines).clamp(max=1).acos().rad2deg()


# ------------------------------------------------------------------------------- tables, sentences


def quantities(trajectory: Trajectory) -> dict[str, float]:
    """The numbers of a trajectory by what they are."""
    values = {
        "snapshots": len(trajectory.gram),
        "parameters": trajectory.n,
        "path length": trajectory.length,
        "distance from start to end": trajectory.distance,
        "effective dimension": trajectory.dimension,
    }
    for share in SHARES:
        values[f"components for {100 * share:.0f} % of the variance"] = trajectory.components(share)
    for k in LEADING:
        if k < len(trajectory.shares):
            which = f"first {k} components" if k > 1 else "first component"
            values[f"% of the variance in the {which}"] = 100 * trajectory.explained(k)
    return values


def layer_quantities(
    grams: Mapping[str, Tensor], sizes: Mapping[str, int]
) -> Iterator[dict[str, Any]]:
    """The numbers of each layer; those that are None belong to one that does not move."""
    total = sum(float(gram.trace()) for gram in grams.values())
    for layer, gram in grams.items():
        row = {"layer": layer, **dict.fromkeys(LAYER_COLUMNS), "parameters": sizes[layer]}
        if step_lengths(gram).any():
            moved = Trajectory(gram, sizes[layer])
            row["% of the variance"] = 100 * float(gram.trace()) / total
            row["path length"], row["distance"] = moved.length, moved.distance
            row["effective dimension"], row["of the walk"] = moved.dimension, moved.walk.dimension
        yield row


def overview(columns: Mapping[str, Mapping[str, float]]) -> list[dict[str, str]]:
    """The table of what `quantities` returns of several trajectories, by their names."""
    rows = next(iter(columns.values()))
    return [
        {"": row} | {name: text(values.get(row)) for name, values in columns.items()}
        for row in rows
    ]


def as_text(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, str]]:
    """A table of numbers as it is shown."""
    return [{name: text(value) for name, value in row.items()} for row in rows]


def text(value: Any) -> str:
    """A cell of a table."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else value or ""


def conclusions(trajectory: Trajectory) -> list[str]:
    """What the comparison with the walk says, in sentences."""
    walk, ratio = trajectory.walk, trajectory.distance / trajectory.walk.distance
    count = trajectory.components(0.95)
    dimensions = f"{trajectory.dimension:.2f}, of the walk {walk.dimension:.2f}"
    if trajectory.dimension < (1 - MARGIN) * walk.dimension:
        verdict = (
            "it is more concentrated than a walk. That few components explain much of its variance "
            "is more than chance, but no evidence yet that training works in their span."
        )
    else:
        less = trajectory.dimension > (1 + MARGIN) * walk.dimension
        verdict = (
            f"it is {'less' if less else 'about as'} concentrated {'than' if less else 'as'} a "
            "walk. That few components explain much of its variance is no evidence that training "
            "takes place in few dimensions."
        )
    direction = "its steps turn back" if ratio < 1 else "its steps share a direction"
    if abs(ratio - 1) < MARGIN:
        direction = "about as far as by chance"
    return [
        f"95 % of the variance of the trajectory lies in {count} principal "
        f"component{'s' if count > 1 else ''}, of a random walk with the same step lengths in "
        f"{walk.components(0.95)}.",
        f"The effective dimension of the trajectory is {dimensions}: {verdict}",
        f"Its end is {ratio:.2f} times as far from its start as that of the walk: {direction}.",
    ]


def random_angle(k: int, n: int) -> float:
    """About the smallest angle, in degrees, between two random subspaces of k of n dimensions.

    Its cosine is the largest singular value of a k × k matrix of normal numbers of variance 1 / n.
    """
    return math.degrees(math.acos(min(1.0, 2 * math.sqrt(k / n))))


def angles_sentence(angles: Tensor, n: int) -> str:
    """What the angles between two spans say; n parameters move."""
    return (
        f"The spans of the first {len(angles)} principal components of both trajectories have "
        f"principal angles from {float(angles[0]):.1f}° to {float(angles[-1]):.1f}°; those of "
        f"random subspaces of the {n:,} parameters that move are above about "
        f"{random_angle(len(angles), n):.1f}°."
    )


def next_steps(words: Sequence[str], k: int) -> list[str]:
    """The commands that tell whether training in the span works."""
    command = f"python train_psgd.py --samples {shlex.join(words)} --arch MODULE:CALLABLE"
    command += f" --datasets ImageFolder --data-dir DIR --n_components {k}"
    return [command, f"{command} --basis random", f"{command} --basis walk"]

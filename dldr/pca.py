"""The principal components of a trajectory, and what of them chance explains (DLDR: §3.2)."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from dldr.distributed import progress_bar
from dldr.parameters import home_of_float64, parameter_names, trainable

BLOCK = 2**24  # numbers of all snapshots together that are held in float64 at a time


@torch.no_grad()
def pca(
    snapshots: Any,
    n_components: int | float,
    *,
    model: nn.Module | None = None,
    names: Iterable[str] | None = None,
    device: Any = "cpu",
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Principal components of T snapshots: basis (k, n), explained_variance_ratio (k,).

    `snapshots` is a matrix (T, n), a sequence of vectors (n,), as `flatten` makes them, or of state
    dicts. Those need the `model` whose trainable parameters they hold, or the `names` to take of
    them in that order: a file may have another one, which `Subspace` would take for the model's.
    `n_components` is k, or the fraction of the variance that the fewest components exceed. Rows are
    orthonormal, those of largest variance first, the entry of largest magnitude in each positive,
    as in scikit-learn. The results are on `device`, the basis in `dtype` (default: the snapshots'),
    ratios at least float32.

    T ≪ n, so the components come from the T × T Gram matrix: the snapshots are read twice, and are
    never in memory all at once.

    Raises ValueError where k > T − 1, where the snapshots do not span k directions, where they are
    not finite, of different shapes, without some of the names, or share their memory.
    """
    if isinstance(snapshots[0], Mapping) and model is None and names is None:
        raise ValueError("state dicts: their order may not be the model's; pass model=, or names=")
    if model is not None:
        names = list(trainable(model))
    snapshots, names = with_names(snapshots, names)
    own = reduce(torch.promote_types, (snapshots[0][name].dtype for name in names))
    own = own if own.is_floating_point else torch.float64
    n = sum(snapshots[0][name].numel() for name in names)
    k, most = n_components, min(len(snapshots) - 1, n)
    check_components(k, most, len(snapshots))

    variances, vectors = principal_axes(gram_matrix(snapshots, names, device))
    ratios = variances.clamp(min=0) / variances.sum()
    if isinstance(k, float):
        k = min(int(torch.searchsorted(ratios.cumsum(0), k, right=True)) + 1, most)
    if k > (most := spanned(variances)):
        raise ValueError(f"{k}, but the {len(snapshots)} snapshots span only {most} directions")

    weights = (vectors[:, :k] / variances[:k].sqrt()).T.contiguous()
    basis = torch.empty(k, n, dtype=dtype or own, device=device)
    for _, columns, block in centered_blocks(snapshots, names, device):
        basis[:, columns] = weights @ block
    if variances[k - 1] < 1e-8 * variances[0]:  # otherwise their rounding does not matter
        orthonormalize(basis)
    for row in basis:
        low, high = row.aminmax()
        if -low > high:
            row.neg_()
    return basis, ratios[:k].to(torch.promote_types(own, torch.float32)).to(device)


@torch.no_grad()
def spectrum(snapshots: Any, names: Iterable[str] | None = None, device: Any = "cpu") -> Tensor:
    """The share of the variance of T snapshots in each principal component, (T − 1,), float64.

    Of state dicts, `names` are taken, by default all that may be parameters (`parameter_names`).
    Raises ValueError as `pca` does, and where the snapshots are all the same.
    """
    variances, _ = principal_axes(gram_matrix(*with_names(snapshots, names), device))
    if not variances[0] > 0:
        raise ValueError("the snapshots are all the same")
    return (variances.clamp(min=0) / variances.sum())[:-1]


def random_walk_spectrum(steps: Any) -> Tensor:
    """The `spectrum` of a random walk with these step lengths, in the limit of many dimensions.

    `steps` are T − 1 lengths; so is the result. A trajectory whose first components explain no
    more than these is no more concentrated than chance (Antognini and Sohl-Dickstein, NeurIPS 2018,
    for steps of equal length).
    """
    values = torch.linalg.eigvalsh(random_walk_gram(steps)).flip(0).clamp(min=0)
    return values[:-1] / values.sum()


def random_walk_gram(steps: Any) -> Tensor:
    """The Gram matrix (T, T) about their mean of the positions of a random walk, as expected.

    The `steps`, T − 1 lengths, are orthogonal to each other, as in many dimensions those of a walk
    are: positions i and j have the product Σ_{t ≤ min(i, j)} |step_t|².
    """
    steps = torch.as_tensor(steps, dtype=torch.float64)
    variance = torch.cat([steps.new_zeros(1), steps.square().cumsum(0)])
    return centered(torch.minimum(variance[:, None], variance[None]))


def centered(gram: Tensor) -> Tensor:
    """A Gram matrix (S, T) as of two sets of vectors about the mean of each."""
    gram = gram - gram.mean(0)
    return gram - gram.mean(1, keepdim=True)


def principal_angles(basis: Tensor, other: Tensor) -> Tensor:
    """The principal angles between two subspaces, (min(k, l),), float64, in radians, ascending.

    `basis` (k, n) and `other` (l, n) have linearly independent rows that span them. The cosines
    are the singular values of the product of orthonormal bases (Björck and Golub, Math. Comp.
    1973); angles below 1e-7 are rounding. Raises ValueError for rows that are linearly dependent.
    """
    cosines = product(basis, other)
    cosines = torch.linalg.solve_triangular(triangular_factor(basis), cosines, upper=False)
    cosines = torch.linalg.solve_triangular(triangular_factor(other), cosines.T, upper=False)
    return torch.linalg.svdvals(cosines).clamp(max=1).acos()


def orthonormalize(basis: Tensor) -> None:
    """Gram–Schmidt in place on linearly independent rows (k, n), from the first one on.

    Raises ValueError where the rows are linearly dependent, up to rounding.
    """
    factor = triangular_factor(basis)
    for block in basis.split(max(1, BLOCK // len(basis)), dim=1):
        wide = block.to(factor.device, torch.float64)
        block.copy_(torch.linalg.solve_triangular(factor, wide, upper=False))


def triangular_factor(basis: Tensor) -> Tensor:
    """The lower triangular L (k, k) for which L⁻¹ times the rows (k, n) are orthonormal."""
    factor, failed = torch.linalg.cholesky_ex(product(basis, basis))
    if failed:  # a host sync
        raise ValueError("its rows are linearly dependent")
    return factor


def product(basis: Tensor, other: Tensor) -> Tensor:
    """basis · otherᵀ (k, l) in float64, converted block by block."""
    width = max(1, BLOCK // len(basis))
    pairs = zip(basis.split(width, dim=1), other.split(width, dim=1), strict=True)
    wide = {"device": home_of_float64(basis.device), "dtype": torch.float64}
    return sum(one.to(**wide) @ another.to(**wide).T for one, another in pairs)


# --------------------------------------------------------------------- the Gram matrix, in blocks


def gram_matrix(snapshots: Sequence[Mapping], names: Sequence[str], device: Any = "cpu") -> Tensor:
    """The Gram matrix (T, T) of the snapshots about their mean, read once.

    In float64: with a matrix in float32 the basis made from it is not orthonormal (an error of
    0.24 was measured). Raises ValueError for values that are not finite.
    """
    return gram_matrices(snapshots, names, lambda name: "", device)[""]


def gram_matrices(
    snapshots: Sequence[Mapping],
    names: Sequence[str],
    layer_of: Callable[[str], str],
    device: Any = "cpu",
) -> dict[str, Tensor]:
    """The `gram_matrix` of each layer, all in one read: their sum is that of the network."""
    grams: dict[str, Tensor] = {}
    T = len(snapshots)
    for name, _, block in centered_blocks(snapshots, names, device):
        if (layer := layer_of(name)) not in grams:
            grams[layer] = block.new_zeros(T, T)
        grams[layer].addmm_(block, block.T)
    if not all(gram.isfinite().all() for gram in grams.values()):
        for position, snapshot in enumerate(snapshots):
            if not all(snapshot[name].isfinite().all() for name in names):
                raise ValueError(f"{called(snapshot, position)} holds values that are not finite")
        raise ValueError("the snapshots are too large")
    return grams


def principal_axes(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (T,), the largest first, and eigenvectors (T, T) of a centered Gram matrix.

    The eigenvalues are T times the variances along the principal components.
    """
    values, vectors = torch.linalg.eigh(gram)  # the smallest first
    return values.flip(0), vectors.flip(1)


def spanned(variances: Tensor) -> int:
    """How many directions T snapshots span, up to rounding; the T eigenvalues are descending."""
    rounding = len(variances) * torch.finfo(variances.dtype).eps * variances[0]
    return int((variances > rounding).sum())


def step_lengths(gram: Tensor) -> Tensor:
    """The distances (T − 1,) between consecutive snapshots, from their Gram matrix."""
    norms = gram.diagonal()
    return (norms[1:] + norms[:-1] - 2 * gram.diagonal(1)).clamp(min=0).sqrt()


def centered_blocks(
    snapshots: Sequence[Mapping[str, Tensor]], names: Sequence[str], device: Any = "cpu"
) -> Iterator[tuple[str, slice, Tensor]]:
    """The T snapshots about their mean, at most BLOCK / T columns at a time.

    Each block comes with the name that it is of, and its columns among all n. It is good until the
    next one is taken: it is the same memory, since fresh pages for every block were measured to
    cost more than the arithmetic. It is filled where the snapshots are, and goes to another device
    in one copy.
    """
    width = max(1, BLOCK // len(snapshots))
    home, device = (home_of_float64(at) for at in (snapshots[0][names[0]].device, device))
    block = torch.empty(len(snapshots), width, dtype=torch.float64, device=home)
    sizes = [snapshots[0][name].numel() for name in names]
    start = 0
    with progress_bar(None, "PCA", sum(sizes), unit="columns", unit_scale=True) as bar:
        for name, size in zip(names, sizes, strict=True):
            for first in range(0, size, width):
                last = min(first + width, size)
                filled = block[:, : last - first]
                for row, snapshot in zip(filled, snapshots, strict=True):
                    row.copy_(snapshot[name].reshape(-1)[first:last])
                columns = filled.to(device)
                columns -= columns.mean(0)
                yield name, slice(start + first, start + last), columns
                bar.update(last - first)
            start += size


# ------------------------------------------------------------------------------ what is refused


def called(snapshot: Any, position: int) -> str:
    """What messages call a snapshot: its file where it has one."""
    return str(getattr(snapshot, "file", f"snapshot {position}"))


def with_names(
    snapshots: Any, names: Iterable[str] | None
) -> tuple[Sequence[Mapping[str, Tensor]], list[str]]:
    """The snapshots as state dicts, vectors too, and the names of what is taken of each.

    Raises ValueError where a name is missing, shapes differ, or two share their memory.
    """
    if not isinstance(snapshots[0], Mapping):
        snapshots, names = [{"": torch.as_tensor(snapshot)} for snapshot in snapshots], [""]
    names = list(parameter_names(snapshots[0]) if names is None else names)
    if not names:
        raise ValueError(f"{called(snapshots[0], 0)} holds no parameters")
    for position, snapshot in enumerate(snapshots):
        missing = [name for name in names if name not in snapshot]
        if missing:
            raise ValueError(
                f"{called(snapshot, position)} lacks {missing[0]}"
                + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
                + f"; it holds {', '.join(list(snapshot)[:3])}, …"
            )
        for name in names:
            if snapshot[name].shape != snapshots[0][name].shape:
                raise ValueError(
                    f"the snapshots differ in their shapes: {name} is "
                    f"{tuple(snapshot[name].shape)} in {called(snapshot, position)}, "
                    f"{tuple(snapshots[0][name].shape)} in {called(snapshots[0], 0)}"
                )
    check_memory(snapshots, min(names, key=lambda name: snapshots[0][name].numel()))
    return snapshots, names


def check_memory(snapshots: Sequence[Mapping[str, Tensor]], name: str) -> None:
    """ValueError where two snapshots hold the same tensor, which has one value only."""
    tensors = [snapshot[name] for snapshot in snapshots]
    first: dict[int, int] = {}
    for position, tensor in enumerate(tensors):
        other = first.setdefault(tensor.data_ptr(), position)
        if other != position and tensor.numel():
            raise ValueError(
                f"{called(snapshots[position], position)} and {called(snapshots[other], other)} "
                "share their memory; keep copies: {name: value.clone() for name, value in "
                "model.state_dict().items()}"
            )


def check_components(n_components: int | float, most: int, snapshots: int) -> None:
    """ValueError unless it is a k from 1 to `most`, or a fraction of the variance below 1."""
    fits = n_components < 1 if isinstance(n_components, float) else n_components <= most
    if most < 1 or n_components <= 0 or not fits:
        allowed = f"at most {most}, or a fraction of the variance below 1"
        raise ValueError(f"{n_components} of {snapshots} snapshots; allowed: {allowed}")

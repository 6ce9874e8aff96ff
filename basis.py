"""Which subspace a run trains in, and where in it training starts; the file basis.npz."""

import argparse
import contextlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from checkpoint import check_config, check_file, fingerprint, sample_range, save
from distributed import all_reduce, on_rank0, print0, world_size
from errors import InputError, blame
from names import BASES
from network import check_fits, copy_into, load_weights
from utils import (
    Sample,
    abbreviate,
    average,
    check_basis_memory,
    check_components,
    load_samples,
    orthonormalize,
    pca,
    sample_numbers,
    trainable,
)


class Basis(NamedTuple):
    """A subspace as basis.npz holds it."""

    basis: Tensor  # P (k, n)
    explained_variance_ratio: Tensor  # (k,)
    computed_from: str  # the fingerprint of the samples and options


def run_directory(args: argparse.Namespace, method: str) -> Path:
    """Where a subspace run's files are: --run, or a name made of basis and start."""
    name = method
    if args.basis != "pca":
        name += f"_{Path(args.basis).stem}"
    if args.start is not None:
        name += f"_from_{args.start}"
    return args.save_dir / (args.run or name)


def load_trajectory(args: argparse.Namespace, numbers: range) -> list[Sample]:
    """The samples of these numbers, once it is clear that they are of the same experiment."""
    if not on_rank0(args.save_dir.is_dir):
        raise InputError(
            f"--save-dir {args.save_dir}: there is no such directory; train_sgd.py makes it"
        )
    config = args.save_dir / "config.json"
    if on_rank0(config.exists):
        on_rank0(lambda: check_config(args, config))
    else:
        print0(f"{config} is missing: its run's data, network and seed are not checked")
    if world_size() > 1:
        there = [number for number in sample_numbers(args.save_dir) if number in numbers]
        digests = [""] * world_size()
        files = [args.save_dir / f"{number}.pt" for number in there]
        dist.all_gather_object(digests, fingerprint(files))
        if len(set(digests)) > 1:
            raise InputError(
                f"--save-dir {args.save_dir}: not the same samples for all processes; "
                "allowed: a directory that all machines share"
            )
    return load_samples(args.save_dir, numbers.start, numbers.stop, numbers.step)


def load_subspace_samples(args: argparse.Namespace) -> list[Sample]:
    """The samples that --params_start, --params_end and --params_stride name.

    Samples and directions that the options leave open are the published ones, or fewer.
    """
    if args.params_end is None:
        there = on_rank0(lambda: sample_numbers(args.save_dir))
        args.params_end = min(51, there[-1] + 1) if there else 51
    numbers = sample_range(vars(args))
    if args.n_components is None:
        args.n_components = max(1, min(40, len(numbers) - 1))
    if args.params_start >= args.params_end:
        raise InputError(
            f"--params_end {args.params_end}: allowed: above --params_start {args.params_start}"
        )
    with blame(), blame("--params_end", FileNotFoundError):
        samples = load_trajectory(args, numbers)
    if isinstance(args.start, int):
        check_file("--start", args.save_dir / f"{args.start}.pt")
    if args.basis == "pca":
        with blame("--n_components"):
            check_components(args.n_components, len(samples) - 1, len(samples))
    print0(
        f"{args.save_dir}: samples {abbreviate(numbers)} (--params_end {args.params_end}) of "
        f"{args.arch} on {args.datasets}, --corrupt {args.corrupt:g}, "
        f"--randomseed {args.randomseed}; --n_components {args.n_components}"
    )
    return samples


def check_samples(args: argparse.Namespace, samples: Sequence[Sample], model: nn.Module) -> None:
    """InputError that names a sample that does not fit --arch."""
    with blame():
        for sample in samples:
            check_fits(sample, model, sample.file, args.arch)


def load_start(args: argparse.Namespace, samples: Sequence[Sample], model: nn.Module) -> None:
    """Put `model` where training in the subspace starts.

    That is --start, else the first sample unless --pretrained named other weights. InputError for
    samples that are not of such a model.
    """
    check_samples(args, samples, model)
    if args.start == "mean":
        copy_into(model, average(samples))
    elif args.start is not None or not args.pretrained:
        start = args.params_start if args.start is None else args.start
        with blame("--start" if args.start is not None else ""):
            load_weights(model, args.save_dir / f"{start}.pt", args.arch)


def find_basis(args: argparse.Namespace, samples: Sequence[Sample], model: nn.Module) -> Basis:
    """The basis of --basis, from an earlier run's basis.npz if one has the same, else computed."""
    parameters = trainable(model)
    names, n = list(parameters), sum(p.numel() for p in parameters.values())
    files = [sample.file for sample in samples] if args.basis in BASES else [Path(args.basis)]
    with blame("--basis", OSError):
        options = [args.basis, args.n_components, args.basis_dtype, args.randomseed, names]
        options += ["in parts"] if args.shard_basis else []
        source = fingerprint(files, *options)
    origin, basis = "", None
    for file in args.save_dir.glob("*/basis.npz"):
        if computed_from(file) == source and (basis := load_basis(file, n, args.device)):
            origin = f", from {file}"
            break
    found = all_reduce(torch.tensor(int(basis is not None)), dist.ReduceOp.MIN)
    if not found:  # by all processes, since all have to take part in the PCA
        origin = ""
        at_fault = {"pca": "--n_components", "random": "--n_components", "schmidt": "--params_end"}
        with blame(at_fault.get(args.basis, "--basis")):
            basis = Basis(*compute_basis(args, samples, names, n), source)
    explained = basis.explained_variance_ratio.sum()
    print0(
        f"subspace: {args.basis}, {len(basis.basis)} directions"
        + (f", {explained:.2%} of the variance" if explained.isfinite() else "")
        + f" of {len(samples)} samples ({abbreviate(sample_range(vars(args)))})"
        + origin
    )
    return basis


def compute_basis(
    args: argparse.Namespace, samples: Sequence[Sample], names: Sequence[str], n: int
) -> tuple[Tensor, Tensor]:
    """The basis (k, n) of --basis, and the variance it explains: NaN where that is not known.

    Raises ValueError where there is no such basis.
    """
    dtype, k = getattr(torch, args.basis_dtype), args.n_components
    # Apple's GPUs have no float64, which the PCA needs.
    device = "cpu" if torch.device(args.device).type == "mps" else args.device
    if args.basis in ("pca", "schmidt"):
        # The samples' Gram–Schmidt basis spans what all T − 1 components span. Training is the
        # same in either: SGD, and BFGS from the identity, are equivariant to rotations.
        k = max(1, len(samples) - 1) if args.basis == "schmidt" else k
        settings = {"names": names, "device": device, "dtype": dtype, "shard": args.shard_basis}
        basis, ratio = pca(samples, k, **settings)
        return basis.to(args.device), ratio.to(args.device)
    if args.basis == "random":
        if isinstance(k, float) or k > n:
            raise ValueError(f"{k}: allowed with --basis random: a whole number up to {n}")
        basis = random_basis(k, n, args.randomseed, dtype, device)
    else:
        basis = read_basis(Path(args.basis), n, dtype)
    return basis.to(args.device, dtype), torch.full((len(basis),), math.nan)


def random_basis(k: int, n: int, seed: int, dtype: torch.dtype, device: str) -> Tensor:
    """k orthonormal rows (k, n) of a uniformly random subspace, the same on every device."""
    check_basis_memory(k, n, torch.float32, "cpu")  # where it is drawn
    check_basis_memory(k, n, dtype, device)
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(k, n, generator=generator).to(device)
    orthonormalize(basis)
    return basis.to(dtype)


def read_basis(file: Path, n: int, dtype: torch.dtype) -> Tensor:
    """The basis in a .npy, or in a .npz under the name `basis`, with orthonormal rows.

    Raises ValueError where there is none for n parameters.
    """
    try:
        arrays = np.load(file)
        basis = from_bits(arrays if isinstance(arrays, np.ndarray) else arrays["basis"])
    except Exception as error:  # a broken file makes numpy raise any of half a dozen kinds
        raise ValueError(f"{file}: no .npy or .npz that holds a basis") from error
    fits = basis.dim() == 2 and len(basis) > 0 and basis.shape[1] == n
    if not fits or not basis.is_floating_point() or not basis.isfinite().all():
        raise ValueError(f"{file}: {tuple(basis.shape)}, not finite numbers (k, {n})")
    gram = basis.double() @ basis.double().T
    # What rounding to its own type, or earlier to --basis-dtype, explains.
    rounding = max(torch.finfo(basis.dtype).eps, torch.finfo(dtype).eps, 1e-6)
    if (gram - torch.eye(len(gram))).abs().max() > 10 * rounding:
        with blame(str(file)):
            basis = basis.double() / gram.diagonal().sqrt()[:, None]
            for _ in range(2):  # the second time for what rounding left
                orthonormalize(basis)
        print0(f"{file}: its rows were not orthonormal; they are now, and span the same")
    return basis


# ---------------------------------------------------------------------------------- basis.npz


def computed_from(file: Path) -> str | None:
    """The fingerprint that a basis.npz was saved with; None where there is no such file."""
    with contextlib.suppress(Exception):  # whatever else the file may be
        return str(np.load(file)["computed_from"])


def save_basis(file: Path, basis: Basis) -> None:
    """Write a basis.npz. numpy knows no bfloat16: such a basis is written as its bits, uint16."""
    vectors = basis.basis.cpu()
    if vectors.dtype == torch.bfloat16:
        vectors = vectors.view(torch.uint16)
    ratios = basis.explained_variance_ratio.cpu()
    save(file, Basis(vectors.numpy(), ratios.numpy(), basis.computed_from)._asdict())


def load_basis(file: Path, n: int, device: str) -> Basis | None:
    """Read a basis.npz; None where it does not hold k rows of n finite numbers."""
    with contextlib.suppress(Exception):  # a broken one is computed again
        arrays = np.load(file)
        vectors, ratios = (from_bits(arrays[name]).to(device) for name in Basis._fields[:2])
        fits = vectors.shape == (len(ratios), n)
        if fits and all(row.isfinite().all() for row in vectors):
            return Basis(vectors, ratios, str(arrays["computed_from"]))
    return None


def from_bits(array: np.ndarray) -> Tensor:
    """The array as a tensor; what `save_basis` wrote as bits is bfloat16 again."""
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if tensor.dtype == torch.uint16 else tensor

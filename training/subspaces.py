"""Which samples a run takes, the subspace that they span, and where in it training starts."""

import argparse
import contextlib
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dldr.distributed import on_rank0, print0, world_size
from dldr.parameters import average, flatten, home_of_float64, trainable
from dldr.pca import check_components, gram_matrix, orthonormalize, pca, step_lengths
from dldr.subspace import Subspace
from dldr.trajectory import Snapshot, abbreviate, load_samples, load_snapshot, snapshot_numbers
from training.errors import InputError, blame
from training.files import check_file, fingerprint, save
from training.memory import check_basis_memory
from training.network import check_fits, copy_into, load_weights, outputs_for, rehearsal, renamed
from training.options import BASES
from training.records import SHARED, check_same, read_config, sample_file, sample_key, sample_range
from utils import rng


class Basis(NamedTuple):
    """The basis of a subspace, and what is known of it."""

    vectors: Tensor  # P (k, n)
    ratios: Tensor  # explained variance ratios (k,); NaN where there are no samples to explain
    source: str  # the fingerprint of the samples and options that it was computed from


# What basis.npz calls them, as scikit-learn does where it can.
ARRAYS = ("basis", "explained_variance_ratio", "computed_from")


def load_trajectory(args: argparse.Namespace, numbers: range) -> list[Snapshot]:
    """The samples of these numbers, once it is clear that they are of the same experiment."""
    if not args.samples:
        check_trajectory(args)
    if world_size() > 1:
        digests = [""] * world_size()
        files = [sample_file(args, number) for number in numbers]
        dist.all_gather_object(digests, fingerprint([file for file in files if file.exists()]))
        if len(set(digests)) > 1:
            raise InputError(
                f"{source_of(args)}: not the same samples for all processes; "
                "allowed: a directory that all machines share"
            )
    if args.samples:
        with blame("--samples"):
            files = [sample_file(args, number) for number in numbers]
            return [load_snapshot(file, key=args.key) for file in files]
    return load_samples(args.save_dir, numbers.start, numbers.stop, numbers.step)


def check_trajectory(args: argparse.Namespace) -> None:
    """InputError for a --save-dir of another experiment."""
    if not on_rank0(args.save_dir.is_dir):
        raise InputError(
            f"--save-dir {args.save_dir}: there is no such directory; train_sgd.py makes it"
        )
    config = args.save_dir / "config.json"
    if on_rank0(config.exists):
        arguments = on_rank0(lambda: read_config(config))["arguments"]
        check_same(args, arguments, SHARED, config)
    else:
        print0(f"{config} is missing: its run's data, network and seed are not checked")


def source_of(args: argparse.Namespace) -> str:
    """Where the samples are from, in a message."""
    return "--samples" if args.samples else f"--save-dir {args.save_dir}"


def load_subspace_samples(args: argparse.Namespace) -> list[Snapshot]:
    """The samples that --params_start, --params_end and --params_stride name.

    Samples and directions that the options leave open are the published ones, or fewer.
    """
    most = len(args.samples) if args.samples else None
    if args.params_end is None:
        there = on_rank0(lambda: snapshot_numbers(args.save_dir))
        args.params_end = most or (min(51, there[-1] + 1) if there else 51)
    numbers = sample_range(vars(args))
    if args.n_components is None:
        args.n_components = max(1, min(40, len(numbers) - 1))
    if not numbers:
        raise InputError(
            f"--params_end {args.params_end}: allowed: above --params_start {args.params_start}"
        )
    for option, number in (("--params_end", args.params_end - 1), ("--start", args.start)):
        if most and isinstance(number, int) and number >= most:
            raise InputError(f"{option}: --samples are {most}, numbered from 0")
    with blame(), blame("--params_end", FileNotFoundError):
        samples = load_trajectory(args, numbers)
    if isinstance(args.start, int) and not args.samples:
        check_file("--start", sample_file(args, args.start))
    if args.basis == "pca":
        with blame("--n_components"):
            check_components(args.n_components, len(samples) - 1, len(samples))
    print0(
        f"{source_of(args)}: samples {abbreviate(numbers)} (--params_end {args.params_end}) of "
        f"{args.arch} on {args.datasets}, --corrupt {args.corrupt:g}, "
        f"--randomseed {args.randomseed}; --n_components {args.n_components}"
    )
    return samples


def check_samples(args: argparse.Namespace, samples: Sequence[Snapshot], model: nn.Module) -> None:
    """InputError that names a sample that does not fit --arch; the samples get its names."""
    with blame():
        for sample in samples:
            state = renamed(sample, model)
            sample.clear()
            sample.update(state)
            check_fits(sample, model, sample.file, args.arch)


def load_start(args: argparse.Namespace, samples: Sequence[Snapshot], model: nn.Module) -> None:
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
            load_weights(model, sample_file(args, start), args.arch, None, *sample_key(args))
    check_in_subspace(args, model)


def check_in_subspace(args: argparse.Namespace, model: nn.Module) -> None:
    """InputError for a network that could not be trained in a subspace from where it is."""
    theta = flatten(model)
    images = torch.zeros(2, 3, args.image_size, args.image_size, device=args.device)
    with rehearsal(model) as stand_in, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they come again when it is trained
        try:
            subspace = Subspace(stand_in, theta.new_zeros(1, len(theta)))
            outputs_for(images, subspace, args)
            subspace.release()
        except (ValueError, RuntimeError) as error:
            hint = ""
            if "inplace" in str(error):
                hint = "; if its first batch sets parameters, take a later snapshot: --params_start"
            raise InputError(f"--arch {args.arch}: not in a subspace, {error}{hint}") from error


def find_basis(args: argparse.Namespace, samples: Sequence[Snapshot], model: nn.Module) -> Basis:
    """The basis of --basis, from an earlier run's basis.npz if one has the same, else computed.

    Rank 0 finds it and writes the run's own basis.npz, which all processes read.
    """
    parameters = trainable(model)
    names, n = list(parameters), sum(p.numel() for p in parameters.values())
    files = [sample.file for sample in samples] if args.basis in BASES else [Path(args.basis)]
    own = args.directory / "basis.npz"

    def find() -> str:
        options = [args.basis, args.n_components, args.basis_dtype, args.randomseed, names]
        options += sample_key(args)
        source = fingerprint(files, *options)
        for file in args.save_dir.glob("*/basis.npz"):
            if computed_from(file) == source:
                basis = load_basis(file, n)
                if basis is not None:
                    if file != own:
                        save_basis(own, basis, parameters)
                    return f", from {file}"
        save_basis(own, Basis(*compute_basis(args, samples, names, n), source), parameters)
        return ""

    at_fault = dict.fromkeys(("pca", "random", "walk"), "--n_components")
    at_fault["schmidt"] = "--params_end"
    with blame(at_fault.get(args.basis, "--basis")):
        origin = on_rank0(find)
    basis = load_basis(own, n)
    explained = basis.ratios.sum()
    print0(
        f"subspace: {args.basis}, {len(basis.vectors)} directions"
        + (f", {explained:.2%} of the variance" if explained.isfinite() else "")
        + origin
    )
    return basis


def compute_basis(
    args: argparse.Namespace, samples: Sequence[Snapshot], names: Sequence[str], n: int
) -> tuple[Tensor, Tensor]:
    """The basis (k, n) of --basis, and the variance it explains: NaN where that is not known.

    Raises ValueError where there is no such basis.
    """
    dtype, k = getattr(torch, args.basis_dtype), args.n_components
    device = home_of_float64(args.device)  # the PCA's
    if args.basis == "schmidt":
        # The samples' Gram–Schmidt basis spans what all T − 1 components span. Training is the
        # same in either: SGD, and BFGS from the identity, are equivariant to rotations.
        k = max(1, len(samples) - 1)
    if isinstance(k, int) and k <= n:  # a fraction: known after the PCA only; more: refused below
        check_basis_memory(k, n, dtype, device)
    if args.basis in ("pca", "schmidt"):
        return pca(samples, k, names=names, device=device, dtype=dtype)
    if args.basis == "random":
        if isinstance(k, float) or k > n:
            raise ValueError(f"{k}: allowed with --basis random: a whole number up to {n}")
        basis = random_basis(k, n, args.randomseed, dtype, device)
    elif args.basis == "walk":
        lengths = step_lengths(gram_matrix(samples, names, device))
        basis, _ = pca(random_walk(lengths, n, args.randomseed), k, device=device, dtype=dtype)
    else:
        basis = read_basis(Path(args.basis), n, dtype)
    return basis.to(dtype), torch.full((len(basis),), math.nan)


def random_basis(k: int, n: int, seed: int, dtype: torch.dtype, device: str) -> Tensor:
    """k orthonormal rows (k, n) of a uniformly random subspace, the same on every device."""
    check_basis_memory(k, n, torch.float32, "cpu")  # where it is drawn
    # Of a stream that is not the initialization's: the first row would resemble its weights.
    generator = torch.Generator().manual_seed(int(rng(seed, "basis").integers(2**63)))
    basis = torch.randn(k, n, generator=generator).to(device)
    orthonormalize(basis)
    return basis.to(dtype)


def random_walk(lengths: Tensor, n: int, seed: int) -> list[Tensor]:
    """The T positions (n,) of a random walk with T − 1 steps of these lengths."""
    random = rng(seed, "walk")
    positions = [torch.zeros(n)]
    for length in lengths.tolist():
        step = torch.from_numpy(random.standard_normal(n, dtype=np.float32))
        positions.append(positions[-1] + step * (length / step.norm()))
    return positions


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
        with blame(f"--basis: {file}"):
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


def save_basis(file: Path, basis: Basis, parameters: Mapping[str, Tensor]) -> None:
    """Write a basis.npz, with the names and shapes of the parameters that its columns are of.

    numpy knows no bfloat16: such a basis is written as its bits, uint16.
    """
    vectors = basis.vectors.cpu()
    if vectors.dtype == torch.bfloat16:
        vectors = vectors.view(torch.uint16)
    values = vectors.numpy(), basis.ratios.cpu().numpy(), basis.source
    dimensions = max(p.dim() for p in parameters.values())
    shapes = [[*p.shape, *[-1] * (dimensions - p.dim())] for p in parameters.values()]
    columns = {"names": np.array(list(parameters)), "shapes": np.array(shapes, dtype=int)}
    save(file, dict(zip(ARRAYS, values, strict=True)) | columns)


def load_basis(file: Path, n: int) -> Basis | None:
    """Read a basis.npz; None where it does not hold k rows of n numbers."""
    with contextlib.suppress(Exception):  # a broken one is computed again
        vectors, ratios, source = (np.load(file)[name] for name in ARRAYS)
        if vectors.shape == (len(ratios), n):
            return Basis(from_bits(vectors), torch.from_numpy(ratios), str(source))
    return None


def from_bits(array: np.ndarray) -> Tensor:
    """The array as a tensor; what `save_basis` wrote as bits is bfloat16 again."""
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if tensor.dtype == torch.uint16 else tensor

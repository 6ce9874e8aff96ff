"""What config.json records of a run, and which of its options other runs take or have to share."""

import argparse
import hashlib
import json
import math
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from torch import nn

from dldr.distributed import world_size
from dldr.parameters import trainable
from training.errors import InputError, blame
from training.options import NOISE
from utils import PREPROCESSING, Data, share

# The options that all runs on one trajectory share, and those that a resumed run has to keep.
EXPERIMENT = ("arch", "datasets", "image_size", "corrupt", "noise", "randomseed", "smalldatasets")
SUBSPACE = ("n_components", "params_start", "params_end", "params_stride", "basis", "start")
SHARED = (*EXPERIMENT, *PREPROCESSING)
RESUMED = (*SHARED, *SUBSPACE, "optimizer", "momentum", "weight_decay", "alpha", "gamma")
RESUMED += ("method", "train_seed", "sample_every", "average")
# These too in the middle of an epoch, and with --sample-every.
MIDWAY = ("batch_size", "accumulate", "start_epoch")
# What the command alone decides, also where it resumes a run: which run, from what, and where.
COMMAND = ("save_dir", "run", "directory", "method", "average", "resume", "overwrite", "evaluate")
COMMAND += ("pretrained", "device")


def arguments_of(args: argparse.Namespace) -> dict[str, Any]:
    """The options as config.json has them."""
    options = {name: value for name, value in vars(args).items() if name != "given"}
    return {name: str(v) if isinstance(v, Path) else v for name, v in options.items()}


def read_config(file: Path) -> dict[str, Any]:
    """What is in a config.json; InputError where it is none."""
    with blame(f"{file}: not readable", Exception):
        config = json.loads(file.read_text())
        config["arguments"].setdefault("noise", "symmetric")  # all that earlier versions had
        config["arguments"]["data_dir"], config["sessions"][-1]["arguments"]["data_dir"]
        return config


def shared_options(file: Path) -> dict[str, Any]:
    """The options in a trajectory's config.json that the runs on its samples take."""
    with blame(f"{file}: not readable", Exception):
        arguments = read_config(file)["arguments"]
        return usable({name: arguments[name] for name in (*SHARED, "data_dir")})


def resumed_options(file: Path) -> dict[str, Any]:
    """The options in a run's config.json that it takes when it is resumed: its last ones."""
    arguments = read_config(file)["sessions"][-1]["arguments"]
    return usable({name: value for name, value in arguments.items() if name not in COMMAND})


def usable(options: dict[str, Any]) -> dict[str, Any]:
    """Recorded options as the parser would give them.

    A network to import is not among them: code is not run because a file names it.
    """
    options["data_dir"] = Path(options["data_dir"])
    if ":" in options["arch"]:
        del options["arch"]
    return options


def check_same(
    args: argparse.Namespace, recorded: Mapping[str, Any], names: Sequence[str], file: Path
) -> None:
    """InputError where an option that has to be the same differs from what `file` recorded."""
    for name in names:
        if name not in recorded:
            raise InputError(
                f"{file}: begun by an earlier version of these scripts, without {name}; "
                "--overwrite that run"
            )
        here, there = vars(args)[name], recorded[name]
        option = "--" + (name if name in SUBSPACE else name.replace("_", "-"))
        if here != there and name in args.given | {"method"}:
            raise InputError(f"{option}: {here} here, {there} in {file}; they have to be the same")
        if here != there:
            raise InputError(f"{option}: has to be given; it is {there} in {file}")


def changed_options(args: argparse.Namespace, recorded: Mapping[str, Any]) -> dict[str, list]:
    """The options that differ from the recorded ones: [before, now] by name."""
    now = arguments_of(args)
    names = [name for name in now if name not in COMMAND or name == "device"]
    return {
        name: [recorded[name], now[name]]
        for name in names
        if name in recorded and recorded[name] != now[name]
    }


def sample_range(arguments: Mapping[str, Any]) -> range:
    """The numbers of the samples that a run takes, by its options as config.json has them."""
    if arguments["average"]:
        return range(*arguments["average"])
    if arguments["basis"]:
        names = ("params_start", "params_end", "params_stride")
        return range(*(arguments[name] for name in names))
    return range(0)


def sample_file(args: argparse.Namespace, number: int) -> Path:
    """The file of a sample: N.pt in --save-dir, or the N-th that --samples names."""
    return Path(args.samples[number]) if args.samples else args.save_dir / f"{number}.pt"


def sample_key(args: argparse.Namespace) -> list[str]:
    """The key to the weights in the files of --samples, where one is given."""
    return [args.key] if args.samples and args.key else []


def label_digest(data: Data) -> str:
    """A digest of all labels, in their order: other images have others, or another number."""
    digest = hashlib.sha256()
    for part in (data.train, data.test):
        digest.update(part.labels.cpu().long().numpy().tobytes())
    return digest.hexdigest()[:16]


def facts_of(
    args: argparse.Namespace, data: Data, model: nn.Module, basis: Any, optimizer: Any, steps: int
) -> dict[str, Any]:
    """What config.json records of the method, the network, the data and the subspace.

    `basis` is None outside of a subspace, and `steps` are those of an epoch.
    """
    # A subspace freezes all parameters; its origin are those that were trained.
    trained = [model.origin] if basis else trainable(model).values()
    facts = {
        "kind": "average" if args.average else "subspace" if basis else "full",
        "method": args.method,
        "optimizer": type(optimizer).__name__ if optimizer else None,
        "arch": args.arch,
        "n": sum(p.numel() for p in trained),
        "datasets": args.datasets,
        "train_images": len(data.train),
        "test_images": len(data.test),
        "num_classes": data.num_classes,
        "corrupted_labels": share(args.corrupt, len(data.train)),
        "wrong_labels": data.wrong_labels,
        "labels": label_digest(data),
    }
    if every := args.sample_every:
        epochs = [i * every / steps for i in range(args.epochs * steps // every + 1)]
        # The first is of --start-epoch, wherever that lies between two multiples.
        facts["sample_epochs"] = [round(max(e, args.start_epoch), 6) for e in epochs]
    if basis:
        facts["k"] = len(basis.vectors)
        explained = 100 * float(basis.ratios.sum())
        facts["explained_variance"] = explained if math.isfinite(explained) else None
    return facts


def summary_of(args: argparse.Namespace, facts: Mapping[str, Any], variant: str) -> str:
    """The facts in a line; `variant` says which of several networks of that name it is."""
    variant = f" ({variant})" if variant else ""
    noise = f"{facts['corrupted_labels']:,} labels replaced"
    if args.noise not in NOISE:
        noise = f"labels of {Path(args.noise).name}"
    return (
        f"{facts['arch']}{variant}, {facts['n']:,} parameters; {facts['datasets']}, "
        f"{facts['train_images']:,} training images ({noise}, {facts['wrong_labels']:,} wrong), "
        f"{facts['test_images']:,} test images; {args.device}, "
        f"threads: {torch.get_num_threads()}, processes: {world_size()}"
    )


def session_of(args: argparse.Namespace, epoch: int, changed: dict[str, list]) -> dict[str, Any]:
    """What config.json records of one start that trains, from `epoch` on."""
    hardware = torch.get_device_module(args.device)
    versions = {module.__name__: module.__version__ for module in (torch, torchvision, np)}
    return {
        "arguments": arguments_of(args),
        "changed": changed,
        "device": getattr(hardware, "get_device_name", platform.machine)(),
        "threads": torch.get_num_threads(),
        "processes": world_size(),
        "versions": versions | {"python": platform.python_version()},
        "commit": git_commit(),
        "from_epoch": epoch,
    }


def git_commit() -> str | None:
    """The commit these scripts are at, where git can tell."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    except OSError:
        return None

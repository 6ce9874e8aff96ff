"""The network of a run: how it is built and checked, and the weights that are loaded into it."""

import argparse
from collections.abc import Mapping
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import models
from dldr.distributed import in_turn, on_rank0, print0
from dldr.parameters import trainable
from dldr.trajectory import load_state_dict
from training.errors import InputError, blame
from utils import Data


def build_model(args: argparse.Namespace, data: Data) -> nn.Module:
    """The network of --arch on the device, initialized with the seed or from --pretrained."""
    torch.manual_seed(args.randomseed)
    with blame("--arch", (ValueError, TypeError)):
        model = models.build(args.arch, data.num_classes, args.image_size)
        if not isinstance(model, nn.Module):
            raise ValueError(f"{args.arch}: gives a {type(model).__name__}, not a torch.nn.Module")
    check_network(args, model, data)
    with blame("--pretrained"):
        if args.pretrained is True:
            load_torchvision_weights(model, args.arch)
        elif args.pretrained:
            load_weights(model, args.pretrained, args.arch)
    model = model.to(args.device)
    if args.sync_bn:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if not args.compile:  # compiled, they are part of larger kernels
        count_on_host(model)
    return model


def count_on_host(model: nn.Module) -> None:
    """Keep BatchNorm's counters of batches on the CPU: on a GPU each costs a launch per step.

    Only `momentum=None` uses them, and it reads them on the host.
    """
    for layer in model.modules():
        if isinstance(layer, _BatchNorm) and layer.num_batches_tracked is not None:
            layer.num_batches_tracked = layer.num_batches_tracked.cpu()


@torch.no_grad()
def check_network(args: argparse.Namespace, model: nn.Module, data: Data) -> None:
    """InputError if the network cannot be trained or tested on the data; it stays as it was."""
    with blame(f"--arch {args.arch}"):
        parameters = trainable(model)
    if not args.evaluate and not any(p.requires_grad for p in parameters.values()):
        raise InputError(f"--arch {args.arch}: has no parameters to train")
    initial = {name: value.clone() for name, value in model.state_dict().items()}
    size, classes = args.image_size, data.num_classes
    images = 1 if 1 in (len(data.train), args.batch_size) and not args.evaluate else 2
    # Every network fails in its own way on images too small for it, or on one alone.
    with blame(f"--arch {args.arch}: cannot take {images} images of {size} × {size}", Exception):
        batch = torch.zeros(images, 3, size, size)
        outputs = [model.train()(batch), model.eval()(batch)]
    for logits in outputs:
        shape = logits.shape if isinstance(logits, Tensor) else type(logits).__name__
        if len(shape) != 2 or shape[0] != images or shape[1] < classes:
            raise InputError(f"--arch {args.arch}: gives {shape}, not ({images}, {classes}) logits")
    copy_into(model, initial)


def load_torchvision_weights(model: nn.Module, arch: str) -> None:
    """Load torchvision's best weights, except for a classifier of another number of classes.

    Raises ValueError where torchvision has none for `arch`.
    """
    if arch not in torchvision.models.list_models():
        raise ValueError(f"torchvision has no weights for {arch}; name a file: --pretrained PATH")
    if getattr(model, "variant", "") == "for small images":
        raise ValueError(f"torchvision's weights do not fit this {arch}; name a file: PATH")
    weights = torchvision.models.get_model_weights(arch).DEFAULT
    try:
        state = in_turn(lambda: weights.get_state_dict(progress=False, check_hash=True))
    except Exception as error:  # network, disk or archive
        raise ValueError(f"{weights} not downloaded ({error}); name a file: PATH") from error
    own = model.state_dict()
    fits = {name: v for name, v in state.items() if name in own and own[name].shape == v.shape}
    copy_into(model, own | fits)
    left = ", ".join(sorted(own.keys() - fits.keys())) or "nothing"
    print0(f"pretrained: {weights}; left as initialized: {left}")


def check_fits(state: Mapping[str, Tensor], module: nn.Module, file: Path, arch: str) -> None:
    """ValueError for a state, read from `file`, whose names or shapes are not the module's."""
    own = module.state_dict()
    for name in own | state:
        if name not in own or name not in state or own[name].shape != state[name].shape:
            raise ValueError(f"{file}: does not fit --arch {arch} with these options, see {name}")


@torch.no_grad()
def copy_into(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy a state that fits; some networks' `load_state_dict` would want metadata, too."""
    for name, value in module.state_dict().items():
        value.copy_(state[name])


def load_weights(model: nn.Module, file: Path, arch: str) -> None:
    """Load the weights in `file`; raises ValueError where they do not fit the model."""
    state = on_rank0(lambda: load_state_dict(file))  # the others may not see the file
    # torch < 0.4.1, which saved the best-known CIFAR ResNets, had no counters in BatchNorm.
    own = model.state_dict().items()
    counters = {name: v.new_zeros(()).cpu() for name, v in own if "num_batches_tracked" in name}
    state = counters | state
    check_fits(state, model, file, arch)
    copy_into(model, state)

"""The network of a run: how it is built and checked, and the weights that are loaded into it."""

import argparse
import contextlib
import copy
import io
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import models
from dldr.distributed import in_turn, on_rank0, print0
from dldr.parameters import overlaps, trainable
from dldr.reading import is_extra_state
from dldr.subspace import check_modes
from dldr.trajectory import fitting, load_state_dict, prefixes, without
from training.errors import InputError, blame
from utils import Data, seed_all


def build_model(args: argparse.Namespace, data: Data) -> nn.Module:
    """The network of --arch on the device, initialized with the seed or from --pretrained."""
    seed_all(args.randomseed)
    with blame("--arch", (ValueError, TypeError)):
        model = call_factory(args.arch, data.num_classes, args.image_size)
        if not isinstance(model, nn.Module):
            raise ValueError(f"{args.arch}: gives a {type(model).__name__}, not a torch.nn.Module")
    check_network(args, model, data)
    with blame("--pretrained"):
        if args.pretrained is True:
            load_torchvision_weights(model, args.arch)
        elif args.pretrained:
            load_weights(model, args.pretrained, args.arch, data.num_classes, args.key)
    model = model.to(args.device)
    if args.sync_bn:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    make_gradients_dense(model)
    if not args.compile:  # compiled, they are part of larger kernels
        count_on_host(model)
    return model


def call_factory(arch: str, num_classes: int, image_size: int) -> Any:
    """What `models.build` returns; what other people's code raises becomes a ValueError."""
    try:
        return models.build(arch, num_classes, image_size)
    except (ValueError, TypeError):
        raise
    except Exception as error:
        raise ValueError(f"{arch}: {models.described(error)}") from error


def make_gradients_dense(model: nn.Module) -> None:
    """Turn off sparse gradients of embeddings: fused optimizers and subspaces take dense ones."""
    for layer in model.modules():
        if isinstance(layer, nn.Embedding | nn.EmbeddingBag):
            layer.sparse = False


def count_on_host(model: nn.Module) -> None:
    """Keep BatchNorm's counters of batches on the CPU: on a GPU each costs a launch per step.

    Only `momentum=None` uses them, and it reads them on the host.
    """
    for layer in model.modules():
        if isinstance(layer, _BatchNorm) and layer.num_batches_tracked is not None:
            layer.num_batches_tracked = layer.num_batches_tracked.cpu()


# ------------------------------------------------------------------------------ what is refused


@torch.no_grad()
def check_network(args: argparse.Namespace, model: nn.Module, data: Data) -> None:
    """InputError if the network cannot be trained or tested on the data; it stays as it was.

    Where it takes no images in channels_last, it gets contiguous ones from here on.
    """
    with blame(f"--arch {args.arch}"):
        parameters = trainable(model)
        check_extra_state(model)
    if not args.evaluate and not any(p.requires_grad for p in parameters.values()):
        raise InputError(f"--arch {args.arch}: has no parameters to train")
    size, classes = args.image_size, data.num_classes
    count, images = 2, f"two images of {size} × {size}"
    if 1 in (len(data.train), args.batch_size) and not args.evaluate:
        count, images = 1, f"a batch of one image, --batch-size {args.batch_size}"
    with rehearsal(model) as stand_in:
        with blame(f"--arch {args.arch}"):
            check_modes(stand_in)
        # Every network fails in its own way on images too small for it, or on one alone.
        with blame(f"--arch {args.arch}: cannot take {images}", Exception):
            outputs = try_out(args, stand_in.to(args.device), data, count)
    for logits in outputs:
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        if len(shape) != 2 or shape[0] != count or shape[1] < classes:
            raise InputError(
                f"--arch {args.arch}: gives {shape} for {images}, not ({count}, {classes}) numbers"
            )


@contextlib.contextmanager
def rehearsal(model: nn.Module) -> Iterator[nn.Module]:
    """A copy of the model to try it out on, since a first batch may change more than tensors.

    A model that cannot be copied is tried out itself, and gets its tensors back.
    """
    try:
        stand_in = copy.deepcopy(model)
    except Exception:  # weight_norm's tensors, locks, open files, …
        before = copy.deepcopy(full_state(model))
        yield model
        for name in full_state(model).keys() - before.keys():
            set_buffer(model, name, None)
        copy_into(model, before)
        model.train()
    else:
        yield stand_in


def try_out(args: argparse.Namespace, model: nn.Module, data: Data, images: int) -> list:
    """The outputs for images of zeros in training and in evaluation mode, as they will lie."""
    shape = (images, 3, args.image_size, args.image_size)
    try:
        return outputs_for(torch.zeros(shape, device=args.device), model, args)
    except RuntimeError:
        if not args.channels_last:
            raise
    args.channels_last = False  # x.view(len(x), -1) after a convolution cannot take it
    outputs = outputs_for(torch.zeros(shape, device=args.device), model, args)
    for loader in (data.train, data.test):
        loader.layout = torch.contiguous_format
    print0(f"--arch {args.arch}: cannot take images in channels_last, so they are contiguous")
    return outputs


def outputs_for(images: Tensor, model: nn.Module, args: argparse.Namespace) -> list:
    """The outputs in training and in evaluation mode."""
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    images = images.contiguous(memory_format=layout)
    with torch.autocast(args.device, torch.bfloat16, enabled=args.half):
        return [model.train()(images), model.eval()(images)]


def check_extra_state(model: nn.Module) -> None:
    """ValueError for a `get_extra_state` that could not be read again without running code."""
    for name, value in model.state_dict().items():
        if isinstance(value, Tensor):
            continue
        try:
            stream = io.BytesIO()
            torch.save(value, stream)
            stream.seek(0)
            torch.load(stream, weights_only=True)
        except Exception as error:
            raise ValueError(
                f"{name} holds a {type(value).__name__}; get_extra_state() may return tensors, "
                "numbers, text, and lists and dicts of them"
            ) from error


# -------------------------------------------------------------------------------- states


def full_state(module: nn.Module) -> dict[str, Any]:
    """The state dict, with the buffers that it leaves out (persistent=False)."""
    state = module.state_dict()
    for name, buffer in module.named_buffers(remove_duplicate=False):
        if not overlaps(buffer):  # such a one cannot be written to, so it is constant
            state.setdefault(name, buffer)
    return state


def state_of(part: Any) -> dict[str, Any]:
    """What a checkpoint holds of a module or an optimizer."""
    return full_state(part) if isinstance(part, nn.Module) else part.state_dict()


def is_unset_buffer(module: nn.Module, name: str) -> bool:
    """Whether the name is that of a buffer that is None until a first batch sets it."""
    path, _, attribute = name.rpartition(".")
    part = dict(module.named_modules()).get(path, nn.Module())
    return attribute in part._buffers and part._buffers[attribute] is None


def set_buffer(module: nn.Module, name: str, value: Tensor | None) -> None:
    """Make `value` the buffer of that name."""
    path, _, attribute = name.rpartition(".")
    module.get_submodule(path)._buffers[attribute] = value


def check_fits(state: Mapping[str, Any], module: nn.Module, file: Path, arch: str) -> None:
    """ValueError for a state, read from `file`, whose names or shapes are not the module's."""
    required, own = module.state_dict(), full_state(module)
    for name in required | state:
        if is_extra_state(name) or (name not in own and is_unset_buffer(module, name)):
            continue
        if name not in own or name not in state or own[name].shape != state[name].shape:
            raise ValueError(f"{file}: does not fit --arch {arch} with these options, see {name}")
        if name.endswith("running_var") and (state[name] < 0).any():
            raise ValueError(f"{file}: {name} is negative, which a variance cannot be")


@torch.no_grad()
def copy_into(module: nn.Module, state: Mapping[str, Any]) -> None:
    """Copy a state that fits; some networks' `load_state_dict` would want metadata, too."""
    own = full_state(module)
    for name in module.state_dict() | state:
        if is_extra_state(name):
            if name in state:
                module.get_submodule(name.rpartition(".")[0]).set_extra_state(state[name])
        elif name in own:
            own[name].copy_(state[name])
        elif is_unset_buffer(module, name):
            set_buffer(module, name, state[name].clone())
        else:
            raise KeyError(name)


def renamed(state: Mapping[str, Any], module: nn.Module) -> dict[str, Any]:
    """The state under the module's names, with BatchNorm's counters where it has none.

    A file may have a prefix before them. DataParallel's `module.` is dropped where files are read,
    though it may be a name in the network. torch < 0.4.1, which saved the best-known CIFAR ResNets,
    had no counters.
    """
    with contextlib.suppress(ValueError):  # what it lacks is said later
        state = fitting({"": state}, module)
    own = module.state_dict()
    names = {bare(name): name for name in own}
    spelled = {names.get(bare(name), name): value for name, value in state.items()}
    begun = prefixes(spelled, [([bare(next(iter(own), ""))], None)])
    spellings = [dict(state), spelled, *(without(prefix, spelled) for prefix in begun)]
    nearest = max(spellings, key=lambda spelling: len(own.keys() & spelling))
    counters = [name for name in own if name.endswith("num_batches_tracked")]
    return {name: torch.zeros((), dtype=torch.long) for name in counters} | nearest


# ---------------------------------------------------------------------- weights that are loaded


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


def bare(name: str) -> str:
    """A name without `module.` before it, as often as it is there."""
    return re.sub(r"^(module\.)+", "", name)


def load_weights(
    model: nn.Module, file: Path, arch: str, num_classes: int | None = None, key: str | None = None
) -> None:
    """Load the weights in `file`; raises ValueError where they do not fit the model.

    With `num_classes`, a classifier of another number of classes is left as initialized. Of several
    weights in the file those are taken that `key` names, or the only ones that fit.
    """

    def read() -> dict[str, Any]:
        with contextlib.suppress(ValueError):
            return load_state_dict(file, key=key, model=model)
        return load_state_dict(file, key=key)

    state = on_rank0(read)  # the others may not see the file
    state = renamed(state, model)
    left = heads(state, model, num_classes) if num_classes else {}
    check_fits(state | left, model, file, arch)
    copy_into(model, state | left)
    if left:
        print0(f"{file}: for another number of classes; left as initialized: {', '.join(left)}")


def heads(state: Mapping[str, Tensor], model: nn.Module, num_classes: int) -> dict[str, Tensor]:
    """The model's own classifier, where that of the state is for another number of classes."""
    return {
        name: value
        for name, value in model.state_dict().items()
        if isinstance(value, Tensor) and name in state
        if value.shape[:1] == (num_classes,) and value.shape[1:] == state[name].shape[1:]
        if value.shape != state[name].shape
    }

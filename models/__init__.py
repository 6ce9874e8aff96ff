"""Every network the scripts can train, by name, and `Subspace`, which restricts one to a plane."""

import importlib
from collections.abc import Callable

import torchvision
from torch import nn

from models import resnet_cifar
from models.subspace import Subspace

__all__ = ["ARCHITECTURES", "Subspace", "build"]

# These two return auxiliary outputs in training unless told not to, initialise by a slow library
# function unless told which, and take images normalised as their weights want only when told so.
INCEPTION = {"aux_logits": False, "init_weights": True, "transform_input": True}
SETTINGS = {"googlenet": INCEPTION, "inception_v3": INCEPTION}

OWN = {f"resnet{depth}": depth for depth in (8, 20, 32, 44, 56, 110, 1202)}
ARCHITECTURES = (*OWN, *torchvision.models.list_models(module=torchvision.models))


def build(arch: str, num_classes: int, **kwargs) -> nn.Module:
    """The network called `arch`, freshly initialised from torch's global random state.

    `arch` is one of ARCHITECTURES, or package.module:callable, which is imported and called with
    num_classes. `kwargs` go to the network's constructor. Raises ValueError for a name that is
    neither, and where there is no such module or callable.
    """
    if ":" in arch:
        return imported(arch)(num_classes=num_classes, **kwargs)
    if arch not in ARCHITECTURES:
        raise ValueError(
            f"no network is called {arch!r}; models.ARCHITECTURES lists those there are"
        )
    if arch in OWN:
        return resnet_cifar.ResNet(OWN[arch], num_classes, **kwargs)
    kwargs = SETTINGS.get(arch, {}) | kwargs
    return torchvision.models.get_model(arch, weights=None, num_classes=num_classes, **kwargs)


def imported(arch: str) -> Callable[..., nn.Module]:
    """The callable that package.module:callable names; ValueError where it is not there."""
    module, _, name = arch.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{arch}: {error}; PYTHONPATH says where modules are") from error

"""Every network the scripts can train, by name; and `Subspace`, which restricts one."""

import importlib
from collections.abc import Callable

import torch
import torchvision
from torch import nn

from models import small
from models.subspace import Subspace
from names import ARCHITECTURES, LARGE, SMALL

__all__ = ["ARCHITECTURES", "Subspace", "build", "listing"]

SMALL_PIXELS = 64  # above it, a name that both have is torchvision's network

# With transform_input they take images normalized as for all other networks.
SETTINGS = dict.fromkeys(("googlenet", "inception_v3"), small.INCEPTION | {"transform_input": True})


def build(arch: str, num_classes: int, image_size: int = 32, **kwargs) -> nn.Module:
    """The network called `arch`, freshly initialized from torch's global random state.

    `arch` is one of ARCHITECTURES, or package.module:callable, which is imported and called with
    num_classes. Where the name means one network for images of 32 pixels and torchvision's for
    those of 224, `image_size` decides, and the network's attribute `variant` says what it is.
    `kwargs` go to the network's constructor. Raises ValueError for a name that is neither, and
    where there is no such module or callable.
    """
    if ":" in arch:
        return imported(arch)(num_classes=num_classes, **kwargs)
    if arch not in ARCHITECTURES:
        raise ValueError(
            f"no network is called {arch!r}; models.ARCHITECTURES lists those there are"
        )
    both = arch in SMALL and arch in LARGE
    torchvisions = image_size > SMALL_PIXELS if both else arch in LARGE
    if not torchvisions:
        constructor, *arguments = SMALL[arch]
        network = imported(f"models.{constructor}")(*arguments, num_classes=num_classes, **kwargs)
    else:
        kwargs = SETTINGS.get(arch, {}) | kwargs
        network = torchvision.models.get_model(
            arch, weights=None, num_classes=num_classes, **kwargs
        )
    if both:
        network.variant = "torchvision's" if torchvisions else "for small images"
    return network


def imported(arch: str) -> Callable[..., nn.Module]:
    """The callable that package.module:callable names; ValueError where it is not there."""
    module, _, name = arch.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{arch}: {error}; PYTHONPATH says where modules are") from error


def listing() -> str:
    """All names and parameter counts, a table to be read in a terminal."""
    lines = [f"{'for images of 32 pixels':<24}parameters at 10 classes"]
    with torch.device("meta"):
        for name in SMALL:
            size = sum(parameter.numel() for parameter in build(name, 10).parameters())
            lines.append(f"{name:<24}{size:>15,}")
    lines.append(f"\n{'torchvision, by name':<24}parameters at 1000 classes")
    for name in LARGE:
        note = f"  above {SMALL_PIXELS} pixels" if name in SMALL else ""
        size = torchvision.models.get_model_weights(name).DEFAULT.meta["num_params"]
        lines.append(f"{name:<24}{size:>15,}{note}")
    return "\n".join(lines)

"""Every network the scripts can train, by name; and `Subspace`, which restricts one."""

import importlib
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torchvision
from torch import nn

from dldr.subspace import Subspace
from models import small

__all__ = ["ARCHITECTURES", "Subspace", "build", "listing"]

SMALL_PIXELS = 64  # above it, a name that both have is torchvision's network


def family(name: str, network: str, *sizes: int) -> dict[str, tuple]:
    """Name + size of the networks of one family, each with its constructor and first argument."""
    return {f"{name}{size}": (network, size) for size in sizes}


# The networks for images of 32 pixels, as published: module:constructor, its first arguments.
SMALL = {
    **family("resnet", "resnet_cifar:ResNet", 8, 20, 32, 44, 56, 110, 1202),
    **family("vgg", "small:vgg", 11, 13, 16, 19),
    **family("densenet", "small:densenet", 121, 161, 169, 201),
    "googlenet": ("small:googlenet",),
    "inceptionv3": ("small:inception_v3",),
    "inceptionv4": ("inception_v4:InceptionV4",),
    "inceptionresnetv2": ("inception_v4:InceptionResNetV2",),
    "xception": ("xception:Xception",),
    **family("resnet", "small:resnet", 18, 34, 50, 101, 152),
    **family("preactresnet", "preact_resnet:preact_resnet", 18, 34, 50, 101, 152),
    **family("resnext", "resnext:resnext", 50, 101, 152),
    "shufflenet": ("shufflenet:ShuffleNet",),
    "shufflenetv2": ("small:shufflenet_v2",),
    "squeezenet": ("squeezenet:SqueezeNet",),
    "mobilenet": ("mobilenet:MobileNet",),
    "mobilenetv2": ("small:mobilenet_v2",),
    "nasnet": ("nasnet:NASNet", 4, 2, 44),  # cells, reductions, channels
    "attention56": ("attention:ResidualAttentionNetwork", (1, 1, 1)),
    "attention92": ("attention:ResidualAttentionNetwork", (1, 2, 3)),
    **family("seresnet", "se_resnet:se_resnet", 18, 34, 50, 101, 152),
    "wideresnet": ("wide_resnet:WideResNet",),
    **family("stochasticdepth", "stochastic_depth:stochastic_depth_resnet", 18, 34, 50, 101),
    "efficientnet": ("small:efficientnet",),
}
# torchvision's classifiers, those of its later versions too.
LARGE = torchvision.models.list_models(module=torchvision.models)
ARCHITECTURES = (*SMALL, *(name for name in LARGE if name not in SMALL))

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
        sought = error.name if isinstance(error, ImportError) and error.name else module
        top = sought.partition(".")[0]
        file = getattr(sys.modules.get(top), "__file__", None)
        hint = "PYTHONPATH says where modules are"
        if file and Path(file).is_relative_to(Path(__file__).parent.parent):
            hint = f"{file} belongs to these scripts and comes before others that are called {top}"
        raise ValueError(f"{arch}: {error}; {hint}") from error
    except Exception as error:
        raise ValueError(f"{arch}: {described(error)}") from error


def described(error: Exception) -> str:
    """The kind, the message and the place of what other people's code raised."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{Path(place.filename).name}, line {place.lineno}"
    return f"{type(error).__name__}: {error} ({where})"


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

"""Every network the scripts can train, by name; and `Subspace`, which restricts one."""

import importlib
from collections.abc import Callable
from functools import partial

import torch
import torchvision
from torch import nn

from models import small
from models.attention import ResidualAttentionNetwork
from models.inception_v4 import InceptionResNetV2, InceptionV4
from models.mobilenet import MobileNet
from models.nasnet import NASNet
from models.preact_resnet import preact_resnet
from models.resnet_cifar import ResNet
from models.resnext import resnext
from models.se_resnet import se_resnet
from models.shufflenet import ShuffleNet
from models.squeezenet import SqueezeNet
from models.stochastic_depth import stochastic_depth_resnet
from models.subspace import Subspace
from models.wide_resnet import WideResNet
from models.xception import Xception

__all__ = ["ARCHITECTURES", "Subspace", "build", "listing"]


def family(name: str, network: Callable[..., nn.Module], *sizes: int) -> dict[str, Callable]:
    """Names and constructors of one family: name + size, and network(size)."""
    return {f"{name}{size}": partial(network, size) for size in sizes}


# For images of 32 pixels, as published.
SMALL = {
    **family("resnet", ResNet, 8, 20, 32, 44, 56, 110, 1202),
    **family("vgg", small.vgg, 11, 13, 16, 19),
    **family("densenet", small.densenet, 121, 161, 169, 201),
    "googlenet": small.googlenet,
    "inceptionv3": small.inception_v3,
    "inceptionv4": InceptionV4,
    "inceptionresnetv2": InceptionResNetV2,
    "xception": Xception,
    **family("resnet", small.resnet, 18, 34, 50, 101, 152),
    **family("preactresnet", preact_resnet, 18, 34, 50, 101, 152),
    **family("resnext", resnext, 50, 101, 152),
    "shufflenet": ShuffleNet,
    "shufflenetv2": small.shufflenet_v2,
    "squeezenet": SqueezeNet,
    "mobilenet": MobileNet,
    "mobilenetv2": small.mobilenet_v2,
    "nasnet": partial(NASNet, cells=4, reductions=2, channels=44),
    "attention56": partial(ResidualAttentionNetwork, (1, 1, 1)),
    "attention92": partial(ResidualAttentionNetwork, (1, 2, 3)),
    **family("seresnet", se_resnet, 18, 34, 50, 101, 152),
    "wideresnet": WideResNet,
    **family("stochasticdepth", stochastic_depth_resnet, 18, 34, 50, 101),
    "efficientnet": small.efficientnet,
}
LARGE = torchvision.models.list_models(module=torchvision.models)
ARCHITECTURES = (*SMALL, *(name for name in LARGE if name not in SMALL))
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
        network = SMALL[arch](num_classes=num_classes, **kwargs)
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

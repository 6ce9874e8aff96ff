"""The SE-ResNets of "Squeeze-and-Excitation Networks" (CVPR 2018, section 3.3), for 32 pixels.

Published with biases before BatchNorm, which change nothing, and a ReLU before the squeeze, which
the paper does not have: 0.1 % more parameters.
"""

from torch import nn
from torchvision.models import resnet
from torchvision.ops import SqueezeExcitation

from models.small import LAYERS, small_resnet


def excited(bn: nn.BatchNorm2d) -> nn.Sequential:
    """The last BatchNorm of a residual branch, and the excitation after it."""
    return nn.Sequential(bn, SqueezeExcitation(bn.num_features, bn.num_features // 16))


class BasicBlock(resnet.BasicBlock):
    """torchvision's, its channels weighted before the addition."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.bn2 = excited(self.bn2)


class Bottleneck(resnet.Bottleneck):
    """torchvision's, its channels weighted before the addition."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.bn3 = excited(self.bn3)


def se_resnet(depth: int, num_classes: int = 10) -> resnet.ResNet:
    """The network of `depth` layers (those of the excitations not counted), one of LAYERS."""
    return small_resnet(BasicBlock if depth < 50 else Bottleneck, LAYERS[depth], num_classes)

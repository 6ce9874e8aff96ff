"""The ResNeXts of "Aggregated Residual Transformations for Deep Neural Networks" (CVPR 2017).

The 32 × 4d template of table 1, for images of 32 pixels. As published, and unlike the paper's, the
first 1 × 1 convolution of a block is grouped, too, and ResNeXt-152 has stages of (3, 4, 36, 3).
"""

from torch import nn
from torchvision.models import resnet

from models.small import LAYERS, small_resnet


class Bottleneck(resnet.Bottleneck):
    """torchvision's, with as many groups in its first convolution as in its second."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        first, groups = self.conv1, self.conv2.groups
        self.conv1 = nn.Conv2d(first.in_channels, first.out_channels, 1, groups=groups, bias=False)


def resnext(depth: int, num_classes: int = 10) -> resnet.ResNet:
    """The network of `depth` (50, 101 or 152) layers and cardinality 32."""
    layers = (3, 4, 36, 3) if depth == 152 else LAYERS[depth]
    return small_resnet(Bottleneck, layers, num_classes, groups=32, width_per_group=4)

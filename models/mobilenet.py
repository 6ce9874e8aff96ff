"""The network of "MobileNets" (Howard et al., arXiv 1704.04861, table 1), for 32 pixels.

As published, the first convolution has no stride. Published with biases before BatchNorm, which
change nothing: 0.2 % more parameters.
"""

import torch
from torch import nn
from torchvision.ops.misc import Conv2dNormActivation

from models.small import initialize

# Channels and stride of each depthwise separable convolution. The last stride is 2 in the paper's
# table, where the sizes of the images say that 1 is meant.
LAYERS = (
    *((64, 1), (128, 2), (128, 1), (256, 2), (256, 1)),
    *((512, 2), (512, 1), (512, 1), (512, 1), (512, 1), (512, 1), (1024, 2), (1024, 1)),
)


class MobileNet(nn.Module):
    """LAYERS with `width` times their channels, between a convolution and a classifier."""

    def __init__(self, width: float = 1.0, num_classes: int = 10) -> None:
        super().__init__()
        channels_in = int(32 * width)
        layers = [Conv2dNormActivation(3, channels_in, 3)]
        for channels, stride in LAYERS:
            channels_out = int(channels * width)
            layers += [
                Conv2dNormActivation(channels_in, channels_in, 3, stride, groups=channels_in),
                Conv2dNormActivation(channels_in, channels_out, 1),
            ]
            channels_in = channels_out
        self.features = nn.Sequential(*layers)
        self.linear = nn.Linear(channels_in, num_classes)
        initialize(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.features(x).mean(dim=(2, 3)))

"""torchvision's networks for images of 32 pixels, with fewer halvings.

VGG (Simonyan and Zisserman, ICLR 2015), GoogLeNet (Szegedy et al., CVPR 2015), Inception-v3
(Szegedy et al., CVPR 2016), ResNet (He et al., CVPR 2016), DenseNet (Huang et al., CVPR 2017),
MobileNetV2 (Sandler et al., CVPR 2018), ShuffleNet V2 (Ma et al., ECCV 2018), EfficientNet (Tan and
Le, ICML 2019). Each is torchvision's but for its stem, its strides, and what its function says.
"""

from collections.abc import Sequence

import torchvision
from torch import nn
from torchvision.models.googlenet import Inception
from torchvision.models.inception import BasicConv2d
from torchvision.models.resnet import BasicBlock, Bottleneck

# Blocks in each of the four stages, by depth: table 1 of "Deep Residual Learning" (CVPR 2016).
LAYERS = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}
# torchvision's two Inception networks return auxiliary outputs in training unless told not to, and
# initialize by a slow library function unless told which.
INCEPTION = {"aux_logits": False, "init_weights": True}


def initialize(network: nn.Module) -> None:
    """He initialization of all convolutions, as in torchvision's residual networks."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def convolution(channels_in: int, channels: int) -> nn.Conv2d:
    """3 × 3, at every pixel."""
    layer = nn.Conv2d(channels_in, channels, 3, padding=1, bias=False)
    initialize(layer)
    return layer


def small_resnet(
    block: type[nn.Module], layers: Sequence[int], num_classes: int = 10, **kwargs
) -> torchvision.models.ResNet:
    """torchvision's ResNet of `block`s, `layers` of them in each stage."""
    network = torchvision.models.ResNet(block, list(layers), num_classes=num_classes, **kwargs)
    network.conv1 = convolution(3, 64)
    network.maxpool = nn.Identity()
    return network


def resnet(depth: int, num_classes: int = 10, **kwargs) -> torchvision.models.ResNet:
    """The network of `depth` layers, one of LAYERS."""
    block = BasicBlock if depth < 50 else Bottleneck
    return small_resnet(block, LAYERS[depth], num_classes, **kwargs)


def vgg(depth: int, num_classes: int = 10, **kwargs) -> torchvision.models.VGG:
    """With BatchNorm. Five poolings leave one pixel: the first linear layer has 512 inputs."""
    network = torchvision.models.get_model(f"vgg{depth}_bn", num_classes=num_classes, **kwargs)
    network.avgpool = nn.AdaptiveAvgPool2d(1)
    network.classifier[0] = nn.Linear(512, 4096)
    nn.init.normal_(network.classifier[0].weight, 0, 0.01)
    nn.init.zeros_(network.classifier[0].bias)
    return network


def densenet(depth: int, num_classes: int = 10, **kwargs) -> torchvision.models.DenseNet:
    """The first dense block, which begins with BatchNorm, follows the first convolution."""
    network = torchvision.models.get_model(f"densenet{depth}", num_classes=num_classes, **kwargs)
    network.features.conv0 = convolution(3, network.features.conv0.out_channels)
    for name in ("norm0", "relu0", "pool0"):
        delattr(network.features, name)
    return network


def mobilenet_v2(num_classes: int = 10, **kwargs) -> torchvision.models.MobileNetV2:
    """Down to 4 × 4. Published with biases before BatchNorm: 0.7 % more parameters."""
    # Expansion, channels, repeats, stride: table 2 of the paper, the last stride of 2 made 1.
    stages = [[1, 16, 1, 1], [6, 24, 2, 2], [6, 32, 3, 2], [6, 64, 4, 2]]
    stages += [[6, 96, 3, 1], [6, 160, 3, 1], [6, 320, 1, 1]]
    network = torchvision.models.mobilenet_v2(
        num_classes=num_classes, inverted_residual_setting=stages, **kwargs
    )
    network.features[0][0].stride = (1, 1)
    return network


def shufflenet_v2(num_classes: int = 10, **kwargs) -> torchvision.models.ShuffleNetV2:
    """Down to 4 × 4. Published with biases before BatchNorm: 0.4 % more parameters."""
    network = torchvision.models.shufflenet_v2_x1_0(num_classes=num_classes, **kwargs)
    network.conv1[0].stride = (1, 1)
    network.maxpool = nn.Identity()
    return network


def efficientnet(num_classes: int = 10, **kwargs) -> torchvision.models.EfficientNet:
    """B0 down to 4 × 4."""
    network = torchvision.models.efficientnet_b0(num_classes=num_classes, **kwargs)
    network.features[0][0].stride = (1, 1)
    _, depthwise, *_ = network.features[6][0].block
    depthwise[0].stride = (1, 1)
    return network


def googlenet(num_classes: int = 10, **kwargs) -> torchvision.models.GoogLeNet:
    """With two 3 × 3 convolutions where the paper has one of 5 × 5, and torchvision one of 3 × 3.

    Published with 3 × 3 for the second convolution of the stem, and biases before BatchNorm:
    0.7 % more parameters.
    """
    network = torchvision.models.googlenet(num_classes=num_classes, **INCEPTION | kwargs)
    network.conv1 = BasicConv2d(3, 64, kernel_size=3, padding=1)
    network.maxpool1 = nn.Identity()
    for module in network.children():
        if isinstance(module, Inception):
            channels = module.branch3[-1].conv.out_channels
            module.branch3.append(BasicConv2d(channels, channels, kernel_size=3, padding=1))
    return network


def inception_v3(num_classes: int = 10, **kwargs) -> torchvision.models.Inception3:
    """Down to 6 × 6. As published, the first blocks have 3 × 3 convolutions after a pooling."""
    network = torchvision.models.inception_v3(num_classes=num_classes, **INCEPTION | kwargs)
    network.Conv2d_1a_3x3.conv.stride = (1, 1)
    for layer in (network.Conv2d_1a_3x3, network.Conv2d_2a_3x3):
        layer.conv.padding = (1, 1)
    network.maxpool1 = network.maxpool2 = nn.Identity()
    for block in (network.Mixed_5b, network.Mixed_5c, network.Mixed_5d):
        pooled = block.branch_pool.conv
        block.branch_pool = BasicConv2d(
            pooled.in_channels, pooled.out_channels, kernel_size=3, padding=1
        )
    return network

"""The ResNets of "Deep Networks with Stochastic Depth" (ECCV 2016, section 3), for 32 pixels.

Published without the ReLU after the addition, which the paper has, with survival 1 for the first
block, where the paper has it for the input, and in the basic blocks with biases before BatchNorm,
which change nothing: 0.04 % more parameters.
"""

from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from torchvision.ops import StochasticDepth

from models.small import LAYERS, small_resnet


def stochastic_depth_resnet(
    depth: int, last_survival: float = 0.5, num_classes: int = 10
) -> ResNet:
    """The network of `depth` layers, one of LAYERS, that skips residual branches in training.

    A branch survives with a probability that falls linearly from 1 at the input to `last_survival`
    at the last block. torchvision's layer divides by it in training, where the paper multiplies
    in testing: the same in expectation, and the same function at the start, as the last BatchNorm
    of a branch starts with this probability as its scale. A skipped branch is computed and
    multiplied by zero, which needs no control flow; its parameters have gradients of zero.
    """
    block, last = (BasicBlock, "bn2") if depth < 50 else (Bottleneck, "bn3")
    network = small_resnet(block, LAYERS[depth], num_classes)
    blocks = [module for module in network.modules() if isinstance(module, block)]
    for number, module in enumerate(blocks, start=1):
        death = (1 - last_survival) * number / len(blocks)
        bn = getattr(module, last)
        nn.init.constant_(bn.weight, 1 - death)
        setattr(module, last, nn.Sequential(bn, StochasticDepth(death, mode="batch")))
    return network

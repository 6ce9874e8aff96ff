"""The networks of "Wide Residual Networks" (BMVC 2016, section 2, table 1).

Published with biases before BatchNorm, which change nothing: 0.03 % more parameters.
"""

from functools import partial

from models.preact_resnet import BasicBlock, PreActResNet


class WideResNet(PreActResNet):
    """WRN-depth-widening, depth = 6m + 4: three stages of m blocks, `dropout` in each of them.

    The defaults are as published; the paper drops 0.3 of the activations.
    """

    def __init__(
        self, depth: int = 40, widening: int = 10, dropout: float = 0.5, num_classes: int = 10
    ) -> None:
        super().__init__(
            partial(BasicBlock, dropout=dropout),
            layers=3 * [(depth - 4) // 6],
            widths=(16 * widening, 32 * widening, 64 * widening),
            stem=16,
            num_classes=num_classes,
        )

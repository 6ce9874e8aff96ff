"""What options may name, known without torch, which takes seconds to import."""

DATASETS = ("digits", "CIFAR10", "CIFAR100", "MNIST", "ImageFolder", "ImageNet")
BASES = ("pca", "schmidt", "random")


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
# torchvision's classifiers; one of a later version is torchvision.models:NAME.
LARGE = """
alexnet convnext_base convnext_large convnext_small convnext_tiny densenet121 densenet161
densenet169 densenet201 efficientnet_b0 efficientnet_b1 efficientnet_b2 efficientnet_b3
efficientnet_b4 efficientnet_b5 efficientnet_b6 efficientnet_b7 efficientnet_v2_l efficientnet_v2_m
efficientnet_v2_s googlenet inception_v3 maxvit_t mnasnet0_5 mnasnet0_75 mnasnet1_0 mnasnet1_3
mobilenet_v2 mobilenet_v3_large mobilenet_v3_small regnet_x_16gf regnet_x_1_6gf regnet_x_32gf
regnet_x_3_2gf regnet_x_400mf regnet_x_800mf regnet_x_8gf regnet_y_128gf regnet_y_16gf
regnet_y_1_6gf regnet_y_32gf regnet_y_3_2gf regnet_y_400mf regnet_y_800mf regnet_y_8gf resnet101
resnet152 resnet18 resnet34 resnet50 resnext101_32x8d resnext101_64x4d resnext50_32x4d
shufflenet_v2_x0_5 shufflenet_v2_x1_0 shufflenet_v2_x1_5 shufflenet_v2_x2_0 squeezenet1_0
squeezenet1_1 swin_b swin_s swin_t swin_v2_b swin_v2_s swin_v2_t vgg11 vgg11_bn vgg13 vgg13_bn vgg16
vgg16_bn vgg19 vgg19_bn vit_b_16 vit_b_32 vit_h_14 vit_l_16 vit_l_32 wide_resnet101_2
wide_resnet50_2
""".split()  # noqa: SIM905
ARCHITECTURES = (*SMALL, *(name for name in LARGE if name not in SMALL))

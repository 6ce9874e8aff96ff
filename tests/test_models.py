"""Networks. Oracles: published sizes, torchvision's own constructors."""

import pytest
import torch
import torchvision

import models

SIZES = {
    "resnet8": (75_290, 81_140),
    "resnet20": (269_722, 275_572),
    "resnet32": (464_154, 470_004),
    "resnet44": (658_586, 664_436),
    "resnet56": (853_018, 858_868),
    "resnet110": (1_727_962, 1_733_812),
}


def size(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("arch", SIZES)
def test_published_sizes(arch):
    assert tuple(size(models.build(arch, classes)) for classes in (10, 100)) == SIZES[arch]


def test_layers_are_what_the_name_says():
    with torch.device("meta"):
        for arch, depth in models.OWN.items():
            layers = [p for p in models.build(arch, 10).parameters() if p.dim() > 1]
            assert len(layers) == depth


@pytest.mark.parametrize("side", [8, 28, 32])
def test_forward_and_backward(side):
    model = models.build("resnet20", 10)
    output = model(torch.randn(4, 3, side, side))
    assert output.shape == (4, 10)
    output.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_shortcut_without_parameters_subsamples_and_pads_with_zeros():
    """Option A: with a zero residual branch the block is ReLU of the padded, subsampled image."""
    block = models.resnet_cifar.BasicBlock(16, 32, stride=2).eval()
    torch.nn.init.zeros_(block.bn2.weight)
    image = torch.rand(2, 16, 8, 8)
    output = block(image)
    torch.testing.assert_close(output[:, 8:24], image[:, :, ::2, ::2])
    assert not output[:, :8].any()
    assert not output[:, 24:].any()


def test_state_dict_names_are_those_of_public_checkpoints():
    names = list(models.build("resnet20", 10).state_dict())
    assert names[:2] == ["conv1.weight", "bn1.weight"]
    assert names[-2:] == ["linear.weight", "linear.bias"]
    parts = ("conv1", "bn1", "conv2", "bn2")
    blocks = [f"layer{group}.{block}" for group in (1, 2, 3) for block in (0, 1, 2)]
    own = {name.rpartition(".")[0] for name in names}
    assert own == {"conv1", "bn1", "linear"} | {f"{b}.{part}" for b in blocks for part in parts}


@pytest.mark.parametrize("arch", ["resnet18", "mobilenet_v2", "googlenet", "inception_v3"])
def test_torchvision_networks_by_name(arch):
    kwargs = {"googlenet": {"aux_logits": False}, "inception_v3": {"aux_logits": False}}.get(
        arch, {}
    )
    model = models.build(arch, 7)
    with torch.device("meta"):
        oracle = getattr(torchvision.models, arch)(num_classes=7, **kwargs)
    assert {k: v.shape for k, v in model.state_dict().items()} == {
        k: v.shape for k, v in oracle.state_dict().items()
    }
    output = model.train()(torch.randn(2, 3, 96, 96))
    assert output.shape == (2, 7), "no auxiliary outputs, in training either"


def test_architectures_are_classifiers():
    assert "resnet20" in models.ARCHITECTURES
    assert "vit_b_16" in models.ARCHITECTURES
    assert not {"fcn_resnet50", "raft_small", "r3d_18"} & set(models.ARCHITECTURES)
    with pytest.raises(ValueError, match="resnet21"):
        models.build("resnet21", 10)

"""Networks. Oracles: published sizes, torchvision's own constructors, what one network computes."""

import re
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import ROOT

import models
import train_pbfgs
import train_sgd
from models import SMALL

README = (ROOT / "models" / "README.md").read_text()

SIZES = {
    "resnet8": (75_290, 81_140),
    "resnet20": (269_722, 275_572),
    "resnet32": (464_154, 470_004),
    "resnet44": (658_586, 664_436),
    "resnet56": (853_018, 858_868),
    "resnet110": (1_727_962, 1_733_812),
}

# At 100 classes, as published. EXACT: those whose architecture is the papers' own.
EXACT = {
    "vgg11": 28_518_244,
    "vgg13": 28_703_140,
    "vgg16": 34_015_396,
    "vgg19": 39_327_652,
    "densenet121": 7_048_548,
    "densenet161": 26_681_188,
    "densenet169": 12_643_172,
    "densenet201": 18_277_220,
    "inceptionv3": 22_318_148,
    "inceptionv4": 41_296_516,
    "resnet18": 11_220_132,
    "resnet34": 21_328_292,
    "resnet50": 23_705_252,
    "resnet101": 42_697_380,
    "resnet152": 58_341_028,
    "resnext50": 14_788_772,
    "resnext101": 25_303_204,
    "resnext152": 33_343_652,
    "efficientnet": 4_135_648,
}
WITHIN_A_HUNDREDTH = {
    "googlenet": 6_402_564,
    "inceptionresnetv2": 65_442_072,
    "xception": 21_013_988,
    "preactresnet18": 11_222_244,
    "preactresnet34": 21_334_116,
    "preactresnet50": 23_720_164,
    "preactresnet101": 42_738_404,
    "preactresnet152": 58_405_092,
    "shufflenet": 1_012_108,
    "shufflenetv2": 1_360_896,
    "squeezenet": 781_156,
    "mobilenet": 3_315_428,
    "mobilenetv2": 2_369_380,
    "attention56": 55_703_780,
    "attention92": 105_445_860,
    "seresnet18": 11_314_012,
    "seresnet34": 21_498_000,
    "seresnet50": 26_262_804,
    "seresnet101": 47_527_764,
    "seresnet152": 65_045_780,
    "wideresnet": 55_914_020,
    "stochasticdepth18": 11_224_932,
    "stochasticdepth34": 21_336_804,
    "stochasticdepth50": 23_705_316,
    "stochasticdepth101": 42_697_444,
}
# Of the published parameters so many are in no forward pass: each cell has two projections of what
# came before it, and uses one or none.
OTHER = {"nasnet": 5_221_624 - 887_568}
SIZED = [*EXACT, *WITHIN_A_HUNDREDTH, *OTHER]
DEEPER = re.compile("(34|92|101|152|161|169|201|vgg13|vgg16|vgg19)$")  # more of the same blocks


def size(model):
    return sum(parameter.numel() for parameter in model.parameters())


def test_published_sizes():
    with torch.device("meta"):
        found = {a: tuple(size(models.build(a, classes)) for classes in (10, 100)) for a in SIZES}
    assert found == SIZES


def test_the_names_are_the_published_ones():
    own = {f"resnet{depth}" for depth in (8, 20, 32, 44, 56, 110, 1202)}
    assert SMALL.keys() == EXACT.keys() | WITHIN_A_HUNDREDTH.keys() | OTHER.keys() | own


@pytest.mark.slow
def test_sizes_of_the_networks_for_small_images():
    with torch.device("meta"):
        found = {arch: size(models.build(arch, 100)) for arch in SIZED}
    assert {arch: found[arch] for arch in EXACT} == EXACT
    assert found == pytest.approx(EXACT | WITHIN_A_HUNDREDTH | OTHER, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [arch for arch in SIZED if not DEEPER.search(arch)])
def test_a_subspace_of_every_kind_of_network(arch):
    """Forward and backward. Oracle: the chain rule, ∂L/∂z = P ∂L/∂θ; and θ is all in use."""
    torch.manual_seed(0)
    model = models.build(arch, 10)
    shapes = [parameter.shape for parameter in model.parameters()]
    subspace = models.Subspace(model, F.normalize(torch.linspace(-1, 1, size(model))[None]))
    subspace.origin.requires_grad_()
    output = subspace(torch.randn(2, 3, 32, 32))
    assert output.shape == (2, 10)
    output.square().sum().backward()
    gradient = subspace.origin.grad
    torch.testing.assert_close(subspace.coordinates.grad, subspace.basis @ gradient)
    used = [part.any() for part in gradient.split([shape.numel() for shape in shapes])]
    assert all(used) or arch.startswith("stochasticdepth"), "which skips some blocks"


def test_layers_are_what_the_name_says():
    with torch.device("meta"):
        for depth in (8, 20, 32, 44, 56, 110, 1202):
            layers = [p for p in models.build(f"resnet{depth}", 10).parameters() if p.dim() > 1]
            assert len(layers) == depth


def test_forward_and_backward():
    model = models.build("resnet20", 10)
    for side in (8, 28, 32):
        output = model(torch.randn(4, 3, side, side))
        assert output.shape == (4, 10)
        model.zero_grad()
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
    inception = {"aux_logits": False, "init_weights": False}
    kwargs = {"googlenet": inception, "inception_v3": inception}.get(arch, {})
    model = models.build(arch, 7, image_size=96)
    with torch.device("meta"):
        oracle = getattr(torchvision.models, arch)(num_classes=7, **kwargs)
    assert {k: v.shape for k, v in model.state_dict().items()} == {
        k: v.shape for k, v in oracle.state_dict().items()
    }
    output = model.train()(torch.randn(2, 3, 96, 96))
    assert output.shape == (2, 7), "no auxiliary outputs, in training either"


def test_a_name_follows_the_image_size():
    with torch.device("meta"):
        small, large = (models.build("resnet18", 10, image_size=side) for side in (64, 65))
    assert small.conv1.kernel_size == (3, 3)
    assert small.variant == "for small images"
    assert large.conv1.kernel_size == (7, 7)
    assert large.variant == "torchvision's"


@pytest.mark.slow
def test_the_list_of_networks(capsys):
    """Also in models/README.md."""
    with pytest.raises(SystemExit) as exit:
        train_sgd.main(["--arch", "list"])
    assert exit.value.code == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["resnet18", "11,173,962"] in lines
    assert ["vit_b_16", "86,567,656"] in lines
    assert {line[0] for line in lines if line} >= set(models.ARCHITECTURES)
    sizes = {line[0]: int(line[1].replace(",", "")) for line in lines if len(line) == 2}
    told = []
    for cell, millions in re.findall(r"^\| (`[a-z].*?) \| (.*?) \|", README, re.MULTILINE):
        names = re.findall(r"`(\w+)`", cell)
        told += names
        ends = [f"{end(sizes[name] for name in names) / 1e6:.2f}" for end in (min, max)]
        assert millions == " – ".join(dict.fromkeys(ends))
    assert sorted(told) == sorted(SMALL)


@pytest.mark.parametrize("arch", ["stochasticdepth18", "efficientnet"])
def test_a_search_sees_one_draw(arch):
    """All trials of a step skip the same blocks; so do its gradient, and not the next step."""
    torch.manual_seed(0)
    model = models.build(arch, 10)
    subspace = models.Subspace(model, torch.eye(1, size(model)))
    images, labels = torch.randn(8, 3, 32, 32), torch.arange(8)
    found = []

    class Looking(train_pbfgs.PBFGS):
        def step(self, evaluate, loss):
            found.append([float(value) for value in (loss, evaluate(), evaluate())])
            self.state[self.param_groups[0]["params"][0]] = {"s": torch.zeros(1)}
            return 0

    args = train_pbfgs.get_options().parse_args(["--batch-size", "8"])
    optimizer = Looking([subspace.coordinates])
    for _ in range(2):
        torch.manual_seed(len(found))  # as the epoch loop does before each batch
        run = SimpleNamespace(args=args, weight=1.0)
        batch = train_pbfgs.Batch(run, subspace, images, labels)
        _, _, start = batch.backward()
        optimizer.step(batch.evaluate, start)
    for losses in found:
        assert len(set(losses)) == 1
    assert found[0][0] != pytest.approx(found[1][0], rel=1e-3)


def test_architectures_are_classifiers():
    assert "resnet20" in models.ARCHITECTURES
    assert "vit_b_16" in models.ARCHITECTURES
    assert not {"fcn_resnet50", "raft_small", "r3d_18"} & set(models.ARCHITECTURES)
    with pytest.raises(ValueError, match="resnet21"):
        models.build("resnet21", 10)

"""Code for CUDA, checked without one: fake tensors refuse to mix devices, as real ones do."""

import argparse

import pytest
import torch
from test_data import random_split
from torch._subclasses import FakeTensorMode

import models
import utils
from train_pbfgs import PBFGS, make_step
from utils import DATASETS, Images


@pytest.fixture
def fake():
    """Inside, tensors have a shape and a device, cuda too, but no data."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        yield mode


def test_the_mode_catches_a_mixture(fake):
    with pytest.raises(Exception, match="device"):
        torch.ones(2, device="cuda") + torch.ones(2)


@pytest.mark.parametrize("seed", [None, 1])
def test_batches_are_on_the_device(fake, seed):
    images = Images(random_split(), DATASETS["CIFAR10"]._replace(padding=1), 7, "cuda", seed)
    for batch, labels in images.epoch(0):
        assert batch.device.type == labels.device.type == "cuda"
        assert batch.dtype == torch.float32


def test_pca_moves_its_blocks_to_the_device(fake):
    """pca as a whole decides on values (rank, signs), which fake tensors do not have."""
    samples = [{"w": torch.randn(3, 4)} for _ in range(5)]
    for columns, block in utils.centered_blocks(samples, ["w"], "cuda"):
        assert block.device.type == "cuda"
        assert block.dtype == torch.float64
        assert columns == slice(0, 12)
    utils.orthonormalize(torch.randn(3, 12, device="cuda"))


def test_a_training_step_stays_on_the_device(fake, monkeypatch):
    """Loss, BFGS update, residual; autograd's engine and the search's decision need a real one."""
    with torch.device("cuda"):
        model = models.build("resnet8", 10)
        basis = torch.randn(4, 75290)
        images, labels = torch.randn(6, 3, 8, 8), torch.zeros(6, dtype=torch.long)
    subspace = models.Subspace(model, basis)
    z, origin = subspace.coordinates, subspace.origin.requires_grad_()
    assert z.device.type == "cuda"

    def backward(loss):
        assert loss.device.type == "cuda"
        z.grad, origin.grad = torch.ones_like(z), torch.ones_like(origin)

    class NoSearch(PBFGS):
        @torch.no_grad()
        def step(self, evaluate, loss):
            assert evaluate().device.type == loss.device.type == "cuda"
            z.add_(z.grad)
            self.state[z]["s"] = z.grad
            return 0

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    args = argparse.Namespace(batch_size=4, half=False, weight_decay=0.1)
    residual = torch.optim.SGD([origin], 0.1, 0.9)
    loss, output, details = make_step(args, subspace, NoSearch([z]), residual)(images, labels)
    assert loss.device.type == output.device.type == "cuda"
    assert details["step_length"].device.type == "cuda"
    assert all(value.device.type == "cuda" for value in subspace.export().values())


def test_the_line_search_moves_only_on_the_device(fake):
    """The whole of PBFGS.step twice, with the comparison of losses answered for it."""
    z = torch.nn.Parameter(torch.zeros(4, device="cuda"))
    optimizer = PBFGS([z])
    answers = iter([False, True, True])

    class Loss:
        def __lt__(self, bound):
            assert bound.device.type == "cuda"
            return next(answers)

    z.grad = torch.ones(4, device="cuda")
    assert optimizer.step(Loss, torch.zeros((), device="cuda")) == 1
    assert optimizer.step(Loss, torch.zeros((), device="cuda")) == 0
    assert all(value.device.type == "cuda" for value in optimizer.state[z].values())

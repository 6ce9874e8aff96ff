"""Code for CUDA, checked without one: fake tensors refuse to mix devices, as real ones do."""

import argparse

import pytest
import torch
from test_data import random_split
from torch._subclasses import FakeTensorMode

import models
import utils
from train_pbfgs import PBFGS, make_step, update_inverse_hessian
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


def test_pca_moves_its_blocks_to_the_device(monkeypatch):
    """pca decides on values (rank, signs), so it runs for real, on the CPU; its blocks do not."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        samples = [{"w": torch.randn(3, 4)} for _ in range(5)]
        for columns, block in utils.column_blocks(samples, ["w"], "cuda"):
            assert block.device.type == "cuda"
            assert block.dtype == torch.float64
            assert columns == slice(0, 12)
        utils.orthonormalise(torch.randn(3, 12, device="cuda"))


@pytest.mark.parametrize("half", [False, True])
def test_a_training_step_stays_on_the_device(fake, half):
    """Gradient, BFGS update, residual; the line search looks at values and is taken out."""
    model = models.build("resnet8", 10).to("cuda")
    n = sum(parameter.numel() for parameter in model.parameters())
    subspace = models.Subspace(model, torch.randn(4, n, device="cuda"))
    z = subspace.coordinates
    assert z.device.type == "cuda"

    class NoSearch(PBFGS):
        @torch.no_grad()
        def step(self, evaluate, loss):
            assert evaluate().device.type == loss.device.type == "cuda"
            s = -update_inverse_hessian(torch.eye(4, device="cuda"), z.grad, z.grad) @ z.grad
            self.state[z]["s"] = s
            z.add_(s)
            return 0

    residual = torch.optim.SGD([subspace.origin.requires_grad_()], 0.1, 0.9)
    args = argparse.Namespace(batch_size=4, half=half, weight_decay=0.1)
    optimizer = NoSearch([z])
    step = make_step(args, subspace, optimizer, residual)
    images = torch.randn(6, 3, 8, 8, device="cuda")
    labels = torch.zeros(6, dtype=torch.long, device="cuda")
    loss, output, details = step(images, labels)
    assert loss.device.type == output.device.type == "cuda"
    assert details["step_length"].device.type == "cuda"
    assert all(value.device.type == "cuda" for value in subspace.export().values())


def test_the_line_search_moves_only_on_the_device(fake, monkeypatch):
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

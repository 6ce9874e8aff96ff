"""PBFGS. Oracles: the published functions' recorded figures, and what BFGS does on a quadratic."""

import argparse
import copy

import pytest
import torch
import torch.nn.functional as F
from golden import Golden, close
from torch import nn

from dldr.pbfgs import PBFGS, frozen_buffers, update_inverse_hessian
from models import Subspace
from train_pbfgs import Batch, step_outside

ARGS = argparse.Namespace(batch_size=16, half=False, weight_decay=0.0)


def take_step(subspace, optimizer, images, labels, residual=None, args=ARGS):
    """A step of train_pbfgs.main: its loss, logits and rejected trials."""
    subspace.zero_grad()
    run = argparse.Namespace(args=args, weight=1.0)
    batch = Batch(run, subspace, images, labels)
    loss, logits, start = batch.backward()
    trials = optimizer.step(batch.evaluate, start)
    if residual:
        step_outside(subspace, residual)
    return loss, logits, trials


def quadratic(k: int = 6) -> torch.Tensor:
    """A symmetric positive definite matrix."""
    torch.manual_seed(0)
    root = torch.randn(k, k, dtype=torch.float64)
    return root @ root.T + torch.eye(k, dtype=torch.float64)


@pytest.mark.parametrize("name", ["pbfgs", "pbfgs_residual"])
def test_step_equals_the_published_function(name, tiny):
    golden = Golden(name, tiny)
    subspace, z = golden.subspace, golden.subspace.coordinates
    optimizer, residual = PBFGS([z]), None
    if golden["alpha"]:
        origin = [subspace.origin.requires_grad_()]
        residual = torch.optim.SGD(origin, float(golden["alpha"]), float(golden["gamma"]))
    for i, (images, labels) in enumerate(golden.batches):
        loss, _, trials = take_step(subspace, optimizer, images, labels, residual)
        close(loss, golden["losses"][i])
        assert trials == golden["trials"][i]
        if not residual:
            close(z, golden["coordinates"][i])
    golden.check_end()


def test_update_satisfies_the_secant_equation():
    A, s = quadratic(), torch.arange(1.0, 7.0, dtype=torch.float64)
    y = A @ s
    B = update_inverse_hessian(torch.eye(6, dtype=torch.float64), s, y)
    torch.testing.assert_close(B @ y, s)
    torch.testing.assert_close(B, B.T)
    assert torch.linalg.eigvalsh(B).min() > 0


def test_update_is_skipped_without_curvature():
    B = quadratic()
    s = torch.zeros(6, dtype=torch.float64)
    s[0] = 1
    for curvature in (-1.0, 0.0, 1e-21):
        assert torch.equal(update_inverse_hessian(B, s, curvature * s), B)


def test_exact_search_ends_after_k_steps_with_the_inverse_hessian():
    """Nocedal and Wright, theorem 6.4: from B = I, on a quadratic ½ zᵀAz, in k steps."""
    A, B = quadratic(), torch.eye(6, dtype=torch.float64)
    z = torch.ones(6, dtype=torch.float64)
    for _ in range(6):
        g = A @ z
        d = -B @ g
        s = -(g @ d) / (d @ A @ d) * d
        z = z + s
        B = update_inverse_hessian(B, s, A @ s)
    assert z.norm() < 1e-9
    torch.testing.assert_close(B @ A, torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-8)


def test_optimizer_finds_the_minimum_of_a_quadratic():
    A, b = quadratic(), torch.arange(6.0, dtype=torch.float64)
    z = nn.Parameter(torch.zeros(6, dtype=torch.float64))
    optimizer = PBFGS([z])
    for _ in range(40):
        optimizer.zero_grad()
        loss = z @ A @ z / 2 - b @ z
        loss.backward()
        optimizer.step(lambda: z @ A @ z / 2 - b @ z, loss.detach())
    torch.testing.assert_close(z.detach(), torch.linalg.solve(A, b))


@pytest.mark.parametrize("curvature", [0.5, 2.0, 100.0, 1e4])
def test_rejected_trials_on_a_parabola(curvature):
    """From z = 1 on c z²/2 the step −ρᵐ c passes when ρᵐ < 2 (1 − σ) / c."""
    expected = 0
    while 0.4**expected >= 1.2 / curvature:
        expected += 1
    z = nn.Parameter(torch.ones(1, dtype=torch.float64))
    z.grad = torch.full((1,), curvature, dtype=torch.float64)
    rejected = PBFGS([z]).step(lambda: curvature * z[0] ** 2 / 2, torch.tensor(curvature / 2))
    assert rejected == expected
    assert z.item() == pytest.approx(1 - 0.4**expected * curvature)


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), 1e9])
def test_when_no_trial_passes_the_last_shrunk_step_is_taken(loss):
    z = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    z.grad = torch.ones(3, dtype=torch.float64)
    trials = []
    assert PBFGS([z]).step(lambda: trials.append(1) or torch.tensor(loss), torch.tensor(0.0)) == 20
    assert len(trials) == 20
    torch.testing.assert_close(z.detach(), torch.full((3,), -(0.4**20), dtype=torch.float64))


def test_only_one_vector():
    for parameters in ([torch.zeros(2, 2)], [torch.zeros(2), torch.zeros(2)]):
        with pytest.raises(ValueError, match="one vector"):
            PBFGS([nn.Parameter(parameter) for parameter in parameters])


def test_a_state_dict_resumes_where_it_was(tiny):
    ends = []
    for restart_after in (None, 7):
        golden = Golden("pbfgs", copy.deepcopy(tiny))
        optimizer = PBFGS([golden.subspace.coordinates])
        for i, (images, labels) in enumerate(golden.batches):
            if i == restart_after:
                saved = optimizer.state_dict()
                optimizer = PBFGS([golden.subspace.coordinates])
                optimizer.load_state_dict(saved)
            take_step(golden.subspace, optimizer, images, labels)
        ends.append(golden.subspace.vector().detach())
    assert torch.equal(*ends)


def test_trials_leave_the_running_statistics_alone(tiny, batch):
    images, _ = batch
    tiny.train()
    before = {name: buffer.clone() for name, buffer in tiny.named_buffers()}
    with frozen_buffers(tiny):
        frozen = tiny(images)
    for name, buffer in tiny.named_buffers():
        assert torch.equal(buffer, before[name])
    assert torch.equal(frozen, tiny(images)), "a trial normalizes as training does, by the batch"
    assert tiny[1].num_batches_tracked == before["1.num_batches_tracked"] + 1


def test_trials_leave_every_other_buffer_as_one_pass_does(batch):
    """Not only BatchNorm has buffers: InstanceNorm's statistics, spectral norm's vectors."""
    images, _ = batch
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 4, 3)),
        nn.InstanceNorm2d(4, track_running_stats=True),
        nn.Flatten(),
        nn.Linear(144, 10),
    ).double()
    oracle = copy.deepcopy(model)
    for network, trials in ((model, 3), (oracle, 0)):
        network.train()(images)
        with frozen_buffers(network):
            for _ in range(trials):
                network(images)
    assert len(list(model.buffers())) == 5
    for buffer, expected in zip(model.buffers(), oracle.buffers(), strict=True):
        assert torch.equal(buffer, expected)


def test_accumulated_batches_make_one_step(batch, orthonormal):
    """Without BatchNorm, two batches of 8 are the batch of 16: gradient, trials and result."""
    images, labels = batch
    torch.manual_seed(3)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 10)).double()
    ends = []
    for size in (16, 8, 11):
        subspace = Subspace(copy.deepcopy(model), orthonormal(5, 1930)).train()
        args = argparse.Namespace(batch_size=size, half=False, weight_decay=0.01, optimizer=None)
        optimizer = PBFGS([subspace.coordinates])
        results = [take_step(subspace, optimizer, images, labels, args=args) for _ in range(5)]
        assert results[-1][1].shape == (16, 10)
        ends.append((subspace.coordinates.detach(), [trials for *_, trials in results]))
    for z, trials in ends[1:]:
        torch.testing.assert_close(z, ends[0][0])
        assert trials == ends[0][1]


def test_all_trials_of_a_step_see_the_same_dropout(batch, orthonormal):
    images, labels = batch
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(192, 10)).double()
    subspace = Subspace(model, orthonormal(5, 1930)).train()

    class Still(PBFGS):
        def step(self, evaluate, loss):
            self.losses = torch.stack([loss, evaluate().detach(), evaluate().detach()])
            self.state[subspace.coordinates]["s"] = subspace.coordinates
            return 0

    optimizer = Still([subspace.coordinates])
    take_step(subspace, optimizer, images, labels)
    first = optimizer.losses
    assert (first == first[0]).all()
    torch.manual_seed(1)
    take_step(subspace, optimizer, images, labels)
    assert optimizer.losses[0] != first[0], "the next step draws again"


def test_residual_step_is_sgd_outside_the_subspace(tiny, batch, orthonormal):
    """θ moves by −α m, m ← γ m + (I − PᵀP) ∇L, on top of the step in the subspace."""
    images, labels = batch
    basis = orthonormal(5, 166)
    plain, subspace = copy.deepcopy(tiny).train(), Subspace(tiny, basis).train()
    start = subspace.origin.detach().clone()
    residual = torch.optim.SGD([subspace.origin.requires_grad_()], 0.1, 0.9)
    optimizer = PBFGS([subspace.coordinates])
    momentum = torch.zeros(166, dtype=torch.float64)
    expected = start
    for _ in range(3):
        theta = subspace.vector().detach().requires_grad_()
        parts = subspace._named(theta)
        output = torch.func.functional_call(plain, parts, (images,))
        (full,) = torch.autograd.grad(F.cross_entropy(output, labels), theta)
        momentum = 0.9 * momentum + full - full @ basis.T @ basis
        expected = expected - 0.1 * momentum
        take_step(subspace, optimizer, images, labels, residual)
    torch.testing.assert_close(subspace.origin.detach(), expected)

"""models.Subspace. Oracles: autograd in the full space, the formula, torch.optim.SGD on θ."""

import copy

import pytest
import torch
import torch.nn.functional as F
from golden import Golden, close

import dldr.subspace as subspace_module
import training.losses
import utils
from models import Subspace, build


def test_gradient_is_the_projected_gradient(tiny, batch, orthonormal):
    images, labels = batch
    F.cross_entropy(tiny(images), labels).backward()
    full = torch.cat([p.grad.reshape(-1) for p in tiny.parameters()])
    basis = orthonormal(5, len(full))
    subspace = Subspace(copy.deepcopy(tiny), basis)
    F.cross_entropy(subspace(images), labels).backward()
    torch.testing.assert_close(subspace.coordinates.grad, basis @ full)


def test_origin_gathers_the_full_gradient_when_asked(tiny, batch, orthonormal):
    images, labels = batch
    F.cross_entropy(tiny(images), labels).backward()
    full = torch.cat([p.grad.reshape(-1) for p in tiny.parameters()])
    subspace = Subspace(tiny, orthonormal(5, len(full)))
    subspace.origin.requires_grad_()
    F.cross_entropy(subspace(images), labels).backward()
    torch.testing.assert_close(subspace.origin.grad, full)


def test_export_is_the_plain_network_at_theta(tiny, batch, orthonormal):
    images, _ = batch
    basis = orthonormal(5, utils.flatten(tiny).numel())
    theta = utils.flatten(tiny) + torch.arange(5.0, dtype=torch.float64) @ basis
    subspace = Subspace(copy.deepcopy(tiny), basis)
    subspace.coordinates.data = torch.arange(5.0, dtype=torch.float64)
    subspace.train()(images)  # moves the running statistics: they have to be exported too
    exported = subspace.export()
    assert list(exported) == list(tiny.state_dict())
    tiny.load_state_dict(exported)
    torch.testing.assert_close(utils.flatten(tiny), theta)
    torch.testing.assert_close(tiny.eval()(images), subspace.eval()(images))
    assert tiny[1].num_batches_tracked == 1
    exported["0.weight"].zero_()
    assert subspace.export()["0.weight"].any(), "the export is a copy"


def test_a_subspace_is_converted_as_any_module_is(orthonormal):
    """Oracle: the network converted first."""
    torch.manual_seed(0)
    network, basis = torch.nn.Linear(4, 3), orthonormal(2, 15)
    images, plain = torch.randn(5, 4, dtype=torch.float64), copy.deepcopy(network).double()
    gradients = []
    for subspace in (Subspace(network, basis.float()).double(), Subspace(plain, basis)):
        subspace(images).square().sum().backward()
        assert subspace.export()["weight"].dtype == torch.float64
        gradients.append(subspace.coordinates.grad)
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-6)


def test_export_has_both_names_of_tied_parameters(orthonormal):
    """Oracle: the network that the state dict is loaded into, tied or not."""

    def build(tied):
        network = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)).double()
        if tied:
            network[1].weight = network[0].weight
        return network

    network = build(tied=True)
    subspace = Subspace(network, orthonormal(3, utils.flatten(network).numel()))
    subspace.coordinates.data.fill_(5)
    inputs = torch.randn(2, 4, dtype=torch.float64)
    for tied in (True, False):
        plain = build(tied)
        plain.load_state_dict(subspace.export())
        torch.testing.assert_close(plain(inputs), subspace(inputs))


def test_only_the_coordinates_train(tiny, orthonormal):
    subspace = Subspace(tiny, orthonormal(5, 166))
    trainable = [name for name, p in subspace.named_parameters() if p.requires_grad]
    assert trainable == ["coordinates"]
    assert subspace.coordinates.shape == (5,)
    assert "basis" not in subspace.state_dict()
    assert "basis" not in dict(subspace.named_buffers())


def test_the_basis_moves_along(tiny, orthonormal):
    subspace = Subspace(tiny, orthonormal(5, 166)).to("meta", torch.float32)
    assert subspace.basis.device.type == "meta"
    assert subspace.basis.dtype == torch.float32


def test_autocast_leaves_theta_in_float32(orthonormal):
    model = build("resnet8", 10)
    subspace = Subspace(model, orthonormal(3, 75290))
    subspace.coordinates.data.normal_()
    with torch.autocast("cpu", torch.bfloat16):
        inside = subspace.vector()
    assert torch.equal(inside, subspace.vector())
    assert inside.dtype == torch.float32


@pytest.mark.parametrize("shape", [(5, 165), (166,), (5, 166, 1)])
def test_a_basis_of_another_shape_is_refused(tiny, shape):
    with pytest.raises(ValueError, match="n = 166"):
        Subspace(tiny, torch.zeros(shape))


def test_psgd_is_projected_sgd_in_the_full_space(tiny, batch, orthonormal):
    """θ ← θ − lr · (momentum over Pᵀ P (∇L + λθ)), by torch.optim.SGD on all parameters."""
    images, labels = batch
    basis = orthonormal(5, 166)
    subspace = Subspace(copy.deepcopy(tiny), basis)
    args = type("args", (), {"weight_decay": 0.1})
    projected_sgd = torch.optim.SGD([subspace.coordinates], 0.5, 0.9)
    full = torch.optim.SGD(tiny.parameters(), 0.5, 0.9)
    for _ in range(6):
        projected_sgd.zero_grad()
        (
            F.cross_entropy(subspace(images), labels) + training.losses.penalty(args, subspace)
        ).backward()
        projected_sgd.step()

        full.zero_grad()
        F.cross_entropy(tiny(images), labels).backward()
        gradient = torch.cat([p.grad.reshape(-1) for p in tiny.parameters()])
        gradient += 0.1 * utils.flatten(tiny)
        projected = utils.unflatten(gradient @ basis.T @ basis, tiny)
        for name, parameter in tiny.named_parameters():
            parameter.grad = projected[name]
        full.step()
    torch.testing.assert_close(subspace.vector().detach(), utils.flatten(tiny))


def test_psgd_equals_the_published_function(tiny):
    golden = Golden("psgd", tiny)
    optimizer = torch.optim.SGD([golden.subspace.coordinates], float(golden["lr"]), 0.9)
    for i, (images, labels) in enumerate(golden.batches):
        optimizer.zero_grad()
        loss = F.cross_entropy(golden.subspace(images), labels)
        close(loss, golden["losses"][i])
        loss.backward()
        optimizer.step()
        close(golden.subspace.coordinates, golden["coordinates"][i])
    golden.check_end()


def test_flatten_and_unflatten_agree_with_torch(tiny):
    vector = utils.flatten(tiny)
    assert torch.equal(vector, torch.nn.utils.parameters_to_vector(tiny.parameters()))
    named = utils.unflatten(vector, tiny)
    assert list(named) == [name for name, _ in tiny.named_parameters()]
    for name, parameter in tiny.named_parameters():
        assert torch.equal(named[name], parameter)
    vector.zero_()
    assert named["0.weight"].any(), "unflatten copies"
    assert utils.flatten(tiny).any(), "flatten copies"


def test_flatten_reads_channels_last(tiny):
    plain = utils.flatten(tiny)
    assert torch.equal(utils.flatten(tiny.to(memory_format=torch.channels_last)), plain)


def test_unflatten_refuses_another_length(tiny):
    with pytest.raises(ValueError, match="166"):
        utils.unflatten(torch.zeros(165), tiny)


@pytest.mark.parametrize("block", [5, 60, 2**22])
def test_a_bfloat16_basis_is_its_float32_copy_in_less_memory(
    block, tiny, batch, orthonormal, monkeypatch
):
    """Oracle: the same numbers as a basis of the model's own type."""
    monkeypatch.setattr(subspace_module, "BLOCK", block)  # one column, 12, and all at a time
    images, labels = batch
    rounded = orthonormal(5, utils.flatten(tiny).numel()).bfloat16()
    outputs, gradients = [], []
    for basis in (rounded, rounded.double()):
        subspace = Subspace(copy.deepcopy(tiny), basis)
        subspace.coordinates.data = torch.arange(5.0, dtype=torch.float64)
        output = subspace(images)
        F.cross_entropy(output, labels).backward()
        outputs.append(output)
        gradients.append(subspace.coordinates.grad)
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(*gradients)


def test_a_bfloat16_basis_stays_one(tiny, orthonormal):
    basis = orthonormal(5, utils.flatten(tiny).numel()).bfloat16()
    subspace = Subspace(tiny, basis)
    assert subspace.basis is basis
    subspace.float()
    assert subspace.basis.dtype == torch.bfloat16
    assert subspace.vector().dtype == subspace.coordinates.dtype == torch.float32

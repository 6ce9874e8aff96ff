"""Adversarial training in the subspace of its own first epochs, on scikit-learn's digits.

    python -m examples.adversarial

After Li et al., "Subspace Adversarial Training", CVPR 2022: trained on images perturbed by one step
(FGSM, random start), a network can lose its robustness against many steps (PGD) from one epoch to
the next. In the span of the first epochs it did not.

On digits nothing breaks down. Accuracy under PGD after 40 epochs at 16/255, seeds 1 and 2: 94.4 and
94.4 % in all n = 19,338 parameters, 94.7 and 94.2 % in the ten directions of the first ten epochs;
at 64/255, seed 1, 53.9 and 54.7 %, at 96/255 21.7 and 20.6 %. So the subspace is as robust, and
here no more so. (torch 2.14, one core of a Xeon)
"""

import copy

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import dldr


def load_data() -> list[Tensor]:
    """Training images (1437, 1, 8, 8) in [0, 1] and labels, test images and labels."""
    images, labels = (torch.from_numpy(part) for part in load_digits(return_X_y=True))
    order = torch.randperm(len(labels))
    images, labels = images[order].float().view(-1, 1, 8, 8) / 16, labels[order]
    return [images[:1437], labels[:1437], images[1437:], labels[1437:]]


def make_network() -> nn.Module:
    """Three convolutions; n = 19,338."""
    layers: list[nn.Module] = []
    for channels, outputs, stride in ((1, 16, 1), (16, 32, 2), (32, 32, 1)):
        layers.append(nn.Conv2d(channels, outputs, 3, stride, padding=1))
        layers += [nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 10))


def attack(
    module: nn.Module, images: Tensor, labels: Tensor, radius: float, steps: int, size: float
) -> Tensor:
    """Images within `radius` in every pixel, after ascending the loss from a random start."""
    change = radius * (2 * torch.rand_like(images) - 1)
    for _ in range(steps):
        change.requires_grad_()
        loss = cross_entropy(module((images + change).clamp(0, 1)), labels)
        (gradient,) = torch.autograd.grad(loss, change)
        change = (change.detach() + size * gradient.sign()).clamp(-radius, radius)
    return (images + change).clamp(0, 1)


def train_epoch(module: nn.Module, optimizer: torch.optim.Optimizer, data: list, radius: float):
    """Train on images perturbed by FGSM with a random start, Wong et al., ICLR 2020."""
    module.train()
    for batch in torch.randperm(len(data[0])).split(100):
        perturbed = attack(module, data[0][batch], data[1][batch], radius, 1, 1.25 * radius)
        optimizer.zero_grad()
        cross_entropy(module(perturbed), data[1][batch]).backward()
        optimizer.step()


def accuracies(module: nn.Module, data: list[Tensor], radius: float) -> list[float]:
    """Test accuracy in percent: as they are, after FGSM, after PGD of ten steps."""
    images, labels = data[2:]
    module.eval()
    fgsm = attack(module, images, labels, radius, 1, 1.25 * radius)
    pgd = attack(module, images, labels, radius, 10, radius / 4)
    with torch.no_grad():
        right = [module(x).argmax(1) == labels for x in (images, fgsm, pgd)]
    return [100 * part.double().mean().item() for part in right]


def main(radius: float = 16 / 255, epochs: int = 40, first: int = 10, seed: int = 1) -> dict:
    """Print accuracies, also of the span of the `first` epochs; returns the last ones."""
    torch.manual_seed(seed)
    data, network, results = load_data(), make_network(), {}
    start, snapshots = copy.deepcopy(network), [dldr.flatten(network)]
    print(f"radius {255 * radius:.0f}/255, seed {seed}: test accuracy clean, FGSM, PGD-10")

    def train(name: str, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for epoch in range(1, epochs + 1):
            train_epoch(module, optimizer, data, radius)
            if module is network and epoch <= first:
                snapshots.append(dldr.flatten(network))
            if epoch % max(1, epochs // 4) == 0:
                results[name] = accuracies(module, data, radius)
                shown = " ".join(f"{value:6.1f}" for value in results[name])
                print(f"{name:<12} epoch {epoch:3d} {shown}", flush=True)

    train("n parameters", network, torch.optim.SGD(network.parameters(), 0.05, 0.9))
    basis, _ = dldr.pca(snapshots, n_components=first)
    subspace = dldr.Subspace(start, basis)
    train(f"{first} in span", subspace, torch.optim.SGD([subspace.coordinates], 0.1, 0.9))
    return results


if __name__ == "__main__":
    main()

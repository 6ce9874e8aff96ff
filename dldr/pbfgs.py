"""P-BFGS: a quasi-Newton method with a line search, on a few variables (Li et al., §4)."""

import contextlib
import random
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dldr.distributed import broadcast
from dldr.parameters import overlaps


class PBFGS(torch.optim.Optimizer):
    """BFGS on one small vector z (k,), with mini-batch gradients and a backtracking line search.

    B, the estimate of the inverse Hessian (k, k), starts as the identity. A step is along d = −B g:
    s = d, ρd, ρ²d, … is tried until L(z + s) < L(z) + σ gᵀs (Armijo), both losses on the
    mini-batch of g. Where `max_trials` are rejected, the next s is taken without a trial. With
    torch.distributed's default process group, all processes take the step of rank 0.

        def evaluate():  # the loss on the mini-batch of g, at the current z
            with torch.no_grad(), frozen_buffers(subspace):
                return loss_of(subspace(images), labels)

        optimizer.zero_grad()
        loss_of(subspace(images), labels).backward()
        optimizer.step(evaluate)

    Raises ValueError unless `params` is one vector.
    """

    def __init__(
        self, params: Iterable[Tensor], rho: float = 0.4, sigma: float = 0.4, max_trials: int = 20
    ) -> None:
        super().__init__(params, {"rho": rho, "sigma": sigma, "max_trials": max_trials})
        if [p.dim() for group in self.param_groups for p in group["params"]] != [1]:
            raise ValueError("PBFGS optimizes one vector")

    @torch.no_grad()
    def step(self, evaluate: Callable[[], Tensor], loss: Tensor | None = None) -> int:
        """Move z, whose .grad is g; returns the number of rejected trials.

        `evaluate()` returns the mini-batch loss at the current z. All its calls draw the same
        random numbers, as for dropout. `loss` is what it returns at the z of g, where
        that is known already: with dropout it is not, unless its draws were those of `evaluate`.
        Each trial is a host sync: what comes next depends on it.
        """
        group = self.param_groups[0]
        (z,) = group["params"]
        g = z.grad.clone()
        state = self.state[z]
        if state:
            state["B"] = update_inverse_hessian(state["B"], state["s"], g - state["g"])
        else:
            state["B"] = torch.eye(len(z), dtype=z.dtype, device=z.device)
        start = z.clone()
        s = -state["B"] @ g
        # Processors round products differently: all processes take rank 0's step and slope, and
        # with losses that are means over the processes decide alike in every trial.
        s, slope = broadcast(torch.cat([s, (g @ s)[None]])).split([len(z), 1])
        slope, rejected = slope[0], 0
        evaluate = with_same_draws(evaluate, z.device)
        loss = evaluate() if loss is None else loss
        torch.add(start, s, out=z)
        while rejected < group["max_trials"] and not evaluate() < loss + group["sigma"] * slope:
            rejected += 1
            s, slope = group["rho"] * s, group["rho"] * slope
            torch.add(start, s, out=z)
        state.update(g=g, s=s)
        return rejected


def with_same_draws(function: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    """The function, which draws the same random numbers each time that it is called.

    They are torch's, and those of random and numpy, which layers that are dropped may draw.
    """
    setters = [torch.set_rng_state, random.setstate, np.random.set_state]
    states = [torch.get_rng_state(), random.getstate(), np.random.get_state()]
    if device.type != "cpu":
        generator = torch.get_device_module(device)
        # That of z's device, not of the current one; Apple has one device, which is not named.
        own = {} if device.type == "mps" else {"device": device}
        setters.append(partial(generator.set_rng_state, **own))
        states.append(generator.get_rng_state(**own))

    def repeated() -> Tensor:
        for put, state in zip(setters, states, strict=True):
            put(state)
        return function()

    return repeated


def update_inverse_hessian(B: Tensor, s: Tensor, y: Tensor) -> Tensor:
    """The BFGS update of B (k, k) by a step s (k,) that changed the gradient by y (k,).

    Nocedal and Wright, Numerical Optimization (2006), eq. 6.17. Unless yᵀs is above 1e-20,
    which keeps B positive definite, B is returned as it is; that is decided on the device.
    """
    curvature = y @ s
    V = torch.eye(len(s), dtype=s.dtype, device=s.device) - torch.outer(y, s) / curvature
    updated = V.T @ B @ V + torch.outer(s, s) / curvature
    return torch.where(curvature > 1e-20, updated, B)


@contextlib.contextmanager
def frozen_buffers(model: nn.Module) -> Iterator[None]:
    """Inside, forward passes leave no trace in the model.

    BatchNorm is told not to track, and in training mode uses the statistics of the batch. The
    buffers of other layers, and frozen parameters such as those of an averaged teacher, are copied
    and put back, also where the layer set new ones. What a layer keeps outside of tensors, such as
    a Python counter, is not.
    """
    tracking = {
        layer: layer.track_running_stats
        for layer in model.modules()
        if isinstance(layer, _BatchNorm)
    }
    kept = [
        (tensors, name, tensor, None if tensor is None else tensor.clone())
        for module in model.modules()
        for tensors in (module._buffers, module._parameters)
        for name, tensor in tensors.items()
        if is_at_risk(module, name, tensor)
    ]
    try:
        for layer in tracking:
            layer.track_running_stats = False
        yield
    finally:
        for layer, tracks in tracking.items():
            layer.track_running_stats = tracks
        with torch.no_grad():
            for tensors, name, tensor, value in kept:
                # Nothing can have written to an expanded view.
                if value is not None and not overlaps(tensor):
                    tensor.copy_(value)
                tensors[name] = tensor


def is_at_risk(module: nn.Module, name: str, tensor: Tensor | None) -> bool:
    """Whether a forward pass could change this parameter or buffer of a module."""
    if name in module._buffers:  # None is one that the first batch sets
        return not isinstance(module, _BatchNorm)
    if tensor is None or tensor.requires_grad:
        return False
    return name not in vars(module)  # a `Subspace` hides its parameters, nothing reaches them

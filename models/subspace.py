"""A network restricted to an affine subspace of its parameters (Li et al., TPAMI 2022)."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.func import functional_call

BLOCK = 2**22  # numbers of a bfloat16 basis converted at a time: they stay in the cache


class Combination(torch.autograd.Function):
    """zᵀP (n,) for z (k,) and P (k, n) of a shorter type, converted block by block."""

    @staticmethod
    def forward(ctx, z: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
        ctx.blocks = basis.split(max(1, BLOCK // len(basis)), dim=1)
        return torch.cat([z @ block.to(z.dtype) for block in ctx.blocks])

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        parts = gradient.split([block.shape[1] for block in ctx.blocks])
        pairs = zip(ctx.blocks, parts, strict=True)
        return sum(block.to(part.dtype) @ part for block, part in pairs), None


class Gathering(torch.autograd.Function):
    """The whole vector (n,), of which each process has n / processes numbers, the last one fewer.

    The gradient is the sum of all processes'. Forward and backward send n numbers each: what a
    sharded basis costs.
    """

    @staticmethod
    def forward(ctx, part: torch.Tensor, n: int) -> torch.Tensor:
        width = -(-n // dist.get_world_size())
        ctx.columns = slice(dist.get_rank() * width, dist.get_rank() * width + len(part))
        padded = torch.zeros(width, dtype=part.dtype, device=part.device)
        padded[: len(part)] = part
        parts = [torch.empty_like(padded) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, padded)
        return torch.cat(parts)[:n]

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        summed = gradient.clone()
        dist.all_reduce(summed)
        return summed[ctx.columns], None


class Subspace(nn.Module):
    """A network with parameters θ(z) = θ_0 + Pᵀ z, of which only the k coordinates z are trained.

    θ_0 is what `model` holds when the subspace is made: its n parameters with `requires_grad`, or
    of a frozen model all that are real numbers, in `named_parameters` order. P is `basis` (k, n).
    Autograd gives ∂L/∂z = P ∂L/∂θ, so every optimizer of torch.optim trains z. The model's
    parameters are frozen; its buffers (BatchNorm statistics) stay in the model, and forwards in
    training mode update them.

    Attributes: `coordinates` (k,) is z, the one trainable parameter; `origin` (n,) is θ_0, frozen
    (with `requires_grad_` it gathers the full gradient ∂L/∂θ); `basis` (k, n) is no buffer,
    since DistributedDataParallel sends the buffers out at every step. z and θ(z) are at least
    float32, also where P or the network are bfloat16. With `shard` each process of
    torch.distributed passes its own columns, as `utils.pca` returns them.

    Raises ValueError where the basis does not fit the model.
    """

    def __init__(self, model: nn.Module, basis: torch.Tensor, shard: bool = False) -> None:
        super().__init__()
        real = {name: p for name, p in model.named_parameters() if p.is_floating_point()}
        parameters = {name: p for name, p in real.items() if p.requires_grad} or real
        self._parts = [(name, p.shape, p.dtype) for name, p in parameters.items()]
        self._shard = shard and dist.is_initialized()
        origin = torch.cat([parameter.detach().reshape(-1) for parameter in parameters.values()])
        if basis.dim() != 2 or (not self._shard and basis.shape[1] != len(origin)):
            raise ValueError(
                f"the basis is {tuple(basis.shape)}, not (k, n) with n = {len(origin)}"
            )
        origin = origin.to(torch.promote_types(origin.dtype, torch.float32))
        self.model = model.requires_grad_(False)
        self.origin = nn.Parameter(origin, requires_grad=False)
        kept = torch.bfloat16 if basis.dtype == torch.bfloat16 else origin.dtype
        self.basis = basis.to(origin.device, kept)
        self.coordinates = nn.Parameter(origin.new_zeros(len(basis)))

    def vector(self) -> torch.Tensor:
        """θ(z), (n,), differentiable in z."""
        # Autocast would make this product bfloat16 and with it round θ to eight bits.
        with torch.autocast(self.origin.device.type, enabled=False):
            return self.origin + self.combine(self.coordinates)

    def combine(self, z: torch.Tensor) -> torch.Tensor:
        """Pᵀz, (n,): the rows of P with the weights z (k,)."""
        same = self.basis.dtype == z.dtype
        combined = z @ self.basis if same else Combination.apply(z, self.basis)
        return Gathering.apply(combined, len(self.origin)) if self._shard else combined

    def _named(self, vector: torch.Tensor) -> dict[str, torch.Tensor]:
        # One split, not a slice a parameter: its backward is one concatenation.
        parts = vector.split([shape.numel() for _, shape, _ in self._parts])
        pairs = zip(self._parts, parts, strict=True)
        return {name: part.view(shape).to(dtype) for (name, shape, dtype), part in pairs}

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """The network's output at θ(z)."""
        return functional_call(self.model, self._named(self.vector()), inputs, options)

    @torch.no_grad()
    def export(self) -> dict[str, torch.Tensor]:
        """The state dict of the plain model at θ(z), a copy."""
        own = dict(self.model.named_parameters())
        of = {own[name]: value for name, value in self._named(self.vector()).items()}
        state = self.model.state_dict(keep_vars=True)  # the parameters, some under two names
        return {name: of.get(value, value).detach().clone() for name, value in state.items()}

    def _apply(
        self, function: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True
    ) -> nn.Module:
        # What .to(device), .double() and the like call: P has to go along though it is no buffer.
        super()._apply(function, recurse)
        own = self.model.get_parameter
        self._parts = [(name, shape, own(name).dtype) for name, shape, _ in self._parts]
        moved = function(self.basis)
        self.basis = moved.bfloat16() if self.basis.dtype == torch.bfloat16 else moved
        return self

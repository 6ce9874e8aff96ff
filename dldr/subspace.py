"""A network restricted to an affine subspace of its parameters (Li et al., TPAMI 2022, §3)."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from dldr.parameters import trainable

BLOCK = 2**22  # numbers of a bfloat16 basis converted at a time: they stay in the cache


class Subspace(nn.Module):
    """A network with parameters θ(z) = θ_0 + Pᵀ z, of which only the k coordinates z are trained.

    θ_0 is what `model` holds when the subspace is made: its n parameters with `requires_grad`, or
    of a frozen model all that are real numbers, in `named_parameters` order. P is `basis` (k, n).
    Autograd gives ∂L/∂z = P ∂L/∂θ, so every optimizer of torch.optim trains z.

    Each forward pass puts θ(z) where the network's layers look for their parameters, and leaves it
    there. So what is computed later sees θ(z), too: a checkpointed block in the backward pass, or
    `subspace.generate(…)`, since attributes that the subspace lacks are the model's. The parameters
    themselves stay θ_0, frozen, until `release`. Buffers stay in the model, and forward passes in
    training mode update them.

    Attributes: `coordinates` (k,) is z, the one trainable parameter; `origin` (n,) is θ_0, frozen
    (with `requires_grad_` it gathers the full gradient ∂L/∂θ); `basis` (k, n) is no buffer, since
    DistributedDataParallel sends the buffers out at every step. z and θ(z) are at least float32,
    also where P or the network are bfloat16. A state dict holds a sketch of P in place of P, by
    which `load_state_dict` refuses what was saved with another basis.

    Raises ValueError where the basis does not fit the model, for a scripted network, and for one
    whose weights change with `eval()`, as those of merging LoRA layers do.
    """

    def __init__(self, model: nn.Module, basis: Tensor) -> None:
        super().__init__()
        parameters = trainable(model)
        check_network(model)
        uncover(model)  # what another subspace left there
        origin = torch.cat([p.detach().reshape(-1) for p in parameters.values()])
        if basis.dim() != 2 or basis.shape[1] != len(origin):
            raise ValueError(
                f"the basis is {tuple(basis.shape)}, not (k, n) with n = {len(origin)}"
            )
        origin = origin.to(torch.promote_types(origin.dtype, torch.float32))
        self._parts = [(name, p.shape, p.dtype) for name, p in parameters.items()]
        self._places = list(places(model, parameters))
        self._recurrent = recurrent(model)
        self._trained = [p for p in model.parameters() if p.requires_grad]
        self._inspected = False
        self.model = model.requires_grad_(False)
        self.origin = nn.Parameter(origin, requires_grad=False)
        kept = torch.bfloat16 if basis.dtype == torch.bfloat16 else origin.dtype
        self.basis = basis.to(origin.device, kept)
        self.coordinates = nn.Parameter(origin.new_zeros(len(basis)))

    def vector(self) -> Tensor:
        """θ(z), (n,), differentiable in z."""
        # Autocast would make this product bfloat16 and with it round θ to eight bits.
        with torch.autocast(self.origin.device.type, enabled=False):
            return self.origin + self.combine(self.coordinates)

    def combine(self, z: Tensor) -> Tensor:
        """Pᵀz, (n,): the rows of P with the weights z (k,)."""
        if self.basis.dtype == z.dtype:
            return z @ self.basis
        return Combination.apply(z, self.basis)

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """The network's output at θ(z)."""
        values = self.place()
        outputs = self.model(*inputs, **options)
        if not self._inspected and not torch.compiler.is_compiling():
            self._inspected = inspect_graph(values, outputs)
        return outputs

    def place(self) -> dict[str, Tensor]:
        """Put θ(z) where the network's layers look for their parameters; returns it by name."""
        values = self._named(self.vector())
        for name, module, attribute in self._places:
            # Not as a parameter: an attribute that hides it.
            object.__setattr__(module, attribute, values[name])
        renew_lists(self._recurrent)
        return values

    @torch.no_grad()
    def export(self) -> dict[str, Any]:
        """The state dict of the plain model at θ(z), a copy."""
        first = {id(p): name for name, p in self.model.named_parameters()}
        every = self.model.named_parameters(remove_duplicate=False)
        names = {name: first[id(p)] for name, p in every}
        values, state = self._named(self.vector()), {}
        for name, value in self.model.state_dict(keep_vars=True).items():
            # A tied parameter is there under each of its names; hooks may copy or rename one.
            value = values.get(names.get(name, first.get(id(value))), value)
            state[name] = value.detach().clone() if isinstance(value, Tensor) else deepcopy(value)
        return state

    @torch.no_grad()
    def release(self) -> nn.Module:
        """The model itself at θ(z), trainable as it was; the subspace is not to be used again."""
        parameters = dict(self.model.named_parameters())
        for name, value in self._named(self.vector()).items():
            parameters[name].copy_(value)
        uncover(self.model)
        for parameter in self._trained:
            parameter.requires_grad_()
        return self.model

    def _named(self, vector: Tensor) -> dict[str, Tensor]:
        # One split, not a slice a parameter: its backward is one concatenation.
        parts = vector.split([shape.numel() for _, shape, _ in self._parts])
        pairs = zip(self._parts, parts, strict=True)
        return {name: part.view(shape).to(dtype) for (name, shape, dtype), part in pairs}

    # What nn.Module does, with P and θ(z) beside the parameters.

    def __getattr__(self, name: str) -> Any:
        for kind in ("_parameters", "_buffers", "_modules"):
            if name in (members := self.__dict__.get(kind, ())):
                return members[name]
        model = self.__dict__.get("_modules", {}).get("model")
        # Not its special methods: a __deepcopy__ of the model would copy the model alone.
        if model is None or name.startswith("__") or not hasattr(model, name):
            raise AttributeError(f"neither Subspace nor its model has the attribute {name!r}")
        value = getattr(model, name)
        if callable(value):
            self.place()
        return value

    def __getstate__(self) -> dict:
        uncover(self.model)  # θ(z) is no leaf of a graph, so it cannot be copied; z and P can
        return self.__dict__.copy()

    def _apply(self, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        # What .to(device), .double() and the like call. P goes along though it is no buffer.
        def at_least_float32(value: Tensor) -> Tensor:
            moved = function(value)
            narrow = moved.dtype != torch.promote_types(moved.dtype, torch.float32)
            return value.to(moved.device, torch.float32) if narrow else moved

        uncover(self.model)
        self.model._apply(function)
        super()._apply(at_least_float32, recurse=False)
        own = dict(self.model.named_parameters())
        self._parts = [(name, shape, own[name].dtype) for name, shape, _ in self._parts]
        kept = torch.bfloat16 if self.basis.dtype == torch.bfloat16 else self.origin.dtype
        self.basis = self.basis.to(self.origin.device, kept)
        return self

    def extra_repr(self) -> str:
        """k and n, for repr."""
        k, n = self.basis.shape
        return f"k={k}, n={n}"

    @torch.no_grad()
    def get_extra_state(self) -> Tensor:
        """Eighths of P, each times normal random numbers (k, 8): another basis has others."""
        random = torch.Generator().manual_seed(0)
        numbers = torch.randn(self.basis.shape[1], generator=random).to(self.basis.device)
        parts = zip(numbers.tensor_split(8), self.basis.tensor_split(8, dim=1), strict=True)
        return torch.stack([Projection.apply(*part) for part in parts], dim=1).cpu()

    def set_extra_state(self, state: Tensor) -> None:
        """ValueError unless the state dict was saved with the same basis, up to rounding."""
        own = self.get_extra_state()
        own = own.sum(1) if state.dim() == 1 else own  # as it was kept before 2026-12
        if state.shape != own.shape or not torch.allclose(state.to(own), own, atol=0.05):
            raise ValueError("the state dict is that of a subspace with another basis")

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *options: Any) -> None:
        if (saved := state_dict.get(f"{prefix}_extra_state")) is not None:
            self.set_extra_state(saved)  # before anything is loaded
        super()._load_from_state_dict(state_dict, prefix, *options)


class Combination(torch.autograd.Function):
    """zᵀP (n,) for z (k,) and P (k, n) of a shorter type, converted block by block."""

    generate_vmap_rule = True

    @staticmethod
    def forward(z: Tensor, basis: Tensor) -> Tensor:
        return torch.cat([z @ block.to(z.dtype) for block in blocks_of(basis)])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.basis = inputs[1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return Projection.apply(gradient, ctx.basis), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        return Combination.apply(tangent, ctx.basis)


class Projection(torch.autograd.Function):
    """P g (k,) for g (n,), the transpose of `Combination`, so that it has derivatives, too."""

    generate_vmap_rule = True

    @staticmethod
    def forward(gradient: Tensor, basis: Tensor) -> Tensor:
        blocks = blocks_of(basis)
        parts = gradient.split([block.shape[1] for block in blocks])
        pairs = zip(blocks, parts, strict=True)
        return sum(block.to(part.dtype) @ part for block, part in pairs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.basis = inputs[1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return Combination.apply(gradient, ctx.basis), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        return Projection.apply(tangent, ctx.basis)


def blocks_of(basis: Tensor) -> tuple[Tensor, ...]:
    """The basis (k, n) in blocks of columns."""
    return basis.split(max(1, BLOCK // len(basis)), dim=1)


def places(
    model: nn.Module, parameters: Mapping[str, nn.Parameter]
) -> Iterator[tuple[str, nn.Module, str]]:
    """Where parameters are: name, module and attribute. One that is tied is in several places."""
    name_of = {id(parameter): name for name, parameter in parameters.items()}
    for module in model.modules():
        for attribute, parameter in module._parameters.items():
            if id(parameter) in name_of:
                yield name_of[id(parameter)], module, attribute


def uncover(model: nn.Module) -> None:
    """Take θ(z) away from where it hides the model's parameters."""
    for module in model.modules():
        for attribute in module._parameters:
            vars(module).pop(attribute, None)
    renew_lists(recurrent(model))


def recurrent(model: nn.Module) -> list[nn.RNNBase]:
    """The layers that keep their parameters in a list, too."""
    return [layer for layer in model.modules() if isinstance(layer, nn.RNNBase)]


def renew_lists(layers: Iterable[nn.RNNBase]) -> None:
    """Fill the lists of recurrent layers with the parameters that they have now."""
    for layer in layers:
        layer._flat_weights = [getattr(layer, name) for name in layer._flat_weights_names]


def check_network(model: nn.Module) -> None:
    """ValueError for a network that would not see θ(z), or that changes its own weights."""
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        raise ValueError("scripted networks keep their parameters to themselves; use the original")
    check_modes(model)


@torch.no_grad()
def check_modes(model: nn.Module) -> None:
    """ValueError for a network whose weights are others in training and in evaluation."""
    if all(type(module).train is nn.Module.train for module in model.modules()):
        return
    modes = {module: module.training for module in model.modules()}
    state = model.state_dict() | dict(model.named_parameters())
    state = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    before = {name: value.clone() for name, value in state.items()}
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.add_(1)  # adapters begin at zero, where merging them changes nothing
    shifted = {name: value.clone() for name, value in state.items()}
    model.train(not model.training)
    changed = [name for name, value in state.items() if not torch.equal(value, shifted[name])]
    model.train(not model.training)
    for name, value in state.items():
        value.copy_(before[name])
    for module, mode in modes.items():
        module.training = mode
    if changed:
        raise ValueError(
            f"{changed[0]} changes with train() and eval(), as weights that LoRA layers merge; "
            "turn that off (loralib: merge_weights=False)"
        )


def inspect_graph(values: dict[str, Tensor], outputs: Any) -> bool:
    """Look, once, whether the outputs depend on all of θ(z), given by name; False where none do.

    Warns of parameters that the outputs do not depend on. Raises RuntimeError where torch's
    reentrant checkpointing would compute other gradients.
    """
    if not any(value.requires_grad for value in values.values()):
        return False
    leaves = torch.utils._pytree.tree_leaves(outputs)
    nodes = {leaf.grad_fn: None for leaf in leaves if isinstance(leaf, Tensor) and leaf.grad_fn}
    if not nodes:
        return False
    reached = list(nodes)
    for node in reached:  # it grows
        if node.name() == "CheckpointFunctionBackward":
            raise RuntimeError(
                "gradient checkpointing with use_reentrant=True does not work in a Subspace; "
                "allowed: use_reentrant=False"
            )
        new = [following for following, _ in node.next_functions if following not in nodes]
        nodes |= dict.fromkeys(filter(None, new))
        reached += dict.fromkeys(filter(None, new))
    unused = [name for name, value in values.items() if value.grad_fn not in nodes]
    if unused:
        others = f" and {len(unused) - 3} more" if len(unused) > 3 else ""
        warnings.warn(
            f"Subspace: the output does not depend on {', '.join(unused[:3])}{others}. Unless "
            "layers are dropped at random, these are unused, or a layer reads them from elsewhere "
            "than its attribute, a list, say, and finds θ_0",
            stacklevel=3,
        )
    return True

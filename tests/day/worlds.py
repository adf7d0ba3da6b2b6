"""A model and its optimizer, and what a person has at hand to change them with."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from tests.day.fences import Fences
from weyl_megatron import AdamW2
from weyl_megatron.kernels.choice import VARIABLE


class Holder(nn.Module):
    """One parameter of any shape."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape))


class Views(nn.Module):
    """A matrix and a vector in one piece of memory: beside each other, or the same numbers."""

    def __init__(self, is_shared: bool) -> None:
        super().__init__()
        memory = torch.randn(30)
        self.weight = nn.Parameter(memory[:15].view(5, 3))
        self.bias = nn.Parameter(memory[:15] if is_shared else memory[15:])


#: What a model is put together from.
PIECES = {
    "linear": lambda: nn.Linear(6, 5),
    "wide": lambda: nn.Linear(16, 24, bias=False),
    "tall": lambda: nn.Linear(16, 4000, bias=False),
    "conv1d": lambda: nn.Conv1d(6, 4, 3),
    "conv2d": lambda: nn.Conv2d(3, 4, 3),
    "transposed": lambda: nn.ConvTranspose1d(4, 3, 2),
    "depthwise": lambda: nn.Conv2d(4, 4, 3, groups=4),
    "embedding": lambda: nn.Embedding(10, 4),
    "norm": lambda: nn.LayerNorm(4),
    "attention": lambda: nn.MultiheadAttention(4, 2),
    "experts": lambda: Holder(3, 6, 4),
    "scalar": lambda: Holder(),
    "none": lambda: Holder(0),
    "no rows": lambda: Holder(0, 4),
    "beside": lambda: Views(False),
    "shared": lambda: Views(True),
}

#: The optimizers that live the same day: torch's, and AdamW2 with these τ.
KINDS = ("AdamW", "inf", "0.01")


class World:
    """One of ``KINDS``, on a model of its own that is the same in all of them.

    Args:
        kind: which.
        kernel: what AdamW2 is to step in, as the environment variable has it; "" is the compiled
            one if it can.
        pieces: of the model, by the names in ``PIECES``.
        named: whether the optimizer is given names.
        is_fenced: whether weights and state are moved between fences wherever they can be.
        others: all worlds of the day, AdamW's first.
    """

    def __init__(
        self,
        kind: str,
        kernel: str,
        pieces: tuple[str, ...],
        named: bool,
        is_fenced: bool,
        others: list[World],
    ) -> None:
        self.kind, self.named, self.is_fenced, self.others = kind, named, is_fenced, others
        os.environ[VARIABLE] = kernel
        self.fences = Fences()
        torch.default_generator.manual_seed(len(pieces))
        self.net = nn.Sequential(*(PIECES[piece]() for piece in pieces))
        self.overlaps = "shared" in pieces
        if not {"beside", "shared"} & set(pieces):
            self.fence()
        self.optimizer: torch.optim.Optimizer = self.make_optimizer()
        self.saved: list[dict[str, Any]] = []  #: state dicts of the optimizer
        self.current: dict[
            str, Any
        ] = {}  #: a copy of that of before this action, for all worlds to load
        self.average: list[Tensor] | None = None  #: of the weights, once it was taken
        self.diverges = False  #: whether gradients depend on the weights

    def make_optimizer(self) -> torch.optim.Optimizer:
        """Return a new optimizer of the model."""
        params = list(self.net.named_parameters() if self.named else self.net.parameters())
        if self.kind == "AdamW":
            return torch.optim.AdamW(params, lr=0.01, foreach=False)
        return AdamW2(params, lr=0.01, tau=float(self.kind))

    @property
    def params(self) -> list[nn.Parameter]:
        """What the optimizer steps."""
        return [param for group in self.optimizer.param_groups for param in group["params"]]

    def param(self, number: int) -> nn.Parameter:
        return self.params[number % len(self.params)]

    def module(self, number: int) -> nn.Module:
        """A module that has a weight which torch.nn.utils can work on."""
        modules = [
            module for module in self.net if isinstance(getattr(module, "weight", None), Tensor)
        ]
        return modules[number % len(modules)] if modules else self.net

    def copied(self, tensor: Tensor) -> Tensor:
        """A copy of a tensor, between fences where there are any."""
        return self.fences.copy(tensor) if self.is_fenced else tensor.detach().clone()

    def fence(self) -> None:
        """Move weights and state between fences, as one moves them to other memory."""
        if not self.is_fenced or self.overlaps:
            return
        for param in self.net.parameters():
            if not self.fences.has(param):
                param.data = self.fences.copy(param.data)

    def fence_state(self) -> None:
        if self.is_fenced:
            for state in self.optimizer.state.values():
                for key, value in state.items():
                    if isinstance(value, Tensor) and value.dim() and not self.fences.has(value):
                        state[key] = self.fences.copy(value)

    def effective(self) -> Iterator[Tensor]:
        """Yield every weight as the model uses it: pruned, normalised, or as it is."""
        for module in self.net.modules():
            if isinstance(module, ParametrizationList):
                continue
            for hook in module._forward_pre_hooks.values():
                hook(module, None)
            names = [*module._parameters, *getattr(module, "parametrizations", {})]
            for name in dict.fromkeys(
                name.removesuffix("_orig").removesuffix("_g").removesuffix("_v") for name in names
            ):
                tensor = getattr(module, name)
                if tensor is not None:
                    yield tensor

    def loss(self, seed: int) -> Tensor:
        """Return a loss whose gradient is the same in all worlds."""
        generator = torch.Generator().manual_seed(seed)
        terms = [
            (
                weight
                * torch.randn(weight.shape, generator=generator, dtype=torch.float32).to(
                    weight.dtype
                )
            ).sum()
            for weight in self.effective()
            if weight.is_floating_point()
        ]
        return sum((term.double() for term in terms), torch.zeros((), dtype=torch.float64))

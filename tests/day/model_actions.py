"""What people do to the weights of a model between steps."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, remove_weight_norm, weight_norm

from tests.day.actions import Action
from tests.day.forms import DATA, DTYPES, noise
from tests.day.worlds import World


@dataclass(frozen=True)
class LoadModel(Action):
    """Load the model's own weights of now, into its parameters or in the place of their data."""

    assign: bool

    def play(self, world: World) -> None:
        world.net.load_state_dict(copy.deepcopy(world.net.state_dict()), assign=self.assign)


def _data(world: World, param: nn.Parameter, what: str) -> Tensor:
    """New data; of the old shape where a weight is normalised: torch's own kernel for that reads
    foreign memory.
    """
    new = DATA[what](param.data)
    return world.copied(param.data if world.diverges and new.shape != param.shape else new)


@dataclass(frozen=True)
class SetData(Action):
    """Give a parameter other memory, of another shape or dtype perhaps, and its gradient up where
    ``clears``.
    """

    number: int
    what: str
    clears: bool = True

    def play(self, world: World) -> None:
        param = world.param(self.number)
        with torch.no_grad():
            param.data = _data(world, param, self.what)
        if self.clears:
            param.grad = None


@dataclass(frozen=True)
class Replace(Action):
    """Put a new Parameter in an old one's place in the group and in the model, with the state moved
    along or not.
    """

    number: int
    keeps_state: bool
    what: str = "other memory"

    def play(self, world: World) -> None:
        old = world.param(self.number)
        new = nn.Parameter(_data(world, old, self.what), requires_grad=old.requires_grad)
        for group in world.optimizer.param_groups:
            group["params"] = [new if param is old else param for param in group["params"]]
        for module in world.net.modules():
            for name, param in module._parameters.items():
                if param is old:
                    module._parameters[name] = new
        state = world.optimizer.state.pop(old, None)
        if self.keeps_state and state is not None:
            world.optimizer.state[new] = state


@dataclass(frozen=True)
class Freeze(Action):
    """Freeze a parameter, or train it again; its gradient stays where it is, or goes."""

    number: int
    requires_grad: bool = False
    clears: bool = True

    def play(self, world: World) -> None:
        param = world.param(self.number)
        if param.is_floating_point():
            param.requires_grad_(self.requires_grad)
        if self.clears:
            param.grad = None


@dataclass(frozen=True)
class To(Action):
    """Give the model another dtype, and the state, too, by loading it again."""

    dtype: str
    reloads: bool = True

    def play(self, world: World) -> None:
        world.net.to(DTYPES[self.dtype])
        world.optimizer.zero_grad()
        if self.reloads:
            world.optimizer.load_state_dict(copy.deepcopy(world.optimizer.state_dict()))


@dataclass(frozen=True)
class ChannelsLast(Action):
    is_on: bool = True

    def play(self, world: World) -> None:
        world.net.to(memory_format=torch.channels_last if self.is_on else torch.contiguous_format)


@dataclass(frozen=True)
class Swap(Action):
    """Take an average of the weights; from the second time on exchange it with them, by copy_ or by
    pointer.
    """

    by_pointer: bool

    def play(self, world: World) -> None:
        params = world.params
        if world.average is None or len(world.average) != len(params):
            world.average = [world.copied(param) for param in params]
            return
        with torch.no_grad():
            for number, param in enumerate(params):
                average = world.average[number]
                if self.by_pointer:
                    param.data, world.average[number] = average, param.data
                else:
                    weight = param.detach().clone()
                    param.data.copy_(average)
                    world.average[number] = weight


@dataclass(frozen=True)
class Prune(Action):
    """Prune a weight, or make it permanent, which swaps ``.data``."""

    number: int
    is_removed: bool = False
    is_whole = True

    def play(self, world: World) -> None:
        module = world.module(self.number)
        if self.is_removed:
            prune.remove(module, "weight")
        else:
            prune.custom_from_mask(module, "weight", noise(module.weight.shape, 3) > 0)


@dataclass(frozen=True)
class WeightNorm(Action):
    """Normalise a weight in the old way or the new one, or undo it; the optimizer gets what is
    new.
    """

    number: int
    how: str
    adds: bool = True
    is_whole = True

    def play(self, world: World) -> None:
        if (
            world.overlaps
        ):  # weights in one memory are AdamW's up to rounding, and then so would gradients be
            return
        world.diverges = True
        module = world.module(self.number)
        known = set(map(id, world.net.parameters()))
        if self.how == "old":
            weight_norm(module)
        elif self.how == "new":
            parametrizations.weight_norm(module)
        elif parametrize.is_parametrized(module):
            parametrize.remove_parametrizations(module, "weight")
        else:
            remove_weight_norm(module)
        new = [
            (name, param) for name, param in world.net.named_parameters() if id(param) not in known
        ]
        for (
            _,
            param,
        ) in (
            new
        ):  # the old way leaves them in the memory of the weight that the optimizer still has
            param.data = world.copied(param.data)
        if self.adds and new:
            group = {"params": new if world.named else [param for _, param in new]}
            world.optimizer.add_param_group(group)

"""What people do with an optimizer: steps, and what comes between them. The same in every world."""

from __future__ import annotations

import copy
import io
import pickle
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tests.day.forms import DTYPES, GRADS, STATE, noise
from tests.day.state_dicts import EDITS
from tests.day.worlds import World


@dataclass(frozen=True)
class Action:
    """``play`` does it. Where it raises in AdamW's world, nothing has changed if ``is_whole``."""

    is_whole = False

    def play(self, world: World) -> None:
        raise NotImplementedError


@dataclass(frozen=True)
class Rest(Action):
    """Nothing: what an action that is not needed shrinks to."""

    def play(self, world: World) -> None:
        pass


@dataclass(frozen=True)
class Step(Action):
    """A training step, on a gradient from autograd: with a closure, or after zero_grad; None: on
    what is there.
    """

    seed: int
    closure: bool = False
    set_to_none: bool | None = True
    backward: bool = True

    def play(self, world: World) -> None:
        def closure() -> Tensor:
            if self.set_to_none is not None:
                world.optimizer.zero_grad(set_to_none=self.set_to_none)
            loss = world.loss(self.seed)
            if self.backward and loss.requires_grad:
                loss.backward()
            return loss.detach()

        if self.closure:
            assert world.optimizer.step(closure) is not None
        else:
            closure()
            world.optimizer.step()


@dataclass(frozen=True)
class StepByHand(Action):
    """A step on gradients that were set by hand, for every parameter or for every second one."""

    seed: int
    form: str = "plain"
    every: int = 1

    def play(self, world: World) -> None:
        for number, param in enumerate(world.params):
            if number % self.every == 0 and param.is_floating_point():
                param.grad = GRADS[self.form](param.shape, self.seed + number, param.dtype)
        world.optimizer.step()


@dataclass(frozen=True)
class GradOfDtype(Action):
    """Let one parameter have a gradient of another dtype, and step."""

    number: int
    dtype: str

    def play(self, world: World) -> None:
        param = world.param(self.number)
        if hasattr(param, "grad_dtype") and param.is_floating_point():
            param.grad = None
            param.grad_dtype = None
            param.grad = noise(param.shape, 1, DTYPES[self.dtype])
        world.optimizer.step()


@dataclass(frozen=True)
class ZeroGrad(Action):
    set_to_none: bool

    def play(self, world: World) -> None:
        world.optimizer.zero_grad(set_to_none=self.set_to_none)


@dataclass(frozen=True)
class Save(Action):
    """Keep a state dict: as it is, which shares the tensors, as a copy, or as what torch.load makes
    of the file.
    """

    how: str

    def play(self, world: World) -> None:
        state = world.optimizer.state_dict()
        if self.how == "copy":
            state = copy.deepcopy(state)
        if self.how == "file":
            file = io.BytesIO()
            torch.save(state, file)
            file.seek(0)
            state = torch.load(file, weights_only=True)
        world.saved.append(state)


@dataclass(frozen=True)
class Load(Action):
    """Load a state: the optimizer's own of now or one that was saved, AdamW's, or that of AdamW2 at
    τ = ∞.
    """

    source: str
    edit: str = "as it is"
    number: int = 0
    is_whole = True

    def play(self, world: World) -> None:
        if self.source == "saved":
            state = (
                world.saved[self.number % len(world.saved)]
                if world.saved
                else world.optimizer.state_dict()
            )
        else:
            whose = {"own": world, "AdamW's": world.others[0], "AdamW2's": world.others[1]}[
                self.source
            ]
            state = whose.current
        if self.edit != "as it is" or self.source != "saved":
            state = copy.deepcopy(state)
        EDITS[self.edit](state, self.number)
        world.optimizer.load_state_dict(state)


@dataclass(frozen=True)
class AddGroup(Action):
    """Add a parameter: of any shape, or one that shares its memory with another; with a name where
    others have.
    """

    shape: tuple[int, ...]
    lr: float | None = None
    shares: int | None = None
    is_otherwise: bool = False
    is_whole = True

    def play(self, world: World) -> None:
        data = noise(self.shape, 5)
        if self.shares is not None and not world.diverges:
            data = world.param(self.shares).data.view(-1)
            world.overlaps = True
        param = nn.Parameter(data)
        name = f"extra{len(world.optimizer.param_groups)}"
        group: dict[str, Any] = {
            "params": [(name, param)] if world.named != self.is_otherwise else [param]
        }
        if self.lr is not None:
            group["lr"] = self.lr
        world.optimizer.add_param_group(group)
        world.net.register_parameter(name, param)


@dataclass(frozen=True)
class AddFrozen(Action):
    """Add a parameter that is never trained, of a dtype that no optimizer steps."""

    dtype: str
    is_whole = True

    def play(self, world: World) -> None:
        param = nn.Parameter(
            torch.ones(3, 2, dtype=getattr(torch, self.dtype)), requires_grad=False
        )
        group = {
            "params": [(f"frozen{len(world.optimizer.param_groups)}", param)]
            if world.named
            else [param]
        }
        world.optimizer.add_param_group(group)


@dataclass(frozen=True)
class Copy(Action):
    """Go on with a copy of model and optimizer."""

    how: str
    is_whole = True

    def play(self, world: World) -> None:
        pair = world.net, world.optimizer
        if self.how == "deepcopy":
            pair = copy.deepcopy(pair)
        elif self.how == "pickle":
            pair = pickle.loads(pickle.dumps(pair))
        else:
            file = io.BytesIO()
            torch.save(pair, file)
            file.seek(0)
            pair = torch.load(file, weights_only=False)
        world.net, world.optimizer = pair


@dataclass(frozen=True)
class NewOptimizer(Action):
    """Make a new optimizer of the model as it is now; with the old one's state dict where it
    fits.
    """

    def play(self, world: World) -> None:
        world.optimizer = world.make_optimizer()


@dataclass(frozen=True)
class SetOption(Action):
    """Edit a parameter group."""

    key: str
    value: Any
    as_tensor: bool = False
    group: int = 0

    def play(self, world: World) -> None:
        groups = world.optimizer.param_groups
        value = self.value
        if self.as_tensor:
            value = (
                tuple(map(torch.tensor, value)) if isinstance(value, tuple) else torch.tensor(value)
            )
        groups[self.group % len(groups)][self.key] = value


@dataclass(frozen=True)
class EditState(Action):
    """Put something else in the place of a moment; of both where ``key`` is empty."""

    number: int
    key: str
    what: str

    def play(self, world: World) -> None:
        state = world.optimizer.state.get(world.param(self.number), {})
        for key in [self.key] if self.key else ["exp_avg", "exp_avg_sq"]:
            if isinstance(state.get(key), Tensor):
                new = STATE[self.what](state[key])
                state[key] = (
                    world.copied(new) if isinstance(new, Tensor) and self.what != "meta" else new
                )


@dataclass(frozen=True)
class EditStep(Action):
    number: int
    dtype: str

    def play(self, world: World) -> None:
        state = world.optimizer.state.get(world.param(self.number), {})
        if "step" in state:
            step = float(state["step"])
            state["step"] = {
                "int": lambda: int(step),
                "float": lambda: step,
                "one": lambda: torch.full((1,), step),
                "int64": lambda: torch.tensor(int(step)),
                "float64": lambda: torch.tensor(step, dtype=torch.float64),
                "zero": lambda: torch.tensor(0.0),
                "vector": lambda: torch.full((3,), step),
            }[self.dtype]()


@dataclass(frozen=True)
class ClearState(Action):
    """Forget one parameter's state, all of it, or one key."""

    number: int | None = None
    key: str | None = None

    def play(self, world: World) -> None:
        if self.number is None:
            world.optimizer.state.clear()
        elif self.key is None:
            world.optimizer.state.pop(world.param(self.number), None)
        else:
            world.optimizer.state.get(world.param(self.number), {}).pop(self.key, None)


@dataclass(frozen=True)
class DefaultDtype(Action):
    dtype: str

    def play(self, world: World) -> None:
        torch.set_default_dtype(DTYPES[self.dtype])


@dataclass(frozen=True)
class MoveState(Action):
    """Give the state other memory, as offloading does."""

    def play(self, world: World) -> None:
        world.fence()
        world.fence_state()

"""What people do to a model and its optimizer between steps. An action does the same in every world."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, remove_weight_norm, weight_norm

from tests.day.worlds import World

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}


def noise(shape: Any, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The same numbers in every world."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float32).to(dtype)


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
    """A training step, on a gradient from autograd: with a closure, or after zero_grad; None: on what is there."""

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


def reversed_dims(tensor: Tensor) -> Tensor:
    return tensor.permute(tuple(reversed(range(tensor.dim()))))


def transposed(shape: torch.Size, seed: int, dtype: torch.dtype) -> Tensor:
    return reversed_dims(noise(shape[::-1], seed, dtype))


def strided(shape: torch.Size, seed: int, dtype: torch.dtype) -> Tensor:
    whole = torch.full((*shape, 2), float("nan"), dtype=dtype)
    whole[..., 0] = noise(shape, seed, dtype)
    return whole[..., 0]


def with_graph(shape: torch.Size, seed: int, dtype: torch.dtype) -> Tensor:
    return noise(shape, seed, dtype).requires_grad_() * 2


#: How a gradient may lie in memory.
GRADS: dict[str, Callable[[torch.Size, int, torch.dtype], Tensor]] = {
    "plain": noise,
    "transposed": transposed,
    "expanded": lambda shape, seed, dtype: noise((), seed, dtype).expand(shape),
    "strided": strided,
    "with a graph": with_graph,
    "sparse": lambda shape, seed, dtype: noise(shape, seed, dtype).to_sparse(),
    "zero": lambda shape, seed, dtype: torch.zeros(shape, dtype=dtype),
}


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
    """Keep a state dict: as it is, which shares the tensors, as a copy, or as what torch.load makes of the file."""

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


def _of(state: dict[str, Any], number: int) -> dict[str, Any]:
    """The state of one of the parameters that have one, in a state dict."""
    found: list[dict[str, Any]] = [each for each in state["state"].values() if each]
    return found[number % len(found)] if found else {}


def _reshaped(change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Any], int], None]:
    def edit(state: dict[str, Any], number: int) -> None:
        one = _of(state, number)
        for key, value in one.items():
            if isinstance(value, Tensor) and key != "step":
                one[key] = change(value)

    return edit


def other_rows(rows: int) -> Callable[[Tensor], Tensor]:
    return lambda value: noise((max(0, value.shape[0] + rows) if value.dim() else 2, *value.shape[1:]), rows + 9).abs()


def cast(dtype: torch.dtype) -> Callable[[dict[str, Any], int], None]:
    def edit(state: dict[str, Any], number: int) -> None:
        for one in state["state"].values():
            for key, value in one.items():
                if isinstance(value, Tensor) and key != "step":
                    one[key] = value.to(dtype)

    return edit


def _without_last(state: dict[str, Any], number: int) -> None:
    last = state["param_groups"][-1]["params"]
    if last:
        state["state"].pop(last.pop(), None)


def _without_state(state: dict[str, Any], number: int) -> None:
    if state["state"]:
        state["state"].pop(sorted(state["state"])[number % len(state["state"])])


def _without_square(state: dict[str, Any], number: int) -> None:
    _of(state, number).pop("exp_avg_sq", None)


def _without_group(state: dict[str, Any], number: int) -> None:
    state["param_groups"].pop()


def _counted(change: Callable[[float], Any]) -> Callable[[dict[str, Any], int], None]:
    def edit(state: dict[str, Any], number: int) -> None:
        for one in state["state"].values():
            if "step" in one:
                one["step"] = change(float(one["step"]))

    return edit


def _without_tau(state: dict[str, Any], number: int) -> None:
    for group in state["param_groups"]:
        group.pop("tau", None)


def _swapped(state: dict[str, Any], number: int) -> None:
    """Give two parameters each other's state, as where a model lists its parameters in another order."""
    keys = sorted(state["state"])
    if len(keys) > 1:
        one, other = keys[number % len(keys)], keys[(number + 1) % len(keys)]
        state["state"][one], state["state"][other] = state["state"][other], state["state"][one]


#: What a state dict may have become before it is loaded.
EDITS: dict[str, Callable[[dict[str, Any], int], None]] = {
    "as it is": lambda state, number: None,
    "more rows": _reshaped(other_rows(4)),
    "many more rows": _reshaped(other_rows(1000)),
    "fewer rows": _reshaped(other_rows(-1)),
    "flat": _reshaped(lambda value: value.reshape(-1)),
    "one number": _reshaped(lambda value: torch.ones(())),
    "transposed": _reshaped(lambda value: reversed_dims(value).contiguous()),
    "transposed in memory": _reshaped(lambda value: reversed_dims(reversed_dims(value).contiguous())),
    "one more dimension": _reshaped(lambda value: value[None]),
    "expanded": _reshaped(lambda value: torch.full((), 0.5).expand(value.shape)),
    "float64": cast(torch.float64),
    "bfloat16": cast(torch.bfloat16),
    "fewer parameters": _without_last,
    "a parameter without state": _without_state,
    "a parameter without exp_avg_sq": _without_square,
    "fewer groups": _without_group,
    "nothing": lambda state, number: state["state"].clear(),
    "steps as int": _counted(int),
    "steps as float": _counted(float),
    "steps as tensors of one": _counted(lambda step: torch.full((1,), step)),
    "steps as int64": _counted(lambda step: torch.tensor(int(step))),
    "without tau": _without_tau,
    "two states swapped": _swapped,
}


@dataclass(frozen=True)
class Load(Action):
    """Load a state: the optimizer's own of now or one that was saved, AdamW's, or that of AdamW2 at τ = ∞."""

    source: str
    edit: str = "as it is"
    number: int = 0
    is_whole = True

    def play(self, world: World) -> None:
        if self.source == "saved":
            state = world.saved[self.number % len(world.saved)] if world.saved else world.optimizer.state_dict()
        else:
            whose = {"own": world, "AdamW's": world.others[0], "AdamW2's": world.others[1]}[self.source]
            state = whose.current
        if self.edit != "as it is" or self.source != "saved":
            state = copy.deepcopy(state)
        EDITS[self.edit](state, self.number)
        world.optimizer.load_state_dict(state)


@dataclass(frozen=True)
class LoadModel(Action):
    """Load the model's own weights of now, into its parameters or in the place of their data."""

    assign: bool

    def play(self, world: World) -> None:
        world.net.load_state_dict(copy.deepcopy(world.net.state_dict()), assign=self.assign)


def wider(shape: torch.Size) -> tuple[int, ...]:
    return (shape[0] + 4, *shape[1:]) if shape else (3,)


def much_wider(shape: torch.Size) -> tuple[int, ...]:
    return (shape[0] + 1000, *shape[1:]) if shape else (1000,)


def narrower(shape: torch.Size) -> tuple[int, ...]:
    return (max(0, shape[0] - 1), *shape[1:]) if shape else (0,)


#: What ``.data`` may be set to.
DATA: dict[str, Callable[[Tensor], Tensor]] = {
    "more rows": lambda data: noise(wider(data.shape), 1, data.dtype),
    "many more rows": lambda data: noise(much_wider(data.shape), 1, data.dtype),
    "fewer rows": lambda data: noise(narrower(data.shape), 1, data.dtype),
    "nothing": lambda data: data.new_empty(0),
    "float64": lambda data: data.double(),
    "bfloat16": lambda data: data.bfloat16(),
    "other memory": lambda data: data.clone(),
    "transposed": lambda data: reversed_dims(data),
    "transposed in memory": lambda data: transposed(data.shape, 1, data.dtype),
    "flat": lambda data: data.reshape(-1),
    "strided": lambda data: strided(data.shape, 1, data.dtype),
    "a piece": lambda data: torch.cat([data, data])[: len(data)] if data.dim() else data.clone(),
}


def _data(world: World, param: nn.Parameter, what: str) -> Tensor:
    """New data; of the old shape where a weight is normalised: torch's own kernel for that reads foreign memory."""
    new = DATA[what](param.data)
    return world.copied(param.data if world.diverges and new.shape != param.shape else new)


@dataclass(frozen=True)
class SetData(Action):
    """Give a parameter other memory, of another shape or dtype perhaps, and its gradient up where ``clears``."""

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
    """Put a new Parameter in an old one's place in the group and in the model, with the state moved along or not."""

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
class AddGroup(Action):
    """Add a parameter: of any shape, or one that shares its memory with another; with a name where others have."""

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
        group: dict[str, Any] = {"params": [(name, param)] if world.named != self.is_otherwise else [param]}
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
        param = nn.Parameter(torch.ones(3, 2, dtype=getattr(torch, self.dtype)), requires_grad=False)
        group = {"params": [(f"frozen{len(world.optimizer.param_groups)}", param)] if world.named else [param]}
        world.optimizer.add_param_group(group)


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
    """Make a new optimizer of the model as it is now; with the old one's state dict where it fits."""

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
            value = tuple(map(torch.tensor, value)) if isinstance(value, tuple) else torch.tensor(value)
        groups[self.group % len(groups)][self.key] = value


@dataclass(frozen=True)
class Swap(Action):
    """Take an average of the weights; from the second time on exchange it with them, by copy_ or by pointer."""

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
    """Normalise a weight in the old way or the new one, or undo it; the optimizer gets what is new."""

    number: int
    how: str
    adds: bool = True
    is_whole = True

    def play(self, world: World) -> None:
        if world.overlaps:  # weights in one memory are AdamW's up to rounding, and then so would gradients be
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
        new = [(name, param) for name, param in world.net.named_parameters() if id(param) not in known]
        if self.adds and new:
            group = {"params": new if world.named else [param for _, param in new]}
            world.optimizer.add_param_group(group)


#: What a person may put in the place of a tensor of the state.
STATE: dict[str, Callable[[Tensor], Any]] = {
    "more rows": lambda value: noise(wider(value.shape), 1, value.dtype).abs(),
    "many more rows": lambda value: noise(much_wider(value.shape), 1, value.dtype).abs(),
    "fewer rows": lambda value: noise(narrower(value.shape), 1, value.dtype).abs(),
    "flat": lambda value: value.reshape(-1).clone(),
    "one number": lambda value: torch.ones((), dtype=value.dtype),
    "float64": lambda value: value.double(),
    "bfloat16": lambda value: value.bfloat16(),
    "int64": lambda value: value.long(),
    "meta": lambda value: value.to("meta"),
    "other memory": lambda value: value.clone(),
    "strided": lambda value: strided(value.shape, 1, value.dtype).abs_(),
    "transposed in memory": lambda value: transposed(value.shape, 1, value.dtype).abs_(),
    "expanded": lambda value: torch.ones((), dtype=value.dtype).expand(value.shape),
    "a number": lambda value: 0.5,
    "None": lambda value: None,
}


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
                state[key] = world.copied(new) if isinstance(new, Tensor) and self.what != "meta" else new


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

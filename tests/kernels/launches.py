"""Counts what a step of Triton's kernels launches, on a machine that has no GPU to launch it on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

from benchmarks.models import Shape
from weyl_megatron import AdamW2, matrices
from weyl_megatron.kernels.triton_step import numbers

#: What a stand-in for a GPU does when a kernel is launched: its name, and its arguments.
Stand = Callable[[str, tuple[Any, ...]], None]


class Step(NamedTuple):
    """What one step launched."""

    triton: dict[str, int]  #: by the kernel's name
    torch: int  #: calls of torch that do or allocate something, collectives apart
    collectives: int


def idle(_: str, __: tuple[Any, ...]) -> None:
    """Do nothing: no matrix is ever settled."""


def settles(name: str, given: tuple[Any, ...]) -> None:
    """Tell after a step what a device tells of matrices that were settled, and far from a clip."""
    if name == "follow":
        with _disable_current_modes():  # these are no calls of the host
            rows = given[2]
            rows[numbers.LOWER.value], rows[numbers.NORM.value] = 1e6, 1.0
            rows[numbers.AGE.value] += 1


@contextmanager
def stands_in(stand: Stand) -> Iterator[Counter[str]]:
    """Have optimizers take a GPU's path on the CPU; yield what they launch, by name."""
    launched: Counter[str] = Counter()

    def run(self: Any, *args: Any, **_: Any) -> None:
        launched[self.__name__] += 1
        stand(self.__name__, args)

    with (
        patch.object(JITFunction, "run", run),
        patch.object(matrices, "pick", lambda *_, **__: "triton"),
    ):
        yield launched


class Calls(TorchDispatchMode):
    """Counts the calls of torch, those of collectives apart."""

    def __init__(self) -> None:
        super().__init__()
        self.count = self.collectives = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.collectives += 1
        else:
            self.count += 1
        return func(*args, **(kwargs or {}))


def stepping(shape: Shape) -> tuple[AdamW2, list[nn.Parameter]]:
    """Return an optimizer of a model's parameters, each extent divided by 64, in two groups."""
    named = [
        (name, nn.Parameter(torch.ones([max(1, extent // 64) for extent in extents])))
        for name, extents in shape.parameters()
    ]
    groups = [
        {"params": [pair for pair in named if pair[1].dim() > 1], "weight_decay": 0.1},
        {"params": [pair for pair in named if pair[1].dim() < 2], "weight_decay": 0.0},
    ]
    params = [param for _, param in named]
    for param in params:
        param.grad = torch.ones_like(param)
    return AdamW2(groups, lr=1e-3), params


def counted(optimizer: AdamW2, stand: Stand) -> Step:
    """Return what a step launches where it does as the ones before it: the first ones differ."""
    with stands_in(stand) as launched:
        for _ in range(6):
            optimizer.step()
        launched.clear()
        with Calls() as calls:
            optimizer.step()
    return Step(dict(launched), calls.count, calls.collectives)


class _Gpu:
    """Stands in for the driver of a GPU."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return device


class _Compiled:
    """A kernel that Triton has compiled, whose launch does nothing."""

    function = packed_metadata = None

    def launch_metadata(self, *_: object) -> None:
        pass

    def run(self, *_: object) -> None:
        pass


@contextmanager
def triton_s_own_launcher() -> Iterator[None]:
    """Have Triton do all that its Python does for a launch: it binds, and looks the kernel up."""
    before = dict(vars(driver))
    made: list[Any] = []

    def compile_nothing(self: Any, key: str, _: Any, device: int, *__: Any) -> _Compiled:
        made.append(self)
        self.device_caches[device][0][key] = kernel = _Compiled()
        return kernel

    driver.set_active(_Gpu())
    try:
        with (
            patch.object(JITFunction, "_do_compile", compile_nothing),
            patch.object(matrices, "pick", lambda *_, **__: "triton"),
        ):
            yield
    finally:
        vars(driver).update(before)
        for kernel in made:
            kernel.device_caches.pop(0, None)


def total(step: Step) -> int:
    return sum(step.triton.values())


def set_gradients(params: Sequence[nn.Parameter]) -> None:
    for param in params:
        param.grad = torch.ones_like(param)

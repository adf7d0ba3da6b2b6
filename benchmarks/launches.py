"""What a step launches on a GPU, noted on a machine that has none, for Triton to compile.

Small optimizers make steps on the CPU, in the code of a GPU's step. Triton's own binder specializes
each launch for an architecture, with its constants, dtypes, alignments and options; where a Triton
before 3.5 hands that out in another form, the same is made here of the launch's arguments.
"""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import triton
from torch import Tensor, nn
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import JITFunction, driver

from weyl_megatron import AdamW2, matrices
from weyl_megatron.engines.given import GivenLayout
from weyl_megatron.kernels import triton_step
from weyl_megatron.layouts.buffers import Buffer, Layout, Parameter, Shard


class Dtypes(NamedTuple):
    """Dtypes of weights and gradients, and of M and V where these are others than the weights'."""

    weight: torch.dtype
    grad: torch.dtype
    state: tuple[torch.dtype, torch.dtype] | None = None


FLOAT = Dtypes(torch.float32, torch.float32)

#: What the kernels take. Gradients of other dtypes than the weights' a torch before 2.10 has not.
ALL_DTYPES: tuple[Dtypes, ...] = (
    FLOAT,
    *(
        [Dtypes(torch.float32, torch.bfloat16), Dtypes(torch.float32, torch.float16)]
        if hasattr(Tensor, "grad_dtype")
        else []
    ),
    Dtypes(torch.bfloat16, torch.bfloat16),
    Dtypes(torch.float32, torch.float32, (torch.bfloat16, torch.bfloat16)),
    Dtypes(torch.float32, torch.float32, (torch.bfloat16, torch.float32)),
)

#: Vectors of W, beside any number of U.
_OF_WEIGHT = 4

#: Since then the binder's hook tells all that a compilation takes.
_TELLS_ALL = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 5)

_POINTERS = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.uint8: "*u8",
}


class Launch(NamedTuple):
    """A kernel as it is launched: what Triton compiles for it."""

    kernel: Any
    arch: int
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        """The kernel's name, its constants, and the pointers that this variant takes unaligned."""
        constants = [f"{name}={_said(value)}" for name, value in self.named().items()]
        unaligned = [
            f"{param.name} not aligned"
            for param in self.kernel.params
            if self.signature[param.name].startswith("*")
            and not (
                getattr(param, "do_not_specialize_on_alignment", False)
                or self.attributes.get((param.num,))
            )
        ]
        return " ".join([self.kernel.__name__, *constants, *unaligned])

    def named(self) -> dict[str, Any]:
        """Return the constants by their names."""
        return {self.kernel.arg_names[at[0]]: value for at, value in self.constants.items()}

    @property
    def target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    @property
    def source(self) -> ASTSource:
        if "constexprs" in inspect.signature(ASTSource).parameters:
            return ASTSource(self.kernel, self.signature, self.constants, self.attributes)
        return _older_source(self)


def launches(arch: int, width: int = 4, dtypes: Sequence[Dtypes] = (FLOAT,)) -> list[Launch]:
    """Return what a step launches, once per variant that Triton compiles for an architecture.

    Args:
        arch: as 90.
        width: vectors of U, whose singular values are clipped; 4: or the rate. W has 4.
        dtypes: of weights, gradients and moments.
    """
    noted: dict[str, Launch] = {}
    clip: dict[str, Any] = {"clip": "project", "vectors": width, "io": []}
    with _as_on_a_gpu(arch, noted):
        for kinds in dtypes:
            for count in (3, 16):  # a row of a mask is aligned after 16 of them
                if width == _OF_WEIGHT:
                    _steps(*_whole(count, width, kinds), kinds)
                _steps(*_whole(count, width, kinds, **clip), kinds)
            if width == _OF_WEIGHT:
                _steps(*_cut(width, kinds), kinds)
            _steps(*_cut(width, kinds, **clip), kinds)
    return list(noted.values())


def never_launched(launches: Sequence[Launch]) -> list[str]:
    """Return the names of the kernels that are in none of the launches."""
    launched = {launch.kernel.__name__ for launch in launches}
    return [kernel.__name__ for kernel in kernels() if kernel.__name__ not in launched]


def kernels() -> list[Any]:
    """Return what of triton_step/ Triton compiles and no other function there calls."""
    names = [module.name for module in pkgutil.iter_modules(triton_step.__path__)]
    modules = [importlib.import_module(f"{triton_step.__name__}.{name}") for name in names]
    functions = {
        id(each): each
        for module in modules
        for each in vars(module).values()
        if isinstance(each, JITFunction)
    }
    called = {
        id(each.fn.__globals__.get(name))
        for each in functions.values()
        for name in each.fn.__code__.co_names
    }
    return [each for key, each in functions.items() if key not in called]


class _Driver:
    """Stands in for the driver of a GPU; one device per architecture, which Triton remembers."""

    def __init__(self, arch: int) -> None:
        self._arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._arch, 32)

    def get_current_device(self) -> int:
        return self._arch

    def get_current_stream(self, device: int) -> int:
        return device


@contextmanager
def _as_on_a_gpu(arch: int, noted: dict[str, Launch]) -> Iterator[None]:
    """Have optimizers take a GPU's path on the CPU, and note what Triton compiles."""
    before = dict(vars(driver))
    driver.set_active(_Driver(arch))
    noting = _bound if _TELLS_ALL else _by_arguments
    try:
        with (
            noting(arch, noted),
            patch.object(matrices, "pick", lambda *_, **__: "triton"),
        ):
            yield
    finally:
        vars(driver).update(before)


@contextmanager
def _bound(arch: int, noted: dict[str, Launch]) -> Iterator[None]:
    """Note launches as Triton's binder has them: it looks for them by these keys on a GPU."""
    from triton import knobs

    kernels: list[Any] = []

    def note(*, key: str, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        kernels.append(fn.jit_function)
        given = json.loads(compile["specialization_data"])["options"]
        options = {name: value for name, value in given.items() if isinstance(value, int | str)}
        bound = compile["signature"], compile["constants"], compile["configs"][0]
        noted.setdefault(f"{fn.name}{key}", Launch(fn.jit_function, arch, *bound, options))
        return True  # it is neither compiled nor launched

    with patch.object(knobs.runtime, "jit_cache_hook", note):
        try:
            yield
        finally:
            for kernel in kernels:
                kernel.device_caches.pop(arch, None)


@contextmanager
def _by_arguments(arch: int, noted: dict[str, Launch]) -> Iterator[None]:
    """Note launches by their arguments, as the binder specializes them."""

    def run(kernel: Any, *args: Any, **given: Any) -> None:
        values = dict(zip(kernel.arg_names, args, strict=False))
        others = {*kernel.arg_names, "grid", "warmup"}
        options = {name: given[name] for name in given if name not in others}
        values |= {name: given[name] for name in given if name in kernel.arg_names}
        signature: dict[str, str] = {}
        constants: dict[tuple[int, ...], Any] = {}
        attributes: dict[tuple[int, ...], Any] = {}
        for param in kernel.params:
            value = values[param.name]
            kind, is_aligned = _specialized(param, value)
            signature[param.name] = kind
            if kind == "constexpr":
                constants[param.num,] = value
            if is_aligned:
                attributes[param.num,] = [["tt.divisibility", 16]]
        launch = Launch(kernel, arch, signature, constants, attributes, options)
        key = f"{kernel.__name__} {signature} {constants} {attributes} {options}"
        noted.setdefault(key, launch)

    with patch.object(JITFunction, "run", run):
        yield


def _specialized(param: Any, value: Any) -> tuple[str, bool]:
    """Return an argument's type, and whether it is known to be a multiple of 16."""
    if param.is_constexpr:
        return "constexpr", False
    takes_value = not param.do_not_specialize
    takes_alignment = takes_value and not getattr(param, "do_not_specialize_on_alignment", False)
    if isinstance(value, Tensor):
        return _POINTERS[value.dtype], takes_alignment and value.data_ptr() % 16 == 0
    if isinstance(value, int) and not isinstance(value, bool):
        if value == 1 and takes_value:
            return "constexpr", False
        is_short = -(1 << 31) <= value < 1 << 31
        return "i32" if is_short else "i64", takes_alignment and value % 16 == 0
    return "fp32", False


def _older_source(launch: Launch) -> ASTSource:
    """Return what Triton before 3.3 compiles for a launch."""
    signature = {name: kind for name, kind in launch.signature.items() if kind != "constexpr"}
    aligned = [at[0] for at in launch.attributes]
    compiler = importlib.import_module("triton.compiler.compiler")
    if "divisible_by_16" in inspect.signature(compiler.AttrsDescriptor).parameters:  # 3.1
        attributes = compiler.AttrsDescriptor(divisible_by_16=set(aligned))
    else:
        attributes = compiler.AttrsDescriptor.from_hints(dict.fromkeys(aligned, 16))
    return ASTSource(launch.kernel, signature, launch.named(), attributes)


def _steps(optimizer: AdamW2, parameters: list[nn.Parameter], dtypes: Dtypes) -> None:
    """Make steps, the first from cold vectors; what is launched depends on no number of theirs."""
    for _ in range(3):
        for parameter in parameters:
            if dtypes.weight != dtypes.grad:
                parameter.grad_dtype = dtypes.grad
            parameter.grad = torch.randn_like(parameter).to(dtypes.grad)
        optimizer.step()


def _whole(
    count: int, width: int, dtypes: Dtypes, **options: Any
) -> tuple[AdamW2, list[nn.Parameter]]:
    """Return an optimizer of matrices that lie whole in their tensors, and of a vector."""
    shapes = [(width + 9 + number, width + 7) for number in range(count)]
    named = [
        (f"w{number}", nn.Parameter(torch.randn(shape, dtype=dtypes.weight)))
        for number, shape in enumerate(shapes)
    ]
    named.append(("bias", nn.Parameter(torch.randn(5, dtype=dtypes.weight))))
    optimizer = AdamW2(named, tau=0.01, **_kept_in(dtypes), **options)
    return optimizer, [parameter for _, parameter in named]


def _cut(width: int, dtypes: Dtypes, **options: Any) -> tuple[AdamW2, list[nn.Parameter]]:
    """Return an optimizer of a matrix that is cut within a row, as ZeRO cuts it between ranks."""
    shape = width + 9, width + 7
    size, cut = shape[0] * shape[1], 30
    parameter = Parameter("w", shape)
    lengths = cut, size - cut
    pieces = [nn.Parameter(torch.randn(length, dtype=dtypes.weight)) for length in lengths]
    shards = Shard(parameter, 0, cut, 0), Shard(parameter, cut, size, 0)
    named = zip(("first", "second"), pieces, strict=True)
    optimizer = AdamW2(named, tau=0.01, **_kept_in(dtypes), **options)
    buffers = [Buffer(piece, (shard,)) for piece, shard in zip(pieces, shards, strict=True)]
    optimizer.engine = GivenLayout(lambda: Layout(buffers))
    return optimizer, pieces


def _kept_in(dtypes: Dtypes) -> dict[str, Any]:
    """Return what has AdamW2 keep M and V so, at a β₂ that V in bfloat16 can follow."""
    return {"betas": (0.9, 0.95), "state_dtype": dtypes.state}


def _said(value: Any) -> str:
    return str(getattr(value, "value", value))

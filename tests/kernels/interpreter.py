"""Triton's interpreter, and steps that it can make in a test's time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import pytest

from weyl_megatron import device_step, host_step

#: Of files that test_choice.py runs, in a process whose environment has it from the start.
needs_interpreter = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1",
    reason="runs with TRITON_INTERPRET=1, from test_choice.py",
)


@contextmanager
def few_iterations(count: int = 3) -> Iterator[None]:
    """Have the first step make so few iterations, under every kernel."""
    import triton.language as tl

    from weyl_megatron.kernels.triton_step import decisions

    with ExitStack() as stack:
        for module in (device_step, host_step):
            stack.enter_context(patch.object(module, "COLD_ITERS", count))
        stack.enter_context(patch.object(decisions, "_COLD", tl.constexpr(count)))
        yield


@contextmanager
def quick_interpreter() -> Iterator[None]:
    """Have the interpreter put its functions in the place of the language's once in a launch.

    It does so at every call of a device function, which takes half of its time.
    """
    from triton.runtime import interpreter

    put_in_place: Any = interpreter._patch_lang
    launch: Any = None  # what the launch that runs has put in place, until it is taken out again
    done: set[tuple[int, ...]] = set()

    def put_once(fn: Any) -> Any:
        nonlocal launch
        languages = {id(interpreter.tl), id(interpreter.tl.core)}
        sees = tuple(id(each) for each in fn.__globals__.values() if id(each) in languages)
        if launch is None or not launch._changes:
            done.clear()
            launch = put_in_place(fn)
        elif sees not in done:
            launch._changes += put_in_place(fn)._changes
        else:
            return type(launch)()
        done.add(sees)
        return launch

    with patch.object(interpreter, "_patch_lang", put_once):
        yield

"""What `make asan` looks for is found: calls of the C++ kernel that are wrong on purpose."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import ROOT
from weyl_megatron.kernels import cpu

pytestmark = pytest.mark.skipif(
    "-fsanitize" not in os.environ.get(cpu.FLAGS, ""), reason="`make asan` runs it"
)

#: Steps a (9, 7) matrix, W, G, M and V of which are tensors of their own, in a process per call.
_CALLS = """
import ctypes, json, os, sys, torch
from weyl_megatron.kernels.cpu import library
def step(lengths, offset, stride, matrix):
    tile = torch.tensor([0, offset, 9, 7, stride, matrix, 0, 0, 7, 1, 7, -1, 1])
    tensors = [torch.ones(length) for length in lengths]
    buffers = torch.tensor([*(tensor.data_ptr() for tensor in tensors), 0])  # M and V are floats
    hypers = torch.full((14,), 0.5).view(torch.uint8)
    moved, sums = torch.ones(1, dtype=torch.uint8), torch.zeros(1, 3, dtype=torch.float64)
    given = [ctypes.c_void_p(each.data_ptr()) for each in (tile, moved, buffers, hypers, sums)]
    one = ctypes.c_int64(1)
    library().weyl_step(given[0], one, given[1], one, *given[2:], one)
library()
for name, call in json.loads(sys.argv[1]).items():
    process = os.fork()
    if not process:
        out = os.open(os.path.join(sys.argv[2], name), os.O_CREAT | os.O_WRONLY)
        os.dup2(out, 1), os.dup2(out, 2)
        step(**call)
        os.write(1, b"stepped")
        os._exit(0)
    os.waitpid(process, 0)
"""

_RIGHT = {"lengths": [63] * 4, "offset": 0, "stride": 7, "matrix": 0}

#: What is wrong, and what is said of it.
FAULTS: dict[str, tuple[dict[str, object], str]] = {
    "nothing": ({}, "stepped"),
    "W is short": ({"lengths": [62, 63, 63, 63]}, "AddressSanitizer: heap-buffer-overflow"),
    "G is short": ({"lengths": [63, 62, 63, 63]}, "AddressSanitizer: heap-buffer-overflow"),
    "M is short": ({"lengths": [63, 63, 62, 63]}, "AddressSanitizer: heap-buffer-overflow"),
    "V is short": ({"lengths": [63, 63, 63, 62]}, "AddressSanitizer: heap-buffer-overflow"),
    "a tile begins early": ({"offset": -1}, "AddressSanitizer: heap-buffer-overflow"),
    "a tile's rows are longer": ({"stride": 8}, "AddressSanitizer: heap-buffer-overflow"),
    "a tile is of no matrix": ({"matrix": 1 << 40}, "AddressSanitizer: "),
    "an address overflows": ({"stride": 1 << 61}, "runtime error: "),
}


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What every call said, in a file of its name."""
    folder = tmp_path_factory.mktemp("said")
    calls = json.dumps({name: {**_RIGHT, **fault} for name, (fault, _) in FAULTS.items()})
    command = [sys.executable, "-c", _CALLS, calls, str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=300)
    return folder


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(name: str, said: Path) -> None:
    text = (said / name).read_text()
    assert FAULTS[name][1] in text
    assert ("stepped" in text) == (name == "nothing") == ("cpu_step.cpp:" not in text)

"""Run tests on the C++ kernel under AddressSanitizer and UBSan, whose first finding ends the run.

    python -m tests.kernels.sanitizers ARGUMENTS        of pytest; `make asan` tells which tests

The sanitizers' library has to be there before Python, which is not built with it; what Python
itself leaks at its end is not looked at. tests/kernels/test_sanitizers.py shows that faults are
found.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from weyl_megatron.kernels import cpu

#: -O3 takes a minute to compile with sanitizers, and what they look at is the same.
_FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g -O1"

#: libstdc++, too, or the first exception that is thrown finds no sanitizer's handler.
_PRELOADED = ("libasan.so", "libstdc++.so")


def main() -> None:
    os.environ[cpu.FLAGS] = _FLAGS
    # Where the tests look for it, too: tests/conftest.py.
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))
    path = cpu.build()  # a compiler is no faster for being sanitized itself
    print(f"{path.name}: {_FLAGS}", flush=True)
    os.environ["LD_PRELOAD"] = " ".join(map(_library, _PRELOADED))
    os.environ["ASAN_OPTIONS"] = "detect_leaks=0"
    os.environ["UBSAN_OPTIONS"] = "print_stacktrace=1"
    os.execv(sys.executable, [sys.executable, "-m", "pytest", *sys.argv[1:]])


def _library(name: str) -> str:
    compiler = str(cpu.find_compiler())
    command = [compiler, f"-print-file-name={name}"]
    path = Path(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
    if not path.is_absolute():
        sys.exit(f"{compiler} has no {name}: the sanitizers take g++ with its own; set CXX.")
    return str(path)


if __name__ == "__main__":
    main()

"""torchrun worker: the Megatron example's own main, on CPU and gloo."""

from __future__ import annotations

import sys

from tests import megatron_cpu
from tests.launch import ROOT

megatron_cpu.install()
sys.path.insert(0, str(ROOT / "examples" / "megatron"))

import pretrain_gpt  # noqa: E402  (after what it finds CUDA by)

if __name__ == "__main__":
    sys.exit(pretrain_gpt.main())

"""torchrun worker: the Megatron example's own main, on CPU and gloo."""

from __future__ import annotations

import sys

from tests.processes import ROOT
from weyl_megatron.engines.shutdown import shutdown

if __name__ == "__main__":  # Megatron's checkpoint writers import this file again
    from tests import megatron_cpu

    megatron_cpu.install()
    sys.path.insert(0, str(ROOT / "examples" / "megatron"))
    import pretrain_gpt

    shutdown(pretrain_gpt.main())

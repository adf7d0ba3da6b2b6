"""A script ends once: what is registered is run, children are ended, and Python is not torn
down.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.processes import HANGS, ROOT, torchrun


def test_ranks_leave_with_what_they_registered_run_and_nothing_torn_down() -> None:
    # Beside this file, its folder would have a "torch" for it. Its children sleep for 600 s.
    printed = torchrun(Path(__file__).parent / "torch/shutdown_worker.py", 2, timeout=300)
    assert printed.count("end of rank 0") == 1 and printed.count("end of rank 1") == 1
    assert "torn down" not in printed


def test_the_status_is_the_process_s_and_what_was_printed_is_written() -> None:
    script = (
        "from weyl_megatron.engines.shutdown import shutdown\n"
        "print('printed')\nshutdown(3)\nprint('after')"
    )
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=HANGS
    )
    assert (run.returncode, run.stdout) == (3, "printed\n")

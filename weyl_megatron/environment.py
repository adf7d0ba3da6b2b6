"""What this package is called outside Python: its log, its command, its environment variables.

Rooms that are to know no engine take these from here, because the package's name holds one's.
"""

from __future__ import annotations

import functools
import logging

#: Where everything that is logged goes.
LOG = logging.getLogger("weyl_megatron")


@functools.cache
def say_once(sentence: str) -> None:
    """Log a warning, unless it was logged before."""
    LOG.warning(sentence)


#: The command that says which kernel steps here and why.
DOCTOR = "weyl-megatron doctor"

#: The variable that names a kernel: "torch", "cpu" or "triton".
KERNEL = "WEYL_MEGATRON_KERNEL"

#: The variable that puts AdamW2 in the place of Megatron's Adam, with its options.
IN_MEGATRON = "WEYL_MEGATRON"

#: Flags for the C++ compiler, beside the package's own.
CXXFLAGS = "WEYL_MEGATRON_CXXFLAGS"

#: The folder in a user's cache where what was compiled lies.
CACHE = "weyl_megatron"

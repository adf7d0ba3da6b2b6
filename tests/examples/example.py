"""Makes the Megatron example's files importable, and a small corpus for them: the standard
library's own sources.
"""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path

import pytest

from tests.processes import ROOT

for module in ("megatron.core", "sentencepiece", "yaml"):
    pytest.importorskip(module)

EXAMPLE = ROOT / "examples" / "megatron"
RECIPES = EXAMPLE / "recipes"
sys.path.insert(0, str(EXAMPLE))


def sources(count: int) -> list[Path]:
    """The first `count` modules of the standard library, by name."""
    return sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:count]

"""The newest megatron-core, where an older one is installed; what only the newest has.

Wheels of megatron-core from 0.17 on are for Python 3.12 and newer, but for the compiled helpers of
its datasets, which training does not need, they are Python that 3.11 runs, too. `make test-matrix`
runs all tests on it, under Python 3.12.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.processes import HANGS, ROOT, environment, run_ranks
from weyl_megatron.environment import CACHE

pytest.importorskip("megatron.core", reason="megatron-core is not installed")

HERE = Path(__file__).parent
INSTALLED = tuple(map(int, version("megatron-core").split(".")[:2]))
NEWEST = "0.19.2"
CORE = [HERE / "test_megatron.py", HERE / "test_variable.py", Path(__file__)]


@pytest.fixture
def newest() -> Path:
    """The folder of the newest megatron-core, unpacked once a machine."""
    if tuple(map(int, NEWEST.split(".")[:2])) <= INSTALLED:
        pytest.skip(f"megatron-core {version('megatron-core')} is what is tested already")
    if sys.version_info < (3, 11):
        pytest.skip(f"megatron-core {NEWEST} needs Python 3.11")
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / CACHE / "tests"
    folder = cache / f"megatron-core-{NEWEST}"
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    options = "--no-deps --only-binary :all: --python-version 3.12 --platform manylinux_2_28_x86_64"
    download = [sys.executable, "-m", "pip", "download", "--quiet", *options.split()]
    with tempfile.TemporaryDirectory(dir=cache) as wheels:
        run = subprocess.run(
            [*download, "--dest", wheels, f"megatron-core=={NEWEST}"],
            capture_output=True,
            text=True,
            timeout=HANGS,
        )
        files = sorted(Path(wheels).glob("*.whl"))
        if not files:
            last = run.stderr.strip().splitlines()[-1:]
            pytest.skip(f"the wheel of megatron-core {NEWEST} could not be had: {last}")
        unpacked = Path(wheels) / "unpacked"
        zipfile.ZipFile(files[0]).extractall(unpacked)
        if not folder.is_dir():  # another process may have been first
            unpacked.rename(folder)
    return folder


@pytest.mark.slow
def test_the_quick_cases_pass_on_the_newest(newest: Path) -> None:
    variables = {**environment(), "MEGATRON_CORE": str(newest)}
    variables["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(newest)])
    selection = ["-m", "not slow", "-p", "no:cacheprovider", *map(str, CORE)]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *selection],
        cwd=ROOT,
        env=variables,
        capture_output=True,
        text=True,
        timeout=2 * HANGS,
    )
    assert run.returncode == 0, run.stdout[-6000:]
    assert re.search(r"^\d+ passed", run.stdout, re.MULTILINE)


@pytest.mark.skipif(INSTALLED < (0, 19), reason="megatron-core before 0.19 has no weight shards")
def test_more_weight_shards_than_tensor_parallel_ranks_are_refused_in_one_sentence() -> None:
    printed = run_ranks("megatron", HERE / "weight_shards_worker.py", 2)
    assert int(re.findall(r"^shards (\d+)", printed, re.MULTILINE)[0]) > 0
    assert json.loads(re.findall(r"^said (.*)", printed, re.MULTILINE)[0]) == [
        "AdamW2: gtp_weight_remat_size got 2, it takes 1: as many weight shards as "
        "tensor-parallel ranks.",
        "AdamW2: parameter 'embedding.word_embeddings.weight' is cut into weight shards (GTP), "
        "whose layout AdamW2 does not understand; it takes as many weight shards as "
        "tensor-parallel ranks.",
    ]

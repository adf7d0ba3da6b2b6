"""The patches, the versions that each is for, and copies of packages with a patch applied to
them.
"""

from __future__ import annotations

import os
import re
import subprocess
import sysconfig
from pathlib import Path

PATCHES = Path(__file__).parent.parent.parent / "patches"
SITE = Path(sysconfig.get_path("platlib"))

#: The patch of each version, by the name of the distribution. Megatron-LM's trees go by
#: megatron-core's version.
SUPPORTED = {
    "megatron-core": {
        "0.14.0": "megatron-0.14.0.patch",
        "0.16.1": "megatron-0.16.1.patch",
        "0.18.2": "megatron-0.18.2.patch",
        "0.19.1": "megatron-0.19.0.patch",  # which is what the tree of core_v0.19.0 calls itself
        "0.19.2": "megatron-0.19.0.patch",
    },
    "deepspeed": {
        version: f"deepspeed-{version}.patch" for version in ("0.16.9", "0.18.9", "0.19.8")
    },
}

#: Of Megatron's patches, what megatron-core alone takes: before 0.18 its wheels have no
#: megatron/training.
CORE = ("--include=megatron/core/*",)


def files(patch: Path) -> dict[str, str]:
    """Return the files that a patch changes and the start of the hash that git gives to each before
    it.
    """
    found = re.findall(
        r"^diff --git a/(\S+) b/\1\nindex ([0-9a-f]+)\.\.[0-9a-f]+\n", patch.read_text(), re.M
    )
    return dict(found)


def git(folder: Path, *args: str) -> str:
    """Run git in ``folder`` as outside of any repository: within one, ``git apply`` skips what is
    not below it.
    """
    environment = dict(os.environ, GIT_CEILING_DIRECTORIES=str(folder.parent))
    run = subprocess.run(
        ["git", *args], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def contents(folder: Path) -> dict[Path, bytes]:
    """Return every file below ``folder``, but not what Python compiled."""
    found = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    return {path.relative_to(folder): path.read_bytes() for path in found}


def check_round_trip(tree: Path, patch: Path, *flags: str) -> None:
    """Apply ``patch`` to the pristine ``tree``; fail unless it was made for these very files and
    can be undone.
    """
    before = contents(tree)
    for name, blob in files(patch).items():
        if (tree / name).is_file():
            assert git(tree, "hash-object", name).startswith(blob), (
                f"{patch.name} was made for another {name}"
            )
    git(tree, "apply", *flags, str(patch))
    after = contents(tree)
    changed = {str(path) for path in after if after[path] != before.get(path)}
    assert (
        changed == {name for name in files(patch) if (tree / name).is_file()}
        and after.keys() == before.keys()
    )
    git(tree, "apply", "-R", *flags, str(patch))
    assert contents(tree) == before
    git(tree, "apply", *flags, str(patch))

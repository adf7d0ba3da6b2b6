"""What every patch is, as text: for one version, in the files that the README names, and small."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.patches.trees import PATCHES, SUPPORTED, files, git

ALL = sorted(PATCHES.glob("*.patch"))
README = PATCHES / "README.md"

each = pytest.mark.parametrize("patch", ALL, ids=[patch.stem for patch in ALL])


def test_every_supported_version_has_a_patch_and_every_patch_a_version() -> None:
    assert {patch.name for patch in ALL} == {
        name for versions in SUPPORTED.values() for name in versions.values()
    }


@each
def test_a_patch_is_well_formed_and_names_one_version(patch: Path) -> None:
    assert re.fullmatch(r"(megatron|deepspeed)-\d+\.\d+\.\d+\.patch", patch.name)
    counted = git(PATCHES, "apply", "--numstat", patch.name)  # reads every hunk
    assert {line.split("\t")[2] for line in counted.splitlines()} == set(files(patch))
    assert re.search(rf"^\|.*`{re.escape(patch.name)}`", README.read_text(), re.MULTILINE)


@each
def test_a_patch_touches_what_the_readme_says(patch: Path) -> None:
    row = next(
        line
        for line in README.read_text().splitlines()
        if f"`{patch.name}`" in line and line.startswith("|")
    )
    named = re.findall(r"`(\S+\.py)`", row)
    package = {"megatron": "megatron/", "deepspeed": "deepspeed/runtime/"}[patch.name.split("-")[0]]
    assert {package + name for name in named} == set(files(patch))


@each
def test_a_patch_imports_us_in_branches_only_and_quotes_little(patch: Path) -> None:
    lines = [line for line in patch.read_text().splitlines() if not line.startswith(("+++", "---"))]
    assert all(
        line.startswith("+    ") for line in lines if "import" in line and "weyl_megatron" in line
    )
    assert sum(line.startswith("-") for line in lines) <= 7
    assert all(line.endswith("@@") for line in lines if line.startswith("@@"))

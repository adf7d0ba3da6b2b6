from __future__ import annotations

import argparse
import re
from pathlib import Path

import pytest
import torch

from tests.browser import CHROMIUM, faults, look
from weyl_megatron.report import simulation
from weyl_megatron.report.modes import run
from weyl_megatron.report.simulation import HEAD, TOKENS, simulate
from weyl_megatron.watch.attention import Mode


@pytest.mark.parametrize("seed", range(8))
def test_every_mode_is_classified_as_it_was_built(seed: int) -> None:
    normal, benign, malignant = simulate(seed)
    assert [each.mode for each in (normal, benign, malignant)] == [
        Mode.NORMAL,
        Mode.BENIGN,
        Mode.MALIGNANT,
    ]
    assert (
        normal.relative_entropy > 0.8
        and max(benign.relative_entropy, malignant.relative_entropy) < 0.05
    )
    assert benign.map_rank > 0.99 * TOKENS and malignant.map_rank < 0.1 * TOKENS
    assert benign.attention.diagonal().min() > 0.9


def test_the_collapses_differ_in_the_spread_of_their_energy_alone() -> None:
    normal, benign, malignant = simulate()
    assert float(benign.singular_values.norm()) == pytest.approx(
        float(malignant.singular_values.norm()), rel=1e-5
    )
    assert (
        benign.concentration[3] < 0.2
        and normal.concentration[3] < 0.2
        and malignant.concentration[1] > 0.99
    )
    for each in (normal, benign, malignant):
        assert each.concentration.shape == (HEAD,) and float(
            each.concentration[-1]
        ) == pytest.approx(1)
        assert each.singular_values.min() > 0.1 and each.singular_values.diff().le(0).all()


def test_a_seed_gives_the_same_maps_again() -> None:
    for first, again in zip(simulate(3), simulate(3), strict=True):
        assert torch.equal(first.attention, again.attention)
    assert not torch.equal(simulate(3)[0].attention, simulate(4)[0].attention)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("modes") / "new" / "modes.html"
    assert run(argparse.Namespace(out=path, seed=0)) == 0
    return path


def test_the_command_prints_the_table(
    page: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "modes.html"
    assert run(argparse.Namespace(out=path, seed=0)) == 0
    shown = capsys.readouterr().out
    assert [line.split()[-1] for line in shown.splitlines()[1:4]] == [
        "normal",
        "benign",
        "malignant",
    ]
    assert "SEC(64, 4)" in shown and str(path) in shown
    assert path.read_bytes() == page.read_bytes()


def test_another_mode_than_built_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(simulation, "SIGMA", 10.0)
    assert run(argparse.Namespace(out=tmp_path / "modes.html", seed=0)) == 1


def test_the_page_needs_nothing_else(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert "://" not in text.replace("http://www.w3.org/2000/svg", "") and "$" not in text
    assert all(source.startswith("data:") for source in re.findall(r'(?:src|href)="([^"]*)"', text))
    assert text.count("<img ") == 3 and text.count("<polyline ") == 6


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium")
@pytest.mark.parametrize("is_dark", [False, True])
def test_the_page_works_in_a_browser(page: Path, tmp_path: Path, is_dark: bool) -> None:
    looks = look(page.read_text(encoding="utf-8"), tmp_path, is_dark)
    assert [faults(seen) for seen in looks] == [{}, {}]
    assert [seen["images"] for seen in looks] == [3, 3]

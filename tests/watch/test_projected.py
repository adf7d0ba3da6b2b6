"""What Watch tells of matrices whose singular values are clipped, from the step to the page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from examples.collapse.model import GPT
from tests.watch.test_watch import CONFIG, tokens
from weyl_megatron import AdamW2, MatrixStats
from weyl_megatron.report.report import write_report
from weyl_megatron.report.runs import read_run
from weyl_megatron.watch import Watch

KEYS = ("directions", "share", "unseen")


def watched(out: Path, **settings: Any) -> tuple[dict[str, MatrixStats], dict[str, float]]:
    """What the optimizer and Watch say of a first step; with the settings of an optimizer."""
    torch.manual_seed(3)
    model = GPT(CONFIG)
    optimizer = AdamW2(model.named_parameters(), model=model, weight_decay=0.0, **settings)
    watch = Watch(model, optimizer, out=out)
    x = tokens()
    loss = model(x[:, :-1], x[:, 1:])
    loss.backward()
    optimizer.step()
    values = dict(watch.step(loss))
    watch.close()
    return optimizer.stats(), values


def page(folder: Path) -> str:
    write_report([folder], folder / "report.html")
    return (folder / "report.html").read_text(encoding="utf-8")


def test_what_is_left_of_a_projected_update_is_told(tmp_path: Path) -> None:
    _, plain = watched(tmp_path / "scale", lr=0.05)
    stats, values = watched(tmp_path / "project", lr=0.05, clip="project", vectors=4)
    projected = {name for name, entry in stats.items() if entry.directions is not None}
    assert projected == {name for name in stats if name.startswith("blocks.")}
    expected = {
        f"clip/{name}/{key}": getattr(stats[name], key) for name in projected for key in KEYS
    }
    assert {tag: values[tag] for tag in expected} == expected
    assert values.keys() - expected.keys() == plain.keys()  # all else is told as of a scaled run
    for name in projected:
        directions, share, unseen = (values[f"clip/{name}/{key}"] for key in KEYS)
        assert 0 < directions <= 4 and 0 < share < 1 and 0 < unseen < 1
        assert values[f"clip/{name}/lr"] == pytest.approx(share * 0.05)
    assert read_run(tmp_path / "project").matrices("unseen").keys() == projected
    assert 'data-panel="projected"' in page(tmp_path / "project")


def test_of_scaled_matrices_alone_nothing_more_is_told(tmp_path: Path) -> None:
    _, values = watched(tmp_path, lr=0.05)
    keys = {tag.rpartition("/")[2] for tag in values if tag.startswith("clip/")}
    assert keys == {"lr", "sigma_weight", "sigma_update", "clipped", "update_norm"}
    assert 'data-missing="projected"' in page(tmp_path)


def test_an_update_that_keeps_the_rule_is_whole(tmp_path: Path) -> None:
    _, values = watched(tmp_path, lr=1e-6, clip="project")
    told = {
        key: {value for tag, value in values.items() if tag.endswith(f"/{key}")} for key in KEYS
    }
    assert told == {"directions": {0}, "share": {1}, "unseen": {1}}
    assert 'data-panel="projected"' in page(tmp_path)

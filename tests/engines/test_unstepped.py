"""An AdamW2 that something else steps in the place of is told, and what waits for that keeps
nothing alive.
"""

from __future__ import annotations

import gc
import logging
import sys
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

from weyl_megatron import AdamW2
from weyl_megatron.engines import unstepped
from weyl_megatron.engines.on_import import when_imported


class Engine:
    """Trains a model with an optimizer."""


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]


def test_it_is_told_once_by_an_engine_and_with_what_stepped(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, engine = nn.Linear(3, 2), Engine()
    optimizer, other = AdamW2(model.parameters()), torch.optim.RMSprop(model.parameters())
    for _ in range(2):
        unstepped.look(engine, model.parameters(), other)
    unstepped.look(Engine(), model.parameters(), other)
    [line] = said(caplog)
    assert (
        "but Engine does not step it: its first step was that of torch.optim.rmsprop.RMSprop."
        in line
    )
    del optimizer


def test_an_engine_may_have_dropped_it_already(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Linear(3, 2)
    AdamW2(model.parameters())
    gc.collect()
    unstepped.look(Engine(), model.parameters(), torch.optim.SGD(model.parameters()))
    assert len(said(caplog)) == 1


def test_nothing_is_told_of_what_is_stepped_or_of_other_models(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, other = nn.Linear(3, 2), nn.Linear(3, 2)
    stepped, elsewhere = AdamW2(model.parameters()), AdamW2(other.parameters())
    model(torch.ones(1, 3)).sum().backward()
    stepped.step()
    unstepped.look(Engine(), model.parameters(), stepped)
    unstepped.look(Engine(), model.parameters(), torch.optim.SGD(model.parameters()))
    assert said(caplog) == []
    unstepped.look(Engine(), other.parameters(), torch.optim.SGD(other.parameters()))
    assert len(said(caplog)) == 1
    del elsewhere


def test_neither_optimizers_nor_parameters_are_kept_alive() -> None:
    model = nn.Linear(3, 2)
    optimizer = AdamW2(model.parameters())
    found = weakref.ref(optimizer), weakref.ref(model.weight)
    del optimizer, model
    gc.collect()
    assert [ref() for ref in found] == [None, None]
    AdamW2([nn.Parameter(torch.ones(1))])  # at which what is gone is dropped
    assert sum(any(ref() is not None for ref in made.params) for made in unstepped._unstepped) <= 1


def test_accelerate_without_deepspeed_tells_it_too(caplog: pytest.LogCaptureFixture) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = nn.Linear(3, 2)
    optimizer = AdamW2(model.parameters())
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    prepared, other = accelerator.prepare(model, torch.optim.Adam(model.parameters()))
    for step in range(4):
        with accelerator.accumulate(prepared):
            accelerator.backward(prepared(torch.ones(1, 3)).sum())
            other.step()
        assert len(said(caplog)) == (step > 0)
    assert (
        "but AcceleratedOptimizer does not step it: its first step was that of "
        "torch.optim.adam.Adam." in said(caplog)[0]
    )
    del optimizer


def test_what_waits_for_a_module_is_called_once_it_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "late_engine").mkdir()
    (tmp_path / "late_engine" / "__init__.py").write_text("")
    (tmp_path / "late_engine" / "inside.py").write_text("value = 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    seen: list[int] = []
    for _ in range(2):
        when_imported("late_engine.inside", lambda module: seen.append(module.value))
    when_imported("no_such_engine", lambda module: seen.append(0))
    assert seen == []
    __import__("late_engine.inside")
    assert seen == [3]
    when_imported("late_engine.inside", lambda module: seen.append(module.value + 1))
    assert seen == [3, 4]
    with pytest.raises(ModuleNotFoundError, match="no_such_engine"):
        __import__("no_such_engine")
    assert "late_engine.inside" in sys.modules

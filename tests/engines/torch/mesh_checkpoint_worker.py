"""torchrun worker: torch.distributed.checkpoint saves a run, and it goes on on another layout.

torchrun --nproc_per_node=N mesh_checkpoint_worker.py save|load LAYOUT FOLDER
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.nn import functional

from tests import tolerances
from tests.engines.torch import meshes
from tests.engines.torch.mesh_worker import batch
from weyl_megatron import AdamW2
from weyl_megatron.engines.shutdown import shutdown

#: Steps before the checkpoint and after it.
BEFORE, AFTER = 4, 3

#: The forms of a state dict, and the options of the optimizer.
RUNS = {
    "nested": (False, {}),
    "flat": (True, {}),
    "nested, projected": (False, {"clip": "project"}),
    "flat, projected": (True, {"clip": "project"}),
    "nested, M and V in bfloat16": (False, {"state_dtype": "bfloat16", "betas": (0.9, 0.95)}),
}


def make(layout: str, options: dict[str, Any], cls: type = AdamW2) -> tuple[Any, Any]:
    torch.manual_seed(0)
    net = meshes.Net(**meshes.OVER_TENSOR_PARALLELISM)  # of every layout: one reads the other's
    if layout != "whole":
        getattr(meshes, layout)(net, dist.get_world_size())
    if cls is not AdamW2:  # torch's, which takes names from 2.6 on
        return net, cls(net.parameters(), lr=1e-2, weight_decay=0.1, **options)
    options = {"tau": 0.03, "io": ["wte*"], **options}
    return net, cls(net.named_parameters(), lr=1e-2, weight_decay=0.1, **options)


def step(net: Any, optimizer: Any, number: int) -> None:
    tokens = batch(number, 4)  # the same on every rank: it does not hang on how many there are
    logits = net(tokens)
    functional.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
    optimizer.step()
    optimizer.zero_grad()


def weights(net: Any) -> dict[str, Tensor]:
    return {name: meshes.whole(param) for name, param in net.named_parameters()}


def go_on(net: Any, optimizer: Any) -> tuple[dict[str, Tensor], Any]:
    for number in range(BEFORE, BEFORE + AFTER):
        step(net, optimizer, number)
    entries = optimizer.stats() if isinstance(optimizer, AdamW2) else {}
    return weights(net), {name: tuple(entry) for name, entry in entries.items()}


def save(layout: str, folder: Path) -> None:
    for name, (is_flat, options) in RUNS.items():
        net, optimizer = make(layout, options)
        for number in range(BEFORE):
            step(net, optimizer, number)
        form = StateDictOptions(flatten_optimizer_state_dict=is_flat)
        model, state = get_state_dict(net, optimizer, options=form)
        if name == "flat":  # on a group of its own, or it would wait for training's collectives
            group = dist.new_group(backend="gloo")
            path = folder / name
            dcp.async_save(
                {"model": model, "optimizer": state}, checkpoint_id=path, process_group=group
            ).result()
        else:
            dcp.save({"model": model, "optimizer": state}, checkpoint_id=folder / name)
        ended = go_on(net, optimizer)
        if dist.get_rank() == 0:
            torch.save(ended, folder / f"{name}.pt")
    net, adamw = make(layout, {}, torch.optim.AdamW)
    for number in range(BEFORE):
        step(net, adamw, number)
    model, state = get_state_dict(net, adamw)
    dcp.save({"model": model, "optimizer": state}, checkpoint_id=folder / "AdamW")
    moments = [meshes.whole(adamw.state[param]["exp_avg_sq"]) for param in adamw.state]
    if dist.get_rank() == 0:
        torch.save(moments, folder / "AdamW.pt")


def load(layout: str, folder: Path) -> None:
    """Go on from what two ranks saved; three save it anew, and one goes on from that, too."""
    again = folder / "again"
    from_three = [(name, again) for name in RUNS if dist.get_world_size() == 1]
    for name, source in [*((name, folder) for name in RUNS), *from_three]:
        is_flat, options = RUNS[name]
        net, optimizer = make(layout, options)
        form = StateDictOptions(flatten_optimizer_state_dict=is_flat)
        read(net, optimizer, source / name, form)
        if dist.get_world_size() == 3:
            model, state = get_state_dict(net, optimizer, options=form)
            dcp.save({"model": model, "optimizer": state}, checkpoint_id=again / name)
        expected, entries = torch.load(folder / f"{name}.pt", weights_only=False)
        ended, entries_here = go_on(net, optimizer)
        is_same = all(torch.equal(ended[key], expected[key]) for key in expected)
        distance = max(
            float((ended[key] - expected[key]).norm() / expected[key].norm()) for key in expected
        )
        has_same_layout = layout == "fsdp" and dist.get_world_size() == 2
        if dist.get_rank() == 0:
            print(f"{name}: {'bit for bit' if is_same else f'{distance:.1e}'}", flush=True)
        assert is_same or not has_same_layout, (name, distance)
        assert not has_same_layout or entries_here == entries
        assert distance <= 1e-5, (name, distance)
        # Had it started from other vectors, σ₁ would be another by more than rounding.
        for key, entry in entries.items():
            assert abs(entries_here[key][1] / entry[1] - 1) < 1e-5, (name, key)
    switch(layout, folder)


def read(net: Any, optimizer: Any, path: Path, form: StateDictOptions, **planner: Any) -> None:
    model, state = get_state_dict(net, optimizer, options=form)
    counts = {float(entry["step"]) for entry in optimizer.state.values()}
    assert counts == {0.0} or not isinstance(optimizer, AdamW2), "the state's making is no step"
    options = {"planner": dcp.DefaultLoadPlanner(**planner)} if planner else {}
    dcp.load({"model": model, "optimizer": state}, checkpoint_id=path, **options)
    set_state_dict(net, optimizer, model_state_dict=model, optim_state_dict=state, options=form)
    counts = {float(entry["step"]) for entry in optimizer.state.values()}
    assert counts == {float(BEFORE)}, counts


def switch(layout: str, folder: Path) -> None:
    """AdamW's run goes on under AdamW², and AdamW²'s under AdamW; a scaled one projected, and the
    reverse.
    """
    for name, is_flat, clip in (("flat", True, "project"), ("nested, projected", False, "scale")):
        net, optimizer = make(layout, {"clip": clip})
        form = StateDictOptions(flatten_optimizer_state_dict=is_flat)
        read(net, optimizer, folder / name, form)
        _, entries = go_on(net, optimizer)
        assert any(entry[3] for entry in entries.values()), "nothing was clipped"
    expected = torch.load(folder / "AdamW.pt")
    net, optimizer = make(layout, {})
    read(net, optimizer, folder / "AdamW", StateDictOptions(), allow_partial_load=True)
    moments = [meshes.whole(optimizer.state[param]["exp_avg_sq"]) for param in optimizer.state]
    assert all(map(torch.equal, moments, expected))
    _, entries = go_on(net, optimizer)
    assert any(entry[3] for entry in entries.values()), "nothing was clipped"
    net, adamw = make(layout, {}, torch.optim.AdamW)
    read(net, adamw, folder / "nested", StateDictOptions())
    go_on(net, adamw)


def main() -> None:
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    action, layout, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    with tolerances.every_iteration():
        {"save": save, "load": load}[action](layout, folder)
    print("done", flush=True)
    shutdown()


if __name__ == "__main__":
    main()

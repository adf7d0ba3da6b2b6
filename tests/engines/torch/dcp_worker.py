"""torchrun worker: DDP, scaled and projected, saved and loaded by torch.distributed.checkpoint.

Usage: dcp_worker.py FOLDER. On every rank, a run that is stopped and resumed has the weights of one
that is not, bit for bit.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn.parallel import DistributedDataParallel

from weyl_megatron import AdamW2
from weyl_megatron.engines.shutdown import shutdown

#: Before the checkpoint, and after it.
BEFORE, AFTER = 4, 3

CLIPS: dict[str, dict[str, Any]] = {
    "scale": {},
    "project": {"clip": "project", "vectors": 6},
}


class Run:
    """A net of an embedding, two hidden matrices and a head."""

    def __init__(self, seed: int, **options: Any) -> None:
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Embedding(19, 16), nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 16))
        net.add_module("head", nn.Linear(16, 5))
        self.model = DistributedDataParallel(net)
        self.optimizer = AdamW2(
            self.model.named_parameters(), lr=0.03, weight_decay=0.1, model=self.model, **options
        )

    def train(self, first: int, steps: int) -> None:
        for step in range(first, first + steps):
            generator = torch.Generator().manual_seed(100 * step + dist.get_rank())
            tokens = torch.randint(19, (8,), generator=generator)
            self.optimizer.zero_grad()
            self.model(tokens).square().mean().backward()
            self.optimizer.step()

    def weights(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self.model.parameters()]


def by_name(run: Run) -> dict[str, Any]:
    """As torch's pages have it: state by the parameters' names."""
    model, optimizer = get_state_dict(run.model, run.optimizer)
    return {"model": model, "optimizer": optimizer}


def plain(run: Run) -> dict[str, Any]:
    """The state dicts as they are."""
    return {"model": run.model.state_dict(), "optimizer": run.optimizer.state_dict()}


def resumed(path: Path, seed: int, form: str, options: dict[str, Any]) -> Run:
    run = Run(seed, **options)
    if form == "by_name":
        state = by_name(run)
        dcp.load(state, checkpoint_id=path)
        set_state_dict(
            run.model,
            run.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
        return run
    run.train(0, 1)  # DCP loads into what is there: a state dict has to have its form
    state = plain(run)
    dcp.load(state, checkpoint_id=path)
    run.model.load_state_dict(state["model"])
    run.optimizer.load_state_dict(state["optimizer"])
    return run


def main() -> None:
    folder = Path(sys.argv[1])
    dist.init_process_group("gloo")
    for clip, options in CLIPS.items():
        run = Run(0, **options)
        run.train(0, BEFORE)
        for form, state_of in {"by_name": by_name, "plain": plain}.items():
            dcp.save(state_of(run), checkpoint_id=folder / f"{clip}-{form}")
        run.train(BEFORE, AFTER)
        stats = run.optimizer.stats()
        if clip == "project":
            assert any(entry.directions for entry in stats.values()), stats
        assert any(entry.clipped for entry in stats.values()), stats
        for form in ("by_name", "plain"):
            again = resumed(folder / f"{clip}-{form}", 1, form, options)
            again.train(BEFORE, AFTER)
            assert all(map(torch.equal, again.weights(), run.weights())), (clip, form)
            assert again.optimizer.stats() == stats, (clip, form)
        again = resumed(folder / f"{clip}-plain", 1, "plain", options)
        again.optimizer.forget()
        again.train(BEFORE, AFTER)
        assert not all(map(torch.equal, again.weights(), run.weights())), "vectors tell nothing"
    if dist.get_rank() == 0:
        print("resumed bit for bit")
    shutdown()


if __name__ == "__main__":
    main()

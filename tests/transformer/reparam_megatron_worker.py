"""torchrun worker: trains tests/engines/megatron/gpt.py with σReparam and Megatron's Adam, tensor
parallel.

Usage: reparam_megatron_worker.py OUT.json CHECKPOINT…: saves the first, and loads each into a model
of its own.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests import megatron_cpu
from weyl_megatron.engines.shutdown import shutdown

megatron_cpu.install()

from megatron.core import dist_checkpointing  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: E402

from tests.engines.megatron import gpt  # noqa: E402
from weyl_megatron.transformer.reparam import fold, sigma_reparam, sigmas  # noqa: E402


def build(case: dict[str, Any]) -> GPTModel:
    model = GPTModel(
        config=gpt.config_of(case),
        transformer_layer_spec=get_gpt_layer_local_spec(),
        vocab_size=gpt.VOCAB,
        max_sequence_length=gpt.LENGTH,
        share_embeddings_and_output_weights=False,
    )
    with torch.no_grad():
        for name, param in model.named_parameters():
            full = gpt.weight(name, gpt.full_shape(param, name, case))
            param.copy_(gpt.cut(name, full, *gpt.split_of(param, name, case)))
    return model


def loss_of(model: GPTModel, step: int) -> torch.Tensor:
    tokens = torch.randint(
        gpt.VOCAB, (2, gpt.LENGTH + 1), generator=torch.Generator().manual_seed(step)
    )
    positions = torch.arange(gpt.LENGTH).expand(2, -1)
    mask = torch.ones(1, 1, gpt.LENGTH, gpt.LENGTH, dtype=torch.bool).triu(1)
    losses: torch.Tensor = model(tokens[:, :-1], positions, mask, labels=tokens[:, 1:])
    return losses.float().mean()


def restored(case: dict[str, Any], path: Path) -> float:
    """The loss of a model whose every number comes from a checkpoint."""
    model = build(case)
    sigma_reparam(model, exclude=("output_layer",))
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if isinstance(tensor, torch.Tensor):
                tensor.fill_(0.5)
    model.load_state_dict(dist_checkpointing.load(model.sharded_state_dict(metadata={}), str(path)))
    return loss_of(model.eval(), 0).item()


def refusal(model: GPTModel) -> str:
    try:
        sigma_reparam(model, match=("output_layer",))
    except ValueError as error:
        return str(error)
    return ""


def main() -> None:
    out, checkpoints = Path(sys.argv[1]), [Path(path) for path in sys.argv[2:]]
    dist.init_process_group("gloo")
    case = {"tp": dist.get_world_size(), "layers": 2}
    gpt.start(case)
    model = build(case)
    names = sigma_reparam(model, exclude=("output_layer",))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, eps=1e-4)
    losses = []
    for step in range(6):
        loss = loss_of(model, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    found: dict[str, Any] = {"losses": losses, "sigmas": sigmas(model)}
    layers = {name: model.get_submodule(name) for name in names}
    found["gammas"] = {
        name: float(layer.parametrizations.weight[0].gamma.detach())
        for name, layer in layers.items()
    }
    found["exact"] = {
        name: float(
            torch.linalg.matrix_norm(layer.parametrizations.weight.original.detach().double(), 2)
        )
        for name, layer in layers.items()
    }
    found["evaluated"] = loss_of(model.eval(), 0).item()
    if dist.get_rank() == 0:
        checkpoints[0].mkdir()
    dist.barrier()
    dist_checkpointing.save(model.sharded_state_dict(metadata={}), str(checkpoints[0]))
    found["restored"] = {path.name: restored(case, path) for path in checkpoints}
    model.output_layer.gradient_accumulation_fusion = True
    found["refusals"] = [refusal(model)]
    weight, model.output_layer.weight = (
        model.output_layer.weight,
        None,
    )  # as where it is tied to the embedding
    found["refusals"].append(refusal(model))
    model.output_layer.weight, model.output_layer.gradient_accumulation_fusion = weight, False
    fold(model)
    found["folded"] = loss_of(model, 0).item()
    if dist.get_rank() == 0:
        out.write_text(json.dumps(found))
    gpt.stop()
    shutdown()


if __name__ == "__main__":
    main()

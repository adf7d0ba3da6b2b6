"""torchrun worker: what megatron-core's Mamba and Gated DeltaNet pack into in_proj, cut by tensor
parallelism, makes up the parts that they split.

    torchrun --nproc_per_node=2 tests/engines/megatron/packed_worker.py

Their kernels come from packages for CUDA; that these are there is what they are told, and nothing
is computed.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from tests import megatron_cpu
from weyl_megatron.engines.shutdown import shutdown

megatron_cpu.install()

from megatron.core import parallel_state  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from megatron.core.ssm import gated_delta_net, mamba_mixer  # noqa: E402
from megatron.core.tensor_parallel import (  # noqa: E402
    ColumnParallelLinear,
    RowParallelLinear,
    model_parallel_cuda_manual_seed,
)
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from weyl_megatron.engines.megatron.modules import fused_weights  # noqa: E402
from weyl_megatron.layouts.grid import Box, grid_of  # noqa: E402
from weyl_megatron.layouts.tensor_parallel import Sharding  # noqa: E402

HIDDEN = 16


class Norm(nn.Module):
    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__()


def modules() -> dict[str, tuple[Any, dict[str, int]]]:
    """Return both, each with the parts of its in_proj, in rows of the whole weight."""
    mamba_mixer.HAVE_MAMBA_SSM = gated_delta_net.HAVE_FLA = True
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=4,
        use_cpu_initialization=True,
        add_bias_linear=False,
        tensor_model_parallel_size=dist.get_world_size(),
    )
    config.mamba_state_dim, config.mamba_head_dim, config.mamba_num_groups = 6, 4, 2
    config.linear_num_key_heads, config.linear_num_value_heads = 2, 4
    config.linear_key_head_dim, config.linear_value_head_dim = 5, 3
    config.linear_conv_kernel_dim = 2
    groups = ProcessGroupCollection.use_mpu_process_groups()
    layers = {"in_proj": ColumnParallelLinear, "out_proj": RowParallelLinear}
    mamba = mamba_mixer.MambaMixer(
        config, mamba_mixer.MambaMixerSubmodules(**layers), HIDDEN, pg_collection=groups
    )
    delta = gated_delta_net.GatedDeltaNet(
        config,
        gated_delta_net.GatedDeltaNetSubmodules(**layers, out_norm=Norm),
        layer_number=1,
        pg_collection=groups,
    )
    return {
        "mamba": (mamba, {"z": 32, "x": 32, "B": 12, "C": 12, "dt": 8}),
        "delta": (
            delta,
            {"query": 10, "key": 10, "value": 12, "z": 12, "beta": 4, "alpha": 4},
        ),
    }


def check(module: Any, parts: dict[str, int]) -> None:
    """Compare what ranks put into each matrix with their shares of each part, one after another."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    weight = module.in_proj.weight.detach()
    rows = weight.shape[0]
    sharding = Sharding(parallel_state.get_tensor_model_parallel_group(), 0, (rows,) * ranks, rank)
    [fused] = fused_weights([module], {id(module.in_proj.weight): sharding}).values()
    assert dict(zip(fused.labels, fused.sizes, strict=True)) == parts
    box = Box((rank * rows, 0), (rows, HIDDEN))
    grid = grid_of((rows * ranks, HIDDEN), box=box, fused=fused)
    expected = weight.split([size // ranks for size in parts.values()])
    for number, (shape, share) in enumerate(zip(grid.matrices, expected, strict=True)):
        matrix = torch.zeros(shape.rows, shape.cols)
        for block in grid.blocks:
            if block.matrix == number:
                taken = weight[block.grid_row : block.grid_row + block.rows]
                matrix[block.row : block.row + block.rows] = taken
        dist.all_reduce(matrix)
        shares = [torch.empty_like(share) for _ in range(ranks)]
        dist.all_gather(shares, share.contiguous())
        whole: Tensor = torch.cat(shares)
        # Every element is on one rank, so that the sum has its bits.
        assert torch.equal(torch.linalg.svdvals(matrix), torch.linalg.svdvals(whole)), shape
        assert torch.equal(matrix, whole), shape


def main() -> None:
    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=dist.get_world_size())
    model_parallel_cuda_manual_seed(1)
    for module, parts in modules().values():
        check(module, parts)
    print("all agree", flush=True)
    parallel_state.destroy_model_parallel()
    shutdown()


if __name__ == "__main__":
    main()

"""torchrun worker, 3 ranks: σ₁ in several layouts against the whole matrices, and the collectives
counted.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from weyl_megatron.engines.shutdown import shutdown
from weyl_megatron.spectral import Block, MatrixSpec, PowerIteration, Tile, tiles_of_range


def main() -> None:
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    everyone = dist.group.WORLD
    assert everyone is not None
    pair = dist.new_group([0, 1])
    torch.manual_seed(0)
    ragged, banded, alone = torch.randn(11, 7), torch.randn(8, 6), torch.randn(5, 5)

    counted = {"collectives": 0}
    all_reduce = dist.all_reduce

    def count(*args: object, **kwargs: object) -> object:
        counted["collectives"] += 1
        return all_reduce(*args, **kwargs)

    dist.all_reduce = count

    # Matrix 0 flattened over all ranks, the last of which holds nothing; matrix 1 in row bands over
    # a pair; matrix 2 is repeated on every rank.
    edges = [0, 40, ragged.numel(), ragged.numel()]
    start, stop = edges[rank], edges[rank + 1]
    tiles = list(tiles_of_range([Block(0, 0, 0, 11, 7, 0, 0)], 7, start, stop, 0, buffer=0))
    specs = [MatrixSpec("ragged", 11, 7, (everyone,)), MatrixSpec("alone", 5, 5)]
    buffers = [ragged.flatten()[start:stop], alone.flatten()]
    tiles.append(Tile(1, 0, 0, 5, 5, 0, 5, buffer=1))
    matrices = [ragged, alone]
    if rank < 2:
        band = banded[4 * rank : 4 * rank + 4]
        specs.append(MatrixSpec("banded", 8, 6, (pair,)))
        tiles.append(Tile(2, 4 * rank, 0, 4, 6, 0, 6, buffer=2))
        buffers.append(band.flatten())
        matrices.append(banded)
    power = PowerIteration(specs, tiles, iters=30)
    counted["collectives"] = 0
    sigmas = power.sigmas([buffers])[0]
    exact = torch.stack([torch.linalg.matrix_norm(matrix, 2) for matrix in matrices])
    assert torch.allclose(sigmas, exact, rtol=1e-5), (rank, sigmas, exact)
    # Per iteration two over all ranks, whose ranges cut rows, and one over the pair, whose bands do
    # not.
    assert counted["collectives"] == 30 * (3 if rank < 2 else 2), counted

    gathered = [torch.zeros(2) for _ in range(world)]
    dist.all_gather(gathered, sigmas[:2].contiguous())
    assert all(torch.equal(each[0], gathered[0][0]) for each in gathered)
    if rank == 0:
        print("all layouts agree")
    shutdown()


if __name__ == "__main__":
    main()

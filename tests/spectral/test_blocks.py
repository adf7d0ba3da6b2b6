from __future__ import annotations

from typing import Any

import torch

from tests.faults.threads import Group, on_ranks, summing_groups
from weyl_megatron.spectral.blocks import Blocks, MatrixSpec


def test_ranks_keep_the_vectors_of_a_shared_matrix_in_one_dtype_whatever_else_they_have() -> None:
    group: Any = Group([0, 1])  # it stands in for a ProcessGroup

    def kept(rank: int) -> list[torch.dtype]:
        shared = MatrixSpec("embedding", 40, 30, (group,))
        own = [MatrixSpec(f"layer{number}", 4, 9000) for number in range(3)] if rank else []
        batches = [[0], list(range(1, len(own) + 1))]
        blocks = Blocks(
            [shared, *own],
            [],
            (4, 4),
            batches[: 1 + bool(own)],
            False,
            torch.device("cpu"),
            torch.float32,
        )
        return [each.dtype for each in blocks.operands[0].kept]

    with summing_groups():
        of_first, of_second = on_ranks(2, [group], kept)
    assert of_first == [torch.float32] and of_second == [torch.float32, torch.bfloat16]


def test_starting_again_leaves_the_vectors_where_they_were() -> None:
    blocks = Blocks(
        [MatrixSpec("w", 8, 5)], [], (4, 4), [[0]], False, torch.device("cpu"), torch.float32
    )
    kept = blocks.operands[1].kept[0]
    first, address = kept.clone(), kept.data_ptr()
    kept.zero_()
    blocks.restart()
    assert blocks.operands[1].kept[0].data_ptr() == address and torch.equal(kept, first)

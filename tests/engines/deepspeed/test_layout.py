"""What the masters of DeepSpeed's wrappers hold is compared with the model while both are still the
same.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.processes import run_ranks
from weyl_megatron.engines.deepspeed.layout import Masters
from weyl_megatron.layouts.buffers import Parameter, Shard

SHARD = Shard(Parameter("up.weight", (3, 4)), 0, 12, 2)
REFUSED = "ZeRO's partition does not hold the weights of parameter 'up.weight'"


def checked(masters: Masters, weights: Tensor, partition: Tensor) -> None:
    masters.check(weights, partition, SHARD, "ZeRO")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("master", [torch.float32, torch.bfloat16])
def test_masters_may_be_set_to_anything_once_they_were_seen_to_hold_the_weights(
    dtype: torch.dtype, master: torch.dtype
) -> None:
    partition = torch.randn(15, generator=torch.Generator().manual_seed(0)).to(master)
    weights = partition[2:14].to(dtype)
    for change in (
        lambda p: p.flip(0),
        lambda p: p + 1,
        torch.zeros_like,
        lambda p: p * float("nan"),
    ):
        masters, set_by_user = Masters(), partition.clone()
        checked(masters, weights, partition)
        set_by_user[2:14] = change(partition[2:14])  # flipped, it has the same sum
        checked(masters, weights, set_by_user)


def test_another_place_or_size_is_found_at_once() -> None:
    partition = torch.arange(15.0)
    with pytest.raises(ValueError, match=REFUSED):
        checked(Masters(), partition[3:15], partition)
    with pytest.raises(ValueError, match=REFUSED):
        checked(Masters(), partition[2:13], partition)


def test_weights_that_were_changed_in_the_model_alone_are_found() -> None:
    partition, masters = torch.arange(15.0), Masters()
    checked(masters, partition[2:14], partition)
    checked(masters, partition[2:14] + 1, partition + 1)  # a checkpoint is loaded into both
    with pytest.raises(ValueError, match=REFUSED):
        checked(masters, partition[2:14] + 1, partition)


def test_parts_that_autotp_cuts_each_by_itself_are_matrices_of_their_own() -> None:
    pytest.importorskip("deepspeed.module_inject.autotp_config", reason="DeepSpeed before 0.18")
    worker = Path(__file__).with_name("subparameters_worker.py")
    assert run_ranks("deepspeed", worker, 2).count("all agree") == 2

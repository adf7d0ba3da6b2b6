"""NVMe: what DeepSpeed ZeRO-3 keeps in files between steps, and brings back for one sub-group at a
time.

Its partitions are empty then, or hold what is of no use. They are checked as the engine is built
and before its first step, one sub-group in memory at a time. DeepSpeed 0.19 copies the files with a
checkpoint and reads the weights back from them, and nothing else; :func:`restore` has it read the
moments, too, and loads what was never in a file.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...layouts.buffers import Layout
from .layout import Masters, is_here

#: The keys of ZeRO-3's state dict that say how losses are scaled.
_LOSS_SCALE = ("loss_scaler", "dynamic_loss_scale", "overflow")


def is_swapping(wrapper: Any) -> bool:
    """Whether an engine's wrapper keeps sub-groups in files."""
    return bool(getattr(wrapper, "swap_optimizer", False))


def sizes_in_files(wrapper: Any) -> list[int | None]:
    """Return how many elements each sub-group of ZeRO-3 has that is kept in a file, else None."""
    if not is_swapping(wrapper):
        return [None] * len(wrapper.fp16_groups)
    return [
        size if wrapper._swappable_optimizer_subgroup(number) else None
        for number, size in enumerate(wrapper.fp16_partitioned_groups_flat_numel)
    ]


def check_swapped(wrapper: Any, layout: Layout, masters: Masters, *, reads_weights: bool) -> None:
    """Check sub-groups that are in files as those in memory are checked where the layout is read.

    Args:
        wrapper: ZeRO-3's.
        layout: the engine's.
        masters: what the partitions held when they were made.
        reads_weights: whether to read weights of the model that are in files themselves, too.

    Raises:
        ValueError: a partition does not hold the weights that the layout says it holds.
    """
    for number, buffer in enumerate(layout.buffers):
        params = wrapper.fp16_groups[number]
        if buffer.swapped is None and all(map(is_here, params)):
            continue
        with _swapped_in(wrapper, number, is_swapped=buffer.swapped is not None):
            for param, shard in zip(params, buffer.shards, strict=True):
                if reads_weights or is_here(param):
                    weights = _weights_of(param)[: shard.stop - shard.start]
                    masters.check(weights, buffer.tensor, shard, "ZeRO-3")


def _weights_of(param: Any) -> Tensor:
    if is_here(param):
        return param.ds_tensor.detach().view(-1)  # type: ignore[no-any-return]
    read = torch.empty(param.partition_numel(), dtype=param.ds_tensor.dtype)
    param.nvme_swapper.swap_into_buffer(param, read)
    return read


@contextmanager
def _swapped_in(wrapper: Any, number: int, *, is_swapped: bool) -> Iterator[None]:
    """Have a sub-group in memory, unchanged; its gradient stays where it is."""
    if not is_swapped:
        yield
        return
    wrapper._optimizer_states_and_gradient_swap_in(number)
    try:
        yield
    finally:
        wrapper._release_swap_buffers(number)


def restore(engine: Any, load_dir: str, tag: str) -> None:
    """Load what a checkpoint of this rank has beside the files that DeepSpeed is about to copy.

    These are the hyperparameters, counts of steps and power vectors, sub-groups that are too small
    for a file, the loss scale, and that moments are in files.

    Args:
        engine: whose model was just loaded.
        load_dir, tag: of the checkpoint.

    Raises:
        ValueError: it is of another number of data-parallel ranks, its files have other names, or
            it is a universal one.
    """
    wrapper = engine.optimizer
    if engine.load_universal_checkpoint():
        raise ValueError(
            "AdamW2: checkpoint.load_universal got True, it takes False under "
            "offload_optimizer.device 'nvme', where DeepSpeed does not read it."
        )
    ranks, saved_ranks = engine.seq_dp_world_size, engine.loaded_checkpoint_dp_world_size
    if ranks != saved_ranks:
        raise ValueError(
            f"AdamW2: offload_optimizer.device 'nvme' got a checkpoint of {saved_ranks} "
            f"data-parallel ranks, it takes one of {ranks}."
        )
    partitions, in_files = wrapper.fp32_partitioned_groups_flat, sizes_in_files(wrapper)
    swapped = [p for p, size in zip(partitions, in_files, strict=True) if size is not None]
    folder = Path(load_dir, tag, "offloaded_tensors")
    for partition in swapped:
        if not any(folder.glob(f"*/{partition.ds_id}.tensor.swp")):
            raise ValueError(
                "AdamW2: offload_optimizer.device 'nvme' got a checkpoint without a file "
                f"{partition.ds_id}.tensor.swp, it takes one whose process had made as many "
                "parameters before: DeepSpeed names files by their count."
            )
    path = engine._get_zero_ckpt_name(load_dir, tag)
    saved = engine.checkpoint_engine.load(path, map_location="cpu")["optimizer_state_dict"]
    for key in _LOSS_SCALE:
        setattr(wrapper, key, saved[key])
    optimizer, state = wrapper.optimizer, saved["optimizer_state_dict"]
    wrapper._set_fp32_optimizer_param_groups()
    stepped = (tensor for group in optimizer.param_groups for tensor in group["params"])
    for place, tensor in enumerate(stepped):
        if any(tensor is partition for partition in swapped):
            # What the checkpoint itself has of moments that are in files is of no use.
            entry = state["state"].get(place, {})
            entry |= {key: torch.empty_like(tensor) for key in entry if _is_moment(entry[key])}
    optimizer.load_state_dict(state)
    wrapper._clear_fp32_optimizer_param_groups()
    wrapper.optimizer_swapper.purge_state()  # which knows the tensors that were in its state before
    for number, (partition, size) in enumerate(zip(partitions, in_files, strict=True)):
        if size is None:
            partition.data.copy_(saved["fp32_flat_groups"][number].data)
        else:
            _swap_moments(wrapper, number, size)


def _is_moment(value: object) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0


def _swap_moments(wrapper: Any, number: int, size: int) -> None:
    """Have DeepSpeed know that the moments of a sub-group are in files."""
    partition = wrapper.fp32_partitioned_groups_flat[number]
    state = wrapper.optimizer.state.get(partition, {})
    for key, value in state.items():
        if _is_moment(value):
            state[key] = torch.empty(size, dtype=value.dtype)  # it looks at how large they are
    info = wrapper.optimizer_swapper._get_param_swap_info(partition)
    for context in info.tensors[1:]:
        context.release_memory()
